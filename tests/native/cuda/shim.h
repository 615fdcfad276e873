// The names of simt.h on a CPU: the very source that nvcc compiles runs under g++, where its mistakes can be seen.
//
// Threads of a CTA are fibers that take turns where they wait for each other. What is undefined on a GPU is made loud
// here: shared memory holds NaN to begin with, a copy that has not been waited for leaves NaN where it will write,
// lanes that do not carry out one operation together are a fault, as are a barrier that some thread never reaches, a
// misaligned or outlying address in shared memory and a write behind its end. ThreadSanitizer takes fibers for threads
// and barriers for what orders them, and so finds races within a CTA, whichever thread happened to come first.
//
// CTAs run one after the other, in the order of their index.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

#include "launch.h"

#define MLA_DEVICE inline
#define MLA_UNROLL

namespace mla_pass::cuda {

struct Place {
  int x, y, z;
};

namespace shim {

// When copies take place: as they are issued, or not before they are waited for. A GPU is free to do either, and code
// that is right is right under both.
enum class Copies { eager, deferred };

// Which of the threads that could go on does: always the first one, or always the last. What one thread must wait for
// another to do is missing in one of the two orders when it does not wait.
enum class Order { forward, backward };

struct Options {
  Copies copies = Copies::deferred;
  Order order = Order::forward;
  int workers = 1;  // threads of the system that CTAs are spread over
};

// What a kernel did wrong, with the place.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Runs `kernel` in every thread of every CTA. `name` is what a fault calls it.
void launch(const char* name, Grid grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel,
            const Options& options);

// ---- what the names below are made of

// A line of a kernel.
struct Where {
  const char* file;
  int line;
};

// Read and written as one: ThreadSanitizer does not see a memcpy or memset that the compiler makes moves of.
using Sixteen = unsigned char __attribute__((vector_size(16), may_alias));

// What the lanes of a warp hand to each other. A lane writes its own entries alone, and reads them alone; in between,
// when all have come, the operation works on all of them.
struct alignas(64) Exchange {
  std::uint32_t word[32];         // shuffle: what a lane has, then what it gets
  int source[32];
  std::uint32_t a[4][32];         // mma: fragments as the PTX ISA lays them out
  std::uint32_t b[2][32];
  float sum[2][32][2];
  Sixteen row[32];                // ldmatrix: the row a lane addresses
  std::uint32_t matrix[4][32];    // and what it gets
};

// What lanes do together; told apart by address.
struct Operation {
  const char* name;
  bool orders_memory;
  void (*work)(Exchange&);
};

extern const Operation kBarrier, kWarpBarrier, kShuffle, kLoadMatrices, kLoadMatricesTransposed, kMmaF16, kMmaBF16;

// A thread of a CTA as a kernel sees it.
struct Thread {
  Place index, block, grid;
  int threads, lane;
  unsigned char* shared;
  Exchange* exchange;  // its warp's
};

// The one that is running, of a thread of the system. Not thread_local, which would look for a constructor at each use;
// and at a fixed place, also in a library that is loaded late, for this is looked at all the time. Atomic in name: to
// ThreadSanitizer, fibers that share a thread's memory are threads.
extern __thread Thread* running __attribute__((tls_model("initial-exec")));
inline Thread* current() { return __atomic_load_n(&running, __ATOMIC_RELAXED); }

// Returns when all threads of the CTA, or of the warp, have called it, and the operation is done.
void meet_cta(const Operation& operation, Where where);
void meet_warp(const Operation& operation, Where where);
// It is a fault if the 16 bytes at p are not all in shared memory or not aligned.
void expect_shared(const void* p, const char* use, Where where);
void copy(void* shared, const void* global, int bytes, Where where);
void commit_copies();
void wait_for_copies(int groups_left);

// Hides from ThreadSanitizer what the shim's own code reads and writes in the name of several threads.
#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};
#else
struct Unseen {
  Unseen() {}  // so that one is not unused
};
#endif

template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

inline std::uint32_t shuffle_word(std::uint32_t word, int source, Where where) {
  const Unseen unseen;
  Exchange& e = *current()->exchange;
  const int lane = current()->lane;
  e.word[lane] = word;
  e.source[lane] = source;
  meet_warp(kShuffle, where);
  return e.word[lane];
}

inline void load_rows(std::uint32_t (&r)[4], const void* row, const Operation& operation, Where where) {
  expect_shared(row, operation.name, where);
  const Sixteen numbers = *static_cast<const Sixteen*>(row);
  const Unseen unseen;
  Exchange& e = *current()->exchange;
  const int lane = current()->lane;
  e.row[lane] = numbers;
  meet_warp(operation, where);
  for (int i = 0; i < 4; ++i) r[i] = e.matrix[i][lane];
}

}  // namespace shim

// The line of a kernel that calls, as default arguments of what it calls.
#define MLA_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline Place thread() { return shim::current()->index; }
inline Place block() { return shim::current()->block; }
inline Place grid() { return shim::current()->grid; }
inline int threads() { return shim::current()->threads; }
inline int lane() { return shim::current()->lane; }
inline int warp() { return shim::current()->index.x / 32; }
inline unsigned char* shared_memory() { return shim::current()->shared; }

// ---- numbers

struct F16 {
  static float widen(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude < 0x400) {
      return shim::bits_of<float>(shim::bits_of<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f) | sign);
    }
    const std::uint32_t rebias = magnitude < 0x7c00 ? (127u - 15u) << 23 : (255u - 31u) << 23;
    return shim::bits_of<float>(((magnitude << 13) + rebias) | sign);
  }
  static std::uint16_t narrow(float x) {
    constexpr std::uint32_t kInfinity = 0x7f800000u, kLeastNormal = (127u - 14u) << 23, kHalf = (127u - 1u) << 23;
    const std::uint32_t bits = shim::bits_of<std::uint32_t>(x), sign = bits >> 16 & 0x8000u;
    std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > kInfinity) return static_cast<std::uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude < kLeastNormal) {
      // A half has subnormals' spacing as its last place: the sum is rounded where they are.
      const float sum = shim::bits_of<float>(magnitude) + 0.5f;
      return static_cast<std::uint16_t>(sign | (shim::bits_of<std::uint32_t>(sum) - kHalf));
    }
    magnitude -= (127u - 15u) << 23;
    const std::uint32_t rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    return static_cast<std::uint16_t>(sign | (rounded < 0x7c00u ? rounded : 0x7c00u));
  }
  static std::uint32_t pack(float low, float high) {
    return narrow(low) | static_cast<std::uint32_t>(narrow(high)) << 16;
  }
};

