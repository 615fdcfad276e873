// Operands in bfloat16 for vectors that multiply pairs of such numbers, two multiply-adds a lane.
//
// Latents, queries, key_up and attention weights are rounded to bfloat16, products are exact, sums are float32: what
// attention on GPUs does. A number is off by 2^-9 of itself at the most, which is what a row stored as bfloat16 is
// already, and less than what eight bits leave of one. The second terms that tiles.h has would take as long as float32.
//
// Counted per cached row: a number is converted once, moved across once for scores and once for values, whatever the
// number of heads.
#pragma once

#include "bfloat.h"
#include "fine.h"
#include "weigh.h"

namespace mla_pass::MLA_PASS_ISA {

// Two neighbours along a sum, the first in the low half.
struct Pair {
  std::uint32_t bits;
};

inline Vec load(const Pair* p) { return load(reinterpret_cast<const float*>(p)); }
inline Vec load_first(const Pair* p, Index count) { return load_first(reinterpret_cast<const float*>(p), count); }

template <>
inline Vec accumulate<Pair>(Vec a, Vec b, Vec sum) {
  return {_mm512_dpbf16_ps(sum.x, (__m512bh)a.x, (__m512bh)b.x)};
}

// Rows of pairs as the left operand of sums: the lanes take their bits as they are.
// `depth` columns of the latents are read, and rope dims if `rope`.
struct Terms {
  const std::uint16_t* rows;
  Index depth;
  bool rope;
};

inline Index even(Index count) { return (count + 1) / 2 * 2; }

inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// x[0, count) to bfloat16. Writes zeros up to whole vectors of 32.
inline void round_row(const float* x, Index count, std::uint16_t* to) {
  for (Index c = 0; c < count; c += 32) {
    const __m512 low = _mm512_maskz_loadu_ps(lanes_below(count, c), x + c);
    const __m512 high = _mm512_maskz_loadu_ps(lanes_below(count, c + 16), x + c + 16);
    _mm512_storeu_si512(to + c, rounded(low, high));
  }
}

// A row of `rows`: latents, and from the next even number on the rope part, where that is here.
template <class T>
class Packed {
 public:
  Packed(const Problem<T>& p, const PackedScratch& scratch)
      : p_(p), size_(p.size), rows_(scratch.rows), keys_(reinterpret_cast<Pair*>(scratch.keys)),
        values_(scratch.values), weights_(scratch.weights), step_(scratch.columns),
        rope_(size_.rope_dim > 0 && (size_.split >= size_.rank + size_.rope_dim || is_narrow(p.part[1].as))) {}

  // Whether the rope part is here, too.
  bool rope() const { return rope_; }

  // `count` rows from row `first` on, as both operands.
  void read(Index first, Index count) {
    for (Index key = 0; key < count; ++key) read_row(first + key, rows_ + key * step_);
    if (count % 2 == 1) fill_zeros(rows_ + count * step_);
    lay_across(0, key_pairs(), count, keys_);
    if (rope_) lay_across(even(size_.rank), size_.rope_dim / 2, count, keys_ + key_pairs() * kKeyStep);
    for (Index key = 0; key < count; key += 2) {
      const std::uint16_t* from = rows_ + key * step_ + size_.value_offset;
      interleave(from, from + step_, size_.value_rank, values_ + key / 2 * step_);
    }
  }

  // Rows x [rows][step] over the latents' first key_rank columns, and rows of rope dims [rows][rope_step] where they
  // are given and here, as left operands in `room` [rows][columns].
  Terms left(const float* x, Index rows, Index step, const float* rope, Index rope_step, std::uint16_t* room) const {
    for (Index row = 0; row < rows; ++row) {
      round_row(x + row * step, size_.key_rank, room + row * step_);
      if (rope) round_row(rope + row * rope_step, size_.rope_dim, room + row * step_ + 2 * key_pairs());
    }
    return {room, size_.key_rank, rope != nullptr};
  }

  // `x` from a row on, without rope dims, that reads the first `depth` columns of the latents.
  Terms rows_of(const Terms& x, Index row, Index depth) const { return {x.rows + row * step_, depth, false}; }

