// mla_pass::LatentAttention as a custom operator of ONNX Runtime: its kernels, and how they are registered.
#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "cuda/call.h"
#include "export.h"
#include "isa.h"
#include "ort_call.h"
#include "ort_node.h"
#include "scratch.h"

namespace mla_pass {

const OrtApi* ort::api = nullptr;
std::uint32_t ort::newest = 0;

namespace {

// ---- the kernels of a node, one a device

class Kernel {
 public:
  explicit Kernel(const OrtKernelInfo* info)
      : layout_(checked(ort::read_attributes(info))), form_(form_from_environment()) {}
  virtual ~Kernel() = default;
  virtual void compute(OrtKernelContext* context) const = 0;

 protected:
  Layout layout_;
  Form form_;
};

void run_on_pool(void* context, std::size_t count, void (*task)(void*, std::size_t), void* user) {
  if (count == 1) return task(user, 0);
  ort::call<ort::ParallelFor>(static_cast<const OrtKernelContext*>(context), task, count, std::size_t{0}, user);
}

class CpuKernel final : public Kernel {
 public:
  CpuKernel(const OrtKernelInfo* info, Type type)
      : Kernel(info),
        isa_(chosen_isa()),
        workers_(static_cast<Index>(std::max(1u, std::thread::hardware_concurrency()))),
        type_(type) {}

  void compute(OrtKernelContext* context) const override {
    const Inputs inputs = ort::read_inputs(context);
    const Sizes size = checked(layout_, inputs, type_);
    const Outputs outputs = ort::write_outputs(context, inputs, size);
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
  const Isa& isa_;
  Index workers_;
  Type type_;
};

// Working memory of a call, from the allocator that ONNX Runtime keeps for a device. It is asked for on the stream of
// the call, and what is given back with work still queued goes to that stream alone until the stream is waited for.
class DeviceScratch {
 public:
  DeviceScratch(const OrtKernelContext* context, const OrtMemoryInfo* memory, std::size_t bytes) {
    if (bytes == 0) return;
    ort::call<ort::GetAllocator>(context, memory, &allocator_);
    try {
      ort::call<ort::GetScratchBuffer>(context, memory, bytes, &data_);
    } catch (const std::exception&) {
      release();
      throw;
    }
  }
  ~DeviceScratch() { release(); }
  DeviceScratch(const DeviceScratch&) = delete;
  DeviceScratch& operator=(const DeviceScratch&) = delete;

  void* data() const { return data_; }

 private:
  void release() {
    if (allocator_ == nullptr) return;
    // A status would tell of nothing to be done about.
    if (data_ != nullptr) ort::drop(ort::function<ort::AllocatorFree>(ort::api)(allocator_, data_));
    ort::function<ort::ReleaseAllocator>(ort::api)(allocator_);
  }

  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

class CudaKernel final : public Kernel {
 public:
  explicit CudaKernel(const OrtKernelInfo* info) : Kernel(info) {
    if (ort::newest >= ort::kScratchVersion) return;
    throw Refused("this is ONNX Runtime 1.17; expected 1.18 or newer for kernels on CUDA, or a session on the CPU");
  }

