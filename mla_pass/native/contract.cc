#include "contract.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

namespace mla_pass {

const std::array<const char*, kInputs> kInputNames = {
    "query",        "row",          "past_latent",    "past_rope", "cos",    "sin",      "position_ids",
    "total_length", "padding_mask", "attention_bias", "query_map", "key_up", "key_mean", "value_up",
};

Kind kind_of(int input) {
  if (input == kCos || input == kSin) return Kind::float32;
  if (input == kPastLatent || input == kPastRope) return Kind::stored;
  return input == kPositionIds || input == kTotalLength || input == kPaddingMask ? Kind::int64 : Kind::model;
}

Index stored_width(Index numbers, Type type) {
  return type == Type::int8 || type == Type::uint8 ? numbers + kSegments : numbers;
}

namespace {

// Far above any model's sizes and far below where products of three of them overflow.
constexpr std::int64_t kLargest = 1 << 20;

std::string text(std::int64_t value) { return std::to_string(value); }

void within(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most) {
    throw Refused(std::string("attribute ") + name + " is " + text(value) + "; expected " + text(least) + " to " +
                  text(most));
  }
}

void same_length(const char* name, std::size_t length, std::size_t expected, const char* reason) {
  if (length != expected) {
    throw Refused(std::string("attribute ") + name + " has " + std::to_string(length) + " entries; expected " +
                  std::to_string(expected) + ", " + reason);
  }
}

std::vector<Index> columns(const char* name, const std::vector<std::int64_t>& values) {
  for (const std::int64_t value : values) within(name, value, 0, kLargest);
  return {values.begin(), values.end()};
}

// Runs of equal blocks. Each block must hold whole blocks of the finer level, which hand-me-down queries rely on.
std::vector<Level> levels_of(const std::vector<std::int64_t>& block) {
  std::vector<Level> levels;
  for (std::size_t i = 0; i < block.size(); ++i) {
    within("band_block", block[i], 1, std::int64_t{1} << 40);
    const Index at = static_cast<Index>(i);
    if (!levels.empty() && levels.back().block == block[i]) {
      levels.back().end = at + 1;
      continue;
    }
    if (!levels.empty() && (block[i] < levels.back().block || block[i] % levels.back().block != 0)) {
      throw Refused("attribute band_block goes from " + text(levels.back().block) + " to " + text(block[i]) +
                    "; expected finest blocks first, each size a multiple of the one before");
    }
    levels.push_back({static_cast<Index>(block[i]), at, at + 1});
  }
  if (levels.size() > static_cast<std::size_t>(kMaxLevels)) {
    throw Refused("attribute band_block has " + std::to_string(levels.size()) + " different sizes; expected at most " +
                  text(kMaxLevels));
  }
  return levels;
}

}  // namespace

Layout checked(const Attributes& a) {
  within("num_heads", a.num_heads, 1, kLargest);
  within("kv_groups", a.kv_groups, 1, a.num_heads);
  if (a.num_heads % a.kv_groups != 0) {
    throw Refused("attribute num_heads is " + text(a.num_heads) + "; expected a multiple of kv_groups, " +
                  text(a.kv_groups));
  }
  within("rank", a.rank, 1, kLargest);
  within("key_rank", a.key_rank, 0, a.rank);
  within("value_offset", a.value_offset, 0, a.rank);
  within("rope_dim", a.rope_dim, 0, kLargest);
  if (a.rope_dim % 2 != 0) throw Refused("attribute rope_dim is " + text(a.rope_dim) + "; expected an even number");
  within("nope_dim", a.nope_dim, 0, kLargest);
  within("split", a.split, 0, a.rank + a.rope_dim);
  within("causal", a.causal, 0, 1);
  within("shared_buffer", a.shared_buffer, 0, 1);
  if (!std::isfinite(a.scale)) throw Refused("attribute scale is " + std::to_string(a.scale) + "; expected a number");
  if (!(a.softcap >= 0) || std::isinf(a.softcap)) {
    throw Refused("attribute softcap is " + std::to_string(a.softcap) + "; expected 0 or a positive number");
  }
  same_length("rope_index", a.rope_index.size(), static_cast<std::size_t>(a.rope_dim / 2), "half of rope_dim");
  const std::size_t pairs = a.band_index.size();
  same_length("band_block", a.band_block.size(), pairs, "as many as band_index");
  same_length("band_a0", a.band_a0.size(), pairs, "as many as band_index");
  same_length("band_a1", a.band_a1.size(), pairs, "as many as band_index");
  if (2 * static_cast<std::int64_t>(pairs) > a.nope_dim) {
    throw Refused("attribute band_index has " + std::to_string(pairs) + " entries; expected at most half of nope_dim, " +
                  text(a.nope_dim));
  }
  const bool follows = std::any_of(a.band_a1.begin(), a.band_a1.end(), [](float x) { return x != 0.0f; });
  return {a, columns("rope_index", a.rope_index), columns("band_index", a.band_index), levels_of(a.band_block),
          follows ? 2 : 1};
}

