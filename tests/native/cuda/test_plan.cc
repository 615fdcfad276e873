// The plan of a call: launches are recorded, not run, and every address in them is held against the piece of scratch
// that it belongs to.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attend_shared.h"
#include "host.h"
#include "plan.h"

namespace mla_pass::cuda {
namespace {

int failures = 0;
std::string running;

void expect(bool good, const std::string& what) {
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s: %s\n", running.c_str(), what.c_str());
}

// An A100, an L40S and an H100.
constexpr Device kA100 = {8, 0, 108, 163 * 1024, std::size_t{40} << 20};
constexpr Device kL40S = {8, 9, 142, 99 * 1024, std::size_t{96} << 20};
constexpr Device kH100 = {9, 0, 132, 227 * 1024, std::size_t{50} << 20};
// Scratch begins here; inputs lie far away from it.
constexpr std::uintptr_t kScratch = std::uintptr_t{1} << 44;

struct Shape {
  Index batch = 1, fresh = 1, capacity = 8192, heads = 32, groups = 8, rank = 512, rope = 64, head_dim = 128;
  std::vector<std::int64_t> blocks;
  Index still = 64;
  bool order = true, key_up = true, value_up = true, query_map = true, mask = false, shared = true;
  Index window = 0;
  bool causal = true;
  Index value_offset = 0;
  Type latent = Type::bfloat16, part = Type::bfloat16;
};

struct Made {
  Layout layout;
  Inputs inputs{};
  Sizes size;
};

void give(Inputs& inputs, Input input, Type type, std::initializer_list<Index> dims) {
  Tensor& tensor = inputs[input];
  tensor.given = true;
  tensor.data = reinterpret_cast<const void*>((static_cast<std::uintptr_t>(input) + 1) << 52);
  tensor.type = static_cast<int>(type);
  tensor.rank = static_cast<Index>(dims.size());
  std::copy(dims.begin(), dims.end(), tensor.dims.begin());
}

Made make(const Shape& s) {
  Attributes a{};
  const auto pairs = static_cast<Index>(s.blocks.size());
  const Index n = s.key_up ? 2 * pairs + s.still : s.rank, w = s.rank - s.value_offset;
  a.num_heads = s.heads;
  a.kv_groups = s.groups;
  a.rank = a.key_rank = a.split = s.rank;
  a.value_offset = s.value_offset;
  a.rope_dim = s.rope;
  a.nope_dim = n;
  a.local_window_size = s.window > 0 ? s.window : -1;
  a.causal = s.causal;
  a.shared_buffer = s.shared;
  for (Index i = 0; i < s.rope / 2; ++i) a.rope_index.push_back(i);
  for (Index i = 0; i < pairs; ++i) a.band_index.push_back(i);
  a.band_block = s.blocks;
  a.band_a0.assign(s.blocks.size(), 0.5f);
  a.band_a1.assign(s.blocks.size(), s.order ? 0.01f : 0.0f);
  a.scale = 0.1f;
  Made made{checked(a), {}, {}};
  const Type model = Type::bfloat16;
  const Index query = s.query_map ? s.head_dim : n + s.rope;
  const Index past = s.shared ? s.capacity : s.capacity - s.fresh;
  give(made.inputs, kQuery, model, {s.batch, s.fresh, s.heads * query});
  give(made.inputs, kRow, model, {s.batch, s.fresh, s.rank + s.rope});
  give(made.inputs, kPastLatent, s.latent, {s.batch, 1, past, stored_width(s.rank, s.latent)});
  give(made.inputs, kPastRope, s.part, {s.batch, 1, past, stored_width(s.rope, s.part)});
  give(made.inputs, kCos, Type::float32, {s.capacity + 8, std::max<Index>({s.rope / 2, pairs, 1})});
  give(made.inputs, kSin, Type::float32, {s.capacity + 8, std::max<Index>({s.rope / 2, pairs, 1})});
  give(made.inputs, kPositionIds, Type::int64, {s.batch, s.fresh});
  give(made.inputs, kTotalLength, Type::int64, {1});
  if (s.mask) give(made.inputs, kPaddingMask, Type::int64, {s.batch, s.capacity});
  if (s.query_map) give(made.inputs, kQueryMap, model, {s.groups, s.head_dim, n + s.rope});
  if (s.key_up) give(made.inputs, kKeyUp, model, {s.groups, n, s.rank});
  if (s.key_up) give(made.inputs, kKeyMean, model, {s.groups, n});
  if (s.value_up) give(made.inputs, kValueUp, model, {s.groups, w, s.head_dim});
  made.size = checked(made.layout, made.inputs, model, Memory::device);
  return made;
}

// ---- a recording of launches

struct Launched {
  Kernel kernel;
  Grid grid;
  std::size_t shared_bytes;
  std::vector<unsigned char> parameters;

