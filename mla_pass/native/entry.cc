#include "entry.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "cuda/call.h"
#include "cuda/driver.h"
#include "cuda/image.h"
#include "isa.h"
#include "pool.h"

namespace mla_pass {
namespace {

constexpr int kRefused = 1;

// Runs `work`; what the C function is to return, with the sentence in `message` when it throws.
template <class Work>
int guarded(char* message, std::size_t room, const Work& work) {
  try {
    work();
    return 0;
  } catch (const Unsupported& error) {
    std::snprintf(message, room, "%s", error.what());
    return kMlaPassUnsupported;
  } catch (const Refused& error) {
    std::snprintf(message, room, "%s", error.what());
  } catch (const std::exception& error) {
    std::snprintf(message, room, "LatentAttention: %s", error.what());
  }
  return kRefused;
}

template <class List>
auto values(const List& list) {
  return std::vector(list.data, list.data + list.count);
}

Attributes read(const MlaPassAttributes& given) {
  Attributes a{};
  a.num_heads = given.num_heads;
  a.kv_groups = given.kv_groups;
  a.rank = given.rank;
  a.key_rank = given.key_rank;
  a.value_offset = given.value_offset;
  a.rope_dim = given.rope_dim;
  a.nope_dim = given.nope_dim;
  a.split = given.split;
  a.local_window_size = given.local_window_size;
  a.causal = given.causal;
  a.shared_buffer = given.shared_buffer;
  a.rope_index = values(given.rope_index);
  a.band_index = values(given.band_index);
  a.band_block = values(given.band_block);
  a.band_a0 = values(given.band_a0);
  a.band_a1 = values(given.band_a1);
  a.scale = given.scale;
  a.softcap = given.softcap;
  return a;
}

std::string shape_of(std::initializer_list<Index> dims) {
  std::string out;
  for (const Index dim : dims) out += (out.empty() ? "[" : ", ") + std::to_string(dim);
  return out + "]";
}

// An empty tensor often has no memory, which kernels would take for its absence.
void* memory_of(const MlaPassTensor& given, const char* kind, const char* name) {
  alignas(16) static float nothing;
  const bool empty = std::any_of(given.dims, given.dims + given.rank, [](std::int64_t dim) { return dim == 0; });
  if (given.data != nullptr || empty) return given.data == nullptr ? &nothing : given.data;
  throw Refused(std::string(kind) + name + " points to no memory; expected the address of its elements");
}

// `kind` and `name` are put together where there is something to tell: a step allocates nothing.
Tensor read(const MlaPassTensor& given, const char* kind, const char* name) {
  Tensor tensor;
  if (given.type == 0) return tensor;
  if (given.rank < 0 || given.rank > Tensor::kMaxRank) {
    throw Refused(std::string(kind) + name + " has " + std::to_string(given.rank) +
                  " dimensions; expected at most " + std::to_string(Tensor::kMaxRank));
  }
  tensor.given = true;
  tensor.data = memory_of(given, kind, name);
  tensor.type = given.type;
  tensor.rank = given.rank;
  std::copy_n(given.dims, given.rank, tensor.dims.begin());
  return tensor;
}

// The model's type is its query's; an absent one is for the contract to miss.
Type model_of(const Tensor& query) {
  const Type type = query.given ? static_cast<Type>(query.type) : Type::float32;
  if (type == Type::float32 || type == Type::float16 || type == Type::bfloat16) return type;
  throw Refused("input query is of ONNX type " + std::to_string(query.type) +
                "; expected float32, float16 or bfloat16");
}

void check_context(const Tensor& context, const Sizes& size, Type model) {
  if (!context.given || context.type != static_cast<int>(model)) {
    throw Refused("output context is of ONNX type " + std::to_string(context.type) + "; expected " +
                  std::to_string(static_cast<int>(model)) + ", the query's");
  }
  const std::array<Index, 3> want = {size.batch, size.fresh, size.heads * size.value_dim};
  if (context.rank != 3 || !std::equal(want.begin(), want.end(), context.dims.begin())) {
    const auto& d = context.dims;
    throw Refused("output context is " + (context.rank == 3 ? shape_of({d[0], d[1], d[2]})
                                                            : "of " + std::to_string(context.rank) + " dimensions") +
                  "; expected " + shape_of({want[0], want[1], want[2]}));
  }
}

struct Held {
  Layout layout;
  const Isa& isa;
  Form form;
};

Held* make(const MlaPassAttributes& given) {
  Layout layout = checked(read(given));
  if (!layout.attributes.shared_buffer) {
    throw Refused("attribute shared_buffer is 0; expected 1, for the cache is written in place");
  }
  return new Held{std::move(layout), chosen_isa(), form_from_environment()};
}

Inputs read(const MlaPassTensor* given) {
  Inputs inputs{};
  for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i] = read(given[i], "input ", kInputNames[i]);
  return inputs;
}

// The context, and the cache in place.
Outputs outputs_of(const MlaPassTensor& given_context, const Inputs& inputs, const Sizes& size, Type model) {
  const Tensor context = read(given_context, "output ", "context");
  check_context(context, size, model);
  const auto written = [](const Tensor& tensor) { return const_cast<void*>(tensor.data); };
  return {written(context), written(inputs[kPastLatent]), written(inputs[kPastRope])};
}

void attend(const Held& held, const MlaPassTensor* given, const MlaPassTensor& context, Index workers) {
  if (workers < 1) throw Refused("threads is " + std::to_string(workers) + "; expected at least 1");
  const Inputs inputs = read(given);
  const Type model = model_of(inputs[kQuery]);
  const Sizes size = checked(held.layout, inputs, model);
  const Outputs outputs = outputs_of(context, inputs, size, model);
  const Threads threads = own_threads(workers);
  switch (model) {
    case Type::float16:
      return run<Half>(held.layout, size, inputs, outputs, held.isa, held.form, threads);
    case Type::bfloat16:
      return run<Bfloat>(held.layout, size, inputs, outputs, held.isa, held.form, threads);
    default:
      return run<float>(held.layout, size, inputs, outputs, held.isa, held.form, threads);
  }
}

cuda::Call cuda_call(const Held& held, const Inputs& inputs, int device) {
  return cuda::make_call(held.layout, inputs, held.form, device, cuda::Bias::any_width);
}

void cuda_attend(const Held& held, const MlaPassTensor* given, const MlaPassTensor& context, int device, void* stream,
                 void* scratch, std::uint64_t bytes) {
  const Inputs inputs = read(given);
  const cuda::Call call = cuda_call(held, inputs, device);
  const Outputs outputs = outputs_of(context, inputs, call.size, static_cast<Type>(inputs[kQuery].type));
  if (bytes < call.plan.scratch_bytes) {
    throw Refused("scratch holds " + std::to_string(bytes) + " bytes; expected " +
                  std::to_string(call.plan.scratch_bytes) + ", as mla_pass_cuda_scratch tells");
  }
  cuda::run(call, inputs, outputs, device, stream, scratch);
}

const Held& held_by(const void* layout) { return *static_cast<const Held*>(layout); }

}  // namespace
}  // namespace mla_pass

