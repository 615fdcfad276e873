// New rows into the present: rope dims rotated to their positions, everything rounded to what the cache holds.
//
// Numbers are bit for bit what the CPU kernel stores (store_row and pack in ../attention.cc), so that a cache may go
// from one to the other: nothing here is fused, and codes of 8-bit rows come from exact comparisons.
#pragma once

#include <cmath>

#include "stored.cuh"

namespace mla_pass::cuda {

constexpr int kAppendThreads = 128;
static_assert(kAppendThreads / 32 == kSegments, "a warp packs a segment");
constexpr float kLargestInt8 = 127, kLargestFloat8 = 448;

// Rounded by itself: no compiler joins it with an addition.
MLA_DEVICE float product_alone(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  const volatile float alone = a * b;
  return alone;
#endif
}

// The numbers of a new row, rope dims rotated.
template <class T>
struct NewRow {
  const std::uint16_t* row;
  const float *cos, *sin;  // of its position
  const std::uint16_t* rope_index;
  int rank, half;

  MLA_DEVICE float operator()(int i) const {
    if (i < rank) return T::widen(row[i]);
    const bool real = i < rank + half;
    const int pair = i - rank - (real ? 0 : half), column = rope_index[pair];
    const float c = cos[column], s = sin[column];
    const float x = T::widen(row[rank + pair]), y = T::widen(row[rank + half + pair]);
    return real ? product_alone(x, c) - product_alone(y, s) : product_alone(x, s) + product_alone(y, c);
  }
};

// The largest number that code c holds: `largest` times 2^(c / 8), rounded down. The eight of an octave are as
// float32 rounds them down, the others powers of two apart.
MLA_DEVICE float held_by(Stored as, int code) {
  constexpr float kInt8[8] = {0x1.fcp+6f,      0x1.14fd2cp+7f, 0x1.2e0fp+7f,   0x1.4965bp+7f,
                              0x1.6735d2p+7f,  0x1.87b8b6p+7f, 0x1.ab2ce4p+7f, 0x1.d1d68ap+7f};
  constexpr float kFloat8[8] = {0x1.cp+8f,      0x1.e88c26p+8f, 0x1.0a61e4p+9f, 0x1.227df6p+9f,
                                0x1.3cc8a8p+9f, 0x1.597488p+9f, 0x1.78b8bap+9f, 0x1.9ad15cp+9f};
  const int shifted = code + 128;
  const float octave = float_of(static_cast<std::uint32_t>(shifted / 8 + 127 - 16) << 23);
  return (as == Stored::int8 ? kInt8 : kFloat8)[shifted % 8] * octave;
}

// The least code that holds `top`, so far as there are codes.
MLA_DEVICE int least_code(Stored as, float top) {
  int least = -128, most = 127;  // the code is one of these
  while (least < most) {
    const int middle = (least + most) >> 1;
    if (top <= held_by(as, middle)) {
      most = middle;
    } else {
      least = middle + 1;
    }
  }
  return least;
}

MLA_DEVICE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The float8 nearest to q, ties to even. A magnitude in [2^e, 2^(e + 1)) lies m steps of 2^(e - 3) from zero, m in
// [8, 16], and has the bits 8 (e + 6) + m; so do all below 2^-6, with e = -6.
MLA_DEVICE unsigned char nearest_float8(float q) {
  const std::uint32_t bits = bits_of(q), magnitude = bits & 0x7fffffffu;
  const int e = max(static_cast<int>(magnitude >> 23) - 127, -6);
  const float steps = rintf(float_of(magnitude) * float_of(static_cast<std::uint32_t>(3 - e + 127) << 23));
  return static_cast<unsigned char>((8 * (e + 6) + static_cast<int>(steps)) | (bits >> 31 << 7));
}

MLA_DEVICE unsigned char nearest_int8(float q) { return static_cast<unsigned char>(static_cast<int>(rintf(q))); }

struct Segment {
  int begin, end;
};

MLA_DEVICE Segment segment_of(const Part& part, int segment) {
  const int length = (part.numbers + kSegments - 1) / kSegments;
  return {min(segment * length, part.numbers), min((segment + 1) * length, part.numbers)};
}

// The largest magnitude in the warp's segment; infinite where a number is not finite.
template <class T>
MLA_DEVICE float top_of(const Part& part, const NewRow<T>& number, int first) {
  const Segment own = segment_of(part, warp());
  std::uint32_t top = 0;  // magnitudes are in the order of their bits, with NaN above infinity
  for (int i = own.begin + lane(); i < own.end; i += 32) top = max(top, bits_of(number(first + i)) & 0x7fffffffu);
  int most = static_cast<int>(top);
  MLA_UNROLL
  for (int step = 16; step > 0; step /= 2) most = max(most, shuffle_xor(most, step));
  return float_of(static_cast<std::uint32_t>(min(most, 0x7f800000)));
}

// The warp's segment of an 8-bit row and its code.
template <class T>
MLA_DEVICE void pack_segment(const Part& part, const NewRow<T>& number, int first, float top, unsigned char* to) {
  const Segment own = segment_of(part, warp());
  const int code = least_code(part.as, top);
  const float inverse = 1.0f / step_of(code), largest = part.as == Stored::int8 ? kLargestInt8 : kLargestFloat8;
  for (int i = own.begin + lane(); i < own.end; i += 32) {
    const float q = fminf(fmaxf(product_alone(number(first + i), inverse), -largest), largest);
    to[i] = part.as == Stored::int8 ? nearest_int8(q) : nearest_float8(q);
  }
  if (lane() == 0) to[part.numbers + warp()] = static_cast<unsigned char>(part.as == Stored::int8 ? code : code + 128);
}

// Numbers `first` and on of the row as a row of 8 bits; whether they have that form.
template <class T>
MLA_DEVICE bool append_packed(const Part& part, const NewRow<T>& number, int first, float* tops, unsigned char* to) {
  const float top = top_of(part, number, first);
  barrier();
  if (lane() == 0) tops[warp()] = top;
  barrier();
  for (int segment = 0; segment < kSegments; ++segment) {
    if (tops[segment] == float_of(0x7f800000u)) return false;
  }
  pack_segment(part, number, first, top, to);
  return true;
}

// The same of 16 bits; latents keep their bits.
template <class T>
MLA_DEVICE void append_model(const Part& part, const NewRow<T>& number, int first, bool placed, unsigned char* to) {
  auto* out = reinterpret_cast<std::uint16_t*>(to);
  for (int i = thread().x; i < part.numbers; i += kAppendThreads) {
    const int at = first + i;
    const std::uint16_t bits = at < number.rank ? number.row[at] : T::narrow(placed ? number(at) : 0.0f);
    out[i] = placed ? bits : T::narrow(float_of(0x7fc00000u));
  }
}

// grid (S, B)
template <class T>
MLA_DEVICE void append(const Append& p) {
  const int token = block().x, sequence = block().y;
  const Span span = p.span[sequence];
  if (span.total == 0) return;
  const std::int64_t position = p.position_ids[static_cast<long long>(sequence) * p.position_step + token];
  const bool placed = position >= 0 && position < p.tables.positions;
  const long long angles = placed ? position * p.tables.angles : 0;
  const long long fresh = static_cast<long long>(sequence) * p.fresh + token;
  const NewRow<T> number = {p.row + fresh * (p.rank + p.rope_dim), p.tables.cos + angles, p.tables.sin + angles,
                            p.rope_index, p.rank, p.rope_dim / 2};
  const long long at = static_cast<long long>(sequence) * p.capacity + span.total - p.fresh + token;
  bool held = true;
  for (int i = 0; i < 2; ++i) {
    const Part& part = p.part[i];
    unsigned char* to = part.data + at * part.bytes;
    const int first = i == 0 ? 0 : p.split;
    if (part.as == Stored::model) {
      append_model(part, number, first, placed, to);
    } else if (placed) {
      held = append_packed(part, number, first, reinterpret_cast<float*>(shared_memory()), to) && held;
    }
  }
  if (!held && thread().x == 0) p.span[sequence].bad = 1;
}

}  // namespace mla_pass::cuda