  template <class P>
  const P& as() const {
    return *reinterpret_cast<const P*>(parameters.data());
  }
};

class Recorder : public Launcher {
 public:
  std::vector<Launched> launched;
  void launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters, std::size_t bytes) override {
    const auto* from = static_cast<const unsigned char*>(parameters);
    launched.push_back({kernel, grid, shared_bytes, {from, from + bytes}});
  }
};

bool is_attend(Kernel kernel) { return kernel >= Kernel::attend_f16_128_16 && kernel <= Kernel::attend_bf16_256_64; }

// Everything that a plan promises, on the launches of one call.
class Inspection {
 public:
  Inspection(const Shape& shape, const Device& device, Form form, const Room& room)
      : shape_(shape), device_(device), made_(make(shape)),
        plan_(make_plan(made_.layout, made_.size, made_.inputs, Type::bfloat16, form, device, room)) {
    const auto present = [&](Input past) {
      return shape_.shared ? const_cast<void*>(made_.inputs[past].data)
                           : reinterpret_cast<void*>((static_cast<std::uintptr_t>(past) + 100) << 52);
    };
    Recorder recorder;
    void* const context = reinterpret_cast<void*>(std::uintptr_t{200} << 52);
    const Outputs outputs = {context, present(kPastLatent), present(kPastRope)};
    run(plan_, made_.inputs, outputs, reinterpret_cast<void*>(kScratch), recorder);
    launched_ = std::move(recorder.launched);
  }

  const Plan& plan() const { return plan_; }
  const std::vector<Launched>& launched() const { return launched_; }

  void check() const {
    check_pieces();
    for (const Launched& l : launched_) {
      const std::string name = kernel_name(l.kernel);
      expect(l.grid.x >= 1 && l.grid.y >= 1 && l.grid.z >= 1 && l.grid.x <= 0x7fffffffu && l.grid.y <= 65535 &&
                 l.grid.z <= 65535, name + " has a grid that no device takes");
      expect(l.shared_bytes <= static_cast<std::size_t>(device_.shared_bytes), name + " takes too much shared memory");
      check_addresses(l, name);
    }
    check_order();
    check_waves();
  }

 private:
  void check_pieces() const {
    const Scratch& s = plan_.scratch;
    std::vector<Scratch::Piece> pieces = {s.span, s.fit, s.dims, s.fixed, s.keys,
                                          s.mean, s.sum, s.top,  s.mass,  s.joined};
    std::sort(pieces.begin(), pieces.end(), [](const auto& a, const auto& b) {
      return a.at != b.at ? a.at < b.at : a.bytes < b.bytes;
    });
    std::size_t end = 0;
    for (const auto& piece : pieces) {
      expect(piece.at >= end && piece.at % 256 == 0, "pieces of scratch overlap");
      end = std::max(end, piece.at + piece.bytes);
    }
    expect(end <= plan_.scratch_bytes, "a piece lies behind the scratch");
  }

  // `bytes` from `address` on lie in the piece, from its beginning unless it is one sequence's part.
  void within(const std::string& name, const void* address, long long bytes, const Scratch::Piece& piece) const {
    if (bytes == 0) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(address) - kScratch;
    expect(begin >= piece.at && begin + static_cast<std::uintptr_t>(bytes) <= piece.at + piece.bytes,
           name + " reaches beyond its piece of scratch");
  }

