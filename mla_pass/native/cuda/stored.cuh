// Numbers of a cached row, out of the bytes that hold them: see Storage in ../problem.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"
#include "simt.h"

namespace mla_pass::cuda {

constexpr int kSegments = 4;  // of a row of 8 bits, each with a code of its own behind the numbers

MLA_DEVICE float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// 2^(code / 8) of codes from -128 to 127, to the last bit as the CPU kernels have it.
MLA_DEVICE float step_of(int code) {
  const unsigned shifted = static_cast<unsigned>(code + 128);
  const bool odd = shifted & 1, second = shifted & 2;
  const float low = second ? (odd ? 1.29683955f : 1.18920712f) : (odd ? 1.09050773f : 1.0f);
  const float high = second ? (odd ? 1.83400809f : 1.68179283f) : (odd ? 1.54221083f : 1.41421356f);
  return (shifted & 4 ? high : low) * float_of((shifted / 8 + 127 - 16) << 23);
}

// A float8 E4M3: its magnitude's bits are those of a float32 whose exponent is 120 less.
MLA_DEVICE float from_float8(std::uint32_t bits) {
  return float_of(((bits & 0x7fu) << 20) | (bits & 0x80u) << 24) * 0x1p120f;
}

// A q of 8 bits.
MLA_DEVICE float from_eight(Stored as, unsigned char bits) {
  return as == Stored::int8 ? static_cast<float>(static_cast<signed char>(bits)) : from_float8(bits);
}

MLA_DEVICE int segment_length(int numbers) { return numbers <= kSegments ? 1 : (numbers + kSegments - 1) / kSegments; }

// What the q of a segment are multiplied by.
MLA_DEVICE float segment_step(const Part& part, const unsigned char* row, int segment) {
  const unsigned char code = row[part.numbers + segment];
  return step_of(part.as == Stored::int8 ? static_cast<signed char>(code) : code - 128);
}

// Number i of a row of a model of type T.
template <class T>
MLA_DEVICE float stored_number(const Part& part, const unsigned char* row, int i) {
  if (part.as == Stored::model) return T::widen(reinterpret_cast<const std::uint16_t*>(row)[i]);
  return from_eight(part.as, row[i]) * segment_step(part, row, i / segment_length(part.numbers));
}

}  // namespace mla_pass::cuda