namespace {

// A dimension as it should be: any size of at least `least` when `size` is negative, told as `name`.
struct Dim {
  const char* name;
  Index size;
  Index least = 0;
};

std::string type_name(int type) {
  switch (static_cast<Type>(type)) {
    case Type::float32:
      return "float32";
    case Type::int8:
      return "int8";
    case Type::uint8:
      return "uint8";
    case Type::int64:
      return "int64";
    case Type::float16:
      return "float16";
    case Type::bfloat16:
      return "bfloat16";
  }
  return "ONNX type " + std::to_string(type);
}

std::string shape_of(const Tensor& tensor) {
  std::string out = "[";
  for (Index i = 0; i < tensor.rank; ++i) {
    out += (i ? ", " : "") + text(tensor.dims[static_cast<std::size_t>(i)]);
  }
  return out + "]";
}

std::string shape_of(std::initializer_list<Dim> dims) {
  std::string out = "[";
  for (const Dim& dim : dims) {
    out += out.size() > 1 ? ", " : "";
    if (dim.size >= 0) {
      out += text(dim.size);
    } else {
      out += dim.name;
      if (dim.least > 0) out += " >= " + text(dim.least);
    }
  }
  return out + "]";
}

class Checker {
 public:
  Checker(const Inputs& inputs, Type model) : inputs_(inputs), model_(model) {}

  void shape(Input input, std::initializer_list<Dim> dims) const { shape(input, type_of(input), dims); }

  // What an input's elements are to be. A cache may be of 16 bits or of 8 if it is not of the model's type.
  Type type_of(Input input) const {
    switch (kind_of(input)) {
      case Kind::float32:
        return Type::float32;
      case Kind::int64:
        return Type::int64;
      case Kind::stored:
        for (const Type type : {Type::float16, Type::bfloat16, Type::int8, Type::uint8}) {
          if (inputs_[input].type == static_cast<int>(type)) return type;
        }
        return model_;
      default:
        return model_;
    }
  }

  // [batch, 1, rows, numbers as they are stored]
  void cache(Input input, Index batch, Index rows, const char* name, Index numbers) const {
    const Type type = type_of(input);
    shape(input, type, {{"batch", batch}, {"1", 1}, {"rows", rows}, {name, stored_width(numbers, type)}});
  }

  void shape(Input input, Type type, std::initializer_list<Dim> dims) const {
    const Tensor& tensor = inputs_[input];
    bool good = tensor.given && tensor.type == static_cast<int>(type) && tensor.rank == static_cast<Index>(dims.size());
    std::size_t i = 0;
    for (const Dim& dim : dims) {
      if (!good) break;
      const Index size = tensor.dims[i++];
      good = dim.size >= 0 ? size == dim.size : size >= dim.least;
    }
    if (good) return;
    throw Refused("input " + std::string(kInputNames[input]) + " is " +
                  (tensor.given ? type_name(tensor.type) + " " + shape_of(tensor) : std::string("absent")) +
                  "; expected " + type_name(static_cast<int>(type)) + " " + shape_of(dims) +
                  (kind_of(input) == Kind::stored
                       ? ", or of float16, bfloat16, int8 or uint8 (float8), the last two with 4 codes a row"
                       : ""));
  }

