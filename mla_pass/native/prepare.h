// A tile's queries: mapped, split into un-rotated dims and rope dims, rotated, and pulled through key_up where no band
// turns them.
#pragma once

#include "products.h"

namespace mla_pass::MLA_PASS_ISA {

inline Index rows_of(const Tile& tile) { return tile.heads * tile.tokens; }

inline Index row_at(const Tile& tile, Index head, Index token) {
  return tile.token_major ? token * tile.heads + head : head * tile.tokens + token;
}

// A run of a tile's rows whose heads share a kv group.
struct GroupRun {
  Index group, row, rows;
};

// Calls work(GroupRun) for every kv group of the tile. A token-major tile lies within one group.
template <class Work>
inline void for_groups(const Sizes& size, const Tile& tile, const Work& work) {
  const Index per_group = size.heads / size.groups;
  for (Index head = 0; head < tile.heads;) {
    const Index group = (tile.head + head) / per_group;
    const Index end = least(tile.heads, (group + 1) * per_group - tile.head);
    work(GroupRun{group, head * tile.tokens, (end - head) * tile.tokens});
    head = end;
  }
}

// The cache row that a tile's token was written to.
inline Index cache_row(const Sizes& size, const Tile& tile, Index token) {
  return size.total - size.fresh + tile.token + token;
}

template <class T>
inline void read_queries(const Problem<T>& p, const Tile& tile, float* to, Index step) {
  const Sizes& size = p.size;
  for (Index head = 0; head < tile.heads; ++head) {
    for (Index token = 0; token < tile.tokens; ++token) {
      const Index at = (tile.batch * size.fresh + tile.token + token) * size.heads + tile.head + head;
      widen(p.query + at * size.query_dim, to + row_at(tile, head, token) * step, size.query_dim);
    }
  }
}

template <class T>
inline void map_queries(const Problem<T>& p, const Tile& tile, const Queries<T>& queries) {
  const Sizes& size = p.size;
  const Index width = size.nope_dim + size.rope_dim;
  if (!p.query_map) return read_queries(p, tile, queries.dims, queries.width);
  read_queries(p, tile, queries.raw, queries.raw_width);
  fill(queries.dims, rows_of(tile) * queries.width, 0.0f);
  for_groups(size, tile, [&](const GroupRun& run) {
    const Left raw = {queries.raw + run.row * queries.raw_width, queries.raw_width, 1};
    sums(run.rows, width, size.query_dim, raw, p.query_map + run.group * size.query_dim * width, width,
         queries.dims + run.row * queries.width, queries.width);
  });
}

// (re + j im) *= cos + j sin for `count` pairs, whose tables' columns are picked by `columns`.
inline void rotate(float* re, float* im, const float* cos, const float* sin, const Index* columns, Index count) {
  for (Index i = 0; i < count; ++i) {
    const float c = cos[columns[i]], s = sin[columns[i]], x = re[i], y = im[i];
    re[i] = x * c - y * s;
    im[i] = x * s + y * c;
  }
}

template <class T>
inline void rotate_queries(const Problem<T>& p, const Tile& tile, bool expanded, const Queries<T>& queries) {
  const Sizes& size = p.size;
  const Index half = size.rope_dim / 2;
  for (Index token = 0; token < tile.tokens; ++token) {
    const Index position = p.position_ids[tile.batch * size.position_step + tile.token + token];
    const Index row = cache_row(size, tile, token);
    for (Index head = 0; head < tile.heads; ++head) {
      float* dims = queries.dims + row_at(tile, head, token) * queries.width;
      float* rope = dims + size.nope_dim;
      rotate(rope, rope + half, p.cos + position * size.angles, p.sin + position * size.angles, p.rope_index, half);
      if (expanded) {
        rotate(dims, dims + size.pairs, p.cos + row * size.angles, p.sin + row * size.angles, p.band_index, size.pairs);
      }
    }
  }
}

template <class T>
inline void look(const Problem<T>& p, const Tile& tile, Sight<T>* sight) {
  const Sizes& size = p.size;
  for (Index head = 0; head < tile.heads; ++head) {
    for (Index token = 0; token < tile.tokens; ++token) {
      const Index row = cache_row(size, tile, token);
      Sight<T>& seen = sight[row_at(tile, head, token)];
      seen.first = size.window > 0 ? greatest(0, row - size.window + 1) : 0;
      if (p.first_kept) seen.first = greatest(seen.first, p.first_kept[tile.batch]);
      seen.end = size.causal ? row + 1 : size.total;
      seen.bias = p.attention_bias ? p.attention_bias + tile.batch * size.bias_batch +
                                         (tile.head + head) * size.bias_head + (tile.token + token) * size.total
                                   : nullptr;
    }
  }
}

// Latent queries of the dims that no band turns, and what the keys' mean adds to their scores.
template <class T>
inline void absorb_still(const Problem<T>& p, const Tile& tile, const Queries<T>& queries) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile), turning = 2 * size.pairs, count = size.nope_dim - turning;
  fill(queries.still, rows * queries.key_width, 0.0f);
  fill(queries.still_mean, rows, 0.0f);
  if (!p.key_up) {
    for (Index row = 0; row < rows; ++row) {
      widen(queries.dims + row * queries.width, queries.still + row * queries.key_width, count);
    }
    return;
  }
  for_groups(size, tile, [&](const GroupRun& run) {
    const Index first = run.group * size.nope_dim + turning;
    const float* dims = queries.dims + run.row * queries.width + turning;
    sums(run.rows, size.key_rank, count, Left{dims, queries.width, 1}, p.key_up + first * size.key_rank, size.key_rank,
         queries.still + run.row * queries.key_width, queries.key_width);
    for (Index i = 0; i < run.rows; ++i) {
      queries.still_mean[run.row + i] = dot(dims + i * queries.width, p.key_mean + first, count);
    }
  });
}

template <class T>
void prepare(const Problem<T>& p, const Tile& tile, bool expanded, const Queries<T>& queries) {
  map_queries(p, tile, queries);
  rotate_queries(p, tile, expanded, queries);
  look(p, tile, queries.sight);
  if (!expanded && p.size.nope_dim > 0) absorb_still(p, tile, queries);
}

}  // namespace mla_pass::MLA_PASS_ISA
