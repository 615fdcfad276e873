// How `attend` uses shared memory: what the plan fills in and a kernel finds its offsets in.
//
//   tile      keys as rows of 16-bit columns, see Attend in params.h; two of them where copies go straight into it
//   raw       a run of stored bytes of each part, that copies go to where they do not
//   varying   query rows against the first columns, an order each; two of them where blocks change under way
//   fixed     query rows against the other columns
//   weights   query rows by keys, 16 bits
//   tops      what a warp's keys score at the most, for each of its rows
//   sights    which keys a query row sees
//   work      what the CTA does
//
// Rows that matrices are loaded from are an odd number of 16-byte units apart, so that the eight rows of a matrix lie
// in different banks.
#pragma once

#include "params.h"
#include "sizes.h"

namespace mla_pass::cuda {

// Warps that share 16 query rows: each meets a quarter of a tile's keys and sums a quarter of the value columns.
constexpr int kQuarters = 4;
// Query rows of a matrix instruction.
constexpr int kMatrixRows = 16;

// Rows [first, end) of the cache that a query sees, hidden ones in their midst aside.
struct Sight {
  std::int32_t first, end;
};

// The same for all threads of a CTA.
struct Work {
  std::int32_t sequence;
  std::int32_t problem;              // of the launch
  std::int32_t state;                // the problem, counted from the first sequence of all
  std::int32_t row, rows;            // query rows [row, row + rows) of the problem
  std::int32_t first_group, groups;  // kv groups that they are of, where there are decoded dims
  std::int32_t first_tile, tiles;    // the split's, counted in tiles from cache row 0
  std::int32_t bad;
  Sight seen;                        // by any of its rows, in this launch
};

// Whether keys are copied straight into the tile: 16-bit rows that 16-byte copies neither begin nor end amid. All else
// is copied as it lies and unpacked.
MLA_BOTH constexpr bool whole_units(const Part& part) {
  return part.numbers == 0 || (part.as == Stored::model && part.bytes % 16 == 0);
}
MLA_BOTH constexpr bool direct(const Attend& p) {
  return whole_units(p.part[0]) &&
         (p.parts == 1 || (whole_units(p.part[1]) && p.split % 8 == 0 && p.rank % 8 == 0));
}

// The most kv groups that the rows of a CTA are of, where these differ by group: decoded dims.
MLA_BOTH constexpr int tile_groups(const Attend& p) {
  if (p.fine_width == 0) return 0;
  const int group_rows = p.per_group * p.tokens, rows = least(p.tile_rows, p.rows);
  const bool aligned = group_rows % rows == 0 || rows % group_rows == 0;
  return least(p.heads / p.per_group, aligned ? ceil_div(rows, group_rows) : (rows - 2) / group_rows + 2);
}

MLA_BOTH constexpr int shared_raw_bytes(const Part& part, int tile) {
  return up16(tile * part.bytes) + 16;  // whole units of 16 bytes around a run that begins and ends anywhere
}

// For a kernel of `rows` query rows; all other parameters are to be there.
MLA_BOTH constexpr AttendShared attend_shared(const Attend& p, int rows) {
  AttendShared s{};
  s.direct = direct(p);
  s.rope_column = p.parts == 1 ? up16(p.part[0].numbers) : up16(p.rank);
  s.fine_column = s.rope_column + p.rope_width;
  s.columns = s.fine_column + up16(tile_groups(p) * p.fine_width);
  s.tile_step = s.columns + 8;
  s.varying_step = p.key_width + 8;
  s.fixed_width = s.columns - s.rope_column;
  s.fixed_step = s.fixed_width + 8;
  s.weight_step = p.tile + 8;
  s.tiles = s.direct ? p.stages : 1;
  s.varyings = p.blocks > 1 ? p.stages : 1;
  s.tile_bytes = p.tile * s.tile_step * 2;
  s.varying_bytes = p.key_width > 0 ? p.orders * rows * s.varying_step * 2 : 0;
  s.raw[0] = s.tiles * s.tile_bytes;
  s.raw[1] = s.raw[0] + (s.direct ? 0 : shared_raw_bytes(p.part[0], p.tile));
  int at = s.raw[1] + (s.direct || p.parts == 1 ? 0 : shared_raw_bytes(p.part[1], p.tile));
  s.varying = at;
  at += s.varyings * s.varying_bytes;
  s.fixed = at;
  at += s.fixed_width > 0 ? rows * s.fixed_step * 2 : 0;
  s.weights = at;
  at += rows * s.weight_step * 2;
  s.tops = at;
  s.sights = s.tops + rows * kQuarters * static_cast<int>(sizeof(float));
  s.work = s.sights + rows * static_cast<int>(sizeof(Sight));
  s.total = s.work + static_cast<int>(sizeof(Work));
  return s;
}

// `combine`: columns of a warp, warps of a query row, CTAs of 128 threads.
constexpr int kCombineColumns = 128;
MLA_BOTH constexpr int combine_chunks(const Combine& p) { return ceil_div(p.value_dim, kCombineColumns); }
MLA_BOTH constexpr int combine_grid(const Combine& p) {
  return ceil_div(p.batch * p.groups_apart * p.rows * combine_chunks(p), 4);
}

}  // namespace mla_pass::cuda
