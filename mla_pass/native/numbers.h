// Single numbers to float32 and back, where no instruction set has a better way. Included by the vectors: see problem.h.
#pragma once

#include "problem.h"

namespace mla_pass::MLA_PASS_ISA {

inline float to_float(float x) { return x; }
inline float to_float(std::int8_t x) { return static_cast<float>(x); }

// Without subnormals on the way, which a thread may be set to take for zeros.
inline float to_float(Float8 x) {
  const std::uint32_t magnitude = x.bits & 0x7fu, bits = (magnitude << 20) + (120u << 23);
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  if (magnitude < 8) out = static_cast<float>(magnitude) * 0x1p-9f;
  return x.bits & 0x80u ? -out : out;
}

// 2^(code / kOctave) of codes from -128 to 127.
inline float step_of(int code) {
  constexpr float part[kOctave] = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                                   1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
  const unsigned shifted = static_cast<unsigned>(code + 16 * kOctave);  // from zero, so that it splits as it should
  const std::uint32_t bits = (shifted / kOctave + 127u - 16u) << 23;
  float octave;
  __builtin_memcpy(&octave, &bits, sizeof octave);
  return part[shifted % kOctave] * octave;
}

inline float to_float(Bfloat x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

inline void narrow(float x, float* out) { *out = x; }

// Round to nearest, ties to even; a NaN stays one.
inline void narrow(float x, Bfloat* out) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<std::uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace mla_pass::MLA_PASS_ISA
