// How a product on tensor cores uses shared memory: read by kernel and plan alike.
//
//   left      64 rows of the left operand, up to kPanel numbers of each, which stay while columns go by
//   right     two steps of the right operand: one is multiplied with while the other is on its way
//
// Rows are an odd number of 16-byte units apart, so that the eight rows of a matrix lie in different banks.
#pragma once

#include "sizes.h"

namespace mla_pass::cuda {

constexpr int kProductThreads = 128;
constexpr int kProductRows = 64;     // of a CTA, and columns at a time: each warp makes a square of 32
constexpr int kProductColumns = 64;
constexpr int kProductStep = 32;     // numbers summed over at a time
constexpr int kPanel = 512;
constexpr int kRowPad = 8;
// A step of the right operand, [32][64] or [64][32] numbers.
constexpr int kRightNumbers = kProductColumns * (kProductStep + kRowPad);
static_assert(kRightNumbers >= kProductStep * (kProductColumns + kRowPad), "room for either way a step may lie");

MLA_BOTH constexpr int up_step(int depth) { return ceil_div(depth, kProductStep) * kProductStep; }
MLA_BOTH constexpr int left_step(int depth) { return least(up_step(depth), kPanel) + kRowPad; }
// Of a product that sums over `depth` numbers.
MLA_BOTH constexpr int product_bytes(int depth) {
  return (kProductRows * left_step(depth) + 2 * kRightNumbers) * 2;
}

}  // namespace mla_pass::cuda
