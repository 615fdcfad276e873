// Keys and values of cached rows, decoded and turned, for queries enough to share them.
//
// Per row and group k n + w V multiply-adds and 6 m to turn; key_width + V numbers of 16 bits are written, and read
// again by every tile of queries.
#pragma once

#include "product.cuh"
#include "seen.cuh"
#include "stored.cuh"
#include "turn.cuh"

namespace mla_pass::cuda {

// A cached row's two parts.
struct CachedRow {
  const unsigned char *first, *second;
  MLA_DEVICE const unsigned char* part(int i) const { return i == 0 ? first : second; }
};

// Number i of the row.
template <class T>
MLA_DEVICE float cached_number(const Expand& p, const CachedRow& row, int i) {
  const int part = i < p.split ? 0 : 1;
  return stored_number<T>(p.part[part], row.part(part), part == 0 ? i : i - p.split);
}

// A warp writes numbers [begin, begin + count) of the row as 16 bits, zeros for those from `end` on.
template <class T>
MLA_DEVICE void unpack_row(const Expand& p, const CachedRow& row, int begin, int count, int end, std::uint16_t* to) {
  for (int i = lane() * 8; i < count; i += 32 * 8) {
    const int at = begin + i, last = min(at + 8, end), part = at < p.split ? 0 : 1;
    const bool whole = p.part[part].as == Stored::model && (part == 1 || last <= p.split);
    if (at >= end || whole) {
      const auto* numbers = reinterpret_cast<const std::uint16_t*>(row.part(part));
      copy_eight(to + i, at < end ? numbers : nullptr, part == 0 ? at : at - p.split, part == 0 ? end : end - p.split);
      continue;
    }
    for (int j = 0; j < 8; ++j) to[i + j] = at + j < end ? T::narrow(cached_number<T>(p, row, at + j)) : 0;
  }
}

// The CTA's rows, of one sequence and group.
struct ExpandPlace {
  int sequence, group;  // sequence: of the launch
  int first, rows;      // cache rows

  MLA_DEVICE CachedRow cached(const Expand& p, int row) const {
    const long long at = static_cast<long long>(p.first_sequence + sequence) * p.capacity + first + row;
    return {p.part[0].data + at * p.part[0].bytes, p.part[1].data + at * p.part[1].bytes};
  }
  MLA_DEVICE std::uint16_t* out(const Expand& p, int row) const {
    const long long problem = static_cast<long long>(sequence) * p.groups + group;
    return p.out + (problem * (p.end - p.begin) + first - p.begin + row) * p.step;
  }
};

// Numbers [begin, end) of every row into columns [column, column + width), then zeros.
template <class T>
MLA_DEVICE void copy_numbers(const Expand& p, const ExpandPlace& place, int begin, int end, int column, int width) {
  for (int row = warp(); row < place.rows; row += kProductThreads / 32) {
    const CachedRow cached = place.cached(p, row);
    std::uint16_t* to = place.out(p, row) + column;
    for (int i = lane(); i < width; i += 32) {
      to[i] = T::narrow(begin + i < end ? cached_number<T>(p, cached, begin + i) : 0.0f);
    }
  }
}

// Columns [0, n) of keys: pairs, re and im side by side, then still dims.
template <class T>
MLA_DEVICE void expand_keys(const Expand& p, const ExpandPlace& place) {
  const Bands& bands = p.bands;
  const int turning = 2 * bands.pairs;
  const std::uint16_t* key_up = p.key_up + static_cast<long long>(place.group) * p.nope_dim * p.key_rank;
  const std::uint16_t* mean = p.key_mean + static_cast<long long>(place.group) * p.nope_dim;
  const auto dim_of = [&](int column) { return column < turning ? column / 2 + column % 2 * bands.pairs : column; };
  const auto left = [&](int row, int k, int count, std::uint16_t* to) {
    if (row >= place.rows) return copy_row(to, nullptr, k, count, 0);
    unpack_row<T>(p, place.cached(p, row), k, count, p.key_rank, to);
  };
  const auto right = [&](int column) {
    return column < p.nope_dim ? key_up + static_cast<long long>(dim_of(column)) * p.key_rank : nullptr;
  };
  const auto take = [&](int row, int at, float low, float high) {
    if (row >= place.rows || at >= p.nope_dim) return;
    Complex key = {low + T::widen(mean[dim_of(at)]), high};
    if (at + 1 < p.nope_dim) key.im += T::widen(mean[dim_of(at + 1)]);
    if (at < turning) key = times(key, key_turn(p.tables, bands, at / 2, place.first + row));
    store_pair<T>(place.out(p, row), at, p.nope_dim, key.re, key.im);
  };
  product<T, Along::depth>(p.key_rank, 0, p.nope_dim, left, right, p.key_rank, take);
}

template <class T>
MLA_DEVICE void expand_values(const Expand& p, const ExpandPlace& place) {
  const std::uint16_t* value_up = p.value_up + static_cast<long long>(place.group) * p.value_rank * p.value_dim;
  const int width = p.step - p.key_width;
  const auto left = [&](int row, int k, int count, std::uint16_t* to) {
    if (row >= place.rows) return copy_row(to, nullptr, k, count, 0);
    unpack_row<T>(p, place.cached(p, row), p.value_offset + k, count, p.rank, to);
  };
  const auto right = [&](int k) {
    return k < p.value_rank ? value_up + static_cast<long long>(k) * p.value_dim : nullptr;
  };
  const auto take = [&](int row, int at, float low, float high) {
    if (row < place.rows) store_pair<T>(place.out(p, row) + p.key_width, at, width, low, high);
  };
  product<T, Along::columns>(p.value_rank, 0, width, left, right, p.value_dim, take);
}

// grid (tiles of cache rows, groups * {keys, values}, sequences)
template <class T>
MLA_DEVICE void expand(const Expand& p) {
  const int first = p.begin + block().x * kProductRows;
  const ExpandPlace place = {block().z, block().y / 2, first, min(kProductRows, p.end - first)};
  const Span span = p.span[p.first_sequence + place.sequence];
  const Rows seen = seen_rows(span, p.tokens, p.behind, p.window, p.causal);
  if (span.bad || first >= seen.end || first + place.rows <= seen.first) return;
  if (block().y % 2 == 1) {
    if (p.value_up) return expand_values<T>(p, place);
    return copy_numbers<T>(p, place, p.value_offset, p.rank, p.key_width, p.step - p.key_width);
  }
  if (p.key_up) {
    expand_keys<T>(p, place);
  } else {
    copy_numbers<T>(p, place, 0, p.nope_dim, 0, p.nope_dim);
  }
  copy_numbers<T>(p, place, p.rank, p.rank + p.rope_dim, p.nope_dim, p.key_width - p.nope_dim);
}

}  // namespace mla_pass::cuda
