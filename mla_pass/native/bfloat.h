// Rows of bfloat16 numbers as AVX-512 moves them.
#pragma once

#include "maths.h"

namespace mla_pass::MLA_PASS_ISA {

// Of the 16, or 32, lanes from c on, those below `count`.
inline __mmask16 lanes_below(Index count, Index c) {
  return count - c >= 16 ? 0xffff : count > c ? first_lanes(count - c) : 0;
}
inline __mmask32 wide_lanes_below(Index count, Index c) {
  return count - c >= 32 ? ~0u : count > c ? (1u << (count - c)) - 1u : 0u;
}

// [number] dwords: numbers [0, count) of two rows side by side, the first row's in the low half. Writes zeros up to
// whole vectors of 32.
inline void interleave(const std::uint16_t* a, const std::uint16_t* b, Index count, std::uint32_t* to) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (Index c = 0; c < count; c += 32) {
    const __mmask32 lanes = wide_lanes_below(count, c);
    const __m512i x = _mm512_maskz_loadu_epi16(lanes, a + c), y = _mm512_maskz_loadu_epi16(lanes, b + c);
    const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
    _mm512_storeu_si512(to + c, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(to + c + 16, _mm512_permutex2var_epi64(low, second, high));
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