  void check_addresses(const Launched& l, const std::string& name) const {
    const Scratch& s = plan_.scratch;
    const long long batch = shape_.batch, heads = shape_.heads;
    if (l.kernel == Kernel::setup) {
      within(name, l.as<Setup>().span, batch * static_cast<long long>(sizeof(Span)), s.span);
      within(name, l.as<Setup>().fit, 16LL * l.as<Setup>().pairs, s.fit);
    } else if (l.kernel == Kernel::map_bf16) {
      const auto& p = l.as<Map>();
      within(name, p.dims, 4 * batch * p.tokens * heads * p.width, s.dims);
    } else if (l.kernel == Kernel::fix_bf16) {
      const auto& p = l.as<Fix>();
      const long long width = p.expanded ? p.key_width : p.rope_width + p.fine_width;
      within(name, p.dims, 4 * batch * p.tokens * heads * (p.nope_dim + p.rope_dim), s.dims);
      within(name, p.out, 2 * batch * p.tokens * heads * width, s.fixed);
    } else if (l.kernel == Kernel::absorb_bf16) {
      const auto& p = l.as<Absorb>();
      const long long rows = static_cast<long long>(p.sequences) * p.blocks * p.orders * p.heads * p.tokens;
      within(name, p.varying, 2 * rows * p.key_width, s.keys);
      within(name, p.mean, 4 * rows, s.mean);
      const long long of_group = static_cast<long long>(p.heads / p.groups) * p.tokens * p.blocks;
      expect(l.grid.x == static_cast<unsigned>((of_group + 63) / 64), name + " misses rows");
    } else if (l.kernel == Kernel::expand_bf16) {
      const auto& p = l.as<Expand>();
      within(name, p.out, 2LL * p.sequences * p.groups * (p.end - p.begin) * p.step, s.keys);
      expect(l.grid.x == static_cast<unsigned>(ceil_div(p.end - p.begin, 64)), name + " misses rows");
    } else if (l.kernel == Kernel::decode_bf16) {
      const auto& p = l.as<Decode>();
      within(name, p.joined, 2 * batch * p.tokens * heads * p.value_rank, s.joined);
    } else if (l.kernel == Kernel::combine_bf16) {
      const auto& p = l.as<Combine>();
      check_state(name, p.sum, p.top, p.mass, static_cast<long long>(p.groups_apart) * p.splits * p.rows, p.sum_width);
      if (plan_.decode_bytes > 0) within(name, p.out, 2 * batch * p.tokens * heads * p.value_dim, s.joined);
    } else if (is_attend(l.kernel)) {
      check_attend(l, name);
    }
  }

  void check_state(const std::string& name, const float* sum, const float* top, const float* mass, long long rows,
                   long long width) const {
    within(name, sum, 4 * shape_.batch * rows * width, plan_.scratch.sum);
    within(name, top, 4 * shape_.batch * rows, plan_.scratch.top);
    within(name, mass, 4 * shape_.batch * rows, plan_.scratch.mass);
  }

  void check_attend(const Launched& l, const std::string& name) const {
    const auto& p = l.as<Attend>();
    const Scratch& s = plan_.scratch;
    const long long problems = l.grid.y;
    expect(l.grid.z == static_cast<unsigned>(p.splits) &&
               l.grid.x == static_cast<unsigned>(ceil_div(p.rows, p.tile_rows)), name + " has another grid");
    expect(p.first_sequence + problems / p.groups_apart <= shape_.batch, name + " reaches behind the last sequence");
    const int kernel_rows = name.substr(name.size() - 2) == "64" ? 64 : name.substr(name.size() - 2) == "32" ? 32 : 16;
    expect(p.tile_rows <= kernel_rows, name + " is given more rows than it holds");
    expect(p.shared.total == attend_shared(p, kernel_rows).total && p.shared.total <= static_cast<int>(l.shared_bytes),
           name + " gets too little shared memory");
    const long long queries = problems * p.blocks * p.orders * p.rows;
    if (plan_.expanded) {
      within(name, p.varying, 2 * queries * p.key_width, s.fixed);
      within(name, p.part[0].data, problems * p.capacity * p.part[0].bytes, s.keys);
      expect(p.capacity == p.end - p.begin, name + " steps over an expansion of another size");
    } else {
      within(name, p.varying, 2 * queries * p.key_width, s.keys);
      within(name, p.fixed, 2 * problems * p.rows * (p.rope_width + p.fine_width), s.fixed);
      if (p.mean) within(name, p.mean, p.key_width > 0 ? 4 * queries : 0, s.mean);
    }
    check_state(name, p.sum, p.top, p.mass, static_cast<long long>(p.groups_apart) * p.splits * p.rows, p.sum_width);
  }

