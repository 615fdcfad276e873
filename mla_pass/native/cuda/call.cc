#include "call.h"

#include <cstdint>

#include "driver.h"
#include "image.h"

namespace mla_pass::cuda {
namespace {

// Kernels read 16 bytes at a time.
constexpr std::uintptr_t kAligned = 16;

// An absent query is for the contract to miss.
Type model_of(const Tensor& query) {
  const Type type = query.given ? static_cast<Type>(query.type) : Type::float16;
  if (type == Type::float16 || type == Type::bfloat16) return type;
  throw Unsupported("input query is of ONNX type " + std::to_string(query.type) +
                    "; expected float16 or bfloat16 on a CUDA device");
}

void check_address(const char* kind, const char* name, const void* address, std::uintptr_t aligned) {
  if (reinterpret_cast<std::uintptr_t>(address) % aligned == 0) return;
  throw Unsupported(std::string(kind) + name + " lies at an address that is no multiple of " +
                    std::to_string(aligned) + "; expected one on a CUDA device: copy what is a view of another tensor");
}

void check_addresses(const Inputs& inputs, const Outputs& outputs) {
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const bool whole = kind_of(static_cast<int>(i)) == Kind::int64;
    if (inputs[i].given) {
      check_address("input ", kInputNames[i], inputs[i].data, whole ? sizeof(std::int64_t) : kAligned);
    }
  }
  check_address("output ", "context", outputs.context, kAligned);
  check_address("output ", "present_latent", outputs.present_latent, kAligned);
  check_address("output ", "present_rope", outputs.present_rope, kAligned);
}

}  // namespace

bool has_kernels() { return image().bytes > 0; }

Call make_call(const Layout& layout, const Inputs& inputs, Form form, int ordinal, Bias bias) {
  const Device& limits = device(ordinal);
  const Type model = model_of(inputs[kQuery]);
  Sizes size = checked(layout, inputs, model, Memory::device);
  const bool told = inputs[kPaddingMask].given || !layout.attributes.shared_buffer;
  if (bias == Bias::any_width && !told) size.exact = false;
  return {size, make_plan(layout, size, inputs, model, form, limits)};
}

void run(const Call& call, const Inputs& inputs, const Outputs& outputs, int ordinal, void* stream, void* scratch) {
  check_addresses(inputs, outputs);
  Cuda launcher(ordinal, stream);
  run(call.plan, inputs, outputs, scratch, launcher);
}

}  // namespace mla_pass::cuda
