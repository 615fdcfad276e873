// Kernels with one mistake each, which the shim must find: a table of mistakes and of what is said of them. Each runs
// in a process of its own, for what finds it may end the process.
//
// What is found depends on how this program is built: plainly, with AddressSanitizer, with ThreadSanitizer. Tells each
// mistake that was not found; the status is 1 then.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "simt.h"

namespace mla_pass::cuda {
namespace {

using shim::Copies;
using shim::Order;

constexpr int kThreads = 64, kTiles = 5;
constexpr int kSharedBytes = 2 * kThreads * 16;

struct Data {
  std::vector<std::uint16_t> in;
  std::vector<float> out;
};

std::uint16_t* numbers() { return reinterpret_cast<std::uint16_t*>(shared_memory()); }
// Row of eight numbers.
std::uint16_t* row_of(int i) { return numbers() + i * 8; }

// ---- a pipeline of copies, two tiles in flight, in which every thread reads what another has copied. kLeft is how
// many groups of copies may be in flight when a tile is read.
template <int kLeft, bool kArrive, bool kLeave>
void relay(Data& d) {
  const int t = thread().x, partner = kThreads - 1 - t;
  const auto issue = [&](int tile) {
    const int stage = tile % 2;
    if (tile < kTiles) copy_async(row_of(stage * kThreads + t), d.in.data() + (tile * kThreads + t) * 8, 16);
    copy_commit();
  };
  issue(0);
  issue(1);
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    copy_wait<kLeft>();
    if (kArrive) barrier();
    sum += F16::widen(*row_of(tile % 2 * kThreads + partner));
    if (kLeave) barrier();
    issue(tile + 2);
  }
  d.out[static_cast<std::size_t>(t)] = sum;
}

float relayed(const Data& d, int t) {
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    sum += F16::widen(d.in[static_cast<std::size_t>((tile * kThreads + kThreads - 1 - t) * 8)]);
  }
  return sum;
}

// ---- the same numbers by other ways, so that wrong ones show: threads of the right kernels put what `relayed` tells.
// Each of these ways is right where `kPlanted` is false.

void put(Data& d, float x) { d.out[static_cast<std::size_t>(thread().x)] = x; }

// Warp kWriter writes for both.
template <int kWriter, bool kPlanted>
void one_writes(Data& d) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  if (warp() == kWriter) {
    for (int i = lane(); i < kThreads; i += 32) shared[i] = relayed(d, i);
  }
  if (!kPlanted) barrier();
  put(d, shared[thread().x]);
}

// Lanes write the rows that others' ldmatrix reads; where a barrier of the warp is missing, a shuffle is no substitute.
template <bool kPlanted, bool kShuffle>
void lanes_write(Data& d) {
  float* mine = reinterpret_cast<float*>(row_of(thread().x));
  const int other = thread().x ^ 5;
  for (int i = 0; i < 4; ++i) mine[i] = relayed(d, thread().x ^ 5);
  if (kShuffle) shuffle(0, 0);
  if (!kPlanted) warp_barrier();
  std::uint32_t r[4];
  load_matrices(r, row_of(other));
  warp_barrier();
  // Matrix i has the rows of lanes 8 i ...: register i of lane 4 j is word 0 of row 8 i + j.
  const int from = lane() % 8 * 4, matrix = lane() / 8;
  float x = 0;
  for (int i = 0; i < 4; ++i) {
    const float got = shuffle(shim::bits_of<float>(r[i]), from);
    if (i == matrix) x = got;
  }
  put(d, x);
}

// ---- copies

template <bool kPlanted>
void one_copy(Data& d, const void* global, int bytes, bool commit) {
  const int t = thread().x;
  copy_async(row_of(t), global, bytes);
  if (commit) copy_commit();
  copy_wait<0>();
  put(d, F16::widen(row_of(t)[4]) - F16::widen(d.in[static_cast<std::size_t>(t * 8 + 4)]) + relayed(d, t));
}

const std::uint16_t* row_in(const Data& d) { return d.in.data() + thread().x * 8; }

