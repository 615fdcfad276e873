// Joins what the splits of `attend` left of each query row and divides by the mass.
//
// sum = (splits' sums, each by exp2(its top - the largest top)) / (their masses alike): zero where nothing was seen,
// NaN where the sequence is bad. A warp joins 128 columns of a row, four a lane, so that few rows of many splits still
// are work for many warps; it reads a kilobyte for every two splits.
#pragma once

#include "attend_scores.cuh"

namespace mla_pass::cuda {

struct alignas(16) FourFloats {
  float x[4];
};

class Joining {
 public:
  // Of a row whose first split's state is `first`.
  MLA_DEVICE Joining(const Combine& p, long long first) : p_(p), first_(first) {
    float top = -kInfinity;
    for (int split = lane(); split < p.splits; split += 32) top = max(top, p.top[at(split)]);
    MLA_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) top = max(top, shuffle_xor(top, mask));
    base_ = top == -kInfinity ? 0.0f : top;
    for (int split = lane(); split < p.splits; split += 32) mass_ += p.mass[at(split)] * grown(split);
    MLA_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) mass_ += shuffle_xor(mass_, mask);
  }

  // Columns [column, column + 4) of the sums, for every lane its own; zeros behind the last one.
  MLA_DEVICE FourFloats columns(int column) const {
    FourFloats joined{};
    for (int begin = 0; begin < p_.splits; begin += 32) {
      const int mine = begin + lane(), end = min(32, p_.splits - begin);
      const float share = mine < p_.splits && p_.mass[at(mine)] != 0.0f ? grown(mine) / mass_ : 0.0f;
      for (int i = 0; i < end; ++i) add(shuffle(share, i), begin + i, column, joined);
    }
    return joined;
  }

 private:
  MLA_DEVICE long long at(int split) const { return first_ + static_cast<long long>(split) * p_.rows; }
  MLA_DEVICE float grown(int split) const { return exp2(p_.top[at(split)] - base_); }

  // A split that saw nothing has no sum; nor do columns behind the last one.
  MLA_DEVICE void add(float share, int split, int column, FourFloats& joined) const {
    if (share == 0.0f || column >= p_.sum_width) return;
    const auto sum = *reinterpret_cast<const FourFloats*>(p_.sum + at(split) * p_.sum_width + column);
    MLA_UNROLL
    for (int i = 0; i < 4; ++i) joined.x[i] += share * sum.x[i];
  }

  const Combine& p_;
  const long long first_;
  float base_, mass_ = 0.0f;
};

// Where the context of a row of a problem lies in [B][fresh][H].
MLA_DEVICE long long context_row(const Combine& p, int problem, int row) {
  const int sequence = problem / p.groups_apart, group = problem % p.groups_apart;
  const int token = p.token_major ? row / p.heads : row % p.tokens;
  const int head = group * p.heads + (p.token_major ? row % p.heads : row / p.tokens);
  return (static_cast<long long>(sequence) * p.fresh + token) * p.groups_apart * p.heads + head;
}

template <class T>
MLA_DEVICE void combine(const Combine& p) {
  const int chunks = combine_chunks(p), unit = block().x * (threads() / 32) + warp(), row = unit / chunks;
  if (row >= p.batch * p.groups_apart * p.rows) return;
  const int problem = row / p.rows, column = unit % chunks * kCombineColumns + lane() * 4;
  FourFloats joined{{kNaN, kNaN, kNaN, kNaN}};
  if (!p.span[problem / p.groups_apart].bad) {
    joined = Joining(p, static_cast<long long>(problem) * p.splits * p.rows + row % p.rows).columns(column);
  }
  std::uint16_t* out = p.out + context_row(p, problem, row % p.rows) * p.out_step;
  MLA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < p.value_dim) out[column + i] = T::narrow(joined.x[i]);
  }
}

}  // namespace mla_pass::cuda
