// What the shim computes: conversions, mma and ldmatrix, against doubles and against the tables of the PTX ISA. What it
// finds wrong is faults.cc's concern.
//
// Tells each case that differs; the program's status is 1 then.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "simt.h"

namespace mla_pass::cuda {
namespace {

int failures = 0;

// Without a string made for each of a million cases that agree.
template <class Describe>
void expect(bool good, const Describe& describe) {
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s\n", describe().c_str());
}

std::string hexadecimal(std::uint32_t bits) {
  char out[16];
  std::snprintf(out, sizeof out, "%#x", static_cast<unsigned>(bits));
  return out;
}

// ---- formats, as IEEE 754 tells them

template <class T>
struct Format;
template <>
struct Format<F16> {
  static constexpr const char* name = "float16";
  static constexpr int fraction = 10, least_exponent = -14, bias = 15, special = 31;
};
template <>
struct Format<BF16> {
  static constexpr const char* name = "bfloat16";
  static constexpr int fraction = 7, least_exponent = -126, bias = 127, special = 255;
};

template <class T>
double value_of(int bits) {
  using F = Format<T>;
  const int places = 1 << F::fraction, fraction = bits % places, exponent = bits % 0x8000 / places;
  double size = exponent == 0 ? std::ldexp(fraction, F::least_exponent - F::fraction)
                              : std::ldexp(places + fraction, exponent - F::bias - F::fraction);
  if (exponent == F::special) {
    size = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  return bits >= 0x8000 ? -size : size;
}

// Nearest, ties to even: nearbyint's rounding.
template <class T>
double rounded(double x) {
  using F = Format<T>;
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), F::least_exponent) - F::fraction;
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  const double bound = std::ldexp(1.0, F::special - F::bias);
  return std::abs(nearest) < bound ? nearest : std::copysign(std::numeric_limits<double>::infinity(), x);
}

bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

template <class T>
void check_narrow(float x) {
  const double got = value_of<T>(T::narrow(x)), want = rounded<T>(x);
  expect(same(got, want), [&] {
    return std::string("narrow to ") + Format<T>::name + " of " + hexadecimal(shim::bits_of<std::uint32_t>(x)) +
           " is " + std::to_string(got) + ", expected " + std::to_string(want);
  });
}

template <class T>
void check_conversions() {
  constexpr int kPatterns = 1 << 16;
  const float infinity = std::numeric_limits<float>::infinity();
  for (int bits = 0; bits < kPatterns; ++bits) {
    const float x = T::widen(static_cast<std::uint16_t>(bits));
    expect(same(x, value_of<T>(bits)), [&] {
      return std::string("widen of ") + Format<T>::name + " " + hexadecimal(static_cast<std::uint32_t>(bits)) +
             " is " + std::to_string(x);
    });
    check_narrow<T>(x);
    // Half way to the number before, in size, and a float's last place on both sides. The bound of what becomes
    // infinity is half way between the largest number and what would come next.
    const double beyond = std::copysign(std::ldexp(1.0, Format<T>::special - Format<T>::bias), x);
    const double before = value_of<T>(bits % 0x8000 > 0 ? bits - 1 : bits);
    const auto middle = static_cast<float>((before + (std::isinf(x) ? beyond : x)) / 2);
    for (const float near : {middle, std::nextafter(middle, infinity), std::nextafter(middle, -infinity)}) {
      check_narrow<T>(near);
    }
  }
  constexpr std::uint64_t kStride = 9973;  // a prime
  for (std::uint64_t bits = 0; bits <= 0xffffffffu; bits += kStride) {
    check_narrow<T>(shim::bits_of<float>(static_cast<std::uint32_t>(bits)));
  }
  expect(T::pack(1.0f, -2.0f) == (T::narrow(1.0f) | static_cast<std::uint32_t>(T::narrow(-2.0f)) << 16),
         [] { return std::string("pack has the first number above the second"); });
}

void check_fast_exp2() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float x : {-infinity, -1000.0f, -126.5f, -126.0f, -1.5f, 0.0f, 0.3f, 10.0f, 200.0f}) {
    const double exact = std::exp2(static_cast<double>(x)), got = fast_exp2(x);
    double want = exact < std::numeric_limits<float>::min() ? 0 : exact;
    if (exact > std::numeric_limits<float>::max()) want = infinity;
    expect(got == want || std::abs(got - want) <= std::ldexp(want, -22),
           [&] { return "fast_exp2 of " + std::to_string(x) + " is " + std::to_string(got); });
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect(std::isnan(fast_exp2(nan)), [] { return std::string("fast_exp2 loses a NaN"); });
}