void good_copy(Data& d) { one_copy<false>(d, row_in(d), 16, true); }
void copy_of_too_few(Data& d) { one_copy<true>(d, row_in(d), 8, true); }
void copy_of_too_many(Data& d) { one_copy<true>(d, row_in(d), 17, true); }
void copy_of_less_than_none(Data& d) { one_copy<true>(d, row_in(d), -1, true); }
void copy_not_committed(Data& d) { one_copy<true>(d, row_in(d), 16, false); }
void copy_from_misaligned(Data& d) { one_copy<true>(d, d.in.data() + 4, 16, true); }
void copy_from_behind(Data& d) { one_copy<true>(d, d.in.data() + d.in.size(), 16, true); }
void copy_from_behind_of_none(Data& d) {
  copy_async(row_of(thread().x), d.in.data() + d.in.size(), 0);
  copy_commit();
  copy_wait<0>();
  put(d, F16::widen(*row_of(thread().x)) + relayed(d, thread().x));
}
void copy_to_misaligned(Data& d) { copy_async(numbers() + 4, d.in.data(), 16); }
void copy_to_behind(Data& d) { copy_async(shared_memory() + kSharedBytes, d.in.data(), 16); }
void copy_to_global(Data& d) { copy_async(d.out.data(), d.in.data(), 16); }

// ---- barriers and operations that not all come to

void lanes_skip_barrier(Data&) {
  if (lane() < 16) barrier();
}
void warp_leaves_early(Data&) {
  if (warp() == 1) return;
  barrier();
}
void different_barriers(Data&) {
  if (warp() == 1) {
    barrier();
  } else {
    barrier();
  }
}
void lanes_skip_warp_barrier(Data&) {
  if (lane() % 2 == 0) warp_barrier();
}
void lane_skips_shuffle(Data& d) {
  if (lane() != 7) put(d, shuffle(0.0f, 0));
}
void lanes_differ(Data& d) {
  if (lane() < 8) {
    put(d, shuffle(0.0f, 0));
  } else {
    warp_barrier();
  }
}
void types_differ(Data&) {
  float d[4] = {};
  const std::uint32_t a[4] = {};
  if (lane() == 31) {
    mma<BF16>(d, a, 0, 0);
  } else {
    mma<F16>(d, a, 0, 0);
  }
}
void lines_differ(Data&) {
  if (lane() == 0) {
    shuffle(1, 0);
  } else {
    shuffle(2, 0);
  }
}

// ---- shared memory

void load_misaligned(Data&) {
  std::uint32_t r[4];
  load_matrices(r, numbers() + lane() * 8 + 4);
}
void load_behind(Data&) {
  std::uint32_t r[4];
  load_matrices_transposed(r, shared_memory() + kSharedBytes - 31 * 16 + lane() * 16);
}
void write_behind(Data&) {
  if (thread().x == 0) numbers()[kSharedBytes / 2] = 1;
}
void write_before(Data&) {
  if (thread().x == 0) numbers()[-1] = 1;
}
void read_behind(Data& d) { put(d, F16::widen(numbers()[kSharedBytes / 2 + 1])); }
void read_unwritten(Data& d) { put(d, reinterpret_cast<float*>(shared_memory())[thread().x]); }

// ---- the table

enum Build : unsigned { kPlain = 1, kAddress = 2, kRaces = 4, kAll = kPlain | kAddress | kRaces };

#if defined(__SANITIZE_THREAD__)
constexpr Build kBuild = kRaces;
#elif defined(__SANITIZE_ADDRESS__)
constexpr Build kBuild = kAddress;
#else
constexpr Build kBuild = kPlain;
#endif

enum How : unsigned { kEager = 1, kDeferred = 2, kForward = 4, kBackward = 8, kAnyhow = 15 };

struct Case {
  const char* name;
  void (*kernel)(Data&);
  unsigned builds, how;
  const char* finding;  // null: nothing is wrong
};

constexpr const char* kWrong = "wrong number";
constexpr const char* kRace = "ThreadSanitizer: data race";
constexpr const char* kPoisoned = "AddressSanitizer: use-after-poison";

