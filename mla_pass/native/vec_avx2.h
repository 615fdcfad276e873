// Eight floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "numbers_f16c.h"

namespace mla_pass::MLA_PASS_ISA {

struct Vec {
  static constexpr Index width = 8;
  __m256 x;
};

// Of 16 registers: 6 x 2 accumulators, 2 columns, 1 weight.
constexpr Index kSumRows = 6;
constexpr Index kSumColumns = 2;

inline Vec widened(__m128i bits, Half) { return {_mm256_cvtph_ps(bits)}; }

inline Vec widened(__m128i bits, Bfloat) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}

inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }

template <class T>
inline Vec load(const T* p) {
  return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}

inline Vec load(const std::int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

// Float8 numbers, their bits moved to where a half has them: 2^8 too small, subnormals too.
inline Vec load(const Float8* p) {
  const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x80)), 8);
  const __m128i magnitude = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x7f)), 7);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, magnitude)), _mm256_set1_ps(0x1p8f))};
}

inline __m256i first_lanes(Index count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

inline Vec load_first(const float* p, Index count) { return {_mm256_maskload_ps(p, first_lanes(count))}; }

template <class T>
inline Vec load_first(const T* p, Index count) {
  T few[8] = {};
  for (Index i = 0; i < count; ++i) few[i] = p[i];
  return load(few);
}

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
inline void store_first(float* p, Vec a, Index count) { _mm256_maskstore_ps(p, first_lanes(count), a.x); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.x, b.x)}; }

// 0 where x < limit, else a: a NaN stays one.
inline Vec unless_below(Vec x, Vec limit, Vec a) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.x, limit.x, _CMP_NLT_UQ), a.x)};
}

inline Vec round(Vec a) { return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// 2^n of whole numbers n in [-126, 127].
inline Vec power_of_two(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.x), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest(Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// x[row][lane], rows and lanes exchanged.
inline void transpose(Vec (&x)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(x[2 * i].x, x[2 * i + 1].x);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i].x, x[2 * i + 1].x);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2;
    const __m256d a = _mm256_castps_pd(pairs[from]), b = _mm256_castps_pd(pairs[from + 2]);
    fours[i / 2 * 4 + i % 2 * 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    fours[i / 2 * 4 + i % 2 * 2 + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
  // fours[4 i + c] holds, in its 128-bit lane l, column 4 l + c of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c].x = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    x[4 + c].x = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
