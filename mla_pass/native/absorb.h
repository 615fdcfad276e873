// The absorbed form: queries are pulled through key_up and meet the latents themselves.
//
// Counted per cached row and head in multiply-adds: orders * k for the scores, p for the rope part, w for the sum of
// values; and for each level of m pairs in blocks of B rows, 2 m orders (k + 1) / B for the latent queries of its
// blocks (mla_pass/fold/arithmetic.py counts the same). Bytes per cached row: r + p numbers for all heads together, so
// that 32 heads at r = 512 do 61 multiply-adds for each number read.
#pragma once

#include "fine.h"
#include "meet.h"
#if defined(MLA_PASS_MATRIX_UNIT)
#include "tiles.h"
#endif
#include "weigh.h"

namespace mla_pass::MLA_PASS_ISA {

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
inline void meet_bands(Meeting<T>& meeting, BandQueries<T>& bands, Index first, Index keys, const Chunk& chunk,
                       float* s, Ahead& ahead) {
  for_blocks(bands, first, first + keys, [&](Index key, Index count) {
    meeting.block(bands, key, count, from(chunk, key - first), s + key - first, ahead);
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
      Ahead nothing;
      dots(&span, 1, rows, keys, scratch.slopes, kScoreStep, nothing);
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
  Meeting<T> meeting(p, tile, queries, bands.turning(), scratch);
  start(part, rows);
  for (Index first = begin; first < end; first += kChunk) {
    const Index keys = least(kChunk, end - first), at = tile.batch * size.capacity + first;
    const Chunk chunk = read_chunk(p, at, keys, scratch.chunk);
    Ahead ahead(p, at + keys, least(kChunk, end - first - keys));
    if (bands.turning()) {
      meet_bands(meeting, bands, first, keys, chunk, scratch.scores, ahead);
    } else {
      meeting.still(keys, chunk, scratch.scores, ahead);
    }
    fine.meet(first, keys, chunk.latent.data, chunk.latent.step, scratch.scores, kScoreStep, ahead);
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    weigh(how, queries.sight, rows, scratch.scores, kScoreStep, part, 0);
    sums(rows, size.value_rank, keys, Left{scratch.scores, kScoreStep, 1}, chunk.latent.data + size.value_offset,
         chunk.latent.step, part.sum, part.value_width, ahead);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
