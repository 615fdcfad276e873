// The launches of a call on a CUDA device that is not there, as text: the plan is the library's own, and whoever asks
// tells it what the device has. Addresses are made up; nothing is read or written through them.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../mla_pass/native/cuda/plan.h"
#include "../mla_pass/native/entry.h"

struct MlaPassModelDevice {
  std::int64_t cache_bytes;
  std::int32_t major, minor, processors, shared_bytes;
};

namespace mla_pass::cuda {
namespace {

constexpr const char* kNames[] = {
#define MLA_KERNEL(name, parameters, threads, call) #name,
#include "../mla_pass/native/cuda/kernels.def"
#undef MLA_KERNEL
};
constexpr int kThreads[] = {
#define MLA_KERNEL(name, parameters, threads, call) threads,
#include "../mla_pass/native/cuda/kernels.def"
#undef MLA_KERNEL
};

using Numbers = std::vector<std::pair<const char*, long long>>;

// What of a kernel's parameters decides its work.
Numbers told(const Attend& p) {
  return {{"rows", p.rows}, {"tile_rows", p.tile_rows}, {"tile", p.tile}, {"stages", p.stages}, {"splits", p.splits},
          {"begin", p.begin}, {"end", p.end}, {"block", p.block}, {"blocks", p.blocks}, {"orders", p.orders},
          {"key_width", p.key_width}, {"key_rank", p.key_rank}, {"rope_width", p.rope_width},
          {"fine_width", p.fine_width}, {"decoded", p.bands.decoded}, {"value_dim", p.value_dim},
          {"sum_width", p.sum_width}, {"resume", p.resume}, {"has_mean", p.mean != nullptr},
          {"row_bytes", p.part[0].bytes + p.part[1].bytes}, {"direct", p.shared.direct}, {"columns", p.shared.columns},
          {"fixed_width", p.shared.fixed_width}, {"fine_column", p.shared.fine_column}};
}

Numbers told(const Absorb& p) {
  return {{"rows", static_cast<long long>(p.heads) / p.groups * p.tokens * p.blocks}, {"groups", p.groups},
          {"sequences", p.sequences}, {"orders", p.orders}, {"key_width", p.key_width}, {"key_rank", p.key_rank},
          {"depth", p.nope_dim - 2 * p.bands.decoded}, {"product", p.key_up != nullptr},
          {"dims", static_cast<long long>(p.heads) * p.tokens * (p.nope_dim + p.rope_dim)}};
}

Numbers told(const Map& p) {
  return {{"queries", static_cast<long long>(p.batch) * p.tokens * p.heads}, {"query_dim", p.query_dim},
          {"width", p.width}, {"groups", p.groups}, {"product", p.query_map != nullptr}};
}

Numbers told(const Fix& p) {
  return {{"queries", static_cast<long long>(p.batch) * p.tokens * p.heads}, {"width", p.nope_dim + p.rope_dim},
          {"out_width", p.rope_width + p.fine_width}};
}

Numbers told(const Combine& p) {
  return {{"rows", static_cast<long long>(p.batch) * p.groups_apart * p.rows}, {"splits", p.splits},
          {"sum_width", p.sum_width}, {"value_dim", p.value_dim}};
}

Numbers told(const Decode& p) {
  return {{"rows", static_cast<long long>(p.batch) * p.tokens * p.heads}, {"groups", p.groups},
          {"value_rank", p.value_rank}, {"value_dim", p.value_dim}};
}

Numbers told(const Append& p) {
  return {{"rows", static_cast<long long>(p.batch) * p.fresh}, {"row_bytes", p.part[0].bytes + p.part[1].bytes},
          {"numbers", p.rank + p.rope_dim}};
}

Numbers told(const Setup& p) { return {{"sequences", p.batch}, {"pairs", p.pairs}}; }
Numbers told(const Carry& p) { return {{"bytes", static_cast<long long>(p.batch) * p.rows * p.bytes}}; }

Numbers told(const Expand& p) {
  return {{"rows", static_cast<long long>(p.sequences) * (p.end - p.begin)}, {"groups", p.groups}, {"step", p.step}};
}

// One line of JSON a launch.
class Scribe : public Launcher {
 public:
  void launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters, std::size_t) override {
    const int at = static_cast<int>(kernel);
    text_ << "{\"kernel\": \"" << kNames[at] << "\", \"grid\": [" << grid.x << ", " << grid.y << ", " << grid.z
          << "], \"threads\": " << kThreads[at] << ", \"shared_bytes\": " << shared_bytes << ", \"work\": {";
    const char* comma = "";
    for (const auto& [name, number] : numbers(kernel, parameters)) {
      text_ << comma << '"' << name << "\": " << number;
      comma = ", ";
    }
    text_ << "}}\n";
  }

