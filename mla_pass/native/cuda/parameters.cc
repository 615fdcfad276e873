#include <algorithm>
#include <string>

#include "plan_parts.h"

namespace mla_pass::cuda {
namespace {

// Rows of a block that `attend` takes its queries by; pairs of shorter blocks it decodes.
constexpr Index kLeastBlock = 64;
// Multiply-adds that a device makes while its second-level cache hands out a byte: 156e12 a second by 4e12 on an A100,
// 300e12 (by mma.sync) by 7e12 on an H100.
constexpr double kBalance = 40;

Stored stored_as(const Tensor& past, Input input, Type model) {
  const Type type = static_cast<Type>(past.type);
  if (type == model) return Stored::model;
  if (type == Type::int8) return Stored::int8;
  if (type == Type::uint8) return Stored::float8;
  refuse(std::string("input ") + kInputNames[input] +
         " is of 16 bits other than the model's; expected the model's, int8 or uint8");
}

// ---- which pairs are decoded

// The first level that is absorbed, all coarser ones with it: `levels.size()` where none is.
//
// Counted a cached row of a sequence. Absorbed: of a block, H S rows of queries in every order, which are made (n k
// multiply-adds), written and read, and an order more in the scores. Decoded: 2 k multiply-adds for each pair and kv
// group, and again for every tile of queries that has rows of the group, and 2 for each query row.
std::size_t absorbed_from(const Layout& layout, const Sizes& size) {
  const auto of_row = [&](std::size_t first) {
    const Index decoded = first < layout.levels.size() ? layout.levels[first].begin : size.pairs;
    const double rows = static_cast<double>(size.heads * size.fresh), k = static_cast<double>(size.key_rank);
    const double tiles = static_cast<double>(divided_up(size.heads * size.fresh, kMaxTileRows));
    const double decodings = std::max(static_cast<double>(size.groups), tiles);
    double cost = decodings * 2 * static_cast<double>(decoded) * (k + kMaxTileRows);
    if (first == layout.levels.size()) return cost;
    const double block = static_cast<double>(layout.levels[first].block), orders = static_cast<double>(size.orders);
    cost += (orders - 1) * rows * k;
    return cost + orders * rows * k * (static_cast<double>(size.nope_dim - 2 * decoded) + 4 * kBalance) / block;
  };
  std::size_t least = 0;
  while (least < layout.levels.size() && layout.levels[least].block % kLeastBlock != 0) ++least;
  std::size_t best = least;
  for (std::size_t first = least + 1; first <= layout.levels.size(); ++first) {
    if (of_row(first) < of_row(best)) best = first;
  }
  return best;
}

Bands bands_of(const Layout& layout, const Sizes& size, bool expanded) {
  Bands bands{};
  bands.pairs = narrow(size.pairs);
  bands.orders = narrow(size.orders);
  for (const auto& level : layout.levels) {
    for (Index i = level.begin; i < level.end; ++i) bands.block[i] = narrow(level.block);
  }
  std::copy(layout.band_index.begin(), layout.band_index.end(), bands.index);
  if (expanded) return bands;
  const std::size_t first = absorbed_from(layout, size);
  bands.decoded = narrow(first < layout.levels.size() ? layout.levels[first].begin : size.pairs);
  for (std::size_t i = first; i < layout.levels.size(); ++i) {
    const auto& level = layout.levels[i];
    bands.level[bands.absorbed++] = {narrow(level.block), narrow(level.begin), narrow(level.end)};
  }
  return bands;
}

// ---- parameters

class Parameters {
 public:
  Parameters(const Layout& layout, const Sizes& size, const Inputs& inputs, Type model, bool expanded)
      : layout_(layout), size_(size), inputs_(inputs), expanded_(expanded), bands_(bands_of(layout, size, expanded)) {
    tables_.angles = narrow(size.angles);
    tables_.positions = narrow(inputs[kCos].dims[0]);
    for (int i = 0; i < 2; ++i) {
      const Input input = i == 0 ? kPastLatent : kPastRope;
      const Stored as = stored_as(inputs[input], input, model);
      const Index numbers = i == 0 ? size.split : size.rank + size.rope_dim - size.split;
      part_[i] = {nullptr, narrow(numbers), narrow(inputs[input].dims[3] * (as == Stored::model ? 2 : 1)), as};
    }
  }