  // As shape, where the input is there.
  void optional(Input input, std::initializer_list<Dim> dims) const {
    if (inputs_[input].given) shape(input, dims);
  }

  Index dim(Input input, std::size_t axis) const { return inputs_[input].dims[axis]; }
  bool given(Input input) const { return inputs_[input].given; }

 private:
  const Inputs& inputs_;
  Type model_;
};

void require_rank(const Inputs& inputs, Input input, Index rank, const char* shape) {
  const Tensor& tensor = inputs[input];
  if (tensor.given && tensor.rank == rank) return;
  throw Refused("input " + std::string(kInputNames[input]) + " is " +
                (tensor.given ? type_name(tensor.type) + " " + shape_of(tensor) : std::string("absent")) +
                "; expected " + shape);
}

void check_columns(const char* name, const std::vector<Index>& index, Index angles) {
  for (const Index column : index) {
    if (column >= angles) {
      throw Refused(std::string("attribute ") + name + " holds " + text(column) + "; expected columns of cos, 0 to " +
                    text(angles - 1));
    }
  }
}

// T, which tells how many rows are filled once the new ones are written.
Index total_length(const Layout& layout, const Checker& check, const Inputs& inputs, Index fresh) {
  const Tensor& tensor = inputs[kTotalLength];
  check.shape(kTotalLength, {{"1", 1}});
  const std::int64_t total = *tensor.as<std::int64_t>();
  const Index rows = check.dim(kPastLatent, 2);
  if (total < fresh) {
    throw Refused("input total_length is " + text(total) + "; expected at least the " + text(fresh) +
                  " new tokens of query");
  }
  if (layout.attributes.shared_buffer && total > rows) {
    throw Refused("the cache is full: input past_latent has room for " + text(rows) + " rows, and total_length is " +
                  text(total) + " with " + text(fresh) + " new; expected a capacity of at least " + text(total));
  }
  if (!layout.attributes.shared_buffer && total != rows + fresh) {
    throw Refused("input total_length is " + text(total) + "; expected " + text(rows + fresh) + ": the " + text(rows) +
                  " rows of past_latent and " + text(fresh) + " new ones");
  }
  return static_cast<Index>(total);
}

// T where a shape tells it: each row that is filled has a column in a mask and in a bias. Otherwise what fits the cache
// and, for bands, the tables.
Index bound(const Layout& layout, const Checker& check, const Inputs& inputs, Index fresh) {
  check.shape(kTotalLength, {{"1", 1}});
  const Index rows = check.dim(kPastLatent, 2);
  if (!layout.attributes.shared_buffer) return rows + fresh;
  if (rows < fresh) {
    throw Refused("the cache is full: input past_latent has room for " + text(rows) + " rows, and query holds " +
                  text(fresh) + " new tokens; expected a capacity of at least " + text(fresh));
  }
  for (const Input input : {kPaddingMask, kAttentionBias}) {
    if (!check.given(input)) continue;
    const Tensor& tensor = inputs[input];
    require_rank(inputs, input, input == kPaddingMask ? 2 : 4, "[..., total_length]");
    const Index columns = tensor.dims[static_cast<std::size_t>(tensor.rank - 1)];
    if (columns >= fresh && columns <= rows) return columns;
    throw Refused("input " + std::string(kInputNames[input]) + " has " + text(columns) +
                  " columns, as many as rows are filled; expected " + text(fresh) + ", the new tokens of query, to " + text(rows) +
                  ", the rows of past_latent");
  }
  return layout.band_index.empty() ? rows : std::clamp(check.dim(kCos, 0), fresh, rows);
}

void check_positions(const Checker& check, Index batch, Index fresh) {
  const Index sequences = check.dim(kPositionIds, 0) == 1 ? 1 : batch;
  check.shape(kPositionIds, {{"batch", sequences}, {"tokens", fresh}});
}

void read_positions(const Checker& check, const Inputs& inputs) {
  const Index count = check.dim(kPositionIds, 0) * check.dim(kPositionIds, 1), most = check.dim(kCos, 0);
  const std::int64_t* position = inputs[kPositionIds].as<std::int64_t>();
  for (Index i = 0; i < count; ++i) {
    if (position[i] < 0 || position[i] >= most) {
      throw Refused("input position_ids holds " + text(position[i]) + "; expected 0 to " + text(most - 1) +
                    ", the rows of cos");
    }
  }
}

// query_map, key_up, key_mean and value_up, and the sizes that only they tell.
void check_maps(const Layout& layout, const Inputs& inputs, const Checker& check, Sizes& size) {
  const Index groups = size.groups, n = size.nope_dim, k = size.key_rank, width = n + size.rope_dim;
  if (check.given(kKeyUp) != check.given(kKeyMean)) {
    const Input missing = check.given(kKeyUp) ? kKeyMean : kKeyUp;
    throw Refused(std::string("input ") + kInputNames[missing] + " is absent; expected key_up and key_mean together");
  }
  if (check.given(kKeyUp)) {
    check.shape(kKeyUp, {{"kv_groups", groups}, {"nope_dim", n}, {"key_rank", k}});
    check.shape(kKeyMean, {{"kv_groups", groups}, {"nope_dim", n}});
  } else if (!layout.levels.empty()) {
    throw Refused("input key_up is absent; expected it, for the node has bands");
  } else if (n != 0 && n != k) {
    throw Refused("attribute nope_dim is " + text(n) + "; expected key_rank, " + text(k) +
                  ", or 0, for input key_up is absent");
  }
  size.query_dim = width;
  if (check.given(kQueryMap)) {
    require_rank(inputs, kQueryMap, 3, "[kv_groups, head size, nope_dim + rope_dim]");
    size.query_dim = check.dim(kQueryMap, 1);
    check.shape(kQueryMap, {{"kv_groups", groups}, {"head size", -1, 1}, {"nope_dim + rope_dim", width}});
  }
  size.value_dim = size.value_rank;
  if (check.given(kValueUp)) {
    require_rank(inputs, kValueUp, 3, "[kv_groups, rank - value_offset, value head size]");
    size.value_dim = check.dim(kValueUp, 2);
    check.shape(kValueUp, {{"kv_groups", groups}, {"rank - value_offset", size.value_rank}, {"value head size", -1, 1}});
  }
}

void check_tables(const Layout& layout, const Checker& check, Sizes& size) {
  size.angles = check.dim(kCos, 1);
  // Bands read the tables at cached rows and, for the angle itself, at row 1.
  const Index rows = size.pairs > 0 ? std::max<Index>(size.total, 2) : 1;
  check.shape(kCos, {{"positions", -1, rows}, {"rotary pairs", -1}});
  check.shape(kSin, {{"positions", check.dim(kCos, 0)}, {"rotary pairs", size.angles}});
  check_columns("rope_index", layout.rope_index, size.angles);
  check_columns("band_index", layout.band_index, size.angles);
}

void check_bias(const Inputs& inputs, const Checker& check, Sizes& size) {
  if (!check.given(kAttentionBias)) return;
  require_rank(inputs, kAttentionBias, 4, "[batch or 1, num_heads or 1, tokens, total_length]");
  const Index batch = check.dim(kAttentionBias, 0) == 1 ? 1 : size.batch;
  const Index heads = check.dim(kAttentionBias, 1) == 1 ? 1 : size.heads;
  check.shape(kAttentionBias,
              {{"batch", batch}, {"num_heads", heads}, {"tokens", size.fresh}, {"total_length", size.total}});
  size.bias_head = heads == 1 ? 0 : size.fresh * size.total;
  size.bias_batch = batch == 1 ? 0 : heads * size.fresh * size.total;
}

Sizes from_attributes(const Layout& layout) {
  const Attributes& a = layout.attributes;
  Sizes size{};
  size.heads = a.num_heads;
  size.groups = a.kv_groups;
  size.rank = a.rank;
  size.key_rank = a.key_rank;
  size.value_offset = a.value_offset;
  size.value_rank = a.rank - a.value_offset;
  size.rope_dim = a.rope_dim;
  size.nope_dim = a.nope_dim;
  size.split = a.split;
  size.pairs = static_cast<Index>(layout.band_index.size());
  size.orders = layout.orders;
  size.levels = static_cast<Index>(layout.levels.size());
  size.window = a.local_window_size > 0 ? a.local_window_size : 0;
  size.causal = a.causal != 0;
  size.scale = a.scale;
  size.softcap = a.softcap;
  return size;
}

}  // namespace

