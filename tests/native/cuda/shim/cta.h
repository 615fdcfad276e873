// A CTA in the making: its memory, its threads and what they wait for. How threads take turns is the crew's concern.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../shim.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace mla_pass::cuda::shim {

// Dynamic shared memory between two guards. It holds NaN of any type to begin with, and so do the guards, so that what
// is read outside shows; what is written outside is found when the CTA ends, or by AddressSanitizer at once.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* data() const { return block_ + kGuard; }
  std::size_t bytes() const { return bytes_; }
  void poison();
  // Bytes from the beginning of the first one that was written outside, 0 where none was.
  std::ptrdiff_t written_outside();

 private:
  static constexpr std::size_t kGuard = 4096;

  void guard(bool closed);

  unsigned char* block_;
  std::size_t bytes_;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Cta;

struct Member : Thread {
  Cta* cta;
  int number;
  std::vector<Copy> copies;         // not yet carried out, oldest first
  std::vector<std::size_t> groups;  // how many of them each group has, oldest first
  std::size_t open;                 // those of no group yet
  const Operation* waits;           // in what, or null
  Where where;
  bool ended;
};

// Threads that wait for each other: a warp's, or all.
struct Meeting {
  int first, count;  // threads
  int arrived;
  const Operation* operation;  // of those who have
  Where where;
  unsigned times;  // that it was complete
  char turn[2];    // whose addresses stand for the order at an even and at an odd one
};

struct Cta {
  Cta(const char* name, Grid grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel,
      const Options& options);
  void begin(Place block);
  void end();

  // What is wrong, after the name of kernel and CTA.
  std::string report(const std::string& what) const;
  // Who waits where.
  std::string whereabouts() const;

  const char* name;
  const std::function<void()>& kernel;
  const Options& options;
  SharedMemory shared;
  std::vector<Exchange> exchanges;
  std::vector<Member> members;
  std::vector<Meeting> warps;
  Meeting all;
  char start, finish;  // whose addresses stand for the order between the CTA's maker and its threads
};

inline Member& self() { return *static_cast<Member*>(current()); }

// Counts the running thread in; true for the last. All must have come to the same line for the same.
bool arrive(Meeting& meeting, const Operation& operation, Where where);

// What comes before the one, in whatever thread, comes before what comes after the other, if they name one address: for
// ThreadSanitizer, which knows of no other order between fibers.
#if defined(__SANITIZE_THREAD__)
inline void order_before(void* address) { __tsan_release(address); }
inline void order_after(void* address) { __tsan_acquire(address); }
#else
inline void order_before(void*) {}
inline void order_after(void*) {}
#endif

// Throws a Fault of the running thread.
[[noreturn]] void fail(const std::string& what);

// Runs the CTA's kernel in all its threads.
void run(Cta& cta);

}  // namespace mla_pass::cuda::shim
