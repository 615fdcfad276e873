// AVX512-BF16 and AMX as AVX-512 code, read before the kernels of both (MLA_PASS_EMULATE): so the native tests run
// them on processors that have neither. Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual,
// VCVTNEPS2BF16, VDPBF16PS, TDPBF16PS.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {
namespace {

// Round to nearest, ties to even; a NaN stays one, denormals are zero.
inline __m256i narrowed(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0x1p-126f), _CMP_LT_OQ);
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x8000));
  const __m512i number = _mm512_mask_mov_epi32(rounded, small, sign);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(number, nan, quiet));
}

inline __m512i narrowed(__m512 high, __m512 low) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(low)), narrowed(high), 1);
}

inline __m512 even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline __m512 odd(__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-0x10000))); }

inline __m512 pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(even(a), even(b), _mm512_fmadd_ps(odd(a), odd(b), sum));
}

constexpr int kRows = 16, kBytes = 64;

// Tiles of full size, as all of ours are.
struct Tile {
  unsigned char row[kRows][kBytes];
};

inline Tile& tile(int number) {
  static thread_local Tile tiles[8];
  return tiles[number];
}

inline void load(int number, const void* from, std::ptrdiff_t step) {
  for (int i = 0; i < kRows; ++i) std::memcpy(tile(number).row[i], static_cast<const char*>(from) + i * step, kBytes);
}

inline void store(int number, void* to, std::ptrdiff_t step) {
  for (int i = 0; i < kRows; ++i) std::memcpy(static_cast<char*>(to) + i * step, tile(number).row[i], kBytes);
}

inline void zero(int number) { tile(number) = Tile{}; }

// sum[i] += a[i][k] b[k], pairs k.
inline void products(int sum, int a, int b) {
  for (int i = 0; i < kRows; ++i) {
    __m512 total = _mm512_loadu_ps(tile(sum).row[i]);
    for (int k = 0; k < kRows; ++k) {
      std::int32_t pair;
      std::memcpy(&pair, tile(a).row[i] + 4 * k, sizeof pair);
      total = pairs(total, _mm512_set1_epi32(pair), _mm512_loadu_si512(tile(b).row[k]));
    }
    _mm512_storeu_ps(tile(sum).row[i], total);
  }
}

}  // namespace
}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _mm512_cvtneps_pbh(x) emulated::narrowed(x)
#define _mm512_cvtne2ps_pbh(high, low) emulated::narrowed(high, low)
#define _mm512_dpbf16_ps(sum, a, b) emulated::pairs(sum, (__m512i)(a), (__m512i)(b))
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_loadd(number, from, step) emulated::load(number, from, step)
#define _tile_stored(number, to, step) emulated::store(number, to, step)
#define _tile_zero(number) emulated::zero(number)
#define _tile_dpbf16ps(sum, a, b) emulated::products(sum, a, b)
