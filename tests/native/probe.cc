// An operator `probe::Probe` that asks a run for what kernels on CUDA ask: float x -> int64 [3], the number of x's
// device, whether the run has a stream, and what came back from memory of the device's allocator.
#include "ort_api.h"
#include "ort_call.h"

#include <cstdint>

namespace mla_pass::ort {

const OrtApi* api = nullptr;
std::uint32_t newest = 0;

namespace {

// Kernels take memory on a stream, which the CPU has not; this slot is the same without one.
using AllocatorAlloc = Slot<75, OrtStatus*(OrtAllocator*, std::size_t, void** out)>;

std::int64_t through_memory(const OrtKernelContext* context, const OrtMemoryInfo* memory, std::int64_t value) {
  OrtAllocator* allocator = nullptr;
  call<GetAllocator>(context, memory, &allocator);
  void* block = nullptr;
  call<AllocatorAlloc>(allocator, sizeof value, &block);
  *static_cast<std::int64_t*>(block) = value;
  const std::int64_t back = *static_cast<std::int64_t*>(block);
  call<AllocatorFree>(allocator, block);
  function<ReleaseAllocator>(api)(allocator);
  return back;
}

void compute(OrtKernelContext* context) {
  const auto* run = static_cast<const OrtKernelContext*>(context);
  const OrtValue* x = nullptr;
  const OrtMemoryInfo* memory = nullptr;
  int device = -1;
  void* stream = &device;
  call<GetInput>(run, std::size_t{0}, &x);
  call<GetTensorMemoryInfo>(x, &memory);
  call<MemoryInfoGetId>(memory, &device);
  call<GetComputeStream>(run, &stream);
  const std::int64_t dims[] = {3};
  OrtValue* y = nullptr;
  void* data = nullptr;
  call<GetOutput>(context, std::size_t{0}, dims, std::size_t{1}, &y);
  call<GetTensorMutableData>(y, &data);
  auto* out = static_cast<std::int64_t*>(data);
  out[0] = device;
  out[1] = stream != nullptr;
  out[2] = through_memory(run, memory, 42);
}

OrtCustomOp make_probe() {
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "Probe"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return 1; };
  op.GetInputType = [](const OrtCustomOp*, std::size_t) { return static_cast<int>(Type::float32); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return 0; };
  op.GetInputMemoryType = op.GetInputCharacteristic;
  op.GetOutputTypeCount = op.GetInputTypeCount;
  op.GetOutputType = [](const OrtCustomOp*, std::size_t) { return static_cast<int>(Type::int64); };
  op.GetOutputCharacteristic = op.GetInputCharacteristic;
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputMinArity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputMinArity;
  op.GetStartVersion = op.GetVariadicInputMinArity;
  op.GetEndVersion = op.GetVariadicInputMinArity;
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel) -> OrtStatus* {
    *kernel = nullptr;
    return nullptr;
  };
  op.KernelComputeV2 = [](void*, OrtKernelContext* context) { return guarded([&] { compute(context); }); };
  op.KernelDestroy = [](void*) {};
  return op;
}

}  // namespace
}  // namespace mla_pass::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace mla_pass::ort;
  api = base->GetApi(kApiVersion);
  return guarded([&] {
    static const OrtCustomOp probe = make_probe();
    OrtCustomOpDomain* domain = nullptr;
    call<CreateCustomOpDomain>("probe", &domain);
    call<CustomOpDomainAdd>(domain, &probe);
    call<AddCustomOpDomain>(options, domain);
  });
}
