// What a split keeps of each query row: the running sum of values, the largest score so far and the mass.
//
// A warp sums a quarter of the value columns: every fourth run of 16, so that few columns keep all warps busy, too. A
// tile's sum loads each value once for 16 rows, 64 KB of 512 columns, and the weights once a warp.
#pragma once

#include "attend_scores.cuh"

namespace mla_pass::cuda {

// Of at most kValues columns. A thread holds numbers of its two query rows.
template <class T, int kValues>
class State {
 public:
  MLA_DEVICE State(const Attend& p, const Work& work) : p_(p), work_(work) {}

  // From where an earlier launch left off. A row's mass is then with one of the threads that share it.
  MLA_DEVICE void resume() {
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (row_of(i) >= work_.rows) continue;
      const long long at = place(i);
      const float mass = p_.mass[at];
      top_[i] = p_.top[at];
      if (keeps_mass()) mass_[i] = mass;
      if (mass == 0.0f) continue;  // there is no sum yet
      each_column(i, [&](int column, float& sum) { sum = p_.sum[at * p_.sum_width + column]; });
    }
  }

  // Scores become weights in shared memory, which go by the largest of all so far. All threads of the CTA.
  MLA_DEVICE void weigh(float (&score)[2][4], int first_key) {
    exchange_tops(score);
    auto* weights = reinterpret_cast<std::uint16_t*>(shared_memory() + p_.shared.weights);
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float top = joined_top(i), base = top == -kInfinity ? 0.0f : top, shrink = fast_exp2(top_[i] - base);
      top_[i] = top;
      mass_[i] *= shrink;
      MLA_UNROLL
      for (int j = 0; j < kValues / 64; ++j) {
        MLA_UNROLL
        for (int x = 0; x < 4; ++x) sum_[j][x / 2][i * 2 + x % 2] *= shrink;
      }
      std::uint16_t* row = weights + row_of(i) * p_.shared.weight_step + first_key + lane() % 4 * 2;
      MLA_UNROLL
      for (int j = 0; j < 2; ++j) {
        if (j * 8 >= p_.tile / kQuarters) continue;
        const float low = fast_exp2(score[j][i * 2] - base), high = fast_exp2(score[j][i * 2 + 1] - base);
        mass_[i] += low + high;
        *reinterpret_cast<std::uint32_t*>(row + j * 8) = T::pack(low, high);
      }
    }
    barrier();
  }

  // Adds a tile's values, weighed.
  MLA_DEVICE void add(const std::uint16_t* tile) {
    const auto* weights = reinterpret_cast<const std::uint16_t*>(shared_memory() + p_.shared.weights) +
                          (warp() / kQuarters * kMatrixRows + lane() % 16) * p_.shared.weight_step + lane() / 16 * 8;
    const std::uint16_t* values = tile + lane() % 16 * p_.shared.tile_step + (p_.value_column & ~7) + lane() / 16 * 8;
    for (int k = 0; k < p_.tile; k += 16) {
      std::uint32_t weight[4];
      load_matrices(weight, weights + k);
      MLA_UNROLL
      for (int j = 0; j < kValues / 64; ++j) {
        if (first_column(j) >= shift() + p_.value_dim) continue;
        std::uint32_t value[4];
        load_matrices_transposed(value, values + k * p_.shared.tile_step + first_column(j));
        mma<T>(sum_[j][0], weight, value[0], value[1]);
        mma<T>(sum_[j][1], weight, value[2], value[3]);
      }
    }
  }

  // Leaves all to `combine`, or to the next launch. All threads of the CTA.
  MLA_DEVICE void store() {
    join_masses();
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (row_of(i) >= work_.rows) continue;
      const long long at = place(i);
      if (keeps_mass()) {
        p_.top[at] = top_[i];
        p_.mass[at] = mass_[i];
      }
      each_column(i, [&](int column, float& sum) { p_.sum[at * p_.sum_width + column] = sum; });
    }
  }

 private:
  MLA_DEVICE static bool keeps_mass() { return warp() % kQuarters == 0 && lane() % 4 == 0; }

  // Values begin so many columns behind the multiple of 8 that matrices are loaded from.
  MLA_DEVICE int shift() const { return p_.value_column & 7; }
  MLA_DEVICE static int first_column(int j) { return (j * kQuarters + warp() % kQuarters) * 16; }

  MLA_DEVICE long long place(int i) const {
    return (static_cast<long long>(work_.state) * p_.splits + block().z) * p_.rows + work_.row + row_of(i);
  }

  // Calls visit(value column, sum) for all that the thread holds of one of its rows.
  template <class Visit>
  MLA_DEVICE void each_column(int i, const Visit& visit) {
    MLA_UNROLL
    for (int j = 0; j < kValues / 64; ++j) {
      MLA_UNROLL
      for (int x = 0; x < 4; ++x) {
        const int column = first_column(j) + x / 2 * 8 + lane() % 4 * 2 + x % 2 - shift();
        if (column >= 0 && column < p_.value_dim) visit(column, sum_[j][x / 2][i * 2 + x % 2]);
      }
    }
  }

  // A number for each row and quarter of its warps.
  MLA_DEVICE float* tops(int i) const {
    return reinterpret_cast<float*>(shared_memory() + p_.shared.tops) + row_of(i) * kQuarters;
  }

  MLA_DEVICE void exchange_tops(const float (&score)[2][4]) const {
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float top = max(max(score[0][i * 2], score[0][i * 2 + 1]), max(score[1][i * 2], score[1][i * 2 + 1]));
      top = max(top, shuffle_xor(top, 1));
      top = max(top, shuffle_xor(top, 2));
      if (lane() % 4 == 0) tops(i)[warp() % kQuarters] = top;
    }
    barrier();
  }

  MLA_DEVICE float joined_top(int i) const {
    const float* top = tops(i);
    return max(top_[i], max(max(top[0], top[1]), max(top[2], top[3])));
  }

  MLA_DEVICE void join_masses() {
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float mass = mass_[i] + shuffle_xor(mass_[i], 1);
      mass += shuffle_xor(mass, 2);
      if (lane() % 4 == 0) tops(i)[warp() % kQuarters] = mass;
    }
    barrier();
    MLA_UNROLL
    for (int i = 0; i < 2; ++i) mass_[i] = (tops(i)[0] + tops(i)[1]) + (tops(i)[2] + tops(i)[3]);
  }

  const Attend& p_;
  const Work& work_;
  float sum_[kValues / 64][2][4] = {};
  float top_[2] = {-kInfinity, -kInfinity};
  float mass_[2] = {};
};

// Of a split that has no tile: nothing was seen. There is no sum where the mass is zero.
MLA_DEVICE void store_nothing(const Attend& p, const Work& work) {
  const long long first = (static_cast<long long>(work.state) * p.splits + block().z) * p.rows + work.row;
  for (int row = thread().x; row < work.rows; row += threads()) {
    p.top[first + row] = -kInfinity;
    p.mass[first + row] = 0.0f;
  }
}

}  // namespace mla_pass::cuda