Sizes checked(const Layout& layout, const Inputs& inputs, Type model, Memory memory) {
  const Checker check(inputs, model);
  Sizes size = from_attributes(layout);
  require_rank(inputs, kQuery, 3, "[batch, tokens, num_heads * head size]");
  size.batch = check.dim(kQuery, 0);
  size.fresh = check.dim(kQuery, 1);
  check_maps(layout, inputs, check, size);
  check.shape(kQuery, {{"batch", -1, 1}, {"tokens", -1, 1}, {"num_heads * head size", size.heads * size.query_dim}});
  check.shape(kRow, {{"batch", size.batch}, {"tokens", size.fresh}, {"rank + rope_dim", size.rank + size.rope_dim}});
  check.cache(kPastLatent, size.batch, -1, "split", size.split);
  const Index rows = check.dim(kPastLatent, 2);
  check.cache(kPastRope, size.batch, rows, "rank + rope_dim - split", size.rank + size.rope_dim - size.split);
  require_rank(inputs, kCos, 2, "float32 [positions, rotary pairs]");
  const bool here = memory == Memory::host;
  size.total = (here ? total_length : bound)(layout, check, inputs, size.fresh);
  size.exact = here || !layout.attributes.shared_buffer || check.given(kPaddingMask) || check.given(kAttentionBias);
  size.capacity = layout.attributes.shared_buffer ? rows : size.total;
  check_tables(layout, check, size);
  require_rank(inputs, kPositionIds, 2, "int64 [batch or 1, tokens]");
  check_positions(check, size.batch, size.fresh);
  if (here) read_positions(check, inputs);
  size.position_step = check.dim(kPositionIds, 0) == 1 ? 0 : size.fresh;
  check.optional(kPaddingMask, {{"batch", size.batch}, {"total_length", size.total}});
  check_bias(inputs, check, size);
  return size;
}

