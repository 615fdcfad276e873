// Queries to [un-rotated dims | rope dims]: query times query_map, kept as float32.
#pragma once

#include "product.cuh"

namespace mla_pass::cuda {

// Where heads of a kv group have their queries: row = (sequence, token of the run, head of the group).
struct HeadRow {
  int sequence, token, head;
};

MLA_DEVICE HeadRow head_row(int row, int tokens, int per_group, int group) {
  const int place = row / per_group;
  return {place / tokens, place % tokens, group * per_group + row % per_group};
}

// Queries as they are. grid (B * tokens * H rows, kQueryWarps at a time)
template <class T>
MLA_DEVICE void widen_queries(const Map& p) {
  const int row = block().x * kQueryWarps + warp(), place = row / p.heads, head = row % p.heads;
  if (place >= p.batch * p.tokens) return;
  const long long from = static_cast<long long>(place / p.tokens) * p.fresh + place % p.tokens;
  const std::uint16_t* query = p.query + (from * p.heads + head) * p.width;
  float* dims = p.dims + static_cast<long long>(row) * p.width;
  for (int i = lane(); i < p.width; i += 32) dims[i] = T::widen(query[i]);
}

// grid (row tiles of a group, column tiles, groups)
template <class T>
MLA_DEVICE void map(const Map& p) {
  if (!p.query_map) return widen_queries<T>(p);
  const int group = block().z, per_group = p.heads / p.groups, rows = p.batch * p.tokens * per_group;
  const int first = block().x * kProductRows, column = block().y * kProductColumns;
  const std::uint16_t* weights = p.query_map + static_cast<long long>(group) * p.query_dim * p.width;
  const auto left = [&](int row, int k, int count, std::uint16_t* to) {
    const HeadRow at = head_row(first + row, p.tokens, per_group, group);
    const long long from = (static_cast<long long>(at.sequence) * p.fresh + at.token) * p.heads + at.head;
    copy_row(to, first + row < rows ? p.query + from * p.query_dim : nullptr, k, count, p.query_dim);
  };
  const auto right = [&](int k) {
    return k < p.query_dim ? weights + static_cast<long long>(k) * p.width : nullptr;
  };
  const auto take = [&](int row, int at, float low, float high) {
    if (first + row >= rows) return;
    const HeadRow place = head_row(first + row, p.tokens, per_group, group);
    float* dims = p.dims +
                  ((static_cast<long long>(place.sequence) * p.tokens + place.token) * p.heads + place.head) * p.width;
    if (at < p.width) dims[at] = low;
    if (at + 1 < p.width) dims[at + 1] = high;
  };
  product<T, Along::columns>(p.query_dim, column, min(column + kProductColumns, p.width), left, right, p.width, take);
}

}  // namespace mla_pass::cuda
