// The parts of a tile become its context: joined, divided by the mass, decoded by value_up, written.
#pragma once

#include "prepare.h"

namespace mla_pass::MLA_PASS_ISA {

inline float exp_of(float x) {
  float lanes[Vec::width];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

// sum = (parts' sums, each by exp(its top - the largest top)) / (their masses alike); zero where nothing was seen.
inline void join(const Partial* parts, Index count, Index row, float* to, Index width) {
  float top = -kInfinity, mass = 0.0f;
  for (Index i = 0; i < count; ++i) top = parts[i].top[row] > top ? parts[i].top[row] : top;
  for (Index i = 0; i < count; ++i) {
    if (parts[i].mass[row] != 0.0f) mass += parts[i].mass[row] * exp_of(parts[i].top[row] - top);
  }
  fill(to, width, 0.0f);
  for (Index i = 0; i < count; ++i) {
    if (parts[i].mass[row] == 0.0f) continue;
    const Vec share = splat(exp_of(parts[i].top[row] - top) / mass);
    const float* from = parts[i].sum + row * width;
    for (Index x = 0; x < width; x += Vec::width) store(to + x, fma(share, load(from + x), load(to + x)));
  }
}

template <class T>
void finish(const Problem<T>& p, const Tile& tile, const Partial* parts, Index count, const FinishScratch& scratch) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile), width = parts[0].value_width;
  for (Index row = 0; row < rows; ++row) join(parts, count, row, scratch.sum + row * width, width);
  const float* out = scratch.sum;
  Index step = width;
  if (p.value_up && !tile.token_major) {
    out = scratch.out;
    step = scratch.out_width;
    fill(scratch.out, rows * step, 0.0f);
    for_groups(size, tile, [&](const GroupRun& run) {
      sums(run.rows, size.value_dim, size.value_rank, Left{scratch.sum + run.row * width, width, 1},
           p.value_up + run.group * size.value_rank * size.value_dim, size.value_dim, scratch.out + run.row * step,
           step);
    });
  }
  for (Index head = 0; head < tile.heads; ++head) {
    for (Index token = 0; token < tile.tokens; ++token) {
      const Index at = (tile.batch * size.fresh + tile.token + token) * size.heads + tile.head + head;
      const float* from = out + row_at(tile, head, token) * step;
      T* to = p.context + at * size.value_dim;
      for (Index i = 0; i < size.value_dim; ++i) narrow(from[i], to + i);
    }
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
