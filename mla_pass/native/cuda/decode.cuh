// The context: joined sums of latents, pulled through value_up. A sequence whose sums are NaN stays NaN.
#pragma once

#include "map.cuh"

namespace mla_pass::cuda {

// grid (row tiles of a group, column tiles, groups)
template <class T>
MLA_DEVICE void decode(const Decode& p) {
  const int group = block().z, per_group = p.heads / p.groups, rows = p.batch * p.tokens * per_group;
  const int first = block().x * kProductRows, column = block().y * kProductColumns;
  const std::uint16_t* weights = p.value_up + static_cast<long long>(group) * p.value_rank * p.value_dim;
  const auto left = [&](int row, int k, int count, std::uint16_t* to) {
    const HeadRow at = head_row(first + row, p.tokens, per_group, group);
    const long long from = (static_cast<long long>(at.sequence) * p.tokens + at.token) * p.heads + at.head;
    copy_row(to, first + row < rows ? p.joined + from * p.value_rank : nullptr, k, count, p.value_rank);
  };
  const auto right = [&](int k) {
    return k < p.value_rank ? weights + static_cast<long long>(k) * p.value_dim : nullptr;
  };
  const auto take = [&](int row, int at, float low, float high) {
    if (first + row >= rows) return;
    const HeadRow place = head_row(first + row, p.tokens, per_group, group);
    const long long to = (static_cast<long long>(place.sequence) * p.fresh + place.token) * p.heads + place.head;
    store_pair<T>(p.context + to * p.value_dim, at, p.value_dim, low, high);
  };
  product<T, Along::columns>(p.value_rank, column, min(column + kProductColumns, p.value_dim), left, right,
                             p.value_dim, take);
}

}  // namespace mla_pass::cuda
