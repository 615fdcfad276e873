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

#if defined(MLA_PASS_MATRIX_UNIT)

// Scores of a chunk's latents, on the matrix unit: s [rows][kKeyStep].
template <class T>
inline void meet_tiles(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, BandQueries<T>& bands,
                       const Tiles<T>& tiles, const Terms& still, Index first, Index keys, Index limit,
                       const AbsorbScratch& scratch) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  if (!bands.turning()) {
    tiles.products(still, rows, 0, keys, scratch.scores, kKeyStep);
    if (p.key_up) add_mean(rows, keys, queries.still_mean, 1, scratch.scores, kKeyStep);
    return;
  }
  const float* rope = tiles.rope() ? queries.dims + size.nope_dim : nullptr;
  bands.for_blocks(first, first + keys, limit, [&](Index key, Index count) {
    float* s = scratch.scores + key - first;
    const Terms query = tiles.left(bands.query(0, key), rows, bands.step(), rope, queries.width, scratch.tiles.left);
    tiles.products(query, rows, key - first, count, s, kKeyStep);
    if (size.orders == 1) return add_mean(rows, count, bands.mean(0, key), kPad, s, kKeyStep);
    const Terms slope = tiles.left(bands.query(1, key), rows, bands.step(), nullptr, 0, scratch.tiles.left);
    tiles.products(slope, rows, key - first, count, scratch.slopes, kKeyStep);
    follow(rows, count, static_cast<float>(key % bands.block()), scratch.slopes, bands.mean(0, key),
           bands.mean(1, key), kPad, s, kKeyStep);
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
  FinePairs<T> fine(p, tile, queries, scratch);
  Tiles<T> tiles(p, scratch.tiles);
  const float* rope_query = tiles.rope() ? queries.dims + size.nope_dim : nullptr;
  const Terms up = tiles.left(scratch.fine_up, fine.rows(), queries.key_width, nullptr, 0, scratch.tiles.fine);
  const Terms still = tiles.left(queries.still, bands.turning() ? 0 : rows, queries.key_width, rope_query, queries.width,
                                 scratch.tiles.left);
  start(part, rows);
  for (Index first = begin; first < end; first += kChunk) {
    const Index keys = least(kChunk, end - first), at = tile.batch * size.capacity + first;
    tiles.read(at, keys);
    meet_tiles(p, tile, queries, bands, tiles, still, first, keys, end, scratch);
    if (fine.rows() > 0) {
      tiles.products(up, fine.rows(), 0, keys, scratch.fine_keys, kKeyStep);
      fine.meet_decoded(first, keys, scratch.scores);
    }
    if (size.rope_dim > 0 && !tiles.rope()) {
      const Rows rope = size.split == size.rank
                            ? read_rows(p.part[1], at, keys, scratch.chunk.rope, scratch.chunk.rope_step)
                            : read_chunk(p, at, keys, scratch.chunk).rope;
      transpose(rope.data, keys, size.rope_dim, rope.step, scratch.keys, kKeyStep);
      Ahead nothing;
      meet_rope(size, queries, rows, scratch.keys, keys, scratch.scores, nothing);
    }
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    weigh(how, queries.sight, rows, scratch.scores, kKeyStep, part, 0);
    tiles.weighted(rows, keys, scratch.scores, kKeyStep, part);
  }
}

#endif

// Products with a chunk of `keys` rows from `first` on that is laid across; rows end at `limit`.
template <class T>
inline void meet_chunk(const Problem<T>& p, const Queries<T>& queries, BandQueries<T>& bands, Index rows, Index first,
                       Index keys, Index limit, const AcrossChunk& chunk, const AbsorbScratch& scratch, Ahead& ahead) {
  if (!bands.turning()) return meet_still(p, queries, rows, chunk, keys, scratch.scores, ahead);
  bands.for_blocks(first, first + keys, limit, [&](Index key, Index count) {
    meet_block(p, queries, bands, rows, key, count, from(chunk, key - first), scratch.slopes,
               scratch.scores + key - first, ahead);
  });
}

template <class T>
void absorb(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, Index begin, Index end,
            const AbsorbScratch& scratch, const Partial& part) {
#if defined(MLA_PASS_MATRIX_UNIT)
  if (scratch.tiles.rows) return absorb_tiles(p, tile, queries, begin, end, scratch, part);
#endif
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  const bool queries_across = size.levels == 0 && fills_lanes(rows);
  BandQueries<T> bands(p, tile, queries, scratch);
  FinePairs<T> fine(p, tile, queries, scratch);
  const QueriesAcross<T> across(p, queries, queries_across ? rows : 0, scratch.across);
  start(part, rows);
  for (Index first = begin; first < end; first += kChunk) {
    const Index keys = least(kChunk, end - first), at = tile.batch * size.capacity + first;
    const Chunk chunk = read_chunk(p, at, keys, scratch.chunk);
    Ahead ahead(p, at + keys, least(kChunk, end - first - keys));
    if (queries_across) {
      across.meet(keys, chunk, scratch.scores, ahead);
    } else {
      const AcrossChunk laid = lay_across(size, chunk, keys, scratch.keys);
      meet_chunk(p, queries, bands, rows, first, keys, end, laid, scratch, ahead);
      fine.meet(first, keys, laid.latent, scratch.scores, ahead);
    }
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    weigh(how, queries.sight, rows, scratch.scores, kKeyStep, part, 0);
    sums(rows, size.value_rank, keys, Left{scratch.scores, kKeyStep, 1}, chunk.latent.data + size.value_offset,
         chunk.latent.step, part.sum, part.value_width, ahead);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
