// What of the queries is one for all cache blocks: rope dims at their positions, and dims that meet decoded keys at
// their cache rows. A warp a query row; each number is read and written once.
#pragma once

#include "turn.cuh"

namespace mla_pass::cuda {

// A query and where it stands.
struct FixRow {
  const float* dims;
  long long position;
  int row;  // of the cache
  bool bad;
};

MLA_DEVICE FixRow fix_row(const Fix& p, int sequence, int head, int token) {
  const Span span = p.span[sequence];
  const long long query = (static_cast<long long>(sequence) * p.tokens + token) * p.heads + head;
  return {p.dims + query * (p.nope_dim + p.rope_dim),
          p.position_ids[static_cast<long long>(sequence) * p.position_step + token],
          span.total - p.behind - p.tokens + token, span.bad != 0};
}

// Rope dims in columns [0, width) of `to`, real parts before imaginary ones, as the cache has them; then zeros.
template <class T>
MLA_DEVICE void fix_rope(const Fix& p, const FixRow& at, int width, std::uint16_t* to) {
  const int half = p.rope_dim / 2;
  for (int i = lane(); i < width; i += 32) {
    float x = 0.0f;
    if (i < p.rope_dim && !at.bad) {
      const int pair = i % half;
      const float* rope = at.dims + p.nope_dim + pair;
      const Complex turned = times({rope[0], rope[half]}, angle(p.tables, at.position, p.rope_index[pair]));
      x = i < half ? turned.re : turned.im;
    }
    to[i] = T::narrow(x);
  }
}

// Pairs [0, count) turned to the query's row, re and im side by side, in columns [0, width) of `to`; then zeros.
template <class T>
MLA_DEVICE void fix_pairs(const Fix& p, const FixRow& at, int count, int width, std::uint16_t* to) {
  for (int i = lane(); i < (width + 1) / 2; i += 32) {
    Complex turned = {0.0f, 0.0f};
    if (i < count && !at.bad) {
      turned = times({at.dims[i], at.dims[p.bands.pairs + i]}, angle(p.tables, at.row, p.bands.index[i]));
    }
    to[2 * i] = T::narrow(turned.re);
    if (2 * i + 1 < width) to[2 * i + 1] = T::narrow(turned.im);
  }
}

// One problem a sequence, rows head-major: [rope | decoded pairs].
template <class T>
MLA_DEVICE void fix_absorbed(const Fix& p, int row) {
  const int rows = p.heads * p.tokens, sequence = row / rows, head = row % rows / p.tokens;
  const FixRow at = fix_row(p, sequence, head, row % p.tokens);
  std::uint16_t* to = p.out + static_cast<long long>(row) * (p.rope_width + p.fine_width);
  fix_rope<T>(p, at, p.rope_width, to);
  fix_pairs<T>(p, at, p.bands.decoded, p.fine_width, to + p.rope_width);
}

// One problem a kv group, rows token-major: [pairs | still dims | rope], as `expand` has keys.
template <class T>
MLA_DEVICE void fix_expanded(const Fix& p, int row) {
  const int per_group = p.heads / p.groups, rows = per_group * p.tokens, problem = row / rows;
  const int head = problem % p.groups * per_group + row % per_group;
  const FixRow at = fix_row(p, problem / p.groups, head, row % rows / per_group);
  const int turning = 2 * p.bands.pairs;
  std::uint16_t* to = p.out + static_cast<long long>(row) * p.key_width;
  fix_pairs<T>(p, at, p.bands.pairs, turning, to);
  for (int i = turning + lane(); i < p.nope_dim; i += 32) to[i] = T::narrow(at.bad ? 0.0f : at.dims[i]);
  fix_rope<T>(p, at, p.key_width - p.nope_dim, to + p.nope_dim);
}

// grid (B * H * tokens rows, kQueryWarps at a time)
template <class T>
MLA_DEVICE void fix(const Fix& p) {
  const int row = block().x * kQueryWarps + warp();
  if (row >= p.batch * p.heads * p.tokens) return;
  if (p.expanded) return fix_expanded<T>(p, row);
  fix_absorbed<T>(p, row);
}

}  // namespace mla_pass::cuda
