// Cached rows that come next, fetched while those at hand are computed with.
//
// Between two steps of a decoder all other layers pass, so a cache comes from memory, at a few bytes a cycle and core.
// Left to the processor that happens in bursts, when a chunk is first read, and the units wait. Here lines are asked for
// a few at a time, within the tiles of the products, in the measure of their work.
#pragma once

#include "problem.h"

namespace mla_pass::MLA_PASS_ISA {

class Ahead {
 public:
  // Nothing comes next.
  Ahead() = default;

  // `count` rows from row `first` of both tensors.
  template <class T>
  Ahead(const Problem<T>& p, Index first, Index count) {
    for (int part = 0; part < 2; ++part) {
      const Stored& rows = p.part[part];
      const Index row = rows.width * element_bytes(rows.as);
      next_[part] = static_cast<const char*>(rows.data) + first * row;
      end_[part] = next_[part] + count * row;
    }
  }

  // To be called beside so many multiply-adds of vectors.
  void run(Index multiply_adds) {
    Index lines = multiply_adds / kWork;
    for (int part = 0; part < 2; ++part) {
      for (; lines > 0 && next_[part] < end_[part]; --lines, next_[part] += kLine) {
        __builtin_prefetch(next_[part], 0, 2);  // second-level cache
      }
    }
  }

 private:
  static constexpr Index kLine = 64;
  // Multiply-adds a line. More lines at a time flood the few that a core can wait for, and processors go on by
  // themselves along rows that they see being read: measured at 9 and at 32 heads, 48 to 96 are best.
  static constexpr Index kWork = 64;

  const char* next_[2] = {nullptr, nullptr};
  const char* end_[2] = {nullptr, nullptr};
};

}  // namespace mla_pass::MLA_PASS_ISA
