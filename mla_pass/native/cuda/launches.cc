// A plan's launches, one behind the other, with the addresses of this call.
#include <algorithm>

#include "attend_shared.h"
#include "plan.h"
#include "product_shared.h"

namespace mla_pass::cuda {
namespace {

constexpr std::size_t kSmallRoom = 64;  // shared memory of setup and append: a few numbers a warp

struct Range {
  int begin, end;
};

class Call {
 public:
  Call(const Plan& plan, const Inputs& inputs, const Outputs& outputs, void* scratch, Launcher& launcher)
      : plan_(plan), inputs_(inputs), outputs_(outputs), scratch_(static_cast<unsigned char*>(scratch)),
        launcher_(launcher), fresh_(plan.setup.fresh), batch_(plan.setup.batch) {}

  void run() const {
    set_up();
    carry(0, kPastLatent, outputs_.present_latent);
    carry(1, kPastRope, outputs_.present_rope);
    append();
    for (int token = 0; token < fresh_; token += plan_.tokens) {
      run_tokens(token, std::min(plan_.tokens, fresh_ - token));
    }
  }

 private:
  template <class T>
  T* at(const Scratch::Piece& piece) const {
    return piece.bytes > 0 ? reinterpret_cast<T*>(scratch_ + piece.at) : nullptr;
  }
  const std::uint16_t* numbers(Input input) const { return inputs_[input].as<std::uint16_t>(); }
  Tables tables(Tables sizes) const {
    sizes.cos = inputs_[kCos].as<float>();
    sizes.sin = inputs_[kSin].as<float>();
    return sizes;
  }
  Kernel typed(Kernel half, Kernel bfloat) const { return plan_.model == Type::float16 ? half : bfloat; }

  template <class Parameters>
  void launch(Kernel kernel, int x, int y, int z, std::size_t shared_bytes, const Parameters& p) const {
    const Grid grid = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
    launcher_.launch(kernel, grid, shared_bytes, &p, sizeof p);
  }

  void set_up() const {
    Setup p = plan_.setup;
    p.total = inputs_[kTotalLength].as<std::int64_t>();
    p.padding_mask = inputs_[kPaddingMask].as<std::int64_t>();
    p.position_ids = inputs_[kPositionIds].as<std::int64_t>();
    p.tables = tables(p.tables);
    p.span = at<Span>(plan_.scratch.span);
    p.fit = at<float>(plan_.scratch.fit);
    launch(Kernel::setup, batch_, 1, 1, kSmallRoom, p);
  }

  // Nothing to do where the present is the past.
  void carry(int part, Input past, void* present) const {
    Carry p = plan_.carry[part];
    p.past = inputs_[past].as<unsigned char>();
    p.present = static_cast<unsigned char*>(present);
    const long long bytes = static_cast<long long>(p.rows) * p.bytes;
    if (p.past == p.present || bytes == 0) return;
    launch(Kernel::carry, static_cast<int>((bytes + kCarryBytes - 1) / kCarryBytes), batch_, 1, 0, p);
  }

  void append() const {
    Append p = plan_.append;
    p.row = numbers(kRow);
    p.position_ids = inputs_[kPositionIds].as<std::int64_t>();
    place(p.part);
    p.tables = tables(p.tables);
    p.span = at<Span>(plan_.scratch.span);
    launch(typed(Kernel::append_f16, Kernel::append_bf16), fresh_, batch_, 1, kSmallRoom, p);
  }

  void place(Part (&part)[2]) const {
    part[0].data = static_cast<unsigned char*>(outputs_.present_latent);
    part[1].data = static_cast<unsigned char*>(outputs_.present_rope);
  }

  void run_tokens(int token, int tokens) const {
    map(token, tokens);
    fix(token, tokens);
    const int behind = fresh_ - token - tokens;
    for (int first = 0; first < batch_; first += plan_.wave.sequences) {
      run_sequences(first, std::min(plan_.wave.sequences, batch_ - first), token, tokens, behind);
    }
    combine(token, tokens);
    if (plan_.decode_bytes > 0) decode(token, tokens);
  }

  // Rows that some query of the run may see, whatever T is.
  Range rows_of(int tokens, int behind) const {
    const int unit = plan_.wave.unit, window = plan_.attend.window;
    const int end = plan_.attend.causal ? plan_.bound - behind : plan_.bound;
    const int first = plan_.exact && window > 0 ? std::max(0, plan_.bound - behind - tokens - window + 1) : 0;
    return {unit > 0 ? first / unit * unit : 0, end};
  }

