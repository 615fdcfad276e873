// The absorbed form: queries are pulled through key_up and meet the latents themselves.
//
// Counted per cached row and head in multiply-adds: orders * k for the scores, p for the rope part, w for the sum of
// values; and for each level of m pairs in blocks of B rows, 2 m orders (k + 1) / B for the latent queries of its
// blocks (mla_pass/fold/arithmetic.py counts the same). Bytes per cached row: r + p numbers for all heads together, so
// that 32 heads at r = 512 do 61 multiply-adds for each number read.
#pragma once

#include "fine.h"
#include "meet.h"
#include "packed.h"
#include "weigh.h"

namespace mla_pass::MLA_PASS_ISA {

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
#if defined(MLA_PASS_PACKED)
  if (scratch.packed.rows) return absorb_packed(p, tile, queries, begin, end, scratch, part);
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
