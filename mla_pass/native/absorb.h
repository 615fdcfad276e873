// The absorbed form: queries are pulled through key_up and meet the latents themselves.
//
// Counted per cached row and head in multiply-adds: orders * k for the scores, p for the rope part, w for the sum of
// values; and for each level of m pairs in blocks of B rows, 2 m orders (k + 1) / B for the latent queries of its
// blocks (mla_pass/fold/arithmetic.py counts the same). Bytes per cached row: r + p numbers for all heads together, so
// that 32 heads at r = 512 do 61 multiply-adds for each number read.
#pragma once

#include "bands.h"
#include "fine.h"
#if defined(MLA_PASS_MATRIX_UNIT)
#include "tiles.h"
#endif
#include "weigh.h"

namespace mla_pass::MLA_PASS_ISA {

// Cached rows as float32: where they lie, or unpacked into scratch.
struct Rows {
  const float* data;
  Index step;
};

struct Chunk {
  Rows latent, rope;
};

inline Rows read_rows(const Stored& from, Index first, Index count, float* to, Index step) {
  if (from.as == Storage::float32) return {static_cast<const float*>(from.data) + first * from.width, from.width};
  for (Index i = 0; i < count; ++i) unpack(from, first + i, to + i * step);
  return {to, step};
}

// `count` rows from row `first` of both tensors.
template <class T>
inline Chunk read_chunk(const Problem<T>& p, Index first, Index count, const ChunkScratch& scratch) {
  const Sizes& size = p.size;
  if (size.split == size.rank) {
    return {read_rows(p.part[0], first, count, scratch.latent, scratch.latent_step),
            read_rows(p.part[1], first, count, scratch.rope, scratch.rope_step)};
  }
  for (Index i = 0; i < count; ++i) {
    float* row = scratch.latent + i * scratch.latent_step;
    unpack(p.part[0], first + i, row);
    unpack(p.part[1], first + i, row + size.split);
  }
  return {{scratch.latent, scratch.latent_step}, {scratch.latent + size.rank, scratch.latent_step}};
}

// s += offset * slopes, and the means: columns [0, keys) of every row. A row's mean stands each `mean_step`.
inline void follow(Index rows, Index keys, float offset, const float* slopes, const float* mean,
                   const float* mean_slope, Index mean_step, float* s, Index step) {
  for (Index row = 0; row < rows; ++row) {
    const float constant = mean[row * mean_step], slope = mean_slope[row * mean_step];
    for (Index i = 0; i < keys; ++i) {
      const float delta = offset + static_cast<float>(i);
      s[row * step + i] += constant + delta * (slopes[row * step + i] + slope);
    }
  }
}

inline void add_mean(Index rows, Index keys, const float* mean, Index mean_step, float* s, Index step) {
  for (Index row = 0; row < rows; ++row) {
    for (Index i = 0; i < keys; ++i) s[row * step + i] += mean[row * mean_step];
  }
}

constexpr Index kScoreStep = kChunk + kPad;

// Products of a tile's queries with a chunk's rows where no band turns them.
template <class T>
inline void meet_still(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, Index keys, const Chunk& chunk,
                       float* s) {
  const Sizes& size = p.size;
  const auto& [latent, rope] = chunk;
  const Index rows = rows_of(tile);
  const Span spans[2] = {
      {queries.dims + size.nope_dim, queries.width, rope.data, rope.step, size.rope_dim},
      {queries.still, queries.key_width, latent.data, latent.step, size.key_rank},
  };
  dots(spans, size.nope_dim > 0 ? 2 : 1, rows, keys, s, kScoreStep);
  if (size.nope_dim > 0 && p.key_up) add_mean(rows, keys, queries.still_mean, 1, s, kScoreStep);
}

// The same with `keys` rows from `key` on that lie in one block of every level.
template <class T>
inline void meet_block(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, const BandQueries<T>& bands,
                       Index key, Index keys, const Chunk& chunk, const AbsorbScratch& scratch, float* s) {
  const Sizes& size = p.size;
  const auto& [latent, rope] = chunk;
  const Index rows = rows_of(tile);
  const Span spans[2] = {
      {queries.dims + size.nope_dim, queries.width, rope.data, rope.step, size.rope_dim},
      {bands.query(0, key), bands.step(), latent.data, latent.step, size.key_rank},
  };
  dots(spans, 2, rows, keys, s, kScoreStep);
  if (size.orders == 1) return add_mean(rows, keys, bands.mean(0, key), kPad, s, kScoreStep);
  const Span slope = {bands.query(1, key), bands.step(), latent.data, latent.step, size.key_rank};
  dots(&slope, 1, rows, keys, scratch.slopes, kScoreStep);
  follow(rows, keys, static_cast<float>(key % bands.block()), scratch.slopes, bands.mean(0, key), bands.mean(1, key),
         kPad, s, kScoreStep);
}

inline Chunk from(const Chunk& chunk, Index row) {
  return {{chunk.latent.data + row * chunk.latent.step, chunk.latent.step},
          {chunk.rope.data + row * chunk.rope.step, chunk.rope.step}};
}

// Calls work(key, keys) for the run of rows of every finest block within [begin, end), its queries made.
template <class T, class Work>
inline void for_blocks(BandQueries<T>& bands, Index begin, Index end, const Work& work) {
  for (Index key = begin; key < end;) {
    const Index reach = bands.reach(key, end);
    bands.enter(key, reach);
    while (key < reach) {
      const Index stop = least(reach, (key / bands.block() + 1) * bands.block());
      work(key, stop - key);
      key = stop;
    }
  }
}

// Products with a chunk of `keys` rows from `first` on, in runs of blocks.
template <class T>
inline void meet_bands(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, BandQueries<T>& bands,
                       Index first, Index keys, const Chunk& chunk, const AbsorbScratch& scratch) {
  for_blocks(bands, first, first + keys, [&](Index key, Index count) {
    meet_block(p, tile, queries, bands, key, count, from(chunk, key - first), scratch, scratch.scores + key - first);
  });
}

#if defined(MLA_PASS_MATRIX_UNIT)

inline void add_rows(Index rows, Index keys, const float* x, float* s, Index step) {
  for (Index row = 0; row < rows; ++row) {
    for (Index i = 0; i < keys; i += Vec::width) {
      store(s + row * step + i, add(load(s + row * step + i), load(x + row * step + i)));
    }
  }
}

// Scores of a chunk's latents, on the matrix unit: s [rows][kScoreStep].
template <class T>
inline void meet_tiles(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, BandQueries<T>& bands,
                       const Tiles<T>& tiles, const Terms& still, Index first, Index keys,
                       const AbsorbScratch& scratch) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  if (!bands.turning()) {
    tiles.products(still, rows, 0, keys, scratch.scores, kScoreStep);
    if (p.key_up) add_mean(rows, keys, queries.still_mean, 1, scratch.scores, kScoreStep);
    return;
  }
  const float* rope = tiles.rope() ? queries.dims + size.nope_dim : nullptr;
  for_blocks(bands, first, first + keys, [&](Index key, Index count) {
    float* s = scratch.scores + key - first;
    const Terms query = tiles.left(bands.query(0, key), rows, bands.step(), rope, queries.width, scratch.tiles.left);
    tiles.products(query, rows, key - first, count, s, kScoreStep);
    if (size.orders == 1) return add_mean(rows, count, bands.mean(0, key), kPad, s, kScoreStep);
    const Terms slope = tiles.left(bands.query(1, key), rows, bands.step(), nullptr, 0, scratch.tiles.left);
    tiles.products(slope, rows, key - first, count, scratch.slopes, kScoreStep);
    follow(rows, count, static_cast<float>(key % bands.block()), scratch.slopes, bands.mean(0, key),
           bands.mean(1, key), kPad, s, kScoreStep);
  });
}