  void run_sequences(int first, int sequences, int token, int tokens, int behind) const {
    const Range rows = rows_of(tokens, behind);
    const int step = plan_.wave.unit > 0 ? plan_.wave.units * plan_.wave.unit : rows.end;
    for (int begin = rows.begin; begin < rows.end; begin += step) {
      const Range wave = {begin, std::min(begin + step, rows.end)};
      if (plan_.expanded) {
        expand(first, sequences, tokens, behind, wave);
      } else if (plan_.absorb.key_width > 0) {
        absorb(first, sequences, tokens, behind, wave);
      }
      attend(first, sequences, token, tokens, behind, wave, begin > rows.begin);
    }
  }

  int blocks_of(Range wave) const {
    const int block = plan_.absorb.block;
    return block > 0 ? ceil_div(wave.end - wave.begin, block) : 1;
  }

  void map(int token, int tokens) const {
    Map p = plan_.map;
    p.query = numbers(kQuery) + static_cast<long long>(token) * p.heads * p.query_dim;
    p.query_map = numbers(kQueryMap);
    p.tokens = tokens;
    p.dims = at<float>(plan_.scratch.dims);
    const Kernel kernel = typed(Kernel::map_f16, Kernel::map_bf16);
    const int queries = batch_ * tokens * p.heads;
    if (!p.query_map) return launch(kernel, ceil_div(queries, kQueryWarps), 1, 1, 0, p);
    launch(kernel, ceil_div(queries / p.groups, kProductRows), ceil_div(p.width, kProductColumns), p.groups,
           plan_.map_bytes, p);
  }

  void fix(int token, int tokens) const {
    if (plan_.scratch.fixed.bytes == 0) return;
    Fix p = plan_.fix;
    p.dims = at<float>(plan_.scratch.dims);
    p.tokens = tokens;
    p.behind = fresh_ - token - tokens;
    p.position_ids = inputs_[kPositionIds].as<std::int64_t>() + token;
    p.span = at<Span>(plan_.scratch.span);
    p.tables = tables(p.tables);
    p.bands.fit = at<float>(plan_.scratch.fit);
    p.out = at<std::uint16_t>(plan_.scratch.fixed);
    launch(typed(Kernel::fix_f16, Kernel::fix_bf16), ceil_div(batch_ * tokens * p.heads, kQueryWarps), 1, 1, 0, p);
  }

  // What `absorb` and `expand` have in common: they make what a wave's queries meet, or meet with.
  template <class P>
  void place_wave(P& p, int first, int sequences, int tokens, int behind, Range wave) const {
    p.key_up = numbers(kKeyUp);
    p.key_mean = numbers(kKeyMean);
    p.tokens = tokens;
    p.behind = behind;
    p.first_sequence = first;
    p.sequences = sequences;
    p.begin = wave.begin;
    p.end = wave.end;
    p.span = at<Span>(plan_.scratch.span);
    p.tables = tables(p.tables);
    p.bands.fit = at<float>(plan_.scratch.fit);
  }

  void absorb(int first, int sequences, int tokens, int behind, Range wave) const {
    Absorb p = plan_.absorb;
    place_wave(p, first, sequences, tokens, behind, wave);
    p.dims = at<float>(plan_.scratch.dims);
    p.blocks = blocks_of(wave);
    p.varying = at<std::uint16_t>(plan_.scratch.keys);
    p.mean = at<float>(plan_.scratch.mean);
    launch(typed(Kernel::absorb_f16, Kernel::absorb_bf16),
           ceil_div(p.heads / p.groups * tokens * p.blocks, kProductRows), plan_.column_shares,
           sequences * p.groups * p.orders, plan_.absorb_bytes, p);
  }

  void expand(int first, int sequences, int tokens, int behind, Range wave) const {
    Expand p = plan_.expand;
    place_wave(p, first, sequences, tokens, behind, wave);
    place(p.part);
    p.value_up = numbers(kValueUp);
    p.out = at<std::uint16_t>(plan_.scratch.keys);
    launch(typed(Kernel::expand_f16, Kernel::expand_bf16), ceil_div(wave.end - wave.begin, kProductRows), 2 * p.groups,
           sequences, plan_.expand_bytes, p);
  }