constexpr Case kCases[] = {
    {"a pipeline", relay<1, true, true>, kAll, kAnyhow, nullptr},
    {"a pipeline that waits for more than it must", relay<0, true, true>, kAll, kAnyhow, nullptr},
    {"one warp writes", one_writes<0, false>, kAll, kAnyhow, nullptr},
    {"the other warp writes", one_writes<1, false>, kAll, kAnyhow, nullptr},
    {"lanes write", lanes_write<false, false>, kAll, kAnyhow, nullptr},
    {"a copy", good_copy, kAll, kAnyhow, nullptr},
    {"a copy of nothing, from behind memory", copy_from_behind_of_none, kAll, kAnyhow, nullptr},

    {"no barrier after a wait", relay<1, false, true>, kAll, kAnyhow, kWrong},
    {"no barrier after a wait", relay<1, false, true>, kRaces, kAnyhow, kRace},
    {"no barrier before a stage is used again", relay<1, true, false>, kAll, kAnyhow, kWrong},
    {"no barrier before a stage is used again", relay<1, true, false>, kRaces, kAnyhow, kRace},
    {"a wait for one group too few", relay<2, true, true>, kAll, kDeferred | kForward | kBackward, kWrong},
    {"no barrier, and the first warp writes", one_writes<0, true>, kAll, kEager | kDeferred | kBackward, kWrong},
    {"no barrier, and the first warp writes", one_writes<0, true>, kRaces, kAnyhow, kRace},
    {"no barrier, and the last warp writes", one_writes<1, true>, kAll, kEager | kDeferred | kForward, kWrong},
    {"no barrier, and the last warp writes", one_writes<1, true>, kRaces, kAnyhow, kRace},
    {"no barrier of the warp", lanes_write<true, false>, kAll, kAnyhow, kWrong},
    {"no barrier of the warp", lanes_write<true, false>, kRaces, kAnyhow, kRace},
    {"a shuffle for a barrier of the warp", lanes_write<true, true>, kRaces, kAnyhow, kRace},

    {"a copy of too few bytes", copy_of_too_few, kAll, kAnyhow, kWrong},
    {"a copy of 17 bytes", copy_of_too_many, kAll, kAnyhow, "is to read 17 bytes; expected 0 to 16"},
    {"a copy of -1 bytes", copy_of_less_than_none, kAll, kAnyhow, "is to read -1 bytes; expected 0 to 16"},
    {"a copy that is not committed", copy_not_committed, kAll, kDeferred | kForward | kBackward, kWrong},
    {"a copy from a misaligned address", copy_from_misaligned, kAll, kAnyhow, "an address that is no multiple of 16"},
    {"a copy from behind memory", copy_from_behind, kAddress, kAnyhow, "AddressSanitizer: heap-buffer-overflow"},
    {"a copy to a misaligned address", copy_to_misaligned, kAll, kAnyhow, "copy_async at "},
    {"a copy to behind shared memory", copy_to_behind, kAll, kAnyhow, "is given byte 2048 of 2048"},
    {"a copy to global memory", copy_to_global, kAll, kAnyhow, "bytes of shared memory; expected 16 bytes in there"},

    {"lanes skip a barrier", lanes_skip_barrier, kAll, kAnyhow, "threads 0-15 wait in barrier at "},
    {"a warp leaves early", warp_leaves_early, kAll, kAnyhow, "threads 32-63 have ended"},
    {"warps wait in different barriers", different_barriers, kAll, kAnyhow, "came to barrier at "},
    {"lanes skip a barrier of the warp", lanes_skip_warp_barrier, kAll, kAnyhow, "wait in warp_barrier at "},
    {"a lane skips a shuffle", lane_skips_shuffle, kAll, kAnyhow, "wait in shuffle at "},
    {"lanes do different things", lanes_differ, kAll, kAnyhow, " while others of threads "},
    {"lanes multiply different types", types_differ, kAll, kAnyhow, "mma<BF16> at "},
    {"lanes shuffle in different lines", lines_differ, kAll, kAnyhow, "wait in shuffle at "},

    {"ldmatrix of a misaligned address", load_misaligned, kAll, kAnyhow, "load_matrices at "},
    {"ldmatrix behind shared memory", load_behind, kAll, kAnyhow, "is given byte 2048 of 2048"},
    {"a write behind shared memory", write_behind, kAll & ~kAddress, kAnyhow, "byte 2048 of 2048 bytes of shared"},
    {"a write behind shared memory", write_behind, kAddress, kAnyhow, kPoisoned},
    {"a write before shared memory", write_before, kAll & ~kAddress, kAnyhow, "byte -2 of 2048 bytes of shared"},
    {"a write before shared memory", write_before, kAddress, kAnyhow, kPoisoned},
    {"a read behind shared memory", read_behind, kAll & ~kAddress, kAnyhow, kWrong},
    {"a read behind shared memory", read_behind, kAddress, kAnyhow, kPoisoned},
    {"a read of what nobody wrote", read_unwritten, kAll, kAnyhow, kWrong},
};

