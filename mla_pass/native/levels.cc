#include "levels.h"

namespace mla_pass {
namespace {

// What measurement adds to the counts, in multiply-adds. A number of a block's latent queries is handed down, read and
// written twice, and its pairs are turned.
constexpr double kMade = 32;
// Keys of blocks shorter than the widest vector leave half of its lanes empty.
constexpr Index kShort = 16;
constexpr double kShortRuns = 2;

// Multiply-adds for each cached row where levels from `first` on are absorbed. `arithmetic.py` counts them; the values
// and the rope part are the same whatever is absorbed.
double cost(const Level* levels, const Sizes& size, const Index* depth, double rows, double groups, Index first) {
  const double k = static_cast<double>(size.key_rank);
  const Index decoded = first > 0 ? levels[first - 1].end : 0;
  double fine = 0;
  for (Index pair = 0; pair < decoded; ++pair) fine += 2 * (groups * static_cast<double>(depth[pair]) + rows);
  if (first == size.levels) return fine + rows * k;
  const double orders = static_cast<double>(size.orders);
  const double runs = levels[first].block < kShort ? kShortRuns : 1;
  double made = 0;
  for (Index i = first; i < size.levels; ++i) {
    made += (static_cast<double>(2 * (levels[i].end - levels[i].begin)) + kMade) / static_cast<double>(levels[i].block);
  }
  return fine + orders * rows * k * (runs + made);
}

}  // namespace

Index absorbed_from(const Level* levels, const Sizes& size, const Index* depth, Index rows, Index groups) {
  Index best = size.levels > 0 && levels[0].block == 1 ? 1 : 0;
  const auto at = [&](Index first) {
    return cost(levels, size, depth, static_cast<double>(rows), static_cast<double>(groups), first);
  };
  for (Index first = best + 1; first <= size.levels; ++first) {
    if (at(first) < at(best)) best = first;
  }
  return best;
}

}  // namespace mla_pass
