// Products of a kv group's query heads with a matrix of the group: queries by query_map, joined sums by value_up.
#pragma once

#include "product.cuh"

namespace mla_pass::cuda {

// Where a row lies: row = (sequence, token of the run, head of the group).
struct HeadRow {
  int sequence, token, head;

  // Of [B][tokens][H] vectors, the row's.
  MLA_DEVICE long long of(int tokens, int heads) const {
    return (static_cast<long long>(sequence) * tokens + token) * heads + head;
  }
};

MLA_DEVICE HeadRow head_row(int row, int tokens, int per_group, int group) {
  const int place = row / per_group;
  return {place / tokens, place % tokens, group * per_group + row % per_group};
}

// Vectors [B][left_tokens][H][inner], of which the first `tokens` of a sequence are meant, times [G][inner][columns].
// P has heads, groups, batch and tokens. take(HeadRow, column, number, number at column + 1) for every real row.
//
// grid (row tiles of a group, column tiles, groups)
template <class T, class P, class Take>
MLA_DEVICE void product_of_heads(const P& p, const std::uint16_t* vectors, int left_tokens, int inner,
                                 const std::uint16_t* matrices, int columns, const Take& take) {
  const int group = block().z, per_group = p.heads / p.groups, rows = p.batch * p.tokens * per_group;
  const int first = block().x * kProductRows, column = block().y * kProductColumns;
  const std::uint16_t* matrix = matrices + static_cast<long long>(group) * inner * columns;
  const auto place = [&](int row) { return head_row(first + row, p.tokens, per_group, group); };
  const auto left = [&](int row, int k, int count, std::uint16_t* to) {
    const bool real = first + row < rows;
    copy_row(to, real ? vectors + place(row).of(left_tokens, p.heads) * inner : nullptr, k, count, inner);
  };
  const auto right = [&](int k) { return k < inner ? matrix + static_cast<long long>(k) * columns : nullptr; };
  const auto take_real = [&](int row, int at, float low, float high) {
    if (first + row < rows) take(place(row), at, low, high);
  };
  product<T, Along::columns>(inner, column, min(column + kProductColumns, columns), left, right, columns, take_real);
}

}  // namespace mla_pass::cuda
