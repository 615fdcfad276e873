// Scores of a chunk of keys to weights, by the running maximum: weights are exp(score - largest score so far), and sums
// made with an older maximum are scaled when it moves.
#pragma once

#include "maths.h"

namespace mla_pass::MLA_PASS_ISA {

// What turns products into scores, and which keys of the chunk no query sees.
template <class T>
struct Scoring {
  float scale, softcap;
  Index first, keys;           // the chunk: rows [first, first + keys) of the cache
  const std::int64_t* hidden;  // the chunk's part of the padding mask, 0 for a hidden key; null when it hides none
};

// Scale, softcap and bias on columns [begin, end), everything else -inf up to whole vectors.
template <class T>
inline void score(const Scoring<T>& how, const Sight<T>& sight, float* s, Index begin, Index end) {
  const Vec scale = splat(how.scale);
  for (Index i = 0; i < how.keys; i += Vec::width) store(s + i, mul(load(s + i), scale));
  if (how.softcap > 0) {
    const Vec cap = splat(how.softcap), inverse = splat(1.0f / how.softcap);
    for (Index i = 0; i < how.keys; i += Vec::width) store(s + i, mul(cap, tanh(mul(load(s + i), inverse))));
  }
  if (sight.bias) {
    for (Index i = begin; i < end; ++i) s[i] += to_float(sight.bias[how.first + i]);
  }
  if (how.hidden) {
    for (Index i = begin; i < end; ++i) {
      if (how.hidden[i] == 0) s[i] = -kInfinity;
    }
  }
  fill(s, begin, -kInfinity);
  fill(s + end, (how.keys + Vec::width - 1) / Vec::width * Vec::width - end, -kInfinity);
}

inline float top_of(const float* s, Index count, float top) {
  Vec most = splat(top);
  for (Index i = 0; i < count; i += Vec::width) most = max(most, load(s + i));
  return largest(most);
}

// One row. Returns what sums made before are to be multiplied with, 1 when the maximum did not move.
template <class T>
inline float weigh_row(const Scoring<T>& how, const Sight<T>& sight, float* s, float& top, float& mass) {
  const Index begin = greatest(sight.first - how.first, 0), end = least(sight.end - how.first, how.keys);
  if (begin >= end) {
    fill(s, how.keys, 0.0f);
    return 1.0f;
  }
  score(how, sight, s, begin, end);
  const float before = top;
  top = top_of(s, how.keys, before);
  if (top == -kInfinity) {
    fill(s, how.keys, 0.0f);
    return 1.0f;
  }
  const Vec most = splat(top);
  Vec total = zero();
  for (Index i = 0; i < how.keys; i += Vec::width) {
    const Vec weight = exp(sub(load(s + i), most));
    store(s + i, weight);
    total = add(total, weight);
  }
  const float shrink = before == top ? 1.0f : sum(mul(exp(splat(before - top)), splat(1.0f / Vec::width)));
  mass = mass * shrink + sum(total);
  return shrink;
}

// Rows [0, rows) of s, with the sums, maxima and masses of `part` from row `at`.
template <class T>
inline void weigh(const Scoring<T>& how, const Sight<T>* sight, Index rows, float* s, Index step, const Partial& part,
                  Index at) {
  for (Index row = 0; row < rows; ++row) {
    const float shrink = weigh_row(how, sight[row], s + row * step, part.top[at + row], part.mass[at + row]);
    if (shrink == 1.0f) continue;
    const Vec factor = splat(shrink);
    float* total = part.sum + (at + row) * part.value_width;
    for (Index i = 0; i < part.value_width; i += Vec::width) store(total + i, mul(load(total + i), factor));
  }
}

// The chunk's part of the padding mask, null when it hides nothing.
template <class T>
inline const std::int64_t* hidden_keys(const Problem<T>& p, const Tile& tile, Index first, Index keys) {
  if (!p.padding_mask) return nullptr;
  const std::int64_t* mask = p.padding_mask + tile.batch * p.size.total + first;
  for (Index i = 0; i < keys; ++i) {
    if (mask[i] == 0) return mask;
  }
  return nullptr;
}

inline void start(const Partial& part, Index rows) {
  fill(part.sum, rows * part.value_width, 0.0f);
  fill(part.top, rows, -kInfinity);
  fill(part.mass, rows, 0.0f);
}

}  // namespace mla_pass::MLA_PASS_ISA
