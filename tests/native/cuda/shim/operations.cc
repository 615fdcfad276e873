// What the lanes of a warp work out together.
#include "../shim.h"

namespace mla_pass::cuda::shim {
namespace {

// Eight at a time in the compiler's own vectors, whose code is good at every level of optimisation.
using Floats = float __attribute__((vector_size(32)));
using Words = std::uint32_t __attribute__((vector_size(32)));
using Ints = std::int32_t __attribute__((vector_size(32)));
using Halves = std::uint16_t __attribute__((vector_size(16)));

void widen(const Words& numbers, BF16, float* out) {
  const Words bits = numbers << 16;
  std::memcpy(out, &bits, sizeof bits);
}

void widen(const Words& numbers, F16, float* out) {
  const Words sign = (numbers & 0x8000u) << 16, magnitude = numbers & 0x7fffu;
  const Floats subnormal = __builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f;
  const Words rebias = magnitude < 0x7c00u ? Words{} + ((127u - 15u) << 23) : Words{} + ((255u - 31u) << 23);
  const Words normal = (magnitude << 13) + rebias;
  const Words bits = (magnitude < 0x400u ? (Words)subnormal : normal) | sign;
  std::memcpy(out, &bits, sizeof bits);
}

// 8 x 8 numbers of 32 lanes, two a lane: lane 4 r + c has columns 2 c and 2 c + 1 of row r.
template <class T>
void widen_fragment(const std::uint32_t (&fragment)[32], float* out, int step) {
  for (int row = 0; row < 8; ++row) {
    Halves numbers;
    std::memcpy(&numbers, fragment + 4 * row, sizeof numbers);
    widen(__builtin_convertvector(numbers, Words), T{}, out + row * step);
  }
}

// d [16][8] += a [16][16] b [16][8]. The registers of a fragment are 8 x 8 each: of a, rows r and r + 8 of columns up
// to 7, then of the others; of b, whose lanes hold columns, rows up to 7 and the others; of d, rows up to 7 and the
// others.
template <class T>
void multiply(Exchange& e) {
  alignas(32) float a[16][16], columns[8][16], b[16][8];
  for (int i = 0; i < 4; ++i) widen_fragment<T>(e.a[i], &a[i % 2 * 8][i / 2 * 8], 16);
  for (int i = 0; i < 2; ++i) widen_fragment<T>(e.b[i], &columns[0][i * 8], 16);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) b[k][n] = columns[n][k];
  }
  Floats factor[16];
  std::memcpy(factor, b, sizeof factor);
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < 8; ++row) {
      Floats sum;
      float* d = &e.sum[half][4 * row][0];
      std::memcpy(&sum, d, sizeof sum);
      for (int k = 0; k < 16; ++k) sum += a[8 * half + row][k] * factor[k];
      std::memcpy(d, &sum, sizeof sum);
    }
  }
}

void shuffle_words(Exchange& e) {
  std::uint32_t before[32];
  std::memcpy(before, e.word, sizeof before);
  for (int lane = 0; lane < 32; ++lane) e.word[lane] = before[e.source[lane]];
}

// Lanes 8 i to 8 i + 7 address the rows of matrix i.
void spread_rows(Exchange& e) {
  for (int i = 0; i < 4; ++i) std::memcpy(e.matrix[i], &e.row[8 * i], sizeof e.matrix[i]);
}

void spread_columns(Exchange& e) {
  for (int i = 0; i < 4; ++i) {
    std::uint16_t rows[8][8], turned[8][8];
    std::memcpy(rows, &e.row[8 * i], sizeof rows);
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) turned[column][row] = rows[row][column];
    }
    std::memcpy(e.matrix[i], turned, sizeof turned);
  }
}

void nothing(Exchange&) {}

}  // namespace

const Operation kBarrier = {"barrier", true, nothing};
const Operation kWarpBarrier = {"warp_barrier", true, nothing};
const Operation kShuffle = {"shuffle", false, shuffle_words};
const Operation kLoadMatrices = {"load_matrices", false, spread_rows};
const Operation kLoadMatricesTransposed = {"load_matrices_transposed", false, spread_columns};
const Operation kMmaF16 = {"mma<F16>", false, multiply<F16>};
const Operation kMmaBF16 = {"mma<BF16>", false, multiply<BF16>};

}  // namespace mla_pass::cuda::shim