struct BF16 {
  static float widen(std::uint16_t bits) { return shim::bits_of<float>(static_cast<std::uint32_t>(bits) << 16); }
  static std::uint16_t narrow(float x) {
    const std::uint32_t bits = shim::bits_of<std::uint32_t>(x);
    if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  static std::uint32_t pack(float low, float high) {
    return narrow(low) | static_cast<std::uint32_t>(narrow(high)) << 16;
  }
};

inline float exp2(float x) { return ::exp2f(x); }
inline float log2(float x) { return ::log2f(x); }
inline float tanh(float x) { return ::tanhf(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline float fast_exp2(float x) { return x < -126.0f ? 0.0f : ::exp2f(x); }

template <class T>
constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
constexpr T max(T x, T y) {
  return x < y ? y : x;
}

// As the device's, which prefer a number to a NaN.
inline float min(float x, float y) { return ::fminf(x, y); }
inline float max(float x, float y) { return ::fmaxf(x, y); }

// ---- lanes and warps together

inline void barrier(MLA_CALLER) { shim::meet_cta(shim::kBarrier, {file, line}); }
inline void warp_barrier(MLA_CALLER) { shim::meet_warp(shim::kWarpBarrier, {file, line}); }

inline int shuffle(int x, int from, MLA_CALLER) {
  return static_cast<int>(shim::shuffle_word(static_cast<std::uint32_t>(x), from % 32, {file, line}));
}
inline float shuffle(float x, int from, MLA_CALLER) {
  return shim::bits_of<float>(shim::shuffle_word(shim::bits_of<std::uint32_t>(x), from % 32, {file, line}));
}
inline int shuffle_xor(int x, int mask, MLA_CALLER) { return shuffle(x, lane() ^ mask, file, line); }
inline float shuffle_xor(float x, int mask, MLA_CALLER) { return shuffle(x, lane() ^ mask, file, line); }

inline void atomic_or(std::int32_t* at, std::int32_t bits) { __atomic_fetch_or(at, bits, __ATOMIC_RELAXED); }

template <class T>
inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, MLA_CALLER) {
  static_assert(std::is_same_v<T, F16> || std::is_same_v<T, BF16>);
  const shim::Unseen unseen;
  shim::Exchange& e = *shim::current()->exchange;
  const int lane = shim::current()->lane;
  for (int i = 0; i < 4; ++i) e.a[i][lane] = a[i];
  e.b[0][lane] = b0;
  e.b[1][lane] = b1;
  std::memcpy(e.sum[0][lane], d, sizeof e.sum[0][lane]);
  std::memcpy(e.sum[1][lane], d + 2, sizeof e.sum[1][lane]);
  shim::meet_warp(std::is_same_v<T, F16> ? shim::kMmaF16 : shim::kMmaBF16, {file, line});
  std::memcpy(d, e.sum[0][lane], sizeof e.sum[0][lane]);
  std::memcpy(d + 2, e.sum[1][lane], sizeof e.sum[1][lane]);
}

// ---- shared memory

inline void load_matrices(std::uint32_t (&r)[4], const void* row, MLA_CALLER) {
  shim::load_rows(r, row, shim::kLoadMatrices, {file, line});
}
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row, MLA_CALLER) {
  shim::load_rows(r, row, shim::kLoadMatricesTransposed, {file, line});
}

inline void copy_async(void* shared, const void* global, int bytes, MLA_CALLER) {
  shim::copy(shared, global, bytes, {file, line});
}
inline void copy_commit() { shim::commit_copies(); }
template <int N>
inline void copy_wait() {
  static_assert(N >= 0);
  shim::wait_for_copies(N);
}

#undef MLA_CALLER

}  // namespace mla_pass::cuda