  // What a kernel reads another has written before.
  void check_order() const {
    std::string order;
    for (const Launched& l : launched_) {
      order += l.kernel == Kernel::setup                ? 's'
               : l.kernel == Kernel::carry              ? 'c'
               : l.kernel == Kernel::append_bf16        ? 'a'
               : l.kernel == Kernel::map_bf16           ? 'm'
               : l.kernel == Kernel::fix_bf16           ? 'f'
               : l.kernel == Kernel::absorb_bf16        ? 'q'
               : l.kernel == Kernel::expand_bf16        ? 'e'
               : is_attend(l.kernel)                    ? 'A'
               : l.kernel == Kernel::combine_bf16       ? 'j'
               : l.kernel == Kernel::decode_bf16        ? 'd'
                                                        : '?';
    }
    std::size_t at = 0;
    const auto next = [&](char c) { return at < order.size() && order[at] == c && ++at; };
    bool good = next('s');
    while (next('c')) good = good && !shape_.shared;
    good = good && next('a');
    while (good && at < order.size()) {
      good = next('m');
      next('f');
      for (bool more = good; more;) {
        const bool made = next('q') || next('e');
        more = next('A');
        good = good && (more || !made);
      }
      good = good && next('j');
      next('d');
    }
    expect(good, "launches come in the order " + order);
  }

  // Every sequence's every key that may be seen is met once, in order, by every run of tokens.
  void check_waves() const {
    int token = 0;
    std::vector<int> reached(static_cast<std::size_t>(shape_.batch), -1);
    const Absorb* absorb = nullptr;
    for (const Launched& l : launched_) {
      if (l.kernel == Kernel::absorb_bf16) absorb = &l.as<Absorb>();
      if (l.kernel == Kernel::combine_bf16) {
        finish(reached, token);
        token += l.as<Combine>().tokens;
      }
      if (!is_attend(l.kernel)) continue;
      const auto& p = l.as<Attend>();
      expect(p.behind == shape_.fresh - token - p.tokens, "a run is not where it should be");
      const int unit = p.block > 0 ? p.block : 64;
      expect(p.begin % unit == 0 && p.begin < p.end, "a wave begins amid a block");
      if (absorb && !plan_.expanded) {
        expect(absorb->begin == p.begin && absorb->end == p.end && absorb->blocks == p.blocks,
               "a wave has other keys' queries");
      }
      for (int s = p.first_sequence; s < p.first_sequence + static_cast<int>(l.grid.y) / p.groups_apart; ++s) {
        int& now = reached[static_cast<std::size_t>(s)];
        expect(p.resume == (now >= 0), "a wave goes on where none was before, or begins anew");
        const int query = static_cast<int>(made_.size.total) - p.behind - p.tokens;
        const int first = made_.size.exact && p.window > 0 ? std::max(0, query - p.window + 1) : 0;
        expect(now < 0 ? p.begin <= first : p.begin == now, "keys are left out or met twice");
        now = p.end;
      }
    }
    expect(token == shape_.fresh, "tokens are left out");
  }

  void finish(std::vector<int>& reached, int token) const {
    const int tokens = std::min<int>(plan_.tokens, static_cast<int>(shape_.fresh) - token);
    const int behind = static_cast<int>(shape_.fresh) - token - tokens;
    const int last = static_cast<int>(made_.size.total) - (shape_.causal ? behind : 0);
    for (int& now : reached) {
      expect(now == last, "the last keys are left out");
      now = -1;
    }
  }

