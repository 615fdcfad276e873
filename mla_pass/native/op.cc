// mla_pass::LatentAttention as a custom operator of ONNX Runtime: what crosses the C boundary, and nothing else.
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "export.h"
#include "isa.h"
#include "ort_api.h"
#include "scratch.h"

namespace mla_pass {
namespace {

const OrtApi* api = nullptr;

// Call a slot; a status it returns is thrown as an exception.
template <class S, class... Arguments>
void call(Arguments... arguments) {
  OrtStatus* status = ort::function<S>(api)(arguments...);
  if (status == nullptr) return;
  const std::string message = ort::function<ort::GetErrorMessage>(api)(status);
  ort::function<ort::ReleaseStatus>(api)(status);
  throw std::runtime_error(message);
}

// Run `work`; what it throws becomes a status, for no exception may pass through C.
template <class Work>
OrtStatus* guarded(const Work& work) {
  const auto create = ort::function<ort::CreateStatus>(api);
  try {
    work();
    return nullptr;
  } catch (const Refused& error) {
    return create(static_cast<int>(ort::Code::invalid_argument), error.what());
  } catch (const std::exception& error) {
    return create(static_cast<int>(ort::Code::fail), (std::string("LatentAttention: ") + error.what()).c_str());
  }
}

struct ReleaseShape {
  void operator()(ort::Shape* shape) const { ort::function<ort::ReleaseShape>(api)(shape); }
};
using OwnShape = std::unique_ptr<ort::Shape, ReleaseShape>;

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
    call<ort::GetInt>(info, name, &value);
    return value;
  });
}

