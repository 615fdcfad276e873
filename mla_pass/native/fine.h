// Pairs whose blocks are too short to make latent queries for each (levels.h): their keys are decoded and turned.
//
// Counted per cached row in multiply-adds: 2 k for each pair and kv group, fewer where key_up ends in zeros, and then 2
// for each head. Keys lie with cached rows in the lanes, [dim][row], so that neither turning them nor meeting them with
// queries sums across lanes. Pairs come before groups: those of the finest blocks read the fewest columns.
#pragma once

#include "prepare.h"
#include "turn.h"

namespace mla_pass::MLA_PASS_ISA {

// Rows of a run that is decoded from the same columns: two tiles of the products.
constexpr Index kRunRows = 12;

template <class T>
class FinePairs {
 public:
  FinePairs(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, const AbsorbScratch& scratch)
      : p_(p), size_(p.size), tile_(tile), scratch_(scratch), pairs_(p.size.decoded), width_(queries.key_width) {
    if (pairs_ == 0) return;
    for_groups(size_, tile_, [&](const GroupRun&) { ++groups_; });
    Index place = 0;
    for_groups(size_, tile_, [&](const GroupRun& run) { read_up(run.group, place++); });
    for (Index& phase : phase_) phase = -1;
    turn_queries(queries);
  }

  // Rows of key_up that decode the pairs' keys, each key_width from the next, in `AbsorbScratch.fine_up`.
  Index rows() const { return groups_ * 2 * pairs_; }

  // Calls work(row, rows, depth) for runs of these rows that read the first `depth` columns of the latents.
  template <class Work>
  void for_depths(const Work& work) const {
    const Index step = greatest(1, kRunRows / (2 * groups_));
    for (Index pair = 0; pair < pairs_; pair += step) {
      const Index some = least(step, pairs_ - pair);
      work(pair * 2 * groups_, some * 2 * groups_, p_.depth[pair + some - 1]);
    }
  }

  // Adds to the scores s [rows][kKeyStep] of `keys` rows from cache row `first` on, whose latents are laid across.
  void meet(Index first, Index keys, const float* latents, float* s, Ahead& ahead) {
    if (pairs_ == 0) return;
    fill(scratch_.fine_keys, rows() * kKeyStep, 0.0f);
    for_depths([&](Index row, Index some, Index depth) {
      meet_keys(scratch_.fine_up + row * width_, some, width_, latents, depth, keys,
                scratch_.fine_keys + row * kKeyStep, ahead);
    });
    meet_decoded(first, keys, s);
  }

  // The same where `AbsorbScratch.fine_keys` [rows()][kKeyStep] holds the products of key_up and latents already.
  void meet_decoded(Index first, Index keys, float* s) {
    turn_keys(first, keys);
    const Index part = groups_ * kKeyStep;
    Index place = 0;
    Ahead nothing;
    for_groups(size_, tile_, [&](const GroupRun& run) {
      const float *query = scratch_.fine_query + run.row * 2 * pairs_, *decoded = fine_keys(0, place++);
      const Term<float> terms[2] = {
          {{query, 2 * pairs_, 1}, decoded, 2 * part, pairs_},
          {{query + pairs_, 2 * pairs_, 1}, decoded + part, 2 * part, pairs_},
      };
      sums(run.rows, keys, terms, 2, s + run.row * kKeyStep, kKeyStep, nothing);
    });
  }

 private:
  // The pairs' rows of key_up.
  void read_up(Index group, Index place) const {
    for (Index part = 0; part < 2; ++part) {
      for (Index i = 0; i < pairs_; ++i) {
        const T* from = p_.key_up + (group * size_.nope_dim + part * size_.pairs + i) * size_.key_rank;
        widen(from, scratch_.fine_up + ((i * 2 + part) * groups_ + place) * width_, size_.key_rank);
      }
    }
  }

  // The real parts of a pair's keys in the tile's group at `place`; its imaginary parts are groups_ rows on.
  float* fine_keys(Index pair, Index place) const {
    return scratch_.fine_keys + (pair * 2 * groups_ + place) * kKeyStep;
  }

  // Queries turned to their rows: (x + j y) exp(j theta row).
  void turn_queries(const Queries<T>& queries) const {
    for (Index token = 0; token < tile_.tokens; ++token) {
      const Index at = cache_row(size_, tile_, token) * size_.angles;
      for (Index head = 0; head < tile_.heads; ++head) {
        const Index row = row_at(tile_, head, token);
        const float *x = queries.dims + row * queries.width, *y = x + size_.pairs;
        float* out = scratch_.fine_query + row * 2 * pairs_;
        widen(x, out, pairs_);
        widen(y, out + pairs_, pairs_);
        rotate(out, out + pairs_, p_.cos + at, p_.sin + at, p_.band_index, pairs_);
      }
    }
  }

  // Keys, their mean added, turned: by what is the same in every chunk, and by the angle of the chunk's first row.
  void turn_keys(Index first, Index keys) {
    for (Index level = 0; level < size_.finest; ++level) {
      const Level& band = p_.level[level];
      know(level, first, keys);
      for (Index i = band.begin; i < band.end; ++i) {
        const Index at = first * size_.angles + p_.band_index[i];
        float cos[kKeyStep], sin[kKeyStep];
        turn_all(turn(i), turn(i) + kKeyStep, p_.cos[at], p_.sin[at], keys, cos, sin);
        turn_pair_of_groups(i, keys, cos, sin);
      }
    }
  }

  // What pairs of a level are turned by within a chunk: it depends on where its first block begins. No chunk has more
  // rows than the first.
  void know(Index level, Index first, Index keys) {
    const Level& band = p_.level[level];
    const Index phase = first % band.block;
    if (phase_[level] == phase) return;
    for (Index i = band.begin; i < band.end; ++i) {
      fill(turn(i), 2 * kKeyStep, 0.0f);
      make_turn(p_, i, band.block, first, first, keys, turn(i), turn(i) + kKeyStep);
    }
    phase_[level] = phase;
  }

  float* turn(Index pair) const { return scratch_.fine_turn + pair * 2 * kKeyStep; }

  void turn_pair_of_groups(Index pair, Index keys, const float* cos, const float* sin) const {
    Index place = 0;
    for_groups(size_, tile_, [&](const GroupRun& run) {
      const float* mean = p_.key_mean + run.group * size_.nope_dim + pair;
      float* re = fine_keys(pair, place++);
      turn_pair(re, re + groups_ * kKeyStep, mean[0], mean[size_.pairs], cos, sin, keys);
    });
  }

  const Problem<T>& p_;
  const Sizes& size_;
  const Tile& tile_;
  const AbsorbScratch& scratch_;
  const Index pairs_, width_;
  Index groups_ = 0;
  Index phase_[kMaxLevels];  // where in a block the chunk began whose turns of a level are at hand
};

}  // namespace mla_pass::MLA_PASS_ISA
