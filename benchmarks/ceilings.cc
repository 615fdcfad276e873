// What one thread of this machine can do at most, by the thread's CPU time: multiply-adds a second in registers, of
// float32 and of pairs of bfloat16 numbers, and bytes a second read from memory. Compile as a shared library with -O3
// -march=native.
#include <cstdint>
#include <ctime>
#include <vector>

#include "lanes.h"

namespace {

typedef std::int64_t Words __attribute__((vector_size(kBytes)));

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

// Twelve chains hide the latency of two units, five cycles deep at most. A few milliseconds: short enough to stand
// between the calls that it is compared with, for the clock of a shared machine is not constant.
extern "C" double multiply_adds() {
  constexpr int kChains = 12;
  constexpr long kRounds = 500000;
  Lanes x[kChains] = {}, a = Lanes{} + 0.999f, b = Lanes{} + 0.001f;
  const double start = now();
  for (long i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      x[j] = x[j] * a + b;
      asm volatile("" : "+x"(x[j]));
    }
  }
  const double taken = now() - start;
  return static_cast<double>(kRounds) * kChains * kLanes / taken;
}

// The same of pairs of bfloat16 numbers, two multiply-adds a lane; 0 where there are none.
extern "C" double pair_multiply_adds() {
#if defined(__AVX512BF16__)
  constexpr int kChains = 12;
  constexpr long kRounds = 500000;
  Lanes x[kChains] = {}, a = {}, b = {};
  const double start = now();
  for (long i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) asm volatile("vdpbf16ps %1, %2, %0" : "+v"(x[j]) : "v"(a), "v"(b));
  }
  const double taken = now() - start;
  return 2.0 * static_cast<double>(kRounds) * kChains * kLanes / taken;
#else
  return 0;
#endif
}

extern "C" double bytes_read() {
  std::vector<Words> memory((std::size_t{256} << 20) / sizeof(Words), Words{} + 1);
  Words sum[8] = {};
  const double start = now();
  constexpr int kPasses = 4;
  for (int pass = 0; pass < kPasses; ++pass) {
    for (std::size_t i = 0; i + 8 <= memory.size(); i += 8) {
#pragma GCC unroll 8
      for (std::size_t j = 0; j < 8; ++j) sum[j] ^= memory[i + j];
    }
    asm volatile("" : : "m"(sum));
  }
  return static_cast<double>(kPasses) * static_cast<double>(memory.size() * sizeof(Words)) / (now() - start);
}
