// The part of ONNX Runtime's C API that a custom operator needs, written from its binary interface: no wheel of ONNX
// Runtime ships headers.
//
// The API is a table of function pointers that only grows: a slot's number and signature never change once released.
// The highest slot used here came with version 17, so every release since then can load this library, but for one of
// version 18, which kernels on CUDA take; tests/test_native_binding.py calls slots of the installed one.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtApi;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTensorTypeAndShapeInfo;

struct OrtApiBase {
  const OrtApi* (*GetApi)(std::uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  std::uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, std::size_t);
  std::size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, std::size_t);
  std::size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, std::size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, std::size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, std::size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  void* later[4];  // members of versions after 17, which nobody reads in an operator of version 17
};
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*), "the layout that ONNX Runtime reads");

}  // extern "C"

namespace mla_pass::ort {

constexpr std::uint32_t kApiVersion = 17;
// Of GetScratchBuffer.
constexpr std::uint32_t kScratchVersion = 18;

enum class Characteristic : int { required = 0, optional = 1 };
enum class Code : int { fail = 1, invalid_argument = 2 };

// A slot of the table: its number, and the signature of the function there.
template <int Number, class Signature>
struct Slot {
  static constexpr int number = Number;
  using Function = Signature*;
};

using Shape = OrtTensorTypeAndShapeInfo;

using CreateStatus = Slot<0, OrtStatus*(int code, const char* message)>;
using GetErrorMessage = Slot<2, const char*(const OrtStatus*)>;
using CreateCustomOpDomain = Slot<26, OrtStatus*(const char* name, OrtCustomOpDomain** out)>;
using CustomOpDomainAdd = Slot<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Slot<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Slot<51, OrtStatus*(OrtValue*, void** out)>;
using GetElementType = Slot<60, OrtStatus*(const Shape*, int* out)>;
using GetDimensionsCount = Slot<61, OrtStatus*(const Shape*, std::size_t* out)>;
using GetDimensions = Slot<62, OrtStatus*(const Shape*, std::int64_t* dims, std::size_t count)>;
using GetTensorShape = Slot<65, OrtStatus*(const OrtValue*, Shape** out)>;
using MemoryInfoGetId = Slot<72, OrtStatus*(const OrtMemoryInfo*, int* out)>;
using AllocatorFree = Slot<76, OrtStatus*(OrtAllocator*, void*)>;
using GetFloat = Slot<85, OrtStatus*(const OrtKernelInfo*, const char* name, float* out)>;
using GetInt = Slot<86, OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out)>;
using GetInputCount = Slot<88, OrtStatus*(const OrtKernelContext*, std::size_t* out)>;
using GetInput = Slot<90, OrtStatus*(const OrtKernelContext*, std::size_t index, const OrtValue** out)>;
using GetOutput = Slot<91, OrtStatus*(OrtKernelContext*, std::size_t index, const std::int64_t* dims,
                                      std::size_t count, OrtValue** out)>;
using ReleaseStatus = Slot<93, void(OrtStatus*)>;
using ReleaseShape = Slot<99, void(Shape*)>;
using ReleaseAllocator = Slot<132, void(OrtAllocator*)>;
using GetFloats = Slot<162, OrtStatus*(const OrtKernelInfo*, const char* name, float* out, std::size_t* count)>;
using GetInts = Slot<163, OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out, std::size_t* count)>;
using GetComputeStream = Slot<193, OrtStatus*(const OrtKernelContext*, void** out)>;
using GetTensorMemoryInfo = Slot<194, OrtStatus*(const OrtValue*, const OrtMemoryInfo** out)>;
using GetAllocator = Slot<253, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator** out)>;
using ParallelFor = Slot<274, OrtStatus*(const OrtKernelContext*, void (*task)(void*, std::size_t), std::size_t total,
                                         std::size_t batches, void* user)>;
// Of the device's allocator, on the call's stream; given back by AllocatorFree.
using GetScratchBuffer = Slot<277, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, std::size_t bytes,
                                              void** out)>;

template <class S>
typename S::Function function(const OrtApi* api) {
  return reinterpret_cast<typename S::Function>(reinterpret_cast<void* const*>(api)[S::number]);
}

}  // namespace mla_pass::ort
