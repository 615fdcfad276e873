// Queries meet a tile's keys, and products become scores.
//
// A warp meets a quarter of the keys, 16 or 8, with its 16 query rows. For every 16 columns of 16 keys it loads a
// matrix of keys, and one of queries for each order, 512 bytes each.
#pragma once

#include "attend_copy.cuh"

namespace mla_pass::cuda {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");
constexpr float kLog2e = 1.44269504f;

// Two products of 16 query rows and 8 keys for each order.
using Products = float[2][2][4];

// How a warp meets its keys: `steps` times 16 columns, from this lane's rows of queries and keys on.
struct Sixteen {
  // 8 keys in each product.
  template <class T, int kOrders>
  MLA_DEVICE static void meet(const std::uint16_t* query, int order_step, const std::uint16_t* key, int steps,
                              Products& d) {
    for (int k = 0; k < steps; ++k, query += 16, key += 16) {
      std::uint32_t b[4];
      load_matrices(b, key);
      MLA_UNROLL
      for (int order = 0; order < kOrders; ++order) {
        std::uint32_t a[4];
        load_matrices(a, query + order * order_step);
        mma<T>(d[order][0], a, b[0], b[1]);
        mma<T>(d[order][1], a, b[2], b[3]);
      }
    }
  }
};

struct Eight {
  // The same 8 keys in both: columns alternate between them.
  template <class T, int kOrders>
  MLA_DEVICE static void meet(const std::uint16_t* query, int order_step, const std::uint16_t* key, int steps,
                              Products& d) {
    for (int k = 0; k < steps; k += 2, query += 32, key += 32) {
      const bool both = k + 1 < steps;
      std::uint32_t b[4];
      load_matrices(b, both ? key : key - lane() / 16 * 16);  // no row goes on behind its last column
      MLA_UNROLL
      for (int order = 0; order < kOrders; ++order) {
        std::uint32_t a[4];
        load_matrices(a, query + order * order_step);
        mma<T>(d[order][0], a, b[0], b[1]);
        if (!both) continue;
        load_matrices(a, query + order * order_step + 16);
        mma<T>(d[order][1], a, b[2], b[3]);
      }
    }
  }

  MLA_DEVICE static void join(Products& d) {
    MLA_UNROLL
    for (int x = 0; x < 4; ++x) {
      d[0][0][x] += d[0][1][x];
      d[1][0][x] += d[1][1][x];
    }
  }
};

template <class T, int kRows>
class Scores {
 public:
  MLA_DEVICE Scores(const Attend& p, const Work& work, const QueryRows<kRows>& queries)
      : p_(p), work_(work), queries_(queries) {}

  // Keys that the warp meets, the first of them in the tile.
  MLA_DEVICE int first_key() const { return warp() % kQuarters * (p_.tile / kQuarters); }

  // Scores in units of log2, of 8 keys each; -inf where there is nothing to be seen.
  MLA_DEVICE void score(int tile, const std::uint16_t* keys, const std::uint16_t* varying, float (&score)[2][4]) const {
    const int block = queries_.block_of(tile);
    float mean[2][2];
    read_means(block, mean);
    Products product{};
    meet(keys, varying, product);
    const int first = tile * p_.tile + first_key() + lane() % 4 * 2;  // cache row of the lane's first key
    const float offset = static_cast<float>(first - p_.begin - block * p_.block);
    each(score, [&](float& s, int i, int x, int key) {
      s = product[0][i][x] + mean[0][x / 2];
      if (p_.orders == 2) s += (offset + static_cast<float>(key)) * (product[1][i][x] + mean[1][x / 2]);
      s *= p_.scale;
    });
    if (p_.softcap > 0) cap(score);
    if (p_.bias != nullptr) add_bias(first, score);
    hide(first, score);
  }

