// The absorbed form for latents that are stored in fewer bits than float32, in bfloat16: on a matrix unit (tiles.h), or
// on vectors that multiply pairs of such numbers (pairs.h).
//
// Both make of a chunk of cached rows what scores and sums read of it, once for all heads, and of queries, key_up and
// attention weights what meets them.
#pragma once

#include "bands.h"
#include "fine.h"
#include "meet.h"
#if defined(MLA_PASS_MATRIX_UNIT)
#include "tiles.h"
#elif defined(MLA_PASS_PAIRS)
#include "pairs.h"
#endif

#if defined(MLA_PASS_MATRIX_UNIT) || defined(MLA_PASS_PAIRS)
#define MLA_PASS_PACKED 1

namespace mla_pass::MLA_PASS_ISA {

// Scores of a chunk's latents: s [rows][kKeyStep].
template <class T>
inline void meet_packed(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, BandQueries<T>& bands,
                        const Packed<T>& packed, const Terms& still, Index first, Index keys, Index limit,
                        const AbsorbScratch& scratch, Ahead& ahead) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  if (!bands.turning()) {
    packed.products(still, rows, 0, keys, scratch.scores, kKeyStep, ahead);
    if (p.key_up) add_mean(rows, keys, queries.still_mean, 1, scratch.scores, kKeyStep);
    return;
  }
  const float* rope = packed.rope() ? queries.dims + size.nope_dim : nullptr;
  bands.for_blocks(first, first + keys, limit, [&](Index key, Index count) {
    float* s = scratch.scores + key - first;
    const Terms query = packed.left(bands.query(0, key), rows, bands.step(), rope, queries.width, scratch.packed.left);
    packed.products(query, rows, key - first, count, s, kKeyStep, ahead);
    if (size.orders == 1) return add_mean(rows, count, bands.mean(0, key), kPad, s, kKeyStep);
    const Terms slope = packed.left(bands.query(1, key), rows, bands.step(), nullptr, 0, scratch.packed.left);
    packed.products(slope, rows, key - first, count, scratch.slopes, kKeyStep, ahead);
    follow(rows, count, static_cast<float>(key % bands.block()), scratch.slopes, bands.mean(0, key),
           bands.mean(1, key), kPad, s, kKeyStep);
  });
}

// As absorb, for latents that are met in bfloat16.
template <class T>
void absorb_packed(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, Index begin, Index end,
                   const AbsorbScratch& scratch, const Partial& part) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  BandQueries<T> bands(p, tile, queries, scratch);
  FinePairs<T> fine(p, tile, queries, scratch);
  Packed<T> packed(p, scratch.packed);
  const float* rope_query = packed.rope() ? queries.dims + size.nope_dim : nullptr;
  const Terms up = packed.left(scratch.fine_up, fine.rows(), queries.key_width, nullptr, 0, scratch.packed.fine);
  const Terms still = packed.left(queries.still, bands.turning() ? 0 : rows, queries.key_width, rope_query,
                                  queries.width, scratch.packed.left);
  start(part, rows);
  for (Index first = begin; first < end; first += kChunk) {
    const Index keys = least(kChunk, end - first), at = tile.batch * size.capacity + first;
    packed.read(at, keys);
    Ahead ahead(p, at + keys, least(kChunk, end - first - keys));
    meet_packed(p, tile, queries, bands, packed, still, first, keys, end, scratch, ahead);
    if (fine.rows() > 0) {
      fine.for_depths([&](Index row, Index some, Index depth) {
        float* decoded = scratch.fine_keys + row * kKeyStep;
        packed.products(packed.rows_of(up, row, depth), some, 0, keys, decoded, kKeyStep, ahead);
      });
      fine.meet_decoded(first, keys, scratch.scores);
    }
    if (size.rope_dim > 0 && !packed.rope()) {
      const Rows rope = size.split == size.rank
                            ? read_rows(p.part[1], at, keys, scratch.chunk.rope, scratch.chunk.rope_step)
                            : read_chunk(p, at, keys, scratch.chunk).rope;
      transpose(rope.data, keys, size.rope_dim, rope.step, scratch.keys, kKeyStep);
      meet_rope(size, queries, rows, scratch.keys, keys, scratch.scores, ahead);
    }
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    weigh(how, queries.sight, rows, scratch.scores, kKeyStep, part, 0);
    packed.weighted(rows, keys, scratch.scores, kKeyStep, part, ahead);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA

#endif