// As absorb, for latents that a matrix unit takes.
template <class T>
void absorb_tiles(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, Index begin, Index end,
                  const AbsorbScratch& scratch, const Partial& part) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  const TileUse use;
  BandQueries<T> bands(p, tile, queries, scratch);
  const FinePairs<T> fine(p, tile, queries, scratch);
  Tiles<T> tiles(p, scratch.tiles);
  const float* rope_query = tiles.rope() ? queries.dims + size.nope_dim : nullptr;
  const Terms up = tiles.left(scratch.fine_up, fine.rows(), queries.key_width, nullptr, 0, scratch.tiles.fine);
  const Terms still = tiles.left(queries.still, bands.turning() ? 0 : rows, queries.key_width, rope_query, queries.width,
                                 scratch.tiles.left);
  start(part, rows);
  for (Index first = begin; first < end; first += kChunk) {
    const Index keys = least(kChunk, end - first), at = tile.batch * size.capacity + first;
    tiles.read(at, keys);
    meet_tiles(p, tile, queries, bands, tiles, still, first, keys, scratch);
    if (fine.rows() > 0) {
      tiles.products(up, fine.rows(), 0, keys, scratch.fine_keys, FinePairs<T>::kStep);
      fine.meet_decoded(first, keys, scratch.scores, kScoreStep);
    }
    if (size.rope_dim > 0 && !tiles.rope()) {
      const Rows rope = size.split == size.rank
                            ? read_rows(p.part[1], at, keys, scratch.chunk.rope, scratch.chunk.rope_step)
                            : read_chunk(p, at, keys, scratch.chunk).rope;
      const Span span = {queries.dims + size.nope_dim, queries.width, rope.data, rope.step, size.rope_dim};
      dots(&span, 1, rows, keys, scratch.slopes, kScoreStep);
      add_rows(rows, keys, scratch.slopes, scratch.scores, kScoreStep);
    }
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    weigh(how, queries.sight, rows, scratch.scores, kScoreStep, part, 0);
    tiles.weighted(rows, keys, scratch.scores, kScoreStep, part);
  }
}

#endif

template <class T>
void absorb(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, Index begin, Index end,
            const AbsorbScratch& scratch, const Partial& part) {
#if defined(MLA_PASS_MATRIX_UNIT)
  if (scratch.tiles.rows) return absorb_tiles(p, tile, queries, begin, end, scratch, part);
#endif
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  BandQueries<T> bands(p, tile, queries, scratch);
  const FinePairs<T> fine(p, tile, queries, scratch);
  start(part, rows);
  for (Index first = begin; first < end; first += kChunk) {
    const Index keys = least(kChunk, end - first), at = tile.batch * size.capacity + first;
    const Chunk chunk = read_chunk(p, at, keys, scratch.chunk);
    if (bands.turning()) {
      meet_bands(p, tile, queries, bands, first, keys, chunk, scratch);
    } else {
      meet_still(p, tile, queries, keys, chunk, scratch.scores);
    }
    fine.meet(first, keys, chunk.latent.data, chunk.latent.step, scratch.scores, kScoreStep);
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    weigh(how, queries.sight, rows, scratch.scores, kScoreStep, part, 0);
    sums(rows, size.value_rank, keys, Left{scratch.scores, kScoreStep, 1}, chunk.latent.data + size.value_offset,
         chunk.latent.step, part.sum, part.value_width);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