  void compute(OrtKernelContext* context) const override {
    const Inputs inputs = ort::read_inputs(context);
    const OrtMemoryInfo* memory = nullptr;
    int device = 0;
    void* stream = nullptr;
    ort::call<ort::GetTensorMemoryInfo>(ort::input_value(context, kQuery), &memory);
    ort::call<ort::MemoryInfoGetId>(memory, &device);
    ort::call<ort::GetComputeStream>(static_cast<const OrtKernelContext*>(context), &stream);
    const cuda::Call call = cuda::make_call(layout_, inputs, form_, device, cuda::Bias::exact);
    const Outputs outputs = ort::write_outputs(context, inputs, call.size);
    const DeviceScratch scratch(context, memory, call.plan.scratch_bytes);
    cuda::run(call, inputs, outputs, device, stream, scratch.data());
  }
};

// ---- the operator, once for every device and combination of the model's type and those its cache is stored as

enum class Device { cpu, cuda };

struct Op : OrtCustomOp {
  Device device;
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

Kernel* make_kernel(const Op& op, const OrtKernelInfo* info) {
  if (op.device == Device::cuda) return new CudaKernel(info);
  return new CpuKernel(info, op.model);
}

Op make_op(Device device, Type model, Type latent, Type rope) {
  Op op{};
  op.version = ort::kApiVersion;
  op.device = device;
  op.model = model;
  op.latent = latent;
  op.rope = rope;
  op.GetName = [](const OrtCustomOp*) { return "LatentAttention"; };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) -> const char* {
    return as_op(self).device == Device::cuda ? "CUDAExecutionProvider" : nullptr;  // null: the CPU's
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return kInputs; };
  op.GetInputType = input_type;
  op.GetInputCharacteristic = input_characteristic;
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return 0; };  // the provider's own
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
    return ort::guarded([&] { *out = make_kernel(as_op(self), info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return ort::guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  // No InferOutputShapeFn: element types follow from the schema, the model states the shapes of its own outputs, and
  // what ONNX Runtime lets such a function say has no word for a dimension that is not known.
  return op;
}

// All combinations of what the two parts of a row are stored as.
void add_ops(Device device, Type model, const std::vector<Type>& stored, std::vector<Op>& ops) {
  for (const Type latent : stored) {
    for (const Type rope : stored) ops.push_back(make_op(device, model, latent, rope));
  }
}

// The CPU's kernels come first and are always there: on a machine without CUDA they serve, and where CUDA has no kernel
// for a node, as for float32, ONNX Runtime falls back to them.
std::vector<Op> make_ops() {
  std::vector<Op> ops;
  for (const Type model : {Type::float32, Type::float16, Type::bfloat16}) {
    std::vector<Type> stored = {Type::float16, Type::bfloat16, Type::int8, Type::uint8};
    if (model == Type::float32) stored.push_back(model);
    add_ops(Device::cpu, model, stored, ops);
  }
  if (cuda::has_kernels()) {
    for (const Type model : {Type::float16, Type::bfloat16}) {
      add_ops(Device::cuda, model, {model, Type::int8, Type::uint8}, ops);
    }
  }
  return ops;
}

// Sessions keep pointers to the domain and to its operators: all of them live as long as the library.
OrtCustomOpDomain* domain() {
  static const std::vector<Op> ops = make_ops();
  static OrtCustomOpDomain* const made = [] {
    OrtCustomOpDomain* fresh = nullptr;
    ort::call<ort::CreateCustomOpDomain>("mla_pass", &fresh);
    for (const Op& op : ops) ort::call<ort::CustomOpDomainAdd>(fresh, static_cast<const OrtCustomOp*>(&op));
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
  ort::api = table;
  ort::newest = base->GetApi(ort::kScratchVersion) == nullptr ? ort::kApiVersion : ort::kScratchVersion;
  return ort::guarded([&] { ort::call<ort::AddCustomOpDomain>(options, domain()); });
}

// The table that ONNX Runtime handed over; null before the library is registered. For the test of the slots.
MLA_PASS_EXPORT const OrtApi* mla_pass_ort_api() { return mla_pass::ort::api; }

// Name of the i-th instruction set that this processor and this build have, best first; null past the last.
MLA_PASS_EXPORT const char* mla_pass_isa(std::size_t i) {
  const mla_pass::Isa* isa = mla_pass::usable_isa(static_cast<mla_pass::Index>(i));
  return isa == nullptr ? nullptr : isa->name;
}

// How often, in this process, working memory had to be asked for.
MLA_PASS_EXPORT std::uint64_t mla_pass_scratch_growths() { return mla_pass::scratch_growths(); }

// Bytes of cache, in this process, that were copied because a present was not its past.
MLA_PASS_EXPORT std::uint64_t mla_pass_copied_bytes() { return mla_pass::copied_bytes(); }
