#include <algorithm>
#include <string>
#include <tuple>

#include "attend_shared.h"
#include "plan_parts.h"

namespace mla_pass::cuda {
namespace {

// Keys that are worth a CTA of their own. A split adds 4 bytes a value column and query row that are written and read:
// at 32 rows of 512 columns as many as 113 keys of 576 numbers have.
constexpr int kLeastKeys = 128;
// CTAs at the most for every place on the device that one can run in.
constexpr int kMostRounds = 4;

struct KernelSize {
  int columns, rows;
};
// In the order of kernels.def.
constexpr KernelSize kAttends[] = {{128, 16}, {256, 16}, {384, 16}, {512, 16}, {128, 32},
                                   {256, 32}, {384, 32}, {512, 32}, {128, 64}, {256, 64}};
constexpr int kAttendCount = static_cast<int>(sizeof kAttends / sizeof *kAttends);
constexpr int kernels_from(Kernel first, Kernel last) { return static_cast<int>(last) - static_cast<int>(first) + 1; }
static_assert(kernels_from(Kernel::attend_f16_128_16, Kernel::attend_f16_256_64) == kAttendCount &&
                  kernels_from(Kernel::attend_bf16_128_16, Kernel::attend_bf16_256_64) == kAttendCount,
              "kernels.def has other kernels");

// Columns of accumulators: they begin at the multiple of 8 before the first value.
int value_columns(const Attend& a) { return up16(a.value_dim + a.value_column % 8); }

// The narrowest kernel of so many rows, or none.
const KernelSize* kernel_of(int columns, int rows) {
  for (const KernelSize& size : kAttends) {
    if (size.rows == rows && size.columns >= columns) return &size;
  }
  return nullptr;
}

// CTAs that an SM holds: as many as its shared memory does, and its registers, see kernels.cu.
int resident(const Tiling& tiling, int columns, const Device& device) {
  const auto by_memory = static_cast<int>(static_cast<std::size_t>(device.shared_bytes) / tiling.shared_bytes);
  return std::min(by_memory, (columns > 256 ? 384 : 512) / (8 * tiling.rows));
}

// Splits with which the device is done first: CTAs run in rounds of as many as there is room for, and take as long as
// their share of the keys, and a tile of 64 keys more to begin and to leave their state.
int splits_of(const Plan& plan, const Attend& a, const Tiling& tiling, const Device& device, Index state_bytes) {
  const Index tiles = divided_up(a.rows, tiling.tile_rows) * plan.wave.sequences * a.groups_apart;
  const Index places = Index{device.processors} * resident(tiling, value_columns(a), device);
  Index keys = plan.wave.unit > 0 ? std::min<Index>(plan.bound, Index{plan.wave.units} * plan.wave.unit) : plan.bound;
  if (a.window > 0) keys = std::min<Index>(keys, Index{a.window} + a.tokens);
  const Index state = Index{plan.setup.batch} * a.groups_apart * a.rows * (a.sum_width + 2) * 4;
  const Index most = std::min({divided_up(kMostRounds * places, tiles), keys / kLeastKeys, state_bytes / state});
  const auto time = [&](Index splits) {
    return divided_up(tiles * splits, places) * (divided_up(divided_up(keys, 64), splits) + 1);
  };
  Index best = 1;
  for (Index splits = 2; splits <= most; ++splits) {
    if (time(splits) < time(best)) best = splits;
  }
  return narrow(best);
}

// A way to meet keys: rows that the kernel has room for, those that a CTA takes, keys at a time, and how many times
// these are in shared memory.
struct Way {
  int rows, taken, tile, stages;
};

// Whether x is to be preferred. Where keys or queries are made for every tile, arithmetic is waited for: they are to be
// made for many rows and keys at a time. Otherwise memory is: keys are to be copied while others are met.
bool better(const Attend& a, const Way& x, const Way& y) {
  const bool made = a.fine_width > 0 || a.orders > 1;
  const auto rank = [&](const Way& way) {
    const int tiles = ceil_div(a.rows, way.taken), copies = -way.stages;
    return std::make_tuple(made ? 0 : copies, tiles, -way.tile, copies, way.taken, way.rows);
  };
  return rank(x) < rank(y);
}

// Calls visit(way) with all there are. Where dims are decoded, and a CTA has rows of several kv groups, it has whole
// ones.
template <class Visit>
void for_ways(const Attend& a, int columns, const Visit& visit) {
  const int group_rows = a.per_group * a.tokens;
  for (int rows = 16; kernel_of(columns, rows) != nullptr; rows *= 2) {
    const bool whole = a.fine_width > 0 && rows > group_rows;
    for (int taken = whole ? rows / group_rows * group_rows : rows; taken > 0; taken -= whole ? group_rows : taken) {
      for (const int tile : {64, 32}) {
        for (const int stages : {2, 1}) visit(Way{rows, std::min(taken, a.rows), tile, stages});
      }
    }
  }
}

}  // namespace

Tiling tiling_of(const Plan& plan, const Device& device, int tokens, Index state_bytes) {
  Attend a = plan.attend;
  a.tokens = tokens;
  a.rows = a.heads * tokens;
  a.blocks = plan.expanded ? 1 : plan.wave.units;
  const int columns = value_columns(a), most = kAttends[3].columns;
  if (columns > most) {
    refuse("values of " + std::to_string(a.value_dim) + " columns from column " + std::to_string(a.value_column) +
           " are too wide; expected at most " + std::to_string(most - a.value_column % 8));
  }
  const auto bytes_of = [&](const Way& way) {
    a.tile_rows = way.taken;
    a.tile = way.tile;
    a.stages = way.stages;
    return attend_shared(a, way.rows).total;
  };
  Way best{};
  int least = 0;
  for_ways(a, columns, [&](const Way& way) {
    const int bytes = bytes_of(way);
    least = least == 0 ? bytes : std::min(least, bytes);
    if (bytes <= device.shared_bytes && (best.rows == 0 || better(a, way, best))) best = way;
  });
  if (best.rows == 0) {
    refuse("attention over rows of " + std::to_string(plan.append.rank + plan.append.rope_dim) + " numbers takes " +
           std::to_string(least) + " bytes of shared memory at the least; expected at most " +
           std::to_string(device.shared_bytes));
  }
  const Kernel first = plan.model == Type::float16 ? Kernel::attend_f16_128_16 : Kernel::attend_bf16_128_16;
  const auto kernel = static_cast<int>(first) + static_cast<int>(kernel_of(columns, best.rows) - kAttends);
  Tiling tiling{static_cast<Kernel>(kernel), best.rows, best.taken, best.tile, best.stages, 1,
                static_cast<std::size_t>(bytes_of(best))};
  tiling.splits = splits_of(plan, a, tiling, device, state_bytes);
  return tiling;
}

}  // namespace mla_pass::cuda