  Shape shape_;
  Device device_;
  Made made_;
  Plan plan_;
  std::vector<Launched> launched_;
};

void test_random_shapes() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<Index> list) {
    return list.begin()[random() % list.size()];
  };
  for (int i = 0; i < 3000; ++i) {
    Shape s;
    const bool tight = random() % 2;  // little scratch: many launches even of small shapes
    s.batch = tight ? pick({1, 1, 2, 3}) : pick({1, 1, 2, 17, 64});
    s.fresh = tight ? pick({1, 1, 2, 3, 17}) : pick({1, 1, 3, 300, 5000});
    s.groups = pick({1, 2, 3, 8});
    s.heads = s.groups * pick({1, 2, 3, 4, 7, 16});
    s.rank = pick({64, 80, 128, 256, 384, 500, 512});
    s.value_offset = pick({0, 0, 5, 8});
    s.rope = pick({0, 8, 64, 128});
    s.head_dim = pick({64, 128, 192});
    s.capacity = s.fresh + (tight ? pick({0, 1, 63, 64, 1000}) : pick({0, 64, 40000, 131072}));
    Index block = pick({1, 4, 16, 64, 128});
    for (Index level = pick({0, 1, 2, 3}); level > 0; --level, block *= pick({2, 4})) {
      for (Index pair = pick({1, 3, 8}); pair > 0; --pair) s.blocks.push_back(block);
    }
    s.still = s.blocks.empty() ? 64 : pick({0, 6, 64});
    s.order = pick({0, 1});
    s.key_up = !s.blocks.empty() || pick({0, 1});
    s.value_up = pick({0, 1, 1});
    s.query_map = pick({0, 1});
    s.mask = pick({0, 1});
    s.shared = pick({0, 1, 1});
    s.window = pick({0, 0, 100, 4096});
    s.causal = pick({0, 1, 1});
    s.latent = static_cast<Type>(pick({16, 16, 3, 2}));
    s.part = s.latent;
    const Device device = std::vector<Device>{kA100, kL40S, kH100}[random() % 3];
    const Form form = std::vector<Form>{Form::counted, Form::absorbed, Form::expanded}[random() % 3];
    const Room room = tight ? Room{Index{1} << (10 + random() % 14), Index{1} << (10 + random() % 14)} : Room{};
    running = "random shape " + std::to_string(i);
    try {
      Inspection(s, device, form, room).check();
    } catch (const Unsupported& error) {
      // Wide values, or an L40S whose shared memory a row of 640 numbers and its queries do not fit.
      const std::string told = error.what();
      const bool wide = told.find("are too wide") != std::string::npos && !s.value_up;
      const bool full = told.find("bytes of shared memory") != std::string::npos && s.rank >= 256;
      expect(wide || full || told.find("columns from") != std::string::npos, "is refused: " + told);
    }
  }
}

// ---- choices

// Blocks of band pairs: so many of each size.
std::vector<std::int64_t> blocks_of(std::initializer_list<std::pair<Index, std::int64_t>> levels) {
  std::vector<std::int64_t> out;
  for (const auto& [count, block] : levels) out.insert(out.end(), static_cast<std::size_t>(count), block);
  return out;
}

Shape llama(std::vector<std::int64_t> blocks) {
  Shape s;
  s.blocks = std::move(blocks);
  s.still = 128 - 2 * static_cast<Index>(s.blocks.size());
  return s;
}

void test_form() {
  running = "form";
  Shape s = llama(blocks_of({{8, 64}}));
  const auto expanded = [&](Index fresh, Form form) {
    s.fresh = fresh;
    return Inspection(s, kA100, form, {}).plan().expanded;
  };
  const Made made = make(s);
  const Index from = expand_from(made.layout, made.size, true, true);
  expect(from > 2 && from < 4096, "counts are not those of this test");
  expect(!expanded(from - 1, Form::counted), "fewer tokens than are counted are expanded");
  expect(expanded(from, Form::counted), "as many tokens as are counted are not expanded");
  expect(!expanded(4096, Form::absorbed) && expanded(1, Form::expanded), "a form that is asked for is not taken");
}