// ---- fragments, as the figures of the PTX ISA show them ("Matrix Fragments for mma.m16n8k16 with floating point
// type", .f16 and .bf16)

// Of an element: the lane that holds it, and which of the lane's it is. Element e is half e % 2 of register e / 2.
struct Holder {
  int lane, element;
};

// Figure of matrix A: lanes of rows 0 to 7; rows 8 to 15 repeat them, and so do columns 8 to 15.
constexpr int kLanesA[8][8] = {
    {0, 0, 1, 1, 2, 2, 3, 3},         {4, 4, 5, 5, 6, 6, 7, 7},         {8, 8, 9, 9, 10, 10, 11, 11},
    {12, 12, 13, 13, 14, 14, 15, 15}, {16, 16, 17, 17, 18, 18, 19, 19}, {20, 20, 21, 21, 22, 22, 23, 23},
    {24, 24, 25, 25, 26, 26, 27, 27}, {28, 28, 29, 29, 30, 30, 31, 31},
};
// Which of a0 to a7: in rows 0 to 7, then in rows 8 to 15.
constexpr int kElementsA[2][16] = {
    {0, 1, 0, 1, 0, 1, 0, 1, 4, 5, 4, 5, 4, 5, 4, 5},
    {2, 3, 2, 3, 2, 3, 2, 3, 6, 7, 6, 7, 6, 7, 6, 7},
};

// Figure of matrix B, 16 rows of 8 columns.
constexpr int kLanesB[16][8] = {
    {0, 4, 8, 12, 16, 20, 24, 28}, {0, 4, 8, 12, 16, 20, 24, 28}, {1, 5, 9, 13, 17, 21, 25, 29},
    {1, 5, 9, 13, 17, 21, 25, 29}, {2, 6, 10, 14, 18, 22, 26, 30}, {2, 6, 10, 14, 18, 22, 26, 30},
    {3, 7, 11, 15, 19, 23, 27, 31}, {3, 7, 11, 15, 19, 23, 27, 31}, {0, 4, 8, 12, 16, 20, 24, 28},
    {0, 4, 8, 12, 16, 20, 24, 28}, {1, 5, 9, 13, 17, 21, 25, 29}, {1, 5, 9, 13, 17, 21, 25, 29},
    {2, 6, 10, 14, 18, 22, 26, 30}, {2, 6, 10, 14, 18, 22, 26, 30}, {3, 7, 11, 15, 19, 23, 27, 31},
    {3, 7, 11, 15, 19, 23, 27, 31},
};
// Which of b0 to b3, of each row.
constexpr int kElementsB[16] = {0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3};

// Figure of matrices C and D: lanes of rows 0 to 7, which rows 8 to 15 repeat; which of c0 to c3.
constexpr int kLanesC[8][8] = {
    {0, 0, 1, 1, 2, 2, 3, 3},         {4, 4, 5, 5, 6, 6, 7, 7},         {8, 8, 9, 9, 10, 10, 11, 11},
    {12, 12, 13, 13, 14, 14, 15, 15}, {16, 16, 17, 17, 18, 18, 19, 19}, {20, 20, 21, 21, 22, 22, 23, 23},
    {24, 24, 25, 25, 26, 26, 27, 27}, {28, 28, 29, 29, 30, 30, 31, 31},
};
constexpr int kElementsC[2][8] = {{0, 1, 0, 1, 0, 1, 0, 1}, {2, 3, 2, 3, 2, 3, 2, 3}};

Holder holder_a(int row, int column) { return {kLanesA[row % 8][column % 8], kElementsA[row / 8][column]}; }
Holder holder_b(int row, int column) { return {kLanesB[row][column], kElementsB[row]}; }
Holder holder_c(int row, int column) { return {kLanesC[row % 8][column], kElementsC[row / 8][column]}; }

struct Fragments {
  std::uint16_t a[32][8], b[32][4];
  float c[32][4];
};

