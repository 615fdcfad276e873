// Turning decoded keys: cached rows lie in the lanes, a pair of dims at a time.
#pragma once

#include "maths.h"

namespace mla_pass::MLA_PASS_ISA {

// What pair `pair` of keys [first, first + count) is multiplied with, up to an angle of `origin` rows:
// exp(j theta (block's first row - origin)) (A0 + A1 offset), in blocks of `block` rows. The angle's table is read at
// the distance.
template <class T>
inline void make_turn(const Problem<T>& p, Index pair, Index block, Index first, Index origin, Index count, float* re,
                      float* im) {
  const float *a0 = p.fit + pair * 2, *a1 = a0 + p.size.pairs * 2;
  for (Index key = 0; key < count;) {
    const Index begin = (first + key) / block * block, end = least(count, begin + block - first);
    const Index at = (begin < origin ? origin - begin : begin - origin) * p.size.angles + p.band_index[pair];
    const float c = p.cos[at], s = begin < origin ? -p.sin[at] : p.sin[at];
    const float re0 = c * a0[0] - s * a0[1], im0 = c * a0[1] + s * a0[0];
    const float re1 = c * a1[0] - s * a1[1], im1 = c * a1[1] + s * a1[0];
    for (; key < end; ++key) {
      const float offset = static_cast<float>(first + key - begin);
      re[key] = re0 + offset * re1;
      im[key] = im0 + offset * im1;
    }
  }
}

// (re + mean_re + j (im + mean_im)) *= cos + j sin, up to whole vectors.
inline void turn_pair(float* re, float* im, float mean_re, float mean_im, const float* cos, const float* sin,
                      Index keys) {
  const Vec mx = splat(mean_re), my = splat(mean_im);
  for (Index key = 0; key < keys; key += Vec::width) {
    const Vec x = add(load(re + key), mx), y = add(load(im + key), my);
    const Vec c = load(cos + key), s = load(sin + key);
    store(re + key, sub(mul(x, c), mul(y, s)));
    store(im + key, fma(x, s, mul(y, c)));
  }
}

// to = x (c + j s), up to whole vectors.
inline void turn_all(const float* re, const float* im, float c, float s, Index count, float* to_re, float* to_im) {
  const Vec cos = splat(c), sin = splat(s);
  for (Index i = 0; i < count; i += Vec::width) {
    const Vec x = load(re + i), y = load(im + i);
    store(to_re + i, sub(mul(x, cos), mul(y, sin)));
    store(to_im + i, fma(x, sin, mul(y, cos)));
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