void test_decoded_pairs() {
  struct Row {
    const char* name;
    std::vector<std::int64_t> blocks;
    Index heads, groups;
    int decoded, block, orders;
  };
  for (const Row& row : {
           Row{"no bands", {}, 32, 8, 0, 0, 1},
           Row{"blocks of 64 rows are absorbed", blocks_of({{32, 64}}), 32, 8, 0, 64, 2},
           Row{"shorter ones are decoded", blocks_of({{4, 1}, {4, 16}, {24, 128}}), 32, 8, 8, 128, 2},
           Row{"and those that are no multiple of 64", blocks_of({{4, 48}, {20, 96}, {8, 192}}), 32, 8, 24, 192, 2},
           Row{"a single group is decoded for all heads at once", blocks_of({{32, 64}}), 32, 1, 32, 0, 1},
           Row{"few pairs of a fine level for many heads", blocks_of({{2, 64}, {30, 4096}}), 32, 8, 2, 4096, 2},
       }) {
    running = row.name;
    Shape s = llama(row.blocks);
    s.heads = row.heads;
    s.groups = row.groups;
    const Inspection made(s, kA100, Form::absorbed, {});
    const Attend& p = made.plan().attend;
    expect(p.bands.decoded == row.decoded && p.block == row.block && p.orders == row.orders,
           "decodes " + std::to_string(p.bands.decoded) + " pairs, blocks of " + std::to_string(p.block) + ", " +
               std::to_string(p.orders) + " orders");
    made.check();
  }
}

void test_tilings() {
  struct Row {
    const char* name;
    Shape shape;
    Device device;
    int rows, tile_rows, tile, stages;
  };
  Shape wide = llama({}), banded = llama(blocks_of({{32, 64}})), one = llama({});
  Shape fine = llama(blocks_of({{8, 16}, {24, 128}}));
  one.heads = one.groups = 1;
  fine.rank = 256;
  Shape narrow = llama({});
  narrow.rank = 128;
  narrow.heads = 64;
  for (const Row& row : {
           Row{"one head", one, kH100, 16, 1, 64, 2},
           Row{"64 heads of a small rank", narrow, kA100, 64, 64, 64, 2},
           Row{"a rank of 512", wide, kH100, 32, 32, 64, 2},
           Row{"the same with less shared memory", wide, kA100, 32, 32, 32, 2},
           Row{"and with still less", wide, kL40S, 16, 16, 32, 2},
           Row{"queries that change from block to block", banded, kL40S, 16, 16, 32, 1},
           Row{"decoded pairs: keys are made for many rows at a time", fine, kA100, 32, 32, 64, 1},
       }) {
    running = row.name;
    const Tiling t = Inspection(row.shape, row.device, Form::absorbed, {}).plan().tiling;
    expect(t.rows == row.rows && t.tile_rows == row.tile_rows && t.tile == row.tile && t.stages == row.stages,
           "kernel of " + std::to_string(t.rows) + " rows, " + std::to_string(t.tile_rows) + " taken, tiles of " +
               std::to_string(t.tile) + ", " + std::to_string(t.stages) + " stages");
  }
}

// Accumulators begin at the multiple of 8 before the first value.
void test_value_columns() {
  running = "value columns";
  const auto kernel = [](Index rank, Index offset) {
    Shape s = llama({});
    s.rank = rank;
    s.value_offset = offset;
    return std::string(kernel_name(Inspection(s, kH100, Form::absorbed, {}).plan().tiling.kernel));
  };
  expect(kernel(128, 0) == "attend_bf16_128_32", "128 columns take " + kernel(128, 0));
  expect(kernel(136, 8) == "attend_bf16_128_32", "128 columns from column 8 take " + kernel(136, 8));
  expect(kernel(133, 5) == "attend_bf16_256_32", "128 columns from column 5 take " + kernel(133, 5));
  expect(kernel(129, 0) == "attend_bf16_256_32", "129 columns take " + kernel(129, 0));
}

