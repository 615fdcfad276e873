// Latent queries of the blocks that cached rows lie in: what meets the cache as it is stored.
//
// The key of an absorbed pair at a row of the cache is its latents pulled through key_up, its mean added, times
// exp(j theta b) (A0 + A1 (row - b)), b the first row of the pair's block. Moved to the query's side that is a query
// turned by conj(A) exp(j theta (query's row - b)) and pulled through key_up: a part that stands still within a block
// of the finest level (order 0) and one that counts times the rows from its beginning (order 1). All levels are made
// together, in one product over all absorbed pairs and all dims that no band turns: per block, head and order that is
// n k multiply-adds, and k numbers of 16 bits that are written and later read.
#pragma once

#include "product.cuh"
#include "seen.cuh"
#include "turn.cuh"

namespace mla_pass::cuda {

// A row of the product: a query of the group that meets a block.
struct BlockQuery {
  const float* dims;
  int block, row;     // of the launch's blocks; of the problem's query rows
  int first;          // cache row that the block begins at
  int ahead;          // the query's own cache row
};

struct AbsorbPlace {
  int order, group, sequence;  // sequence: of the launch
  int rows;                    // query rows of the group; the product has `blocks` times as many
};

MLA_DEVICE AbsorbPlace absorb_place(const Absorb& p) {
  const int z = block().z;
  return {z % p.orders, z / p.orders % p.groups, z / p.orders / p.groups, p.heads / p.groups * p.tokens};
}

MLA_DEVICE BlockQuery block_query(const Absorb& p, const AbsorbPlace& place, int total, int at) {
  const int block = at / place.rows, row = at % place.rows;
  const int head = place.group * (p.heads / p.groups) + row / p.tokens, token = row % p.tokens;
  const long long query =
      (static_cast<long long>(p.first_sequence + place.sequence) * p.tokens + token) * p.heads + head;
  return {p.dims + query * (p.nope_dim + p.rope_dim), block, head * p.tokens + token, p.begin + block * p.block,
          total - p.behind - p.tokens + token};
}

// What a pair of the query is multiplied by for the block that begins at `first`. The tables are read at the distance:
// only without a causal mask may a block lie ahead of the query.
MLA_DEVICE Complex query_turn(const Absorb& p, const BlockQuery& q, int pair, int order) {
  const int moved = p.bands.block[pair] > 0 ? q.first % p.bands.block[pair] : 0;
  const int distance = q.ahead - (q.first - moved);
  Complex turn = angle(p.tables, distance < 0 ? -distance : distance, p.bands.index[pair]);
  if (distance < 0) turn.im = -turn.im;
  const float* fit = p.bands.fit + pair * 4;
  const float by = static_cast<float>(moved);
  if (order == 1) return times(turn, {fit[2], -fit[3]});
  return times(turn, {fit[0] + by * fit[2], -(fit[1] + by * fit[3])});
}

// Numbers [k, k + count) of a row of the left operand: absorbed pairs, re and im side by side, then still dims.
// Returns what the keys' mean adds to them, this lane's share.
template <class T>
MLA_DEVICE float turn_query(const Absorb& p, const AbsorbPlace& place, const BlockQuery& q, int k, int count,
                            std::uint16_t* to) {
  const Bands& bands = p.bands;
  const int turning = 2 * (bands.pairs - bands.decoded), still = place.order == 0 ? p.nope_dim - 2 * bands.pairs : 0;
  const std::uint16_t* mean = p.key_mean + static_cast<long long>(place.group) * p.nope_dim;
  float sum = 0.0f;
  for (int i = lane() * 2; i < count; i += 64) {
    Complex x = {0.0f, 0.0f};
    if (k + i < turning) {
      const int pair = bands.decoded + (k + i) / 2;
      x = times({q.dims[pair], q.dims[bands.pairs + pair]}, query_turn(p, q, pair, place.order));
      sum += x.re * T::widen(mean[pair]) + x.im * T::widen(mean[bands.pairs + pair]);
    } else {
      const int dim = k + i - turning, at = 2 * bands.pairs + dim;
      if (dim < still) x.re = q.dims[at], sum += x.re * T::widen(mean[at]);
      if (dim + 1 < still) x.im = q.dims[at + 1], sum += x.im * T::widen(mean[at + 1]);
    }
    *reinterpret_cast<std::uint32_t*>(to + i) = T::pack(x.re, x.im);
  }
  return sum;
}

// Where a row's latent query goes, in rows of `varying`, which are entries of `mean`.
MLA_DEVICE long long varying_row(const Absorb& p, const AbsorbPlace& place, const BlockQuery& q) {
  const long long block = static_cast<long long>(place.sequence) * p.blocks + q.block;
  return (block * p.orders + place.order) * (p.heads * p.tokens) + q.row;
}

// Whether rows [first, end) of the product are of blocks that no query sees.
MLA_DEVICE bool unseen(const Absorb& p, const AbsorbPlace& place, const Span& span, int first, int end) {
  if (p.block == 0) return false;
  const Rows seen = seen_rows(span, p.tokens, p.behind, p.window, p.causal);
  return p.begin + first / place.rows * p.block >= seen.end ||
         p.begin + ((end - 1) / place.rows + 1) * p.block <= seen.first;
}

// Without key_up: dims are latent queries.
template <class T>
MLA_DEVICE void narrow_queries(const Absorb& p, const AbsorbPlace& place, int total, int first, int end) {
  for (int at = first + warp(); at < end; at += kProductThreads / 32) {
    const BlockQuery q = block_query(p, place, total, at);
    std::uint16_t* to = p.varying + varying_row(p, place, q) * p.key_width;
    for (int i = lane(); i < p.key_width; i += 32) to[i] = T::narrow(i < p.nope_dim ? q.dims[i] : 0.0f);
  }
}

template <class T>
MLA_DEVICE void absorb_product(const Absorb& p, const AbsorbPlace& place, int total, int first, int rows, int begin,
                               int end) {
  const Bands& bands = p.bands;
  const int turning = 2 * (bands.pairs - bands.decoded);
  const int depth = turning + (place.order == 0 ? p.nope_dim - 2 * bands.pairs : 0);
  const std::uint16_t* key_up = p.key_up + static_cast<long long>(place.group) * p.nope_dim * p.key_rank;
  const auto left = [&](int row, int k, int count, std::uint16_t* to) {
    if (first + row >= rows) return copy_row(to, nullptr, k, count, 0);
    const BlockQuery q = block_query(p, place, total, first + row);
    float mean = turn_query<T>(p, place, q, k, count, to);
    MLA_UNROLL
    for (int step = 16; step > 0; step /= 2) mean += shuffle_xor(mean, step);
    if (begin > 0 || lane() > 0) return;  // where columns are shared, the first CTA's
    float* out = p.mean + varying_row(p, place, q);
    *out = k == 0 ? mean : *out + mean;
  };
  const auto right = [&](int k) -> const std::uint16_t* {
    if (k >= depth) return nullptr;
    const int dim = k < turning ? bands.decoded + k / 2 + k % 2 * bands.pairs : 2 * bands.pairs + k - turning;
    return key_up + static_cast<long long>(dim) * p.key_rank;
  };
  const auto take = [&](int row, int at, float low, float high) {
    if (first + row >= rows) return;
    const BlockQuery q = block_query(p, place, total, first + row);
    store_pair<T>(p.varying + varying_row(p, place, q) * p.key_width, at, p.key_width, low, high);
  };
  product<T, Along::columns>(depth, begin, end, left, right, p.key_rank, take);
}

// grid (row tiles of a group's queries and all blocks, shares of columns, sequences * groups * orders)
template <class T>
MLA_DEVICE void absorb(const Absorb& p) {
  const AbsorbPlace place = absorb_place(p);
  const Span span = p.span[p.first_sequence + place.sequence];
  const int rows = place.rows * p.blocks, first = block().x * kProductRows;
  if (span.bad || unseen(p, place, span, first, min(first + kProductRows, rows))) return;
  if (!p.key_up) return narrow_queries<T>(p, place, span.total, first, min(first + kProductRows, rows));
  const int share = ceil_div(ceil_div(p.key_width, kProductColumns), grid().y) * kProductColumns;
  const int begin = block().y * share;
  absorb_product<T>(p, place, span.total, first, rows, begin, min(begin + share, p.key_width));
}

}  // namespace mla_pass::cuda
