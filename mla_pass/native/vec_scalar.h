// Four floats in the compiler's own vector type: SSE2 on x86-64, NEON on AArch64, scalar code elsewhere.
#pragma once

#include "numbers.h"

namespace mla_pass::MLA_PASS_ISA {

typedef float Float4 __attribute__((vector_size(16)));
typedef std::int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr Index width = 4;
  Float4 x;
};

// Of 16 registers (32 on AArch64): 4 x 2 accumulators, 2 columns, 1 weight.
constexpr Index kSumRows = 4;
constexpr Index kSumColumns = 2;

// Exact, subnormals included: the magnitude's bits, moved to where float32 has them, are off by 2^112, and one
// product puts that right.
inline float to_float(Half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  std::uint32_t bits = magnitude << 13;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  out *= 0x1p112f;
  __builtin_memcpy(&bits, &out, sizeof bits);
  if (magnitude >= 0x7c00u) bits = (magnitude << 13) | 0x7f800000u;
  bits |= sign;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// Round to nearest, ties to even. Adding a power of two whose last place is a half's last place at that size rounds in
// the adder; a NaN and what is too large for a half are told apart before.
inline void narrow(float x, Half* out) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) {  // 65536 and more
    out->bits = static_cast<std::uint16_t>(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
    return;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  std::uint32_t exponent = bits & 0x7f800000u;
  if (exponent < 0x38800000u) exponent = 0x38800000u;  // below 2^-14 the last place stays where it is
  const std::uint32_t base_bits = exponent + (13u << 23);
  float base;
  __builtin_memcpy(&base, &base_bits, sizeof base);
  const float rounded = (magnitude + base) - base;
  // Exact now: scale to where a half's bits line up with a float's.
  const float scaled = rounded * 0x1p-112f;
  std::uint32_t half;
  __builtin_memcpy(&half, &scaled, sizeof half);
  out->bits = static_cast<std::uint16_t>(sign | (half >> 13));
}

inline Vec splat(float x) { return {Float4{x, x, x, x}}; }
inline Vec zero() { return splat(0.0f); }

template <class T>
inline Vec load(const T* p) {
  return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}

inline Vec load(const float* p) {
  Vec out;
  __builtin_memcpy(&out.x, p, sizeof out.x);
  return out;
}

template <class T>
inline Vec load_first(const T* p, Index count) {
  Vec out = zero();
  for (Index i = 0; i < count; ++i) out.x[i] = to_float(p[i]);
  return out;
}

inline void store(float* p, Vec a) { __builtin_memcpy(p, &a.x, sizeof a.x); }
inline void store_first(float* p, Vec a, Index count) {
  for (Index i = 0; i < count; ++i) p[i] = a.x[i];
}
inline Vec add(Vec a, Vec b) { return {a.x + b.x}; }
inline Vec sub(Vec a, Vec b) { return {a.x - b.x}; }
inline Vec mul(Vec a, Vec b) { return {a.x * b.x}; }
inline Vec div(Vec a, Vec b) { return {a.x / b.x}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.x * b.x + c.x}; }
inline Vec max(Vec a, Vec b) { return {a.x > b.x ? a.x : b.x}; }
inline Vec min(Vec a, Vec b) { return {a.x < b.x ? a.x : b.x}; }
// 0 where x < limit, else a: a NaN stays one.
inline Vec unless_below(Vec x, Vec limit, Vec a) { return {x.x < limit.x ? Float4{} : a.x}; }

inline Vec round(Vec a) {
  // Adding 1.5 * 2^23 pushes the fraction out; good for |a| < 2^22, and exp asks for less than 2^8.
  const Float4 magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
  return {(a.x + magic) - magic};
}

// 2^n of whole numbers n in [-126, 127].
inline Vec power_of_two(Vec n) {
  const Int4 bits = (__builtin_convertvector(n.x, Int4) + 127) << 23;
  Vec out;
  __builtin_memcpy(&out.x, &bits, sizeof bits);
  return out;
}

inline float sum(Vec a) { return (a.x[0] + a.x[2]) + (a.x[1] + a.x[3]); }

inline float largest(Vec a) {
  const float x = a.x[0] > a.x[1] ? a.x[0] : a.x[1], y = a.x[2] > a.x[3] ? a.x[2] : a.x[3];
  return x > y ? x : y;
}

// x[row][lane], rows and lanes exchanged.
inline void transpose(Vec (&x)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float above = x[j].x[i];
      x[j].x[i] = x[i].x[j];
      x[i].x[j] = above;
    }
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
