#include "plan.h"

#include <algorithm>
#include <string>

#include "plan_parts.h"
#include "product_shared.h"

namespace mla_pass::cuda {

void refuse(const std::string& what) { throw Unsupported(what + " on a CUDA device"); }

namespace {

// Waves that keys are cut into where a third of the second-level cache would take more of them: each is two launches,
// that of rows which are not filled yet is in vain. What is written for a wave may fill two thirds of that cache then.
constexpr Index kManyWaves = 4;
// Sequences of a wave, so far as there are as many and it has room for that many rows of each.
constexpr Index kWaveSequences = 4, kLeastWaveRows = 4096;
// CTAs of a product for every processor, so that those with less work do not leave it idle.
constexpr int kProductRounds = 2;
// Of a grid in its second and third dimension.
constexpr Index kMostDeep = 65535;
constexpr Index kMostBlock = Index{1} << 30;

void at_most(const char* name, Index value, Index most) {
  if (value <= most) return;
  refuse(std::string(name) + " is " + std::to_string(value) + "; expected at most " + std::to_string(most));
}

void check_limits(const Layout& layout, const Sizes& size) {
  at_most("the number of band pairs", size.pairs, kMaxBandPairs);
  at_most("the number of rope pairs", size.rope_dim / 2, kMaxRopePairs);
  at_most("the batch", size.batch, kMostDeep);
  at_most("num_heads", size.heads, kMostDeep / 4);  // heads, orders, keys and values share a grid's dimension
  at_most("the capacity of the cache", size.capacity, kMostBlock);
  at_most("the number of heads of all sequences", size.batch * size.heads, Index{1} << 27);
  at_most("the number of new tokens", size.fresh, kMostBlock);
  at_most("the number of angles", std::max<Index>(size.angles, 1) - 1, 0xffff);
  for (const auto& level : layout.levels) at_most("a band block", level.block, kMostBlock);
}

// `count` things in pieces of at most `most`, as equal as can be: how many a piece has.
Index evenly(Index count, Index most) { return divided_up(count, divided_up(count, most)); }

// Of the last run.
Index last_tokens(const Plan& plan, const Sizes& size) { return (size.fresh - 1) % plan.tokens + 1; }

// Bytes that are kept of one new token of all sequences.
Index token_bytes(const Plan& plan, const Sizes& size) {
  const Attend& a = plan.attend;
  const Index fixed = plan.expanded ? a.key_width : a.rope_width + a.fine_width;
  const Index varying = !plan.expanded && a.block == 0 ? a.key_width : 0;
  const Index joined = plan.expanded ? 0 : a.value_dim;
  const Index numbers = 2 * (size.nope_dim + size.rope_dim) + fixed + varying + joined + 2 * a.sum_width;
  return size.batch * size.heads * numbers * 2;
}

// Bytes that a wave holds of one unit of a sequence's rows, for runs of plan.tokens.
Index unit_bytes(const Plan& plan) {
  const Attend& a = plan.attend;
  if (plan.expanded) return Index{64} * plan.expand.groups * plan.expand.step * 2;
  return Index{a.orders} * a.heads * plan.tokens * (2 * a.key_width + 4);
}

Wave wave_of(const Plan& plan, const Sizes& size, const Device& device, Index most_bytes) {
  Wave wave{1, 1, plan.expanded ? 64 : plan.attend.block};
  const Index units = wave.unit > 0 ? divided_up(size.total, wave.unit) : 1, bytes = unit_bytes(plan);
  const Index third = static_cast<Index>(device.cache_bytes / 3), all = size.batch * units * bytes;
  const Index room = std::min(std::clamp(all / kManyWaves, third, 2 * third), most_bytes);
  const Index most = std::min(size.batch, kMostDeep / (4 * plan.expand.groups));  // of a grid, see check_limits
  Index sequences = std::clamp<Index>(room / (units * bytes), 1, most);
  // In place of all rows of few sequences: some rows of more, which need as many times fewer splits.
  const Index least_units = wave.unit > 0 ? divided_up(kLeastWaveRows, wave.unit) : 1;
  const Index fitting = room / (bytes * std::min(units, least_units));
  sequences = std::max(sequences, std::clamp<Index>(fitting, 1, std::min(most, kWaveSequences)));
  wave.sequences = narrow(evenly(size.batch, sequences));
  wave.units = narrow(evenly(units, std::clamp<Index>(room / (bytes * wave.sequences), 1, units)));
  return wave;
}

class Carver {
 public:
  Scratch::Piece take(Index bytes) {
    const Scratch::Piece piece = {at_, static_cast<std::size_t>(bytes)};
    at_ += (piece.bytes + 255) / 256 * 256;
    return piece;
  }
  std::size_t bytes() const { return at_; }