// ---- running one

Data make_data() {
  Data d;
  d.in.resize(kTiles * kThreads * 8);
  for (std::size_t i = 0; i < d.in.size(); ++i) d.in[i] = F16::narrow(static_cast<float>(i * 37 % 101 + 1));
  d.out.assign(kThreads, NAN);
  return d;
}

// What thread i is to give: kernels that give nothing are wrong otherwise.
void check(const Data& d) {
  for (int i = 0; i < kThreads; ++i) {
    const float got = d.out[static_cast<std::size_t>(i)], want = relayed(d, i);
    if (got == want) continue;
    std::printf("%s: %f of thread %d, expected %f\n", kWrong, static_cast<double>(got), i, static_cast<double>(want));
    std::exit(EXIT_FAILURE);
  }
}

[[noreturn]] void run_case(const Case& c, const shim::Options& options) {
  Data d = make_data();
  try {
    shim::launch("kernel", {1, 1, 1}, kThreads, kSharedBytes, [&] { c.kernel(d); }, options);
  } catch (const shim::Fault& fault) {
    std::printf("%s\n", fault.what());
    std::exit(EXIT_FAILURE);
  }
  check(d);
  std::exit(EXIT_SUCCESS);
}

struct Outcome {
  int status;
  std::string said;
};

Outcome run_apart(const Case& c, const shim::Options& options) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    run_case(c, options);
  }
  close(ends[1]);
  Outcome outcome;
  char text[4096];
  for (ssize_t got; (got = read(ends[0], text, sizeof text)) > 0;) {
    outcome.said.append(text, static_cast<std::size_t>(got));
  }
  close(ends[0]);
  waitpid(child, &outcome.status, 0);
  return outcome;
}

bool as_expected(const Case& c, const Outcome& outcome) {
  if (c.finding == nullptr) return outcome.status == 0 && outcome.said.empty();
  return outcome.status != 0 && outcome.said.find(c.finding) != std::string::npos;
}

int run() {
  int count = 0, failures = 0;
  for (const Case& c : kCases) {
    if ((c.builds & kBuild) == 0) continue;
    for (const Copies copies : {Copies::eager, Copies::deferred}) {
      for (const Order order : {Order::forward, Order::backward}) {
        if ((c.how & (copies == Copies::eager ? kEager : kDeferred)) == 0) continue;
        if ((c.how & (order == Order::forward ? kForward : kBackward)) == 0) continue;
        shim::Options options;
        options.copies = copies;
        options.order = order;
        const Outcome outcome = run_apart(c, options);
        ++count;
        if (as_expected(c, outcome)) continue;
        ++failures;
        std::printf("FAILED %s (%s, %s): expected %s, found status %d and: %s\n", c.name,
                    copies == Copies::eager ? "eager" : "deferred", order == Order::forward ? "forward" : "backward",
                    c.finding ? c.finding : "nothing", outcome.status, outcome.said.c_str());
      }
    }
  }
  std::printf("%d cases, %d failures\n", count, failures);
  return failures > 0 || count == 0 ? 1 : 0;
}

}  // namespace
}  // namespace mla_pass::cuda

#if defined(__SANITIZE_THREAD__)
// Otherwise it waits a second at every exit, for threads that go on, and looks up the lines of faults that are planned.
extern "C" const char* __tsan_default_options() { return "atexit_sleep_ms=0:symbolize=0"; }
#endif

int main() { return mla_pass::cuda::run(); }
