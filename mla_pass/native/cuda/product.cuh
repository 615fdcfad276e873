// One product on tensor cores for all kernels that need one: 64 rows by some columns, any sizes, sums in float32.
//
// The left operand is whatever a functor writes into shared memory, 16 bits a number: rows as they lie in memory,
// turned queries, unpacked latents. It is made once for all columns of the CTA where it has at most kPanel numbers a
// row, which costs 64 (kPanel + 8) 2 bytes, 65 KB, of shared memory. The right operand is read in steps of 32 by
// cp.async, one step ahead. Per step a warp loads 4 KB of matrices for 32 x 32 x 32 multiply-adds, and the CTA reads
// 4 KB of the right operand, most of it from the second-level cache.
#pragma once

#include "params.h"
#include "product_shared.h"
#include "simt.h"

namespace mla_pass::cuda {

// Eight numbers to shared memory, of which those from `end` on are zeros; `from` may be null: all are. Asynchronous
// where they are aligned.
MLA_DEVICE void copy_eight(std::uint16_t* to, const std::uint16_t* from, int begin, int end) {
  const int count = from ? max(0, min(8, end - begin)) : 0;
  const std::uint16_t* at = from + (count > 0 ? begin : 0);
  if (count > 0 && reinterpret_cast<std::uintptr_t>(at) % 16 == 0) return copy_async(to, at, count * 2);
  MLA_UNROLL
  for (int i = 0; i < 8; ++i) to[i] = i < count ? at[i] : 0;
}

// A warp copies `count` numbers from `begin` on, and zeros for those from `end` on.
MLA_DEVICE void copy_row(std::uint16_t* to, const std::uint16_t* from, int begin, int count, int end) {
  for (int i = lane() * 8; i < count; i += 32 * 8) copy_eight(to + i, from, begin + i, end);
}

// Two numbers of a row, of which only those before `end` are there, by one store where that is aligned.
template <class T>
MLA_DEVICE void store_pair(std::uint16_t* row, int column, int end, float first, float second) {
  std::uint16_t* to = row + column;
  if (column + 1 < end && reinterpret_cast<std::uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<std::uint32_t*>(to) = T::pack(first, second);
    return;
  }
  if (column < end) to[0] = T::narrow(first);
  if (column + 1 < end) to[1] = T::narrow(second);
}

// How a right operand lies in memory: in rows of columns, one for each number summed over, or in rows of such numbers,
// one for each column.
enum class Along { columns, depth };

// right(i) is row i of the right operand, or null for zeros; `length` numbers of a row are there.
template <Along kAlong, class Right>
MLA_DEVICE void fill_right(const Right& right, int length, int column, int k, std::uint16_t* to) {
  constexpr int kWidth = kAlong == Along::columns ? kProductColumns : kProductStep;
  constexpr int kEights = kWidth / 8, kTotal = kProductColumns * kProductStep / 8;
  const int first = kAlong == Along::columns ? k : column, begin = kAlong == Along::columns ? column : k;
  MLA_UNROLL
  for (int i = 0; i < kTotal / kProductThreads; ++i) {
    const int chunk = i * kProductThreads + thread().x, row = chunk / kEights, x = chunk % kEights * 8;
    copy_eight(to + row * (kWidth + kRowPad) + x, right(first + row), begin + x, length);
  }
}

// The warp's square: sum[16-row half][8-column part], as mma lays it out, of one step.
template <class T, Along kAlong>
MLA_DEVICE void multiply_step(const std::uint16_t* left, int left_step, const std::uint16_t* right,
                              float (&sum)[2][4][4]) {
  constexpr int kStep = (kAlong == Along::columns ? kProductColumns : kProductStep) + kRowPad;
  const int row = warp() / 2 * 32, column = warp() % 2 * 32;
  MLA_UNROLL
  for (int k = 0; k < kProductStep; k += 16) {
    std::uint32_t a[2][4], b[2][4];
    MLA_UNROLL
    for (int half = 0; half < 2; ++half) {
      load_matrices(a[half], left + (row + half * 16 + lane() % 16) * left_step + k + lane() / 16 * 8);
      // Four matrices: columns 0-7 and 8-15 of sixteen, each with numbers 0-7 and 8-15 of the step.
      const int sixteen = column + half * 16, low = lane() % 8, second = lane() / 8 % 2 * 8, other = lane() / 16 * 8;
      if (kAlong == Along::columns) {
        load_matrices_transposed(b[half], right + (k + low + second) * kStep + sixteen + other);
      } else {
        load_matrices(b[half], right + (sixteen + low + other) * kStep + k + second);
      }
    }
    MLA_UNROLL
    for (int half = 0; half < 2; ++half) {
      MLA_UNROLL
      for (int part = 0; part < 4; ++part) {
        mma<T>(sum[half][part], a[half], b[part / 2][part % 2 * 2], b[part / 2][part % 2 * 2 + 1]);
      }
    }
  }
}

// Hands take(row, column, number, number at column + 1) what the warp has summed, and starts anew.
template <class Take>
MLA_DEVICE void take_square(const Take& take, int column, float (&sum)[2][4][4]) {
  MLA_UNROLL
  for (int half = 0; half < 2; ++half) {
    MLA_UNROLL
    for (int part = 0; part < 4; ++part) {
      float(&s)[4] = sum[half][part];
      const int row = warp() / 2 * 32 + half * 16 + lane() / 4;
      const int at = column + warp() % 2 * 32 + part * 8 + lane() % 4 * 2;
      take(row, at, s[0], s[1]);
      take(row + 8, at, s[2], s[3]);
      MLA_UNROLL
      for (int i = 0; i < 4; ++i) s[i] = 0.0f;
    }
  }
}

// Sums over `depth` numbers for columns [begin, end), begin a multiple of kProductColumns.
//
//   left(row, k, count, to)   a warp writes numbers [k, k + count) of row 0 to 63 to `to`, zeros behind the last; count
//                             is a multiple of 32. The same is asked for again where rows are longer than a panel
//   right(i), length          see fill_right
//   take                      see take_square; columns run on to the end of a square
template <class T, Along kAlong, class Left, class Right, class Take>
MLA_DEVICE void product(int depth, int begin, int end, const Left& left, const Right& right, int length,
                        const Take& take) {
  auto* panel = reinterpret_cast<std::uint16_t*>(shared_memory());
  const int row_step = left_step(depth);
  std::uint16_t* steps = panel + kProductRows * row_step;
  float sum[2][4][4] = {};
  int resident = -1, stage = 0;
  if (begin < end && depth > 0) fill_right<kAlong>(right, length, begin, 0, steps);
  copy_commit();
  for (int column = begin; column < end; column += kProductColumns) {
    for (int k = 0; k < depth; k += kProductStep) {
      copy_wait<0>();
      barrier();  // this step is there, and nobody reads the one before any more
      if (k / kPanel != resident) {
        resident = k / kPanel;
        const int from = resident * kPanel, count = least(up_step(depth) - from, kPanel);
        for (int row = warp(); row < kProductRows; row += kProductThreads / 32) {
          left(row, from, count, panel + row * row_step);
        }
        copy_commit();
        copy_wait<0>();
        barrier();
      }
      const bool last = k + kProductStep >= depth;
      const int next_column = last ? column + kProductColumns : column, next_k = last ? 0 : k + kProductStep;
      if (next_column < end) {
        fill_right<kAlong>(right, length, next_column, next_k, steps + (stage ^ 1) * kRightNumbers);
      }
      copy_commit();
      multiply_step<T, kAlong>(panel + k % kPanel, row_step, steps + stage * kRightNumbers, sum);
      stage ^= 1;
    }
    take_square(take, column, sum);
  }
}

}  // namespace mla_pass::cuda
