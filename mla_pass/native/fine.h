// Pairs whose blocks are too short to make latent queries for each (levels.h): their keys are decoded and turned.
//
// Counted per cached row in multiply-adds: 2 k for each pair and kv group, and then 2 for each head. Keys lie with cached rows in the lanes, [dim][row], so that neither turning them nor meeting
// them with queries sums across lanes.
#pragma once

#include "prepare.h"
#include "turn.h"

namespace mla_pass::MLA_PASS_ISA {

template <class T>
class FinePairs {
 public:
  FinePairs(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, const AbsorbScratch& scratch)
      : p_(p), size_(p.size), tile_(tile), scratch_(scratch), pairs_(p.size.decoded), width_(queries.key_width) {
    if (pairs_ == 0) return;
    for_groups(size_, tile_, [&](const GroupRun& run) { read_up(run.group, groups_++); });
    if (fills_lanes(rows())) {
      transpose(scratch_.fine_up, rows(), size_.key_rank, width_, scratch_.fine_across, whole_vectors(rows()));
    }
    turn_queries(queries);
  }

  // Rows of key_up that decode the pairs' keys, each key_width from the next, in `AbsorbScratch.fine_up`.
  Index rows() const { return groups_ * 2 * pairs_; }
  static constexpr Index kStep = kChunk + kPad;

  // Adds to the scores s [rows][step] of `keys` rows from cache row `first` on, whose latents are given.
  void meet(Index first, Index keys, const float* latent, Index latent_step, float* s, Index step,
            Ahead& ahead) const {
    if (pairs_ == 0) return;
    if (fills_lanes(rows())) {
      const Span span = {scratch_.fine_across, whole_vectors(rows()), latent, latent_step, size_.key_rank};
      dots_across(&span, 1, rows(), keys, scratch_.fine_keys, kStep, ahead);
    } else {
      const Span span = {scratch_.fine_up, width_, latent, latent_step, size_.key_rank};
      dots(&span, 1, rows(), keys, scratch_.fine_keys, kStep, ahead);
    }
    meet_decoded(first, keys, s, step);
  }

  // The same where `AbsorbScratch.fine_keys` [rows()][kStep] holds the products of key_up and latents already.
  void meet_decoded(Index first, Index keys, float* s, Index step) const {
    turn_keys(first, keys);
    Index place = 0;
    for_groups(size_, tile_, [&](const GroupRun& run) {
      const Left query = {scratch_.fine_query + run.row * 2 * pairs_, 2 * pairs_, 1};
      sums(run.rows, keys, 2 * pairs_, query, scratch_.fine_keys + place++ * 2 * pairs_ * kStep, kStep,
           s + run.row * step, step);
    });
  }

 private:
  // The pairs' rows of key_up, real parts before imaginary parts.
  void read_up(Index group, Index place) const {
    for (Index part = 0; part < 2; ++part) {
      for (Index i = 0; i < pairs_; ++i) {
        const T* from = p_.key_up + (group * size_.nope_dim + part * size_.pairs + i) * size_.key_rank;
        widen(from, scratch_.fine_up + ((place * 2 + part) * pairs_ + i) * width_, size_.key_rank);
      }
    }
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

  // Keys, their mean added, turned.
  void turn_keys(Index first, Index keys) const {
    for (Index level = 0; level < size_.finest; ++level) {
      for (Index i = p_.level[level].begin; i < p_.level[level].end; ++i) {
        float cos[kStep] = {}, sin[kStep] = {};
        make_turn(p_, i, p_.level[level].block, first, keys, cos, sin);
        Index place = 0;
        for_groups(size_, tile_, [&](const GroupRun& run) {
          const float* mean = p_.key_mean + run.group * size_.nope_dim + i;
          float* re = scratch_.fine_keys + (place++ * 2 * pairs_ + i) * kStep;
          turn_pair(re, re + pairs_ * kStep, mean[0], mean[size_.pairs], cos, sin, keys);
        });
      }
    }
  }

  const Problem<T>& p_;
  const Sizes& size_;
  const Tile& tile_;
  const AbsorbScratch& scratch_;
  const Index pairs_, width_;
  Index groups_ = 0;
};

}  // namespace mla_pass::MLA_PASS_ISA