Index expand_from(const Layout& layout, const Sizes& size, bool key_up, bool value_up) {
  double absorbed = 0, expanded = 0, decoding = 0;
  const double k = static_cast<double>(size.key_rank), n = static_cast<double>(size.nope_dim);
  const double orders = static_cast<double>(size.orders);
  if (key_up) {
    for (std::size_t i = 0; i < layout.levels.size(); ++i) {
      const Level& level = layout.levels[i];
      if (level.block == 1) {
        const double per_group = static_cast<double>(size.heads / size.groups);
        absorbed += static_cast<double>(level.end) * ((2 * k + 4) / per_group + 2);
        continue;
      }
      const double made = static_cast<double>(level.end - level.begin) * (4 + 2 * orders * (k + 1));
      const double handed = i + 1 < layout.levels.size() ? (orders - 1) * (k + 1) : 0;
      absorbed += (made + handed) / static_cast<double>(level.block);
    }
    absorbed += orders * k;
    expanded += n;
    decoding += k * n + 6 * static_cast<double>(size.pairs);
  }
  if (value_up) {
    const double w = static_cast<double>(size.value_rank), v = static_cast<double>(size.value_dim);
    absorbed += w;
    expanded += v;
    decoding += w * v;
  }
  const double saved = static_cast<double>(size.heads) * (absorbed - expanded);
  const double from = saved > 0 ? std::ceil(static_cast<double>(size.groups) * decoding / saved) : 1e18;
  return from < 1e15 ? static_cast<Index>(from) : std::numeric_limits<Index>::max();
}

}  // namespace mla_pass
