// The whole operator through plan and shim, on this machine's memory, as a function for Python: every kernel in the
// order and with the addresses that a device would get.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "../../../mla_pass/native/entry.h"
#include "host.h"
#include "plan.h"

// What the device has, and how its threads take turns.
struct MlaPassTestDevice {
  std::int64_t cache_bytes, query_bytes, key_bytes;
  std::int32_t processors, shared_bytes;
  std::int32_t form;               // Form
  std::int32_t exact;              // whether T is told by a shape
  std::int32_t eager, backward;    // shim::Options
};

namespace mla_pass::cuda {
namespace {

template <class List>
auto values(const List& list) {
  return std::vector(list.data, list.data + list.count);
}

Attributes read(const MlaPassAttributes& given) {
  Attributes a{given.num_heads, given.kv_groups, given.rank, given.key_rank, given.value_offset, given.rope_dim,
               given.nope_dim, given.split, given.local_window_size, given.causal, given.shared_buffer,
               values(given.rope_index), values(given.band_index), values(given.band_block),
               given.scale, given.softcap, values(given.band_a0), values(given.band_a1)};
  return a;
}

Tensor read(const MlaPassTensor& given) {
  Tensor tensor;
  if (given.type == 0) return tensor;
  tensor.given = true;
  tensor.data = given.data;
  tensor.type = given.type;
  tensor.rank = given.rank;
  std::copy_n(given.dims, given.rank, tensor.dims.begin());
  return tensor;
}

void compute(const MlaPassAttributes& attributes, const MlaPassTensor* given, const MlaPassTensor* outputs,
             const MlaPassTestDevice& on) {
  const Layout layout = checked(read(attributes));
  Inputs inputs{};
  for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i] = read(given[i]);
  const Type model = static_cast<Type>(inputs[kQuery].type);
  Sizes size = checked(layout, inputs, model, Memory::device);
  if (!on.exact && layout.attributes.shared_buffer) size.exact = false;
  const Device device = {8, 0, on.processors, on.shared_bytes, static_cast<std::size_t>(on.cache_bytes)};
  const Plan plan = make_plan(layout, size, inputs, model, static_cast<Form>(on.form), device,
                              {on.query_bytes, on.key_bytes});
  // NaN of every type; a multiple of the alignment, so that nothing lies between its end and what is guarded.
  const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(256, plan.scratch_bytes), std::free);
  std::memset(scratch.get(), 0xff, plan.scratch_bytes);
  CpuDevice launcher({on.eager ? shim::Copies::eager : shim::Copies::deferred,
                      on.backward ? shim::Order::backward : shim::Order::forward},
                     static_cast<std::size_t>(on.shared_bytes));
  run(plan, inputs, {outputs[0].data, outputs[1].data, outputs[2].data}, scratch.get(), launcher);
}

}  // namespace
}  // namespace mla_pass::cuda

// Outputs: the context and both presents. Returns 0, or 1 with a sentence where something is refused or a kernel is
// wrong.
extern "C" int mla_pass_test_operator(const MlaPassAttributes* attributes, const MlaPassTensor* inputs,
                                      const MlaPassTensor* outputs, const MlaPassTestDevice* device, char* message,
                                      std::size_t room) {
  try {
    mla_pass::cuda::compute(*attributes, inputs, outputs, *device);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  }
}