template <class T>
void run_mma(Fragments& f) {
  const auto kernel = [&] {
    std::uint32_t a[4], b[2];
    std::memcpy(a, f.a[lane()], sizeof a);
    std::memcpy(b, f.b[lane()], sizeof b);
    mma<T>(f.c[lane()], a, b[0], b[1]);
  };
  shim::launch("mma", {1, 1, 1}, 32, 0, kernel, {});
}

// Whole numbers, whose products and sums are exact.
template <class T>
void check_mma_layout() {
  std::mt19937 random(1);
  const auto draw = [&] { return static_cast<int>(random() % 15) - 7; };
  for (int round = 0; round < 20; ++round) {
    int a[16][16], b[16][8], c[16][8];
    Fragments f;
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 16; ++column) {
        const Holder h = holder_a(row, column);
        f.a[h.lane][h.element] = T::narrow(static_cast<float>(a[row][column] = draw()));
      }
      for (int column = 0; column < 8; ++column) {
        const Holder left = holder_b(row, column), sum = holder_c(row, column);
        f.b[left.lane][left.element] = T::narrow(static_cast<float>(b[row][column] = draw()));
        f.c[sum.lane][sum.element] = static_cast<float>(c[row][column] = draw());
      }
    }
    run_mma<T>(f);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        int want = c[row][column];
        for (int k = 0; k < 16; ++k) want += a[row][k] * b[k][column];
        const Holder h = holder_c(row, column);
        expect(f.c[h.lane][h.element] == static_cast<float>(want), [&] {
          return std::string("mma of ") + Format<T>::name + ": row " + std::to_string(row) + ", column " +
                 std::to_string(column) + " is " + std::to_string(f.c[h.lane][h.element]) + ", expected " +
                 std::to_string(want);
        });
      }
    }
  }
}

// Whether an mma took a number of the model's type for what it is. A sum that began with +0 has no -0.
template <class T>
void expect_taken(int bits, const Fragments& f, const Holder& h, const char* side) {
  const double got = f.c[h.lane][h.element], want = value_of<T>(bits);
  expect(same(got, want) || (got == 0 && want == 0), [&] {
    return std::string("mma takes ") + Format<T>::name + " " + hexadecimal(static_cast<std::uint32_t>(bits)) +
           " at the " + side + " for " + std::to_string(got);
  });
}

// Every number times one, at the left in column k, 16 at a time, and at the right in row k, 8 at a time.
template <class T>
void check_mma_numbers() {
  const std::uint16_t one = T::narrow(1.0f);
  const auto put_a = [](Fragments& f, int row, int k, int bits) {
    const Holder h = holder_a(row, k);
    f.a[h.lane][h.element] = static_cast<std::uint16_t>(bits);
  };
  const auto put_b = [](Fragments& f, int k, int column, int bits) {
    const Holder h = holder_b(k, column);
    f.b[h.lane][h.element] = static_cast<std::uint16_t>(bits);
  };
  for (int first = 0; first < 1 << 16; first += 16) {
    const int k = first / 16 % 16;
    Fragments f{};
    for (int i = 0; i < 16; ++i) put_a(f, i, k, first + i);
    for (int i = 0; i < 8; ++i) put_b(f, k, i, one);
    run_mma<T>(f);
    for (int i = 0; i < 16; ++i) expect_taken<T>(first + i, f, holder_c(i, k % 8), "left");
  }
  for (int first = 0; first < 1 << 16; first += 8) {
    const int k = first / 8 % 16;
    Fragments f{};
    for (int i = 0; i < 16; ++i) put_a(f, i, k, one);
    for (int i = 0; i < 8; ++i) put_b(f, k, i, first + i);
    run_mma<T>(f);
    for (int i = 0; i < 8; ++i) expect_taken<T>(first + i, f, holder_c(k, i), "right");
  }
}

// ---- ldmatrix: of each 8 x 8 matrix, the lane that gets an element, as the figure of the PTX ISA shows it, and its
// half of the register. Transposed: who gets element (column, row).

constexpr int kLanesMatrix[8][8] = {
    {0, 0, 1, 1, 2, 2, 3, 3},         {4, 4, 5, 5, 6, 6, 7, 7},         {8, 8, 9, 9, 10, 10, 11, 11},
    {12, 12, 13, 13, 14, 14, 15, 15}, {16, 16, 17, 17, 18, 18, 19, 19}, {20, 20, 21, 21, 22, 22, 23, 23},
    {24, 24, 25, 25, 26, 26, 27, 27}, {28, 28, 29, 29, 30, 30, 31, 31},
};
constexpr int kHalfMatrix[8] = {0, 1, 0, 1, 0, 1, 0, 1};

