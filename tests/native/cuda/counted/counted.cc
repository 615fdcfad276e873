// What `attend` does in a planned call, counted: its launches run on the CPU over memory of zeros, all others are left
// out but for the spans that `setup` would have made.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "../../../../mla_pass/native/cuda/attend.cuh"
#include "../../../../mla_pass/native/cuda/plan.h"
#include "../../../../mla_pass/native/entry.h"

struct MlaPassCountedDevice {
  std::int64_t cache_bytes;
  std::int32_t major, minor, processors, shared_bytes;
};

struct MlaPassCounts {
  std::int64_t products, matrices, copied_bytes;
};

namespace mla_pass::cuda {
namespace {

class Counter : public Launcher {
 public:
  void launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters, std::size_t) override {
    if (kernel == Kernel::setup) return make_spans(*static_cast<const Setup*>(parameters));
    switch (kernel) {
#define MLA_COUNTED(columns, rows)                                                                          \
  case Kernel::attend_bf16_##columns##_##rows:                                                              \
    return shim::launch("attend", grid, 8 * rows, shared_bytes,                                             \
                        [&] { attend<BF16, columns, rows>(*static_cast<const Attend*>(parameters)); }, {});
      MLA_COUNTED(128, 16)
      MLA_COUNTED(256, 16)
      MLA_COUNTED(128, 32)
      MLA_COUNTED(256, 32)
      MLA_COUNTED(128, 64)
      MLA_COUNTED(256, 64)
#undef MLA_COUNTED
      default:
        return;
    }
  }

 private:
  static void make_spans(const Setup& p) {
    for (int i = 0; i < p.batch; ++i) p.span[i] = {p.bound, 0, p.bound, 0};
  }
};

template <class List>
auto values(const List& list) {
  return std::vector(list.data, list.data + list.count);
}

void count(const MlaPassAttributes& a, const MlaPassTensor* given, const MlaPassCountedDevice& on) {
  const Layout layout = checked(Attributes{
      a.num_heads, a.kv_groups, a.rank, a.key_rank, a.value_offset, a.rope_dim, a.nope_dim, a.split,
      a.local_window_size, a.causal, a.shared_buffer, values(a.rope_index), values(a.band_index), values(a.band_block),
      a.scale, a.softcap, values(a.band_a0), values(a.band_a1)});
  Inputs inputs{};
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    inputs[i].given = given[i].type != 0;
    inputs[i].data = given[i].data;
    inputs[i].type = given[i].type;
    inputs[i].rank = given[i].rank;
    std::copy_n(given[i].dims, given[i].rank, inputs[i].dims.begin());
  }
  const Device device = {on.major, on.minor, on.processors, on.shared_bytes, static_cast<std::size_t>(on.cache_bytes)};
  const Plan plan = make_plan(layout, checked(layout, inputs, Type::bfloat16, Memory::device), inputs, Type::bfloat16,
                              Form::counted, device);
  const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(256, plan.scratch_bytes), std::free);
  std::memset(scratch.get(), 0, plan.scratch_bytes);
  Counter counter;
  std::vector<unsigned char> context(1);  // which nothing that runs writes to
  run(plan, inputs, {context.data(), given[kPastLatent].data, given[kPastRope].data}, scratch.get(), counter);
}

}  // namespace
}  // namespace mla_pass::cuda

// Returns 0, or 1 with a sentence.
extern "C" int mla_pass_test_counts(const MlaPassAttributes* attributes, const MlaPassTensor* inputs,
                                    const MlaPassCountedDevice* device, MlaPassCounts* counts, char* message,
                                    std::size_t room) {
  using namespace mla_pass::cuda;
  try {
    counted::counts = {};
    count(*attributes, inputs, *device);
    *counts = {counted::counts.products, counted::counts.matrices, counted::counts.copied_bytes};
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  }
}
