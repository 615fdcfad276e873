// What changes from step to step, read on the device: how far the cache is filled, what the padding mask shows, whether
// positions are in the tables. And the fits of band pairs, which are the same at every step but need the tables.
#pragma once

#include <cmath>

#include "turn.cuh"

namespace mla_pass::cuda {

constexpr int kSetupThreads = 128;
// Numbers of the mask that a thread looks at before the CTA agrees whether to go on.
constexpr int kMaskLoads = 8;

// The least of all threads' numbers; `room` holds one for each warp.
MLA_DEVICE int least_of_all(int x, int* room) {
  MLA_UNROLL
  for (int step = 16; step > 0; step /= 2) x = min(x, shuffle_xor(x, step));
  barrier();
  if (lane() == 0) room[warp()] = x;
  barrier();
  for (int i = 0; i < kSetupThreads / 32; ++i) x = min(x, room[i]);
  return x;
}

// How many hidden keys a mask of `count` begins with, or, `backwards`, ends with. Only these are read: what is shown
// first lies among the first 1024 as a rule.
MLA_DEVICE int hidden_at_edge(const std::int64_t* mask, int count, bool backwards, int* room) {
  for (int begin = 0; begin < count; begin += kSetupThreads * kMaskLoads) {
    int found = count;
    MLA_UNROLL
    for (int i = 0; i < kMaskLoads; ++i) {
      const int at = begin + i * kSetupThreads + thread().x;
      if (at < count && mask[backwards ? count - 1 - at : at] != 0) found = min(found, at);
    }
    found = least_of_all(found, room);
    if (found < count) return found;
  }
  return count;
}

MLA_DEVICE bool positions_are_rows(const Setup& p, int sequence, int* room) {
  const std::int64_t* position = p.position_ids + static_cast<long long>(sequence) * p.position_step;
  int right = 1;
  for (int i = thread().x; i < p.fresh; i += kSetupThreads) {
    if (position[i] < 0 || position[i] >= p.tables.positions) right = 0;
  }
  return least_of_all(right, room) == 1;
}

MLA_DEVICE bool total_is_right(const Setup& p) {
  const std::int64_t total = p.total[0];
  if (total < p.fresh || total > p.bound || (p.exact && total != p.bound)) return false;
  return p.pairs == 0 || total <= p.tables.positions;  // bands read the tables at cached rows
}

// A0 and A1 of a pair: exp(j theta (block - 1) / 2) times a0 - j a1 (block - 1) / 2, and times j a1. The angle of one
// row is read off the tables' row 1, which is unambiguous below pi.
MLA_DEVICE void make_fit(const Setup& p, int pair) {
  const Complex one = angle(p.tables, 1, p.index[pair]);
  const float middle = 0.5f * static_cast<float>(p.block[pair] - 1), theta = atan2f(one.im, one.re);
  const Complex turn = {cosf(theta * middle), sinf(theta * middle)};
  const Complex constant = times(turn, {p.a0[pair], -p.a1[pair] * middle}), slope = times(turn, {0.0f, p.a1[pair]});
  float* fit = p.fit + pair * 4;
  fit[0] = constant.re;
  fit[1] = constant.im;
  fit[2] = slope.re;
  fit[3] = slope.im;
}

MLA_DEVICE void set_up(const Setup& p) {
  int* room = reinterpret_cast<int*>(shared_memory());
  const int sequence = block().x;
  if (sequence == 0) {
    for (int pair = thread().x; pair < p.pairs; pair += kSetupThreads) make_fit(p, pair);
  }
  Span span = {0, 0, 0, 1};
  if (total_is_right(p)) {
    span.total = static_cast<std::int32_t>(p.total[0]);
    span.end = span.total;
    span.bad = positions_are_rows(p, sequence, room) ? 0 : 1;
    if (p.padding_mask) {
      const std::int64_t* mask = p.padding_mask + static_cast<long long>(sequence) * p.mask_step;
      span.first = hidden_at_edge(mask, span.total, false, room);
      span.end -= hidden_at_edge(mask, span.total, true, room);
    }
  }
  if (thread().x == 0) p.span[sequence] = span;
}

}  // namespace mla_pass::cuda
