// What a CTA of `attend` does: its query rows, the cache rows that they see, its share of these. It lies in shared
// memory, where one thread works it out: registers are for products.
#pragma once

#include "attend_shared.h"
#include "simt.h"

namespace mla_pass::cuda {

MLA_DEVICE int token_of(const Attend& p, int row) { return p.token_major ? row / p.heads : row % p.tokens; }
MLA_DEVICE int head_of(const Attend& p, int row) { return p.token_major ? row % p.heads : row / p.tokens; }

MLA_DEVICE Sight sight_of(const Attend& p, const Span& span, int token) {
  const int row = span.total - p.behind - p.tokens + token;
  return {max(max(span.first, p.begin), p.window > 0 ? row - p.window + 1 : 0),
          min(min(span.end, p.end), p.causal ? row + 1 : span.total)};
}

// All tokens that a run of query rows is of lie from the first row's to the last one's, unless it is of several heads.
MLA_DEVICE Sight seen_by(const Attend& p, const Span& span, int row, int rows) {
  const int last = row + rows - 1;
  const bool some = p.token_major || row / p.tokens == last / p.tokens;
  const Sight from = sight_of(p, span, some ? token_of(p, row) : 0);
  const Sight to = sight_of(p, span, some ? token_of(p, last) : p.tokens - 1);
  return {from.first, to.end};
}

MLA_DEVICE Work work_of(const Attend& p) {
  Work w{};
  w.problem = block().y;
  w.sequence = p.first_sequence + w.problem / p.groups_apart;
  w.state = p.first_sequence * p.groups_apart + w.problem;
  w.row = block().x * p.tile_rows;
  w.rows = min(p.tile_rows, p.rows - w.row);
  if (p.fine_width > 0) {
    w.first_group = head_of(p, w.row) / p.per_group;
    w.groups = head_of(p, w.row + w.rows - 1) / p.per_group - w.first_group + 1;
  }
  const Span& span = p.span[w.sequence];
  w.bad = span.bad;
  w.seen = seen_by(p, span, w.row, w.rows);
  if (w.seen.first >= w.seen.end) return w;
  const int first = w.seen.first / p.tile, tiles = ceil_div(w.seen.end, p.tile) - first, split = block().z;
  w.first_tile = first + tiles * split / p.splits;
  w.tiles = first + tiles * (split + 1) / p.splits - w.first_tile;
  return w;
}

// All threads of the CTA, before anything else.
MLA_DEVICE const Work& begin_work(const Attend& p) {
  Work& work = *reinterpret_cast<Work*>(shared_memory() + p.shared.work);
  if (thread().x == 0) work = work_of(p);
  barrier();
  auto* sights = reinterpret_cast<Sight*>(shared_memory() + p.shared.sights);
  for (int row = thread().x; row < work.rows; row += threads()) {
    sights[row] = sight_of(p, p.span[work.sequence], token_of(p, work.row + row));
  }
  return work;
}

// The two query rows that a thread holds numbers of, counted in the CTA.
MLA_DEVICE int row_of(int i) { return warp() / kQuarters * kMatrixRows + lane() / 4 + 8 * i; }

// What one of the CTA's query rows sees, once a barrier is behind `begin_work`.
MLA_DEVICE Sight stored_sight(const Attend& p, const Work& work, int row) {
  if (row >= work.rows) return {0, 0};
  return reinterpret_cast<const Sight*>(shared_memory() + p.shared.sights)[row];
}

}  // namespace mla_pass::cuda
