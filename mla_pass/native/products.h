// The two matrix products everything is made of, both float32.
//
//   dots   s[row][key]  = q[row] . key[key]      both operands contiguous along the sum: queries against cached rows
//   sums   c[row][col] += a[row] . b[.][col]     the second operand contiguous across the sum: weights against values
//
// Neither packs an operand: cached rows, latent queries, up-projections and probabilities are read as they lie. A tile
// of dots reads kDotRows + 4 vectors for 4 * kDotRows multiply-adds, a tile of sums kSumRows + 2 for 2 * kSumRows:
// below the two loads a cycle that go with two multiply-adds. What dots pays is one reduction for each result, about 3
// instructions against depth / width: 4 % at a depth of 576 in vectors of 8, 16 % at 128.
#pragma once

#include "maths.h"

namespace mla_pass::MLA_PASS_ISA {

// One term of a product: rows of q [.][query_step] against rows of key [.][key_step].
struct Span {
  const float* query;
  Index query_step;
  const float* key;
  Index key_step;
  Index depth;
};

constexpr int kDotKeys = 4;
// Keys that stay in a first-level cache (8 x 576 floats: 18 KB) while all queries pass.
constexpr Index kNearKeys = 8;

template <int Rows>
inline void dot_step(Vec (&total)[Rows][kDotKeys], const Vec (&query)[Rows], const Vec& key, int j) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) total[i][j] = fma(query[i], key, total[i][j]);
}

// Rows of queries from `row` against four keys; a result a query for each, side by side at s.
template <int Rows>
inline void dot_tile(const Span* spans, int count, Index row, const Index (&keys)[kDotKeys], float* s, Index step) {
  Vec total[Rows][kDotKeys];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) total[i][j] = zero();
  }
  for (int x = 0; x < count; ++x) {
    const Span& span = spans[x];
    const float* q = span.query + row * span.query_step;
    const float* k[kDotKeys];
    for (int j = 0; j < kDotKeys; ++j) k[j] = span.key + keys[j] * span.key_step;
    Vec query[Rows];
    Index d = 0;
    for (; d + Vec::width <= span.depth; d += Vec::width) {
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) query[i] = load(q + i * span.query_step + d);
#pragma GCC unroll 4
      for (int j = 0; j < kDotKeys; ++j) dot_step<Rows>(total, query, load(k[j] + d), j);
    }
    if (d < span.depth) {
      const Index left = span.depth - d;
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) query[i] = load_first(q + i * span.query_step + d, left);
#pragma GCC unroll 4
      for (int j = 0; j < kDotKeys; ++j) dot_step<Rows>(total, query, load_first(k[j] + d, left), j);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) store_sums(s + (row + i) * step, total[i][0], total[i][1], total[i][2], total[i][3]);
}

template <int Rows>
inline void dot_rows(Index left, const Span* spans, int count, Index row, const Index (&keys)[kDotKeys], float* s,
                     Index step) {
  if constexpr (Rows > 1) {
    if (left < Rows) return dot_rows<Rows - 1>(left, spans, count, row, keys, s, step);
  }
  dot_tile<Rows>(spans, count, row, keys, s, step);
}

// s[row][key] = the sum of all spans' products. Writes up to three columns past the last key.
inline void dots(const Span* spans, int count, Index rows, Index keys, float* s, Index step) {
  for (Index near = 0; near < keys; near += kNearKeys) {
    const Index end = least(near + kNearKeys, keys);
    for (Index row = 0; row < rows; row += kDotRows) {
      for (Index key = near; key < end; key += kDotKeys) {
        // Past the last key the last one is taken again: its results are never read.
        const Index last = keys - 1;
        const Index four[kDotKeys] = {key, least(key + 1, last), least(key + 2, last), least(key + 3, last)};
        dot_rows<static_cast<int>(kDotRows)>(rows - row, spans, count, row, four, s + key, step);
      }
    }
  }
}

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

template <int Rows, int Columns, bool Whole, class T>
inline void sum_tile(const Term<T>* terms, int count, Index row, Index col, float* c, Index c_step, Index lanes) {
  Vec total[Rows][Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Columns; ++j) total[i][j] = load(c + i * c_step + j * Vec::width);
  }
  for (int term = 0; term < count; ++term) {
    const auto& [left, b, b_step, depth] = terms[term];
    const float* a = left.data + row * left.row_step;
    for (Index d = 0; d < depth; ++d) {
      Vec column[Columns];
#pragma GCC unroll 2
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
#pragma GCC unroll 2
        for (int j = 0; j < Columns; ++j) total[i][j] = fma(weight, column[j], total[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Columns; ++j) store(c + i * c_step + j * Vec::width, total[i][j]);
  }
}

template <int Rows, int Columns, bool Whole, class T>
inline void sum_rows(Index left, const Term<T>* terms, int count, Index row, Index col, float* c, Index c_step,
                     Index lanes) {
  if constexpr (Rows > 1) {
    if (left < Rows) return sum_rows<Rows - 1, Columns, Whole>(left, terms, count, row, col, c, c_step, lanes);
  }
  sum_tile<Rows, Columns, Whole>(terms, count, row, col, c, c_step, lanes);
}

// One strip of columns, rows in tiles of nearly equal height: a last tile of one row would wait for its own sums.
template <int Columns, bool Whole, class T>
inline void sum_strip(Index rows, const Term<T>* terms, int count, Index col, float* c, Index c_step, Index lanes) {
  const Index tiles = (rows + kSumRows - 1) / kSumRows;
  for (Index tile = 0; tile < tiles; ++tile) {
    const Index row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
    sum_rows<static_cast<int>(kSumRows), Columns, Whole>(height, terms, count, row, col, c + row * c_step + col, c_step,
                                                         lanes);
  }
}

// c[row][col] += the sum of all terms; rows of c are padded to whole vectors.
template <class T>
inline void sums(Index rows, Index columns, const Term<T>* terms, int count, float* c, Index c_step) {
  constexpr Index width = Vec::width;
  Index at = 0;
  for (; at + 2 * width <= columns; at += 2 * width) {
    sum_strip<2, true>(rows, terms, count, at, c, c_step, width);
  }
  for (; at + width <= columns; at += width) sum_strip<1, true>(rows, terms, count, at, c, c_step, width);
  if (at < columns) sum_strip<1, false>(rows, terms, count, at, c, c_step, columns - at);
}

// The same with one term: c[row][col] += sum over d of a(row, d) * b[d][col].
template <class T>
inline void sums(Index rows, Index columns, Index depth, const Left& a, const T* b, Index b_step, float* c,
                 Index c_step) {
  const Term<T> term = {a, b, b_step, depth};
  sums(rows, columns, &term, 1, c, c_step);
}

}  // namespace mla_pass::MLA_PASS_ISA