  // Everything but what depends on a run of tokens.
  void fill(Plan& plan) const {
    fill_setup(plan.setup);
    fill_append(plan.append);
    fill_carry(plan.carry);
    fill_queries(plan.map, plan.fix);
    fill_keys(plan.absorb, plan.expand);
    fill_attend(plan.attend);
    fill_context(plan.attend, plan.combine, plan.decode);
  }

 private:
  bool absorbs() const { return bands_.absorbed > 0; }
  int turning_orders() const { return absorbs() ? narrow(size_.orders) : 1; }
  int block() const { return absorbs() ? bands_.level[0].block : 0; }
  int key_width() const {
    if (expanded_) return up16(narrow(size_.nope_dim + size_.rope_dim));
    return size_.nope_dim > 2 * bands_.decoded ? up16(narrow(size_.key_rank)) : 0;
  }

  void fill_setup(Setup& p) const {
    p.mask_step = inputs_[kPaddingMask].given ? narrow(inputs_[kPaddingMask].dims[1]) : 0;
    p.position_step = narrow(size_.position_step);
    p.batch = narrow(size_.batch);
    p.fresh = narrow(size_.fresh);
    p.bound = narrow(size_.total);
    p.exact = size_.exact;
    p.tables = tables_;
    p.pairs = bands_.pairs;
    std::copy_n(bands_.index, p.pairs, p.index);
    std::copy_n(bands_.block, p.pairs, p.block);
    std::copy(layout_.attributes.band_a0.begin(), layout_.attributes.band_a0.end(), p.a0);
    std::copy(layout_.attributes.band_a1.begin(), layout_.attributes.band_a1.end(), p.a1);
  }

  void fill_append(Append& p) const {
    p.position_step = narrow(size_.position_step);
    p.batch = narrow(size_.batch);
    p.fresh = narrow(size_.fresh);
    p.capacity = narrow(size_.capacity);
    p.rank = narrow(size_.rank);
    p.rope_dim = narrow(size_.rope_dim);
    p.split = narrow(size_.split);
    std::copy_n(part_, 2, p.part);
    p.tables = tables_;
    std::copy(layout_.rope_index.begin(), layout_.rope_index.end(), p.rope_index);
  }

  void fill_carry(Carry (&carry)[2]) const {
    for (int i = 0; i < 2; ++i) {
      carry[i].batch = narrow(size_.batch);
      carry[i].rows = narrow(inputs_[kPastLatent].dims[2]);
      carry[i].capacity = narrow(size_.capacity);
      carry[i].bytes = part_[i].bytes;
    }
  }

  void fill_queries(Map& map, Fix& fix) const {
    map.query_dim = narrow(size_.query_dim);
    map.width = narrow(size_.nope_dim + size_.rope_dim);
    map.heads = fix.heads = narrow(size_.heads);
    map.groups = fix.groups = narrow(size_.groups);
    map.batch = fix.batch = narrow(size_.batch);
    map.fresh = narrow(size_.fresh);
    fix.nope_dim = narrow(size_.nope_dim);
    fix.rope_dim = narrow(size_.rope_dim);
    fix.expanded = expanded_;
    fix.position_step = narrow(size_.position_step);
    fix.tables = tables_;
    fix.bands = bands_;
    std::copy(layout_.rope_index.begin(), layout_.rope_index.end(), fix.rope_index);
    fix.rope_width = expanded_ ? 0 : up16(narrow(size_.rope_dim));
    fix.fine_width = up8(2 * bands_.decoded);
    fix.key_width = key_width();
  }