void test_splits() {
  running = "splits";
  for (const Device& device : {kA100, kL40S, kH100}) {
    for (const Index batch : {1, 4, 64}) {
      for (const Index capacity : {200, 8192, 131072}) {
        Shape s = llama({});
        s.batch = batch;
        s.capacity = capacity;
        const Inspection made(s, device, Form::absorbed, {});
        const Tiling& t = made.plan().tiling;
        const Index ctas = t.splits * batch * ceil_div(32, t.tile_rows), most = std::max<Index>(1, capacity / 128);
        // A round of CTAs that run at the same time is full, or nearly.
        const Index by_memory = device.shared_bytes / static_cast<Index>(t.shared_bytes);
        const Index resident = std::min<Index>(by_memory, t.rows == 16 ? 3 : 1);
        const Index places = device.processors * resident;
        const double idle = 1 - static_cast<double>(ctas) / static_cast<double>((ctas + places - 1) / places * places);
        expect(t.splits <= most, "a split is left with few keys");
        expect(idle < 0.25 || t.splits > most / 2, std::to_string(ctas) + " CTAs leave processors without work");
        expect(t.splits == 1 || ctas <= 4 * places, "there are many more splits than processors");
      }
    }
  }
  Shape s = llama({});
  s.window = 100;
  s.capacity = 131072;
  expect(Inspection(s, kA100, Form::absorbed, {}).plan().tiling.splits == 1, "a window is split");
}

void test_scratch_is_bounded() {
  running = "bounded scratch";
  const auto within_bounds = [](const Shape& s, Form form, const char* what) {
    const std::size_t megabytes = Inspection(s, kH100, form, {}).plan().scratch_bytes >> 20;
    expect(megabytes < 640, std::string(what) + " takes " + std::to_string(megabytes) + " MB");
  };
  Shape s = llama(blocks_of({{16, 64}, {16, 256}}));
  s.capacity = 131072;
  for (const Index fresh : {1, 64, 2048, 131072}) {
    s.fresh = fresh;
    for (const Form form : {Form::absorbed, Form::expanded}) within_bounds(s, form, "a prompt");
  }
  s.fresh = 1;
  s.batch = 64;
  within_bounds(s, Form::absorbed, "a batch");
  Shape latent;  // as DeepSeek's: latent queries and sums are the model's own
  latent.heads = latent.groups = 128;
  latent.key_up = latent.value_up = latent.query_map = false;
  latent.fresh = 16384;
  latent.capacity = 131072;
  within_bounds(latent, Form::absorbed, "a prompt of latent queries");
}

void test_refusals() {
  const auto refused = [&](const char* name, const Shape& s, const std::string& told) {
    running = name;
    try {
      Inspection(s, kL40S, Form::absorbed, {});
      expect(false, "is accepted");
    } catch (const Unsupported& error) {
      expect(std::string(error.what()).find(told) != std::string::npos, std::string("is told as: ") + error.what());
    }
  };
  Shape s = llama(blocks_of({{130, 64}}));
  s.still = 0;
  refused("band pairs", s, "the number of band pairs is 130; expected at most 128 on a CUDA device");
  s = llama({});
  s.rope = 514;
  refused("rope pairs", s, "the number of rope pairs is 257; expected at most 256");
  s = llama(blocks_of({{1, std::int64_t{1} << 32}}));
  refused("a long block", s, "a band block is 4294967296; expected at most 1073741824");
  s = llama({});
  s.rank = 520;
  refused("wide values", s, "values of 520 columns from column 0 are too wide; expected at most 512");
  s = llama({});
  s.rank = 1280;
  s.value_offset = 1000;
  refused("long rows", s, "attention over rows of 1344 numbers takes ");
  s = llama({});
  s.latent = Type::float16;
  refused("another 16-bit type", s, "input past_latent is of 16 bits other than the model's");
  s = llama({});
  s.batch = 65536;
  refused("a large batch", s, "the batch is 65536; expected at most 65535");
}

}  // namespace
}  // namespace mla_pass::cuda

int main() {
  using namespace mla_pass::cuda;
  test_form();
  test_decoded_pairs();
  test_tilings();
  test_value_columns();
  test_splits();
  test_scratch_is_bounded();
  test_refusals();
  test_random_shapes();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0 ? 1 : 0;
}
