// Sixteen floats: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "numbers_f16c.h"

namespace mla_pass::MLA_PASS_ISA {

struct Vec {
  static constexpr Index width = 16;
  __m512 x;
};

// Of 32 registers: 8 x 3 accumulators, 3 columns, 1 weight.
constexpr Index kSumRows = 8;
constexpr Index kSumColumns = 3;

inline Vec widened(__m256i bits, Half) { return {_mm512_cvtph_ps(bits)}; }

inline Vec widened(__m128i whole, std::int8_t) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(whole))}; }

// Float8 numbers, their bits moved to where a half has them: 2^8 too small, subnormals too.
inline Vec widened(__m128i numbers, Float8) {
  const __m256i bits = _mm256_cvtepu8_epi16(numbers);
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
  const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7f)), 7);
  return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, magnitude)), _mm512_set1_ps(0x1p8f))};
}

inline Vec widened(__m256i bits, Bfloat) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

inline __mmask16 first_lanes(Index count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }

template <class T>
inline Vec load(const T* p) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}

inline Vec load_first(const float* p, Index count) { return {_mm512_maskz_loadu_ps(first_lanes(count), p)}; }

inline Vec load(const std::int8_t* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), *p); }
inline Vec load(const Float8* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), *p); }

template <class T>
inline Vec load_first(const T* p, Index count) {
  return widened(_mm256_maskz_loadu_epi16(first_lanes(count), p), T{});
}

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
inline void store_first(float* p, Vec a, Index count) { _mm512_mask_storeu_ps(p, first_lanes(count), a.x); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }

// 0 where x < limit, else a: a NaN stays one.
inline Vec unless_below(Vec x, Vec limit, Vec a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.x, limit.x, _CMP_NLT_UQ), a.x)};
}

inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// 2^n of whole numbers n in [-126, 127].
inline Vec power_of_two(Vec n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.x)}; }

inline float sum(Vec a) { return _mm512_reduce_add_ps(a.x); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.x); }

// x[row][lane], rows and lanes exchanged.
inline void transpose(Vec (&x)[16]) {
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_ps(x[2 * i].x, x[2 * i + 1].x);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i].x, x[2 * i + 1].x);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int from = i / 2 * 4 + i % 2;
    const __m512d a = _mm512_castps_pd(pairs[from]), b = _mm512_castps_pd(pairs[from + 2]);
    fours[i / 2 * 4 + i % 2 * 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    fours[i / 2 * 4 + i % 2 * 2 + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  // fours[4 i + c] holds, in its 128-bit lane l, column 4 l + c of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    x[c].x = _mm512_shuffle_f32x4(even01, even23, 0x88);
    x[8 + c].x = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    x[4 + c].x = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    x[12 + c].x = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