 private:
  std::size_t at_ = 0;
};

void lay_scratch(Plan& plan, const Sizes& size) {
  const Attend& a = plan.attend;
  const Index queries = size.batch * size.heads * plan.tokens;
  const Index states = size.batch * size.heads * std::max(plan.tiling.splits * plan.tokens,
                                                          plan.last_tiling.splits * narrow(last_tokens(plan, size)));
  const Index units = Index{plan.wave.sequences} * plan.wave.units;
  const bool made = plan.expanded || a.key_width > 0;
  Carver carver;
  Scratch& s = plan.scratch;
  s.span = carver.take(size.batch * static_cast<Index>(sizeof(Span)));
  s.fit = carver.take(size.pairs * 4 * 4);
  s.dims = carver.take(queries * plan.map.width * 4);
  s.fixed = carver.take(queries * (plan.expanded ? a.key_width : a.rope_width + a.fine_width) * 2);
  const Index rows = plan.expanded ? 0 : units * a.orders * a.heads * plan.tokens;
  s.keys = carver.take(!made ? 0 : plan.expanded ? units * unit_bytes(plan) : rows * a.key_width * 2);
  s.mean = carver.take(made ? rows * 4 : 0);
  s.sum = carver.take(states * a.sum_width * 4);
  s.top = carver.take(states * 4);
  s.mass = carver.take(states * 4);
  s.joined = carver.take(plan.decode_bytes > 0 ? queries * a.value_dim * 2 : 0);
  plan.scratch_bytes = carver.bytes();
}

// CTAs to share the columns of latent queries where rows alone do not fill the device.
int column_shares(const Plan& plan, const Device& device) {
  const Absorb& p = plan.absorb;
  const Index rows = Index{p.heads / p.groups} * plan.tokens * plan.wave.units;
  const Index ctas = divided_up(rows, kProductRows) * plan.wave.sequences * p.groups * p.orders;
  const Index most = std::max(1, ceil_div(p.key_width, kProductColumns));
  return narrow(std::clamp<Index>(divided_up(Index{kProductRounds} * device.processors, ctas), 1, most));
}

std::size_t checked_bytes(int depth, const Device& device) {
  const int bytes = product_bytes(depth);
  if (bytes <= device.shared_bytes) return static_cast<std::size_t>(bytes);
  refuse("a product takes " + std::to_string(bytes) + " bytes of shared memory; expected at most " +
         std::to_string(device.shared_bytes));
}

}  // namespace

Plan make_plan(const Layout& layout, const Sizes& size, const Inputs& inputs, Type model, Form form,
               const Device& device, const Room& room) {
  check_limits(layout, size);
  const bool key_up = inputs[kKeyUp].given, value_up = inputs[kValueUp].given;
  const bool counted = size.fresh >= expand_from(layout, size, key_up, value_up);
  Plan plan{};
  plan.expanded = form == Form::counted ? counted : form == Form::expanded;
  plan.exact = size.exact;
  plan.model = model;
  plan.bound = narrow(size.total);
  fill_parameters(layout, size, inputs, plan);
  plan.tokens = narrow(evenly(size.fresh, std::clamp<Index>(room.queries / token_bytes(plan, size), 1, size.fresh)));
  plan.wave = wave_of(plan, size, device, room.keys);
  plan.tiling = tiling_of(plan, device, plan.tokens, room.queries);
  plan.last_tiling = tiling_of(plan, device, narrow(last_tokens(plan, size)), room.queries);
  plan.column_shares = column_shares(plan, device);
  const int pairs = 2 * plan.absorb.bands.decoded;
  if (inputs[kQueryMap].given) plan.map_bytes = checked_bytes(plan.map.query_dim, device);
  if (key_up) plan.absorb_bytes = checked_bytes(plan.absorb.nope_dim - pairs, device);
  if (key_up || value_up) {
    const int keys = key_up ? plan.expand.key_rank : 0, values = value_up ? plan.expand.value_rank : 0;
    plan.expand_bytes = checked_bytes(std::max(keys, values), device);
  }
  if (value_up && !plan.expanded) plan.decode_bytes = checked_bytes(plan.decode.value_rank, device);
  lay_scratch(plan, size);
  return plan;
}

}  // namespace mla_pass::cuda