void check_load_matrices() {
  constexpr int kStep = 24;  // numbers between rows: more than a row has
  std::uint16_t got[2][32][4][2];
  // Rows lie in an order of their own: what address a lane gives must count, not where its neighbours' rows are.
  const auto place = [](int row) { return (row * 7 + 3) % 32 * kStep; };
  const auto kernel = [&] {
    auto* shared = reinterpret_cast<std::uint16_t*>(shared_memory());
    const int row = lane();
    for (int i = 0; i < 8; ++i) shared[place(row) + i] = static_cast<std::uint16_t>(row * 8 + i);
    warp_barrier();
    std::uint32_t r[4];
    load_matrices(r, shared + place(row));
    std::memcpy(got[0][row], r, sizeof r);
    load_matrices_transposed(r, shared + place(row));
    std::memcpy(got[1][row], r, sizeof r);
  };
  shim::launch("load_matrices", {1, 1, 1}, 32, 32 * kStep * 2, kernel, {});
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        const int number = matrix * 64 + row * 8 + column;
        const int plain = got[0][kLanesMatrix[row][column]][matrix][kHalfMatrix[column]];
        const int turned = got[1][kLanesMatrix[column][row]][matrix][kHalfMatrix[row]];
        expect(plain == number && turned == number, [&] {
          return "load_matrices: matrix " + std::to_string(matrix) + ", row " + std::to_string(row) + ", column " +
                 std::to_string(column) + " is " + std::to_string(plain) + ", transposed " + std::to_string(turned) +
                 ", expected " + std::to_string(number);
        });
      }
    }
  }
}

// ---- shuffles, places, several threads

void check_shuffles() {
  float from_five[64], across[64];
  int around[64], wrapped[64];
  const auto kernel = [&] {
    const int i = thread().x;
    from_five[i] = shuffle(static_cast<float>(i), 5);
    across[i] = shuffle_xor(static_cast<float>(i), 16);
    around[i] = shuffle(i, (lane() + 1) % 32);
    wrapped[i] = shuffle_xor(-i, 1);
  };
  shim::launch("shuffles", {1, 1, 1}, 64, 0, kernel, {});
  for (int i = 0; i < 64; ++i) {
    const int base = i / 32 * 32;
    const bool floats = from_five[i] == static_cast<float>(base + 5) &&
                        across[i] == static_cast<float>(i < base + 16 ? i + 16 : i - 16);
    const bool ints = around[i] == (i == base + 31 ? base : i + 1) && wrapped[i] == (i % 2 == 0 ? -i - 1 : -i + 1);
    expect(floats && ints, [&] { return "shuffles of thread " + std::to_string(i); });
  }
}

void check_places(int workers) {
  constexpr int kThreads = 96;
  std::vector<int> met(2 * 3 * 4 * kThreads);
  const auto kernel = [&] {
    const Place t = thread(), b = block(), g = grid();
    const bool shape = g.x == 2 && g.y == 3 && g.z == 4 && threads() == kThreads;
    const bool own = t.x == warp() * 32 + lane() && t.y == 0 && t.z == 0;
    if (shape && own) ++met[static_cast<std::size_t>(((b.z * 3 + b.y) * 2 + b.x) * kThreads + t.x)];
  };
  shim::Options options;
  options.workers = workers;
  shim::launch("places", {2, 3, 4}, kThreads, 0, kernel, options);
  for (std::size_t i = 0; i < met.size(); ++i) {
    expect(met[i] == 1, [&] {
      return "thread " + std::to_string(i) + " of the grid ran " + std::to_string(met[i]) + " times";
    });
  }
}

int run() {
  check_conversions<F16>();
  check_conversions<BF16>();
  check_fast_exp2();
  check_mma_layout<F16>();
  check_mma_layout<BF16>();
  check_mma_numbers<F16>();
  check_mma_numbers<BF16>();
  check_load_matrices();
  check_shuffles();
  check_places(1);
  check_places(3);
  std::printf("%d failures\n", failures);
  return failures > 0 ? 1 : 0;
}

}  // namespace
}  // namespace mla_pass::cuda

int main() { return mla_pass::cuda::run(); }
