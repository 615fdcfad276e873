// exp and tanh of whole vectors, and the small helpers that the kernels use in place of <algorithm>.
//
// Nothing here may come from the standard library: see problem.h.
#pragma once

#include "problem.h"

namespace mla_pass::MLA_PASS_ISA {

constexpr float kInfinity = __builtin_huge_valf();

inline Index least(Index a, Index b) { return a < b ? a : b; }
inline Index greatest(Index a, Index b) { return a > b ? a : b; }

// exp(x) for x <= 88, to 2e-7 of itself; below -87 it is zero.
//
// x = n ln 2 + f with |f| <= 0.347, where seven terms of the series leave f^7 / 5040 = 1.2e-7.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.0f);
  const Vec bounded = max(lowest, x);  // this order lets a NaN through
  const Vec n = round(mul(bounded, splat(1.44269504f)));
  // ln 2 in two parts, the first exact when multiplied with n.
  const Vec f = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), bounded));
  Vec series = splat(1.0f / 720.0f);
  series = fma(series, f, splat(1.0f / 120.0f));
  series = fma(series, f, splat(1.0f / 24.0f));
  series = fma(series, f, splat(1.0f / 6.0f));
  series = fma(series, f, splat(0.5f));
  series = fma(series, f, splat(1.0f));
  series = fma(series, f, splat(1.0f));
  return unless_below(x, lowest, mul(series, power_of_two(n)));
}

// tanh(x) = 1 - 2 / (exp(2x) + 1), to 2e-7 absolute.
inline Vec tanh(Vec x) {
  const Vec twice = min(splat(40.0f), add(x, x));
  return sub(splat(1.0f), div(splat(2.0f), add(exp(twice), splat(1.0f))));
}

inline float dot(const float* a, const float* b, Index count) {
  Vec total = zero();
  Index i = 0;
  for (; i + Vec::width <= count; i += Vec::width) total = fma(load(a + i), load(b + i), total);
  if (i < count) total = fma(load_first(a + i, count - i), load_first(b + i, count - i), total);
  return sum(total);
}

template <class T>
inline void widen(const T* from, float* to, Index count) {
  Index i = 0;
  for (; i + Vec::width <= count; i += Vec::width) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// The numbers of one row of eight bits.
template <class T>
inline void unpack_coded(const T* row, float* to, Index numbers) {
  const Index length = (numbers + kSegments - 1) / kSegments;
  for (Index segment = 0; segment < kSegments; ++segment) {
    const float step = step_of(code_of(row + numbers + segment));
    Index i = least(segment * length, numbers);
    const Index end = least(i + length, numbers);
    for (; i + Vec::width <= end; i += Vec::width) store(to + i, mul(splat(step), load(row + i)));
    for (; i < end; ++i) to[i] = step * to_float(row[i]);
  }
}

// The numbers of one stored row.
inline void unpack(const Stored& from, Index row, float* to) {
  switch (from.as) {
    case Storage::float32:
      return widen(static_cast<const float*>(from.data) + row * from.width, to, from.numbers);
    case Storage::float16:
      return widen(static_cast<const Half*>(from.data) + row * from.width, to, from.numbers);
    case Storage::bfloat16:
      return widen(static_cast<const Bfloat*>(from.data) + row * from.width, to, from.numbers);
    case Storage::int8:
      return unpack_coded(static_cast<const std::int8_t*>(from.data) + row * from.width, to, from.numbers);
    case Storage::float8:
      return unpack_coded(static_cast<const Float8*>(from.data) + row * from.width, to, from.numbers);
  }
}

inline void fill(float* p, Index count, float value) {
  for (Index i = 0; i < count; ++i) p[i] = value;
}

}  // namespace mla_pass::MLA_PASS_ISA