  // s[row][key] = x[row] . latent[key] for keys [key, key + keys) of the chunk, written up to whole vectors.
  void products(const Terms& x, Index rows, Index key, Index keys, float* s, Index step, Ahead& ahead) const {
    for (Index row = 0; row < rows; ++row) fill(s + row * step, keys, 0.0f);
    const Index depth = even(x.depth) / 2 + (x.rope ? size_.rope_dim / 2 : 0);
    meet_keys(as_left(x.rows), rows, step_ / 2, keys_ + key, depth, keys, s, ahead);
  }

  // sum[row] += weight[row] times the values of `keys` rows; weights s [rows][step].
  void weighted(Index rows, Index keys, const float* s, Index step, const Partial& part, Ahead& ahead) const {
    for (Index row = 0; row < rows; ++row) round_row(s + row * step, keys, weights_ + row * kChunk);
    sums(rows, size_.value_rank, even(keys) / 2, Left{as_left(weights_), kChunk / 2, 1},
         reinterpret_cast<const Pair*>(values_), step_, part.sum, part.value_width, ahead);
  }

 private:
  static const float* as_left(const std::uint16_t* rows) { return reinterpret_cast<const float*>(rows); }

  Index key_pairs() const { return even(size_.key_rank) / 2; }

  void fill_zeros(std::uint16_t* row) const {
    for (Index c = 0; c < step_; c += 32) _mm512_storeu_si512(row + c, _mm512_setzero_si512());
  }

  // In ascending order: every run is written in whole vectors, zeros past its last number. So an odd rank's last pair
  // has a zero.
  void read_row(Index row, std::uint16_t* to) const {
    const Index rank = size_.rank, split = size_.split, end = rank + size_.rope_dim, latents = least(split, rank);
    read_run(p_.part[0], row, 0, latents, to);
    read_run(p_.part[1], row, 0, rank - latents, to + latents);
    if (!rope_) return;
    std::uint16_t* rope = to + even(rank);
    const Index first = greatest(split, rank);
    read_run(p_.part[0], row, rank, first - rank, rope);
    read_run(p_.part[1], row, first - split, end - first, rope + first - rank);
  }

  // Numbers [begin, begin + count) of a stored row.
  void read_run(const Stored& from, Index row, Index begin, Index count, std::uint16_t* to) const {
    if (from.as == Storage::int8) return read_coded<std::int8_t>(from, row, begin, count, to);
    if (from.as == Storage::float8) return read_coded<Float8>(from, row, begin, count, to);
    const Bfloat* numbers = static_cast<const Bfloat*>(from.data) + row * from.width + begin;
    for (Index c = 0; c < count; c += 32) {
      _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(wide_lanes_below(count, c), numbers + c));
    }
  }

  template <class Q>
  void read_coded(const Stored& from, Index row, Index begin, Index count, std::uint16_t* to) const {
    const Q* stored = static_cast<const Q*>(from.data) + row * from.width;
    const Index length = (from.numbers + kSegments - 1) / kSegments, end = begin + count;
    for (Index at = begin; at < end;) {
      const Index stop = least((at / length + 1) * length, end);
      const float scale = step_of(code_of(stored + from.numbers + at / length));
      read_segment(stored + at, stop - at, splat(scale), to + at - begin);
      at = stop;
    }
  }

  template <class Q>
  static void read_segment(const Q* numbers, Index count, Vec scale, std::uint16_t* to) {
    for (Index c = 0; c < count; c += 32) {
      const __m256i q = _mm256_maskz_loadu_epi8(wide_lanes_below(count, c), numbers + c);
      const Vec low = widened(_mm256_castsi256_si128(q), Q{}), high = widened(_mm256_extracti128_si256(q, 1), Q{});
      _mm512_storeu_si512(to + c, rounded(mul(low, scale).x, mul(high, scale).x));
    }
  }

  // `pairs` pairs of columns from `column` on: [pair][kKeyStep].
  void lay_across(Index column, Index pairs, Index count, Pair* to) const {
    transpose(as_left(rows_ + column), count, pairs, step_ / 2, reinterpret_cast<float*>(to), kKeyStep);
  }

  const Problem<T>& p_;
  const Sizes& size_;
  std::uint16_t* rows_;
  Pair* keys_;
  std::uint32_t* values_;
  std::uint16_t* weights_;
  const Index step_;
  const bool rope_;
};

}  // namespace mla_pass::MLA_PASS_ISA