float read_float(const OrtKernelInfo* info, const char* name) {
  return attribute(name, "a float", [&] {
    float value = 0;
    call<ort::GetFloat>(info, name, &value);
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
  return read_list<ort::GetInts, std::int64_t>(info, name, "a list of ints");
}

std::vector<float> read_floats(const OrtKernelInfo* info, const char* name) {
  return read_list<ort::GetFloats, float>(info, name, "a list of floats");
}

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

// ---- one kernel

Tensor read_tensor(const OrtKernelContext* context, std::size_t index) {
  const OrtValue* value = nullptr;
  call<ort::GetInput>(context, index, &value);
  if (value == nullptr) return {};
  Tensor tensor;
  ort::Shape* raw = nullptr;
  call<ort::GetTensorShape>(value, &raw);
  const OwnShape shape(raw);
  std::size_t rank = 0;
  call<ort::GetDimensionsCount>(raw, &rank);
  if (rank > static_cast<std::size_t>(Tensor::kMaxRank)) {
    throw Refused(std::string("input ") + kInputNames[index] + " has " + std::to_string(rank) +
                  " dimensions; expected at most " + std::to_string(Tensor::kMaxRank));
  }
  std::array<std::int64_t, Tensor::kMaxRank> dims{};
  call<ort::GetDimensions>(raw, dims.data(), rank);
  call<ort::GetElementType>(raw, &tensor.type);
  tensor.given = true;
  tensor.rank = static_cast<Index>(rank);
  std::copy(dims.begin(), dims.end(), tensor.dims.begin());
  void* data = nullptr;
  call<ort::GetTensorMutableData>(const_cast<OrtValue*>(value), &data);  // the API has no reading variant
  tensor.data = data;
  return tensor;
}

void* write_tensor(OrtKernelContext* context, std::size_t index, std::initializer_list<std::int64_t> dims) {
  OrtValue* value = nullptr;
  call<ort::GetOutput>(context, index, dims.begin(), dims.size(), &value);
  void* data = nullptr;
  call<ort::GetTensorMutableData>(value, &data);
  return data;
}

void run_on_pool(void* context, std::size_t count, void (*task)(void*, std::size_t), void* user) {
  if (count == 1) return task(user, 0);
  call<ort::ParallelFor>(static_cast<const OrtKernelContext*>(context), task, count, std::size_t{0}, user);
}

class Kernel {
 public:
  Kernel(const OrtKernelInfo* info, Type type)
      : layout_(checked(read_attributes(info))),
        isa_(chosen_isa()),
        form_(form_from_environment()),
        workers_(static_cast<Index>(std::max(1u, std::thread::hardware_concurrency()))),
        type_(type) {}

  void compute(OrtKernelContext* context) const {
    std::size_t count = 0;
    call<ort::GetInputCount>(static_cast<const OrtKernelContext*>(context), &count);
    Inputs inputs{};
    for (std::size_t i = 0; i < std::min(count, inputs.size()); ++i) inputs[i] = read_tensor(context, i);
    const Sizes size = checked(layout_, inputs, type_);
    const Outputs outputs = {
        write_tensor(context, 0, {size.batch, size.fresh, size.heads * size.value_dim}),
        write_tensor(context, 1, {size.batch, 1, size.capacity, inputs[kPastLatent].dims[3]}),
        write_tensor(context, 2, {size.batch, 1, size.capacity, inputs[kPastRope].dims[3]}),
    };
    const Threads threads = {context, run_on_pool, workers_};
    switch (type_) {
      case Type::float16:
        return run<Half>(layout_, size, inputs, outputs, isa_, form_, threads);
      case Type::bfloat16:
        return run<Bfloat>(layout_, size, inputs, outputs, isa_, form_, threads);
      default:
        return run<float>(layout_, size, inputs, outputs, isa_, form_, threads);
    }
  }

 private:
  Layout layout_;
  const Isa& isa_;
  Form form_;
  Index workers_;
  Type type_;
};

// ---- the operator, once for every combination of the model's type and those its cache is stored as

struct Op : OrtCustomOp {
  Type model, latent, rope;
};

const Op& as_op(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

int input_type(const OrtCustomOp* op, std::size_t index) {
  switch (kind_of(static_cast<int>(index))) {
    case Kind::float32:
      return static_cast<int>(Type::float32);
    case Kind::int64:
      return static_cast<int>(Type::int64);
    case Kind::stored:
      return static_cast<int>(index == kPastLatent ? as_op(op).latent : as_op(op).rope);
    default:
      return static_cast<int>(as_op(op).model);
  }
}

int output_type(const OrtCustomOp* op, std::size_t index) {
  const Op& self = as_op(op);
  return static_cast<int>(index == 0 ? self.model : index == 1 ? self.latent : self.rope);
}

int input_characteristic(const OrtCustomOp*, std::size_t index) {
  return static_cast<int>(index < kRequired ? ort::Characteristic::required : ort::Characteristic::optional);
}

Op make_op(Type model, Type latent, Type rope) {
  Op op{};
  op.version = ort::kApiVersion;
  op.model = model;
  op.latent = latent;
  op.rope = rope;
  op.GetName = [](const OrtCustomOp*) { return "LatentAttention"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return kInputs; };
  op.GetInputType = input_type;
  op.GetInputCharacteristic = input_characteristic;
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> std::size_t { return 3; };
  op.GetOutputType = output_type;
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputMinArity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputMinArity;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** out) {
    return guarded([&] { *out = new Kernel(info, as_op(self).model); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  // No InferOutputShapeFn: element types follow from the schema, the model states the shapes of its own outputs, and
  // what ONNX Runtime lets such a function say has no word for a dimension that is not known.
  return op;
}

std::vector<Op> make_ops() {
  std::vector<Op> ops;
  for (const Type model : {Type::float32, Type::float16, Type::bfloat16}) {
    std::vector<Type> stored = {Type::float16, Type::bfloat16, Type::int8, Type::uint8};
    if (model == Type::float32) stored.push_back(model);
    for (const Type latent : stored) {
      for (const Type rope : stored) ops.push_back(make_op(model, latent, rope));
    }
  }
  return ops;
}

// Sessions keep pointers to the domain and to its operators: all of them live as long as the library.
OrtCustomOpDomain* domain() {
  static const std::vector<Op> ops = make_ops();
  static OrtCustomOpDomain* const made = [] {
    OrtCustomOpDomain* fresh = nullptr;
    call<ort::CreateCustomOpDomain>("mla_pass", &fresh);
    for (const Op& op : ops) call<ort::CustomOpDomainAdd>(fresh, static_cast<const OrtCustomOp*>(&op));
    return fresh;
  }();
  return made;
}

}  // namespace
}  // namespace mla_pass

// What ONNX Runtime calls when the library is registered with session options.
MLA_PASS_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace mla_pass;
  const OrtApi* table = base->GetApi(ort::kApiVersion);
  if (table == nullptr) {
    const OrtApi* oldest = base->GetApi(1);
    const std::string message = std::string("mla_pass needs ONNX Runtime 1.17 or newer; this is ") +
                                base->GetVersionString();
    return ort::function<ort::CreateStatus>(oldest)(static_cast<int>(ort::Code::fail), message.c_str());
  }
  api = table;
  return guarded([&] { call<ort::AddCustomOpDomain>(options, domain()); });
}

// The table that ONNX Runtime handed over; null before the library is registered. For the test of the slots.
MLA_PASS_EXPORT const OrtApi* mla_pass_ort_api() { return mla_pass::api; }

// Name of the i-th instruction set that this processor and this build have, best first; null past the last.
MLA_PASS_EXPORT const char* mla_pass_isa(std::size_t i) {
  const mla_pass::Isa* isa = mla_pass::usable_isa(static_cast<mla_pass::Index>(i));
  return isa == nullptr ? nullptr : isa->name;
}

// How often, in this process, working memory had to be asked for.
MLA_PASS_EXPORT std::uint64_t mla_pass_scratch_growths() { return mla_pass::scratch_growths(); }

// Bytes of cache, in this process, that were copied because a present was not its past.
MLA_PASS_EXPORT std::uint64_t mla_pass_copied_bytes() { return mla_pass::copied_bytes(); }
