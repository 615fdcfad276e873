// Attention over part of the cache: the fused kernel of the absorbed form, and of the expanded one.
//
// A CTA holds 16, 32 or 64 query rows, four warps for each 16 of them, and goes through its share of the keys in tiles
// of 64 or 32. A tile is read from memory once and used twice out of shared memory, as keys and as values: at 16 rows
// and 64 keys of 512 + 64 numbers that is
//     2 * 16 * 64 * (512 + 64 + 512) = 2.2 MFLOP (order 1 takes 512 more columns: 3.3)
//     74 KB from memory; from shared memory 74 KB of keys, 74 KB of queries (a warp loads all of its rows'; order 1
//     another 66) and 66 KB of values;
// so that an SM of an H100, which gets 14 bytes a cycle from memory and 128 from shared memory, waits for memory up to
// 32 query rows.
//
// Barriers of a tile: it has arrived (and is unpacked, and decoded); tops of all warps are known; weights are stored.
// With two stages the next tile's copies begin behind the first, when nobody uses any more what they overwrite; with
// one they wait for a barrier of their own.
#pragma once

#include "attend_decode.cuh"
#include "attend_state.cuh"

namespace mla_pass::cuda {

// Brings tiles and the queries that meet them into shared memory, one ahead where there are two stages.
template <class T, int kRows>
class Pipeline {
 public:
  MLA_DEVICE Pipeline(const Attend& p, const Work& work) : p_(p), work_(work), keys_(p, work), queries_(p, work) {}

  MLA_DEVICE const QueryRows<kRows>& queries() const { return queries_; }
  MLA_DEVICE std::uint16_t* tile(int i) const { return keys_.at(buffer(i)); }
  MLA_DEVICE std::uint16_t* varying(int tile) const { return queries_.varying(buffer_of(queries_.block_of(tile))); }

  MLA_DEVICE void begin() const {
    keys_.clear_pads();
    queries_.copy_fixed();
    queries_.copy_varying(queries_.block_of(work_.first_tile), buffer_of(queries_.block_of(work_.first_tile)));
    keys_.copy(work_.first_tile, 0);
    copy_commit();
  }

  // Makes the CTA's i-th tile ready and begins to copy the next one.
  MLA_DEVICE void next(int i) const {
    if (p_.stages == 1 && i > 0) {
      barrier();
      copy(i);
    }
    copy_wait<0>();
    barrier();
    const int at = work_.first_tile + i;
    if (!p_.shared.direct) {
      keys_.template unpack<T>(at);
      barrier();
    }
    if (p_.stages == 2 && i + 1 < work_.tiles) copy(i + 1);
    if (work_.groups == 0) return;
    decode_tile<T>(p_, work_, at * p_.tile, keys_.real(at), tile(i));
    barrier();
  }

 private:
  MLA_DEVICE int buffer(int i) const { return p_.stages == 2 ? i & 1 : 0; }
  MLA_DEVICE int buffer_of(int block) const { return p_.shared.varyings == 2 ? block & 1 : 0; }

  MLA_DEVICE void copy(int i) const {
    const int at = work_.first_tile + i, block = queries_.block_of(at);
    if (block != queries_.block_of(at - 1)) queries_.copy_varying(block, buffer_of(block));
    keys_.copy(at, buffer(i));
    copy_commit();
  }

  const Attend& p_;
  const Work& work_;
  const Keys keys_;
  const QueryRows<kRows> queries_;
};

template <class T, int kValues, int kRows>
MLA_DEVICE void attend(const Attend& p) {
  const Work& work = begin_work(p);
  if (work.bad) return;
  if (work.tiles == 0) {
    if (!p.resume) store_nothing(p, work);
    return;
  }
  const Pipeline<T, kRows> pipeline(p, work);
  const Scores<T, kRows> scores(p, work, pipeline.queries());
  State<T, kValues> state(p, work);
  pipeline.begin();
  if (p.resume) state.resume();
  for (int i = 0; i < work.tiles; ++i) {
    pipeline.next(i);
    float score[2][4];
    scores.score(work.first_tile + i, pipeline.tile(i), pipeline.varying(work.first_tile + i), score);
    state.weigh(score, scores.first_key());
    state.add(pipeline.tile(i));
  }
  state.store();
}

}  // namespace mla_pass::cuda