  void fill_keys(Absorb& absorb, Expand& expand) const {
    absorb.nope_dim = expand.nope_dim = narrow(size_.nope_dim);
    absorb.rope_dim = expand.rope_dim = narrow(size_.rope_dim);
    absorb.key_rank = expand.key_rank = narrow(size_.key_rank);
    absorb.groups = expand.groups = narrow(size_.groups);
    absorb.window = expand.window = narrow(size_.window);
    absorb.causal = expand.causal = size_.causal;
    absorb.tables = expand.tables = tables_;
    absorb.bands = expand.bands = bands_;
    absorb.key_width = expand.key_width = key_width();
    absorb.heads = narrow(size_.heads);
    absorb.orders = turning_orders();
    absorb.block = block();
    std::copy_n(part_, 2, expand.part);
    expand.capacity = narrow(size_.capacity);
    expand.rank = narrow(size_.rank);
    expand.split = narrow(size_.split);
    expand.value_offset = narrow(size_.value_offset);
    expand.value_rank = narrow(size_.value_rank);
    expand.value_dim = narrow(size_.value_dim);
    expand.step = key_width() + up8(narrow(size_.value_dim));
  }

  void fill_attend(Attend& p) const {
    p.key_width = key_width();
    p.per_group = narrow(size_.heads / size_.groups);
    p.groups_apart = expanded_ ? narrow(size_.groups) : 1;
    p.heads = expanded_ ? p.per_group : narrow(size_.heads);
    p.token_major = expanded_;
    p.orders = turning_orders();
    p.block = block();
    p.causal = size_.causal;
    p.window = narrow(size_.window);
    p.scale = size_.scale;
    p.softcap = size_.softcap;
    p.mask_step = inputs_[kPaddingMask].given ? narrow(inputs_[kPaddingMask].dims[1]) : 0;
    fill_bias(p);
    p.tables = tables_;
    p.bands = bands_;
    if (expanded_) return fill_expansion(p);
    p.rope_width = up16(narrow(size_.rope_dim));
    p.fine_width = up8(2 * bands_.decoded);
    std::copy_n(part_, 2, p.part);
    p.parts = 2;
    p.capacity = narrow(size_.capacity);
    p.rank = narrow(size_.rank);
    p.rope_dim = narrow(size_.rope_dim);
    p.split = narrow(size_.split);
    p.nope_dim = narrow(size_.nope_dim);
    p.key_rank = narrow(size_.key_rank);
    p.value_column = narrow(size_.value_offset);
    p.value_dim = narrow(size_.value_rank);
    p.sum_width = up8(p.value_dim);
  }

  void fill_expansion(Attend& p) const {
    const int step = key_width() + up8(narrow(size_.value_dim));
    p.part[0] = {nullptr, step, 2 * step, Stored::model};
    p.parts = 1;
    p.value_column = key_width();
    p.value_dim = narrow(size_.value_dim);
    p.sum_width = up8(p.value_dim);
  }

  // Its own dims count: it may have more columns than rows can be filled.
  void fill_bias(Attend& p) const {
    const Tensor& bias = inputs_[kAttentionBias];
    if (!bias.given) return;
    p.bias_token = bias.dims[3];
    p.bias_head = bias.dims[1] == 1 ? 0 : bias.dims[2] * bias.dims[3];
    p.bias_batch = bias.dims[0] == 1 ? 0 : bias.dims[1] * bias.dims[2] * bias.dims[3];
  }

  void fill_context(const Attend& attend, Combine& combine, Decode& decode) const {
    combine.batch = decode.batch = narrow(size_.batch);
    combine.groups_apart = attend.groups_apart;
    combine.sum_width = attend.sum_width;
    combine.value_dim = combine.out_step = attend.value_dim;
    combine.heads = attend.heads;
    combine.per_group = attend.per_group;
    combine.token_major = attend.token_major;
    decode.fresh = narrow(size_.fresh);
    decode.heads = narrow(size_.heads);
    decode.groups = narrow(size_.groups);
    decode.value_rank = narrow(size_.value_rank);
    decode.value_dim = narrow(size_.value_dim);
  }

  const Layout& layout_;
  const Sizes& size_;
  const Inputs& inputs_;
  const bool expanded_;
  const Bands bands_;
  Tables tables_{};
  Part part_[2];
};

}  // namespace

void fill_parameters(const Layout& layout, const Sizes& size, const Inputs& inputs, Plan& plan) {
  Parameters(layout, size, inputs, plan.model, plan.expanded).fill(plan);
}

}  // namespace mla_pass::cuda