  const Tiling& tiling(int tokens) const { return tokens == plan_.tokens ? plan_.tiling : plan_.last_tiling; }

  void attend(int first, int sequences, int token, int tokens, int behind, Range wave, bool resume) const {
    const Tiling& tiling = this->tiling(tokens);
    Attend p = plan_.attend;
    p.tokens = tokens;
    p.behind = behind;
    p.rows = p.heads * tokens;
    p.first_sequence = first;
    p.begin = wave.begin;
    p.end = wave.end;
    p.resume = resume;
    p.blocks = plan_.expanded ? 1 : blocks_of(wave);
    p.tile_rows = tiling.tile_rows;
    p.tile = tiling.tile;
    p.stages = tiling.stages;
    p.splits = tiling.splits;
    point_attend(p, token);
    p.shared = attend_shared(p, tiling.rows);
    launch(tiling.kernel, ceil_div(p.rows, p.tile_rows), sequences * p.groups_apart, p.splits, tiling.shared_bytes, p);
  }

  void point_attend(Attend& p, int token) const {
    const auto* fixed = at<std::uint16_t>(plan_.scratch.fixed);
    const long long queries = static_cast<long long>(p.first_sequence) * p.groups_apart * p.rows;
    if (plan_.expanded) {
      p.varying = fixed + queries * p.key_width;
      p.part[0].data = at<unsigned char>(plan_.scratch.keys);
      p.capacity = p.end - p.begin;
    } else {
      p.varying = at<std::uint16_t>(plan_.scratch.keys);
      p.mean = inputs_[kKeyUp].given ? at<float>(plan_.scratch.mean) : nullptr;
      p.fixed = fixed ? fixed + queries * (p.rope_width + p.fine_width) : nullptr;
      place(p.part);
      p.key_up = numbers(kKeyUp);
      p.key_mean = numbers(kKeyMean);
    }
    p.tables = tables(p.tables);
    p.bands.fit = at<float>(plan_.scratch.fit);
    p.span = at<Span>(plan_.scratch.span);
    p.padding_mask = inputs_[kPaddingMask].as<std::int64_t>();
    p.bias = inputs_[kAttentionBias].given ? numbers(kAttentionBias) + token * p.bias_token : nullptr;
    p.sum = at<float>(plan_.scratch.sum);
    p.top = at<float>(plan_.scratch.top);
    p.mass = at<float>(plan_.scratch.mass);
  }

  void combine(int token, int tokens) const {
    Combine p = plan_.combine;
    p.sum = at<float>(plan_.scratch.sum);
    p.top = at<float>(plan_.scratch.top);
    p.mass = at<float>(plan_.scratch.mass);
    p.splits = tiling(tokens).splits;
    p.tokens = tokens;
    p.rows = p.heads * tokens;
    p.span = at<Span>(plan_.scratch.span);
    const bool decoded = plan_.decode_bytes > 0;
    p.fresh = decoded ? tokens : fresh_;
    p.out = decoded ? at<std::uint16_t>(plan_.scratch.joined) : context(token);
    launch(typed(Kernel::combine_f16, Kernel::combine_bf16), combine_grid(p), 1, 1, 0, p);
  }

  void decode(int token, int tokens) const {
    Decode p = plan_.decode;
    p.joined = at<std::uint16_t>(plan_.scratch.joined);
    p.value_up = numbers(kValueUp);
    p.tokens = tokens;
    p.context = context(token);
    launch(typed(Kernel::decode_f16, Kernel::decode_bf16),
           ceil_div(batch_ * tokens * (p.heads / p.groups), kProductRows), ceil_div(p.value_dim, kProductColumns),
           p.groups, plan_.decode_bytes, p);
  }

  // Where the contexts of a run's first token begin.
  std::uint16_t* context(int token) const {
    return static_cast<std::uint16_t*>(outputs_.context) +
           static_cast<long long>(token) * plan_.decode.heads * plan_.decode.value_dim;
  }

  const Plan& plan_;
  const Inputs& inputs_;
  const Outputs& outputs_;
  unsigned char* const scratch_;
  Launcher& launcher_;
  const int fresh_, batch_;
};

}  // namespace

void run(const Plan& plan, const Inputs& inputs, const Outputs& outputs, void* scratch, Launcher& launcher) {
  Call(plan, inputs, outputs, scratch, launcher).run();
}

}  // namespace mla_pass::cuda