 private:
  // What the keys' mean adds to the products, [order][row].
  MLA_DEVICE void read_means(int block, float (&mean)[2][2]) const {
    MLA_UNROLL
    for (int order = 0; order < 2; ++order) {
      MLA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool given = p_.mean != nullptr && order < p_.orders && row_of(i) < work_.rows;
        mean[order][i] = given ? p_.mean[queries_.first(block, order) + row_of(i)] : 0.0f;
      }
    }
  }

  MLA_DEVICE void meet(const std::uint16_t* keys, const std::uint16_t* varying, Products& d) const {
    const int row = warp() / kQuarters * kMatrixRows + lane() % 16, right = lane() / 16 * 8;
    const std::uint16_t* query = varying + row * p_.shared.varying_step + right;
    const std::uint16_t* fixed = queries_.fixed() + row * p_.shared.fixed_step + right;
    if (p_.tile == 64) {
      const int key = first_key() + lane() % 8 + lane() / 16 * 8;
      meet_all<Sixteen>(query, fixed, keys + key * p_.shared.tile_step + lane() / 8 % 2 * 8, d);
    } else {
      const int key = first_key() + lane() % 8;
      meet_all<Eight>(query, fixed, keys + key * p_.shared.tile_step + lane() / 8 * 8, d);
      Eight::join(d);
    }
  }

  template <class Keys>
  MLA_DEVICE void meet_all(const std::uint16_t* query, const std::uint16_t* fixed, const std::uint16_t* key,
                           Products& d) const {
    const int steps = p_.key_width / 16;
    if (p_.orders == 2) {
      Keys::template meet<T, 2>(query, queries_.order_step(), key, steps, d);
    } else {
      Keys::template meet<T, 1>(query, 0, key, steps, d);
    }
    Keys::template meet<T, 1>(fixed, 0, key + p_.shared.rope_column, p_.shared.fixed_width / 16, d);
  }

  // Calls visit(score, i, x, key) for all scores of a lane: keys are counted from its first one; x / 2 is the row.
  template <class Visit>
  MLA_DEVICE static void each(float (&score)[2][4], const Visit& visit) {
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) {
      MLA_UNROLL
      for (int x = 0; x < 4; ++x) visit(score[i][x], i, x, i * 8 + x % 2);
    }
  }

  MLA_DEVICE void cap(float (&score)[2][4]) const {
    const float inverse = 1.0f / p_.softcap;
    each(score, [&](float& s, int, int, int) { s = p_.softcap * tanh(s * inverse); });
  }

  // Where a row sees nothing there may be no bias either.
  MLA_DEVICE void add_bias(int first, float (&score)[2][4]) const {
    const std::uint16_t* bias[2];
    Sight sight[2];
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = work_.row + row_of(i), head = work_.problem % p_.groups_apart * p_.heads + head_of(p_, row);
      bias[i] = p_.bias + work_.sequence * p_.bias_batch + head * p_.bias_head + token_of(p_, row) * p_.bias_token;
      sight[i] = stored_sight(p_, work_, row_of(i));
    }
    each(score, [&](float& s, int, int x, int key) {
      const int row = first + key;
      if (row >= sight[x / 2].first && row < sight[x / 2].end) s += T::widen(bias[x / 2][row]);
    });
  }

  // To units of log2, and what is not seen to -inf.
  MLA_DEVICE void hide(int first, float (&score)[2][4]) const {
    const Sight sight[2] = {stored_sight(p_, work_, row_of(0)), stored_sight(p_, work_, row_of(1))};
    const std::int64_t* mask =
        p_.padding_mask == nullptr ? nullptr : p_.padding_mask + static_cast<long long>(work_.sequence) * p_.mask_step;
    each(score, [&](float& s, int i, int x, int key) {
      const int row = first + key;
      const bool seen = i * 8 < p_.tile / kQuarters && row >= sight[x / 2].first && row < sight[x / 2].end &&
                        (mask == nullptr || mask[row] != 0);
      s = seen ? s * kLog2e : -kInfinity;
    });
  }

  const Attend& p_;
  const Work& work_;
  const QueryRows<kRows>& queries_;
};

}  // namespace mla_pass::cuda
