// The expanded form: keys and values of a kv group are decoded chunk by chunk and meet all queries of a large tile.
//
// Counted per cached row and group in multiply-adds: k n + w V to decode, 6 m to turn; then n + p + V for each query,
// where the absorbed form takes orders * k + p + w. A tile of up to 2048 queries shares one decoding, which at k = w =
// 512 and n + V = 256 is then an eighth of the work; decoded rows never leave the cache of the core that made them.
#pragma once

#include "absorb.h"

namespace mla_pass::MLA_PASS_ISA {

// Keys of `count` rows from cache row `first`: re and im turned by exp(j theta block's first row) (A0 + A1 offset).
template <class T>
inline void turn_keys(const Problem<T>& p, Index first, Index count, const ExpandScratch& scratch, Index width) {
  const Sizes& size = p.size;
  for (Index level = 0; level < size.levels; ++level) {
    const Level& band = p.level[level];
    const Index pairs = band.end - band.begin;
    float *re0 = scratch.factor, *im0 = re0 + pairs, *re1 = im0 + pairs, *im1 = re1 + pairs;
    for (Index row = 0; row < count;) {
      const Index block = (first + row) / band.block * band.block, end = least(count, block + band.block - first);
      const float *cos = p.cos + block * size.angles, *sin = p.sin + block * size.angles;
      for (Index i = 0; i < pairs; ++i) {
        const Index pair = band.begin + i;
        const float c = cos[p.band_index[pair]], s = sin[p.band_index[pair]];
        const float *a0 = p.fit + pair * 2, *a1 = a0 + size.pairs * 2;
        re0[i] = c * a0[0] - s * a0[1];
        im0[i] = c * a0[1] + s * a0[0];
        re1[i] = c * a1[0] - s * a1[1];
        im1[i] = c * a1[1] + s * a1[0];
      }
      for (; row < end; ++row) {
        const float offset = static_cast<float>(first + row - block);
        float* re = scratch.keys + row * width + band.begin;
        float* im = re + size.pairs;
        for (Index i = 0; i < pairs; ++i) {
          const float c = re0[i] + offset * re1[i], s = im0[i] + offset * im1[i], x = re[i], y = im[i];
          re[i] = x * c - y * s;
          im[i] = x * s + y * c;
        }
      }
    }
  }
}

template <class T>
inline void decode_keys(const Problem<T>& p, Index group, Index first, Index count, const Chunk& chunk,
                        const ExpandScratch& scratch, Index width) {
  const Sizes& size = p.size;
  const auto& [latent, rope] = chunk;
  const Index n = size.nope_dim;
  if (n > 0 && p.key_up) {
    const Span span = {latent.data, latent.step, scratch.key_up, scratch.key_width, size.key_rank};
    dots(&span, 1, count, n, scratch.keys, width);
    const float* mean = p.key_mean + group * n;
    for (Index row = 0; row < count; ++row) {
      for (Index i = 0; i < n; ++i) scratch.keys[row * width + i] += mean[i];
    }
    turn_keys(p, first, count, scratch, width);
  } else {
    for (Index row = 0; row < count; ++row) widen(latent.data + row * latent.step, scratch.keys + row * width, n);
  }
  for (Index row = 0; row < count; ++row) {
    widen(rope.data + row * rope.step, scratch.keys + row * width + n, size.rope_dim);
  }
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
    decode_keys(p, group, first, keys, chunk, scratch, queries.width);
    const Rows values = decode_values(p, group, keys, chunk.latent, scratch.values, part.value_width);
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    for (Index row = 0; row < rows; row += kQueryRows) {
      const Index some = least(kQueryRows, rows - row);
      const Sight<T> seen = seen_by(queries.sight + row, some);
      if (seen.first >= first + keys || seen.end <= first) continue;
      const Span span = {queries.dims + row * queries.width, queries.width, scratch.keys, queries.width,
                         size.nope_dim + size.rope_dim};
      dots(&span, 1, some, keys, scratch.scores, kScoreStep);
      weigh(how, queries.sight + row, some, scratch.scores, kScoreStep, part, row);
      sums(some, size.value_dim, keys, Left{scratch.scores, kScoreStep, 1}, values.data, values.step,
           part.sum + row * part.value_width, part.value_width);
    }
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
