// The matrix product that everything is made of, float32:
//
//   c[row][col] += a[row] . b[.][col]     b contiguous across the sum: rows of weights against rows of values
//
// Neither operand is packed: cached rows, latent queries, up-projections and probabilities are read as they lie. A tile
// reads kSumRows + kSumColumns vectors for kSumRows * kSumColumns multiply-adds, below the two loads a cycle that go
// with two multiply-adds, and comes within a tenth of what a core can do. Scores, q[row] . k[key], have both operands
// contiguous along the sum; summed so they would end in a reduction across the lanes for each. One of the operands is
// laid across first, transposed:
//
//   s[row][key] += q[row] . across[.][key]          keys across, once a chunk, for any number of rows
//   s[row][key]  = k[key] . across[.][row]          queries across, once for all chunks, where they fill the lanes
#pragma once

#include "ahead.h"
#include "maths.h"

// A tile is a function of its own: inlined, its addresses would share the registers of all that stands around it and
// be read from the stack between the multiply-adds.
#define MLA_PASS_TILE __attribute__((noinline)) inline

namespace mla_pass::MLA_PASS_ISA {

// The left operand of sums: element (row, d) at data[row * row_step + d * depth_step].
struct Left {
  const float* data;
  Index row_step;
  Index depth_step;
};

// One term of a sum of products: a(row, d) * b[d][col] over d.
template <class T>
struct Term {
  Left a;
  const T* b;
  Index b_step;
  Index depth;
};

// The depth of a tile between two looks ahead.
constexpr Index kAheadDepth = 32;

// sum + a b, lane by lane, where b was read of T and a lies in every lane.
template <class T>
inline Vec accumulate(Vec a, Vec b, Vec sum) {
  return fma(a, b, sum);
}

template <int Rows, int Columns, bool Whole, class T>
MLA_PASS_TILE void sum_tile(const Term<T>* terms, int count, Index row, Index col, float* c, Index c_step, Index lanes,
                            Ahead& ahead) {
  Vec total[Rows][Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) total[i][j] = load(c + i * c_step + j * Vec::width);
  }
  for (int term = 0; term < count; ++term) {
    const auto& [left, b, b_step, depth] = terms[term];
    const float* a = left.data + row * left.row_step;
    for (Index d = 0; d < depth;) {
      const Index stop = least(d + kAheadDepth, depth);
      ahead.run(Rows * Columns * (stop - d));
      for (; d < stop; ++d) {
        Vec column[Columns];
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) {
          if constexpr (Whole) {
            column[j] = load(b + d * b_step + col + j * Vec::width);
          } else {
            column[j] = load_first(b + d * b_step + col, lanes);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
          const Vec weight = splat(a[i * left.row_step + d * left.depth_step]);
#pragma GCC unroll 4
          for (int j = 0; j < Columns; ++j) total[i][j] = accumulate<T>(weight, column[j], total[i][j]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) store(c + i * c_step + j * Vec::width, total[i][j]);
  }
}

template <int Rows, int Columns, bool Whole, class T>
inline void sum_rows(Index left, const Term<T>* terms, int count, Index row, Index col, float* c, Index c_step,
                     Index lanes, Ahead& ahead) {
  if constexpr (Rows > 1) {
    if (left < Rows) return sum_rows<Rows - 1, Columns, Whole>(left, terms, count, row, col, c, c_step, lanes, ahead);
  }
  sum_tile<Rows, Columns, Whole>(terms, count, row, col, c, c_step, lanes, ahead);
}

// One strip of columns, rows in tiles of nearly equal height: a last tile of one row would wait for its own sums.
template <int Columns, bool Whole, class T>
inline void sum_strip(Index rows, const Term<T>* terms, int count, Index col, float* c, Index c_step, Index lanes,
                      Ahead& ahead) {
  constexpr int kRows = static_cast<int>(Columns > kSumColumns ? kSumRows * kSumColumns / Columns : kSumRows);
  const Index tiles = (rows + kRows - 1) / kRows;
  for (Index tile = 0; tile < tiles; ++tile) {
    const Index row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
    sum_rows<kRows, Columns, Whole>(height, terms, count, row, col, c + row * c_step + col, c_step, lanes, ahead);
  }
}

// c[row][col] += the sum of all terms; rows of c are padded to whole vectors.
template <class T>
inline void sums(Index rows, Index columns, const Term<T>* terms, int count, float* c, Index c_step, Ahead& ahead) {
  constexpr Index width = Vec::width;
  Index at = 0;
  if constexpr (kSumColumns > 2) {
    // Four where three would leave one: a vector alone keeps the units half busy.
    const Index vectors = columns / width;
    for (Index left = vectors; left > 2; left = vectors - at / width) {
      if (left == 4) {
        sum_strip<4, true>(rows, terms, count, at, c, c_step, width, ahead);
        at += 4 * width;
      } else {
        sum_strip<3, true>(rows, terms, count, at, c, c_step, width, ahead);
        at += 3 * width;
      }
    }
  }
  for (; at + 2 * width <= columns; at += 2 * width) {
    sum_strip<2, true>(rows, terms, count, at, c, c_step, width, ahead);
  }
  for (; at + width <= columns; at += width) sum_strip<1, true>(rows, terms, count, at, c, c_step, width, ahead);
  if (at < columns) sum_strip<1, false>(rows, terms, count, at, c, c_step, columns - at, ahead);
}

template <class T>
inline void sums(Index rows, Index columns, const Term<T>* terms, int count, float* c, Index c_step) {
  Ahead nothing;
  sums(rows, columns, terms, count, c, c_step, nothing);
}

// The same with one term: c[row][col] += sum over d of a(row, d) * b[d][col].
template <class T>
inline void sums(Index rows, Index columns, Index depth, const Left& a, const T* b, Index b_step, float* c,
                 Index c_step, Ahead& ahead) {
  const Term<T> term = {a, b, b_step, depth};
  sums(rows, columns, &term, 1, c, c_step, ahead);
}

template <class T>
inline void sums(Index rows, Index columns, Index depth, const Left& a, const T* b, Index b_step, float* c,
                 Index c_step) {
  Ahead nothing;
  sums(rows, columns, depth, a, b, b_step, c, c_step, nothing);
}

inline Index whole_vectors(Index count) { return (count + Vec::width - 1) / Vec::width * Vec::width; }

template <bool Whole>
inline void transpose_tile(const float* x, Index rows, Index columns, Index step, float* to, Index to_step) {
  constexpr int width = static_cast<int>(Vec::width);
  Vec tile[width];
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    if constexpr (Whole) {
      tile[i] = load(x + i * step);
    } else {
      tile[i] = i < rows ? load_first(x + i * step, columns) : zero();
    }
  }
  transpose(tile);
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    if (Whole || i < columns) store(to + i * to_step, tile[i]);
  }
}

// to[column][row] = x[row][column]. Rows of `to` are written up to whole vectors, zeros past the last row of x.
inline void transpose(const float* x, Index rows, Index columns, Index step, float* to, Index to_step) {
  constexpr Index width = Vec::width;
  for (Index row = 0; row < rows; row += width) {
    const Index height = least(width, rows - row);
    for (Index column = 0; column < columns; column += width) {
      const Index wide = least(width, columns - column);
      const float* from = x + row * step + column;
      float* out = to + column * to_step + row;
      if (height == width && wide == width) {
        transpose_tile<true>(from, width, width, step, out, to_step);
      } else {
        transpose_tile<false>(from, height, wide, step, out, to_step);
      }
    }
  }
}

// Whether so many rows fill three quarters of the lanes that they would lie across: with fewer, keys are laid across.
inline bool fills_lanes(Index rows) { return 3 * whole_vectors(rows) <= 4 * rows; }

// The depth of what lies across that stays in a first-level cache while all of the other side passes.
constexpr Index kAcrossDepth = 128;
// Queries laid across that meet at a time.
constexpr Index kAcrossRows = 3 * Vec::width;

// Rows of matrices that have a chunk's rows in the lanes.
constexpr Index kKeyStep = kChunk + kPad;

// s[row][key] += x[row] . key[key], of keys laid across [depth][kKeyStep].
template <class T>
inline void meet_keys(const float* x, Index rows, Index x_step, const T* across, Index depth, Index keys, float* s,
                      Ahead& ahead) {
  for (Index d = 0; d < depth; d += kAcrossDepth) {
    sums(rows, keys, least(kAcrossDepth, depth - d), Left{x + d, x_step, 1}, across + d * kKeyStep, kKeyStep, s,
         kKeyStep, ahead);
  }
}

// Keys [keys][key_step], and queries laid across them: [depth][query_step], written up to whole vectors.
struct Span {
  const float* query;
  Index query_step;
  const float* key;
  Index key_step;
  Index depth;
};

// s[row][key] = the sum of all spans' products, of at most kChunk keys. Writes s up to whole vectors past the last key.
inline void meet_queries(const Span* spans, int count, Index rows, Index keys, float* s, Ahead& ahead) {
  alignas(64) float met[kChunk * kAcrossRows];
  for (Index row = 0; row < rows; row += kAcrossRows) {
    const Index some = least(kAcrossRows, rows - row), lanes = whole_vectors(some);
    fill(met, keys * lanes, 0.0f);
    for (int x = 0; x < count; ++x) {
      const auto& [query, query_step, key, key_step, depth] = spans[x];
      for (Index d = 0; d < depth; d += kAcrossDepth) {
        sums(keys, lanes, least(kAcrossDepth, depth - d), Left{key + d, key_step, 1}, query + d * query_step + row,
             query_step, met, lanes, ahead);
      }
    }
    transpose(met, keys, some, lanes, s + row * kKeyStep, kKeyStep);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