MLA_PASS_EXPORT void* mla_pass_layout(const MlaPassAttributes* attributes, char* message, std::size_t room) noexcept {
  void* made = nullptr;
  mla_pass::guarded(message, room, [&] { made = mla_pass::make(*attributes); });
  return made;
}

MLA_PASS_EXPORT void mla_pass_layout_free(void* layout) noexcept { delete static_cast<mla_pass::Held*>(layout); }

MLA_PASS_EXPORT int mla_pass_attend(const void* layout, const MlaPassTensor* inputs, const MlaPassTensor* context,
                                    std::int64_t threads, char* message, std::size_t room) noexcept {
  return mla_pass::guarded(message, room,
                           [&] { mla_pass::attend(mla_pass::held_by(layout), inputs, *context, threads); });
}

MLA_PASS_EXPORT int mla_pass_cuda_scratch(const void* layout, const MlaPassTensor* inputs, std::int32_t device,
                                          std::uint64_t* bytes, char* message, std::size_t room) noexcept {
  return mla_pass::guarded(message, room, [&] {
    *bytes = mla_pass::cuda_call(mla_pass::held_by(layout), mla_pass::read(inputs), device).plan.scratch_bytes;
  });
}

MLA_PASS_EXPORT int mla_pass_cuda_attend(const void* layout, const MlaPassTensor* inputs, const MlaPassTensor* context,
                                         std::int32_t device, void* stream, void* scratch, std::uint64_t bytes,
                                         char* message, std::size_t room) noexcept {
  return mla_pass::guarded(message, room, [&] {
    mla_pass::cuda_attend(mla_pass::held_by(layout), inputs, *context, device, stream, scratch, bytes);
  });
}

MLA_PASS_EXPORT const char* mla_pass_cuda_capabilities() noexcept { return mla_pass::cuda::image().capabilities; }

MLA_PASS_EXPORT int mla_pass_cuda_devices(std::int32_t* count, std::int32_t* version, char* message,
                                          std::size_t room) noexcept {
  return mla_pass::guarded(message, room, [&] {
    *count = mla_pass::cuda::device_count();
    *version = mla_pass::cuda::driver_version();
  });
}

MLA_PASS_EXPORT int mla_pass_cuda_device_name(std::int32_t device, char* message, std::size_t room) noexcept {
  return mla_pass::guarded(message, room, [&] {
    std::snprintf(message, room, "%s", mla_pass::cuda::device_name(device).c_str());
  });
}
