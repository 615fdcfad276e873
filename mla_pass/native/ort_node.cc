#include "ort_node.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "ort_call.h"

namespace mla_pass::ort {
namespace {

// ---- attributes

// What ONNX Runtime says of an attribute it cannot give tells neither operator nor what to do.
template <class Read>
auto attribute(const char* name, const char* kind, const Read& read) {
  try {
    return read();
  } catch (const std::runtime_error& error) {
    throw Refused(std::string("attribute ") + name + " cannot be read (" + error.what() + "); expected " + kind +
                  " written on the node");
  }
}

std::int64_t read_int(const OrtKernelInfo* info, const char* name) {
  return attribute(name, "an int", [&] {
    std::int64_t value = 0;
    call<GetInt>(info, name, &value);
    return value;
  });
}

float read_float(const OrtKernelInfo* info, const char* name) {
  return attribute(name, "a float", [&] {
    float value = 0;
    call<GetFloat>(info, name, &value);
    return value;
  });
}

template <class S, class T>
std::vector<T> read_list(const OrtKernelInfo* info, const char* name, const char* kind) {
  return attribute(name, kind, [&] {
    std::size_t count = 0;
    call<S>(info, name, static_cast<T*>(nullptr), &count);
    std::vector<T> values(count);
    if (count > 0) call<S>(info, name, values.data(), &count);
    return values;
  });
}

std::vector<std::int64_t> read_ints(const OrtKernelInfo* info, const char* name) {
  return read_list<GetInts, std::int64_t>(info, name, "a list of ints");
}

std::vector<float> read_floats(const OrtKernelInfo* info, const char* name) {
  return read_list<GetFloats, float>(info, name, "a list of floats");
}

// ---- tensors

struct Released {
  void operator()(Shape* shape) const { function<ReleaseShape>(api)(shape); }
};
using OwnShape = std::unique_ptr<Shape, Released>;

Tensor read_tensor(const OrtKernelContext* context, std::size_t index) {
  const OrtValue* value = input_value(context, index);
  if (value == nullptr) return {};
  Tensor tensor;
  Shape* raw = nullptr;
  call<GetTensorShape>(value, &raw);
  const OwnShape shape(raw);
  std::size_t rank = 0;
  call<GetDimensionsCount>(raw, &rank);
  if (rank > static_cast<std::size_t>(Tensor::kMaxRank)) {
    throw Refused(std::string("input ") + kInputNames[index] + " has " + std::to_string(rank) +
                  " dimensions; expected at most " + std::to_string(Tensor::kMaxRank));
  }
  std::array<std::int64_t, Tensor::kMaxRank> dims{};
  call<GetDimensions>(raw, dims.data(), rank);
  call<GetElementType>(raw, &tensor.type);
  tensor.given = true;
  tensor.rank = static_cast<Index>(rank);
  std::copy(dims.begin(), dims.end(), tensor.dims.begin());
  void* data = nullptr;
  call<GetTensorMutableData>(const_cast<OrtValue*>(value), &data);  // the API has no reading variant
  tensor.data = data;
  return tensor;
}

void* write_tensor(OrtKernelContext* context, std::size_t index, std::initializer_list<std::int64_t> dims) {
  OrtValue* value = nullptr;
  call<GetOutput>(context, index, dims.begin(), dims.size(), &value);
  void* data = nullptr;
  call<GetTensorMutableData>(value, &data);
  return data;
}

}  // namespace

Attributes read_attributes(const OrtKernelInfo* info) {
  Attributes a{};
  a.num_heads = read_int(info, "num_heads");
  a.kv_groups = read_int(info, "kv_groups");
  a.rank = read_int(info, "rank");
  a.key_rank = read_int(info, "key_rank");
  a.value_offset = read_int(info, "value_offset");
  a.rope_dim = read_int(info, "rope_dim");
  a.nope_dim = read_int(info, "nope_dim");
  a.split = read_int(info, "split");
  a.local_window_size = read_int(info, "local_window_size");
  a.causal = read_int(info, "causal");
  a.shared_buffer = read_int(info, "shared_buffer");
  a.rope_index = read_ints(info, "rope_index");
  a.band_index = read_ints(info, "band_index");
  a.band_block = read_ints(info, "band_block");
  a.scale = read_float(info, "scale");
  a.softcap = read_float(info, "softcap");
  a.band_a0 = read_floats(info, "band_a0");
  a.band_a1 = read_floats(info, "band_a1");
  return a;
}

const OrtValue* input_value(const OrtKernelContext* context, std::size_t index) {
  const OrtValue* value = nullptr;
  call<GetInput>(context, index, &value);
  return value;
}

Inputs read_inputs(const OrtKernelContext* context) {
  std::size_t count = 0;
  call<GetInputCount>(context, &count);
  Inputs inputs{};
  for (std::size_t i = 0; i < std::min(count, inputs.size()); ++i) inputs[i] = read_tensor(context, i);
  return inputs;
}

Outputs write_outputs(OrtKernelContext* context, const Inputs& inputs, const Sizes& size) {
  return {
      write_tensor(context, 0, {size.batch, size.fresh, size.heads * size.value_dim}),
      write_tensor(context, 1, {size.batch, 1, size.capacity, inputs[kPastLatent].dims[3]}),
      write_tensor(context, 2, {size.batch, 1, size.capacity, inputs[kPastRope].dims[3]}),
  };
}

}  // namespace mla_pass::ort
