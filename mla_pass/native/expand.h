// The expanded form: keys and values of a kv group are decoded chunk by chunk and meet all queries of a large tile.
//
// Counted per cached row and group in multiply-adds: k n + w V to decode, 6 m to turn; then n + p + V for each query,
// where the absorbed form takes orders * k + p + w. A tile of up to 2048 queries shares one decoding, which at k = w =
// 512 and n + V = 256 is then an eighth of the work; decoded rows never leave the cache of the core that made them.
#pragma once

#include "absorb.h"

namespace mla_pass::MLA_PASS_ISA {

// Keys lie with cached rows in the lanes, [dim][kKeyStep]: neither turning them nor meeting them with queries sums
// across lanes. The mean added, and pairs turned, of keys from cache row `first` on.
template <class T>
inline void finish_keys(const Problem<T>& p, Index group, Index first, Index count, float* keys) {
  const Sizes& size = p.size;
  const float* mean = p.key_mean + group * size.nope_dim;
  for (Index level = 0; level < size.levels; ++level) {
    for (Index pair = p.level[level].begin; pair < p.level[level].end; ++pair) {
      float cos[kKeyStep] = {}, sin[kKeyStep] = {};
      make_turn(p, pair, p.level[level].block, first, 0, count, cos, sin);
      const Index other = size.pairs + pair;
      turn_pair(keys + pair * kKeyStep, keys + other * kKeyStep, mean[pair], mean[other], cos, sin, count);
    }
  }
  for (Index i = 2 * size.pairs; i < size.nope_dim; ++i) {
    for (Index key = 0; key < count; ++key) keys[i * kKeyStep + key] += mean[i];
  }
}

template <class T>
inline void decode_keys(const Problem<T>& p, Index group, Index first, Index count, const Chunk& chunk,
                        const ExpandScratch& scratch) {
  const Sizes& size = p.size;
  const auto& [latent, rope] = chunk;
  const Index n = size.nope_dim;
  transpose(rope.data, count, size.rope_dim, rope.step, scratch.keys + n * kKeyStep, kKeyStep);
  if (n == 0 || !p.key_up) return transpose(latent.data, count, n, latent.step, scratch.keys, kKeyStep);
  transpose(latent.data, count, size.key_rank, latent.step, scratch.latents, kKeyStep);
  fill(scratch.keys, n * kKeyStep, 0.0f);
  Ahead nothing;
  meet_keys(scratch.key_up, n, scratch.key_width, scratch.latents, size.key_rank, count, scratch.keys, nothing);
  finish_keys(p, group, first, count, scratch.keys);
}

// Values of the chunk, decoded or the latents themselves.
template <class T>
inline Rows decode_values(const Problem<T>& p, Index group, Index count, const Rows& latent, float* to, Index width) {
  const Sizes& size = p.size;
  const float* from = latent.data + size.value_offset;
  if (!p.value_up) return {from, latent.step};
  fill(to, count * width, 0.0f);
  sums(count, size.value_dim, size.value_rank, Left{from, latent.step, 1},
       p.value_up + group * size.value_rank * size.value_dim, size.value_dim, to, width);
  return {to, width};
}

// Rows [first, end) of the cache that any of a run of queries sees; empty when first >= end.
template <class T>
inline Sight<T> seen_by(const Sight<T>* sight, Index rows) {
  Sight<T> all = sight[0];
  for (Index i = 1; i < rows; ++i) {
    all.first = least(all.first, sight[i].first);
    all.end = greatest(all.end, sight[i].end);
  }
  return all;
}

template <class T>
void expand(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, const ExpandScratch& scratch,
            const Partial& part) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile), group = tile.head / (size.heads / size.groups);
  start(part, rows);
  if (p.key_up) {
    for (Index i = 0; i < size.nope_dim; ++i) {
      widen(p.key_up + (group * size.nope_dim + i) * size.key_rank, scratch.key_up + i * scratch.key_width,
            size.key_rank);
    }
  }
  const Sight<T> all = seen_by(queries.sight, rows);
  for (Index first = all.first; first < all.end; first += kChunk) {
    const Index keys = least(kChunk, all.end - first), at = tile.batch * size.capacity + first;
    const Chunk chunk = read_chunk(p, at, keys, scratch.chunk);
    decode_keys(p, group, first, keys, chunk, scratch);
    const Rows values = decode_values(p, group, keys, chunk.latent, scratch.values, part.value_width);
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    for (Index row = 0; row < rows; row += kQueryRows) {
      const Index some = least(kQueryRows, rows - row);
      const Sight<T> seen = seen_by(queries.sight + row, some);
      if (seen.first >= first + keys || seen.end <= first) continue;
      fill(scratch.scores, some * kKeyStep, 0.0f);
      Ahead nothing;
      meet_keys(queries.dims + row * queries.width, some, queries.width, scratch.keys, size.nope_dim + size.rope_dim,
                keys, scratch.scores, nothing);
      weigh(how, queries.sight + row, some, scratch.scores, kKeyStep, part, row);
      sums(some, size.value_dim, keys, Left{scratch.scores, kKeyStep, 1}, values.data, values.step,
           part.sum + row * part.value_width, part.value_width);
    }
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