  std::string text() const { return text_.str(); }

 private:
  static Numbers numbers(Kernel kernel, const void* parameters) {
    switch (kernel) {
#define MLA_KERNEL(name, kind, threads, call) \
  case Kernel::name: return told(*static_cast<const kind*>(parameters));
#include "../mla_pass/native/cuda/kernels.def"
#undef MLA_KERNEL
      case Kernel::count: break;
    }
    return {};
  }

  std::ostringstream text_;
};

template <class List>
auto values(const List& list) {
  return std::vector(list.data, list.data + list.count);
}

Layout layout_of(const MlaPassAttributes& given) {
  return checked(Attributes{given.num_heads, given.kv_groups, given.rank, given.key_rank, given.value_offset,
                            given.rope_dim, given.nope_dim, given.split, given.local_window_size, given.causal,
                            given.shared_buffer, values(given.rope_index), values(given.band_index),
                            values(given.band_block), given.scale, given.softcap, values(given.band_a0),
                            values(given.band_a1)});
}

Tensor tensor_of(const MlaPassTensor& given) {
  Tensor tensor;
  tensor.given = given.type != 0;
  tensor.data = given.data;
  tensor.type = given.type;
  tensor.rank = given.rank;
  for (int i = 0; i < given.rank; ++i) tensor.dims[i] = given.dims[i];
  return tensor;
}

std::string launches(const MlaPassAttributes& attributes, const MlaPassTensor* given, const MlaPassModelDevice& on) {
  const Layout layout = layout_of(attributes);
  Inputs inputs{};
  for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i] = tensor_of(given[i]);
  const Type model = static_cast<Type>(inputs[kQuery].type);
  const Device device = {on.major, on.minor, on.processors, on.shared_bytes, static_cast<std::size_t>(on.cache_bytes)};
  const Plan plan = make_plan(layout, checked(layout, inputs, model, Memory::device), inputs, model, Form::counted, device);
  const auto address = [](std::uintptr_t at) { return reinterpret_cast<void*>(at); };
  const Outputs outputs = {address(std::uintptr_t{1} << 44), given[kPastLatent].data, given[kPastRope].data};
  Scribe scribe;
  run(plan, inputs, outputs, address(std::uintptr_t{1} << 45), scribe);
  return scribe.text();
}

}  // namespace
}  // namespace mla_pass::cuda

// Writes a line of JSON for every launch. Returns 0, or 1 with a sentence where the call is refused; 2 where the text
// does not fit.
extern "C" int mla_pass_model_launches(const MlaPassAttributes* attributes, const MlaPassTensor* inputs,
                                       const MlaPassModelDevice* device, char* text, std::size_t room) {
  try {
    const std::string made = mla_pass::cuda::launches(*attributes, inputs, *device);
    return std::snprintf(text, room, "%s", made.c_str()) >= static_cast<int>(room) ? 2 : 0;
  } catch (const std::exception& error) {
    std::snprintf(text, room, "%s", error.what());
    return 1;
  }
}
