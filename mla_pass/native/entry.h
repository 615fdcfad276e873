// LatentAttention for whoever loads the library without ONNX Runtime, by functions and data of C.
//
// Functions that can fail take room for a message, which they fill with one sentence, cut where the room ends.
#pragma once

#include <cstddef>
#include <cstdint>

#include "export.h"

struct MlaPassInts {
  const std::int64_t* data;
  std::int64_t count;
};

struct MlaPassFloats {
  const float* data;
  std::int64_t count;
};

// A node's attributes, by the names and with the meaning they have in mla_pass/onnx/body.py.
struct MlaPassAttributes {
  std::int64_t num_heads, kv_groups, rank, key_rank, value_offset, rope_dim, nope_dim, split, local_window_size, causal,
      shared_buffer;
  MlaPassInts rope_index, band_index, band_block;
  MlaPassFloats band_a0, band_a1;
  float scale, softcap;
};

// A contiguous row-major tensor; an optional input that is absent has type 0.
struct MlaPassTensor {
  void* data;
  std::int32_t type;  // ONNX's number
  std::int32_t rank;
  std::int64_t dims[8];
};

// Checks the attributes and keeps what follows from them, and from the environment variables MLA_PASS_ISA and
// MLA_PASS_FORM. shared_buffer has to be 1: the cache is written in place. Null where something is refused.
MLA_PASS_EXPORT void* mla_pass_layout(const MlaPassAttributes* attributes, char* message, std::size_t room) noexcept;
MLA_PASS_EXPORT void mla_pass_layout_free(void* layout) noexcept;

// Writes the new rows into inputs past_latent and past_rope, and the context [B, S, H * V], which is of the query's
// type. `inputs` are 14, in the order of body.py. On at most `threads` threads, the caller's among them. Returns 0, or
// something else where something is refused. Threads may use a layout at the same time, on caches of their own.
MLA_PASS_EXPORT int mla_pass_attend(const void* layout, const MlaPassTensor* inputs, const MlaPassTensor* context,
                                    std::int64_t threads, char* message, std::size_t room) noexcept;

// What the CUDA functions return where kernels for these inputs, this device or this driver do not exist.
constexpr int kMlaPassUnsupported = 2;

// Bytes of working memory that mla_pass_cuda_attend needs for inputs of these types and shapes.
MLA_PASS_EXPORT int mla_pass_cuda_scratch(const void* layout, const MlaPassTensor* inputs, std::int32_t device,
                                          std::uint64_t* bytes, char* message, std::size_t room) noexcept;

// As mla_pass_attend, with all tensors in the memory of CUDA device number `device`, on its stream `stream`, a CUstream
// or null for the default one: returns once the work is queued. `scratch`, at a multiple of 256, is free again once the
// stream got there. What memory holds is read on the device alone, so that a captured graph of it may be replayed:
// a total_length or positions that the inputs contradict make the context NaN. Without a padding_mask an
// attention_bias may have columns behind the filled rows, too. Returns 0, kMlaPassUnsupported, or something else where
// the inputs are refused or the driver fails.
MLA_PASS_EXPORT int mla_pass_cuda_attend(const void* layout, const MlaPassTensor* inputs, const MlaPassTensor* context,
                                         std::int32_t device, void* stream, void* scratch, std::uint64_t bytes,
                                         char* message, std::size_t room) noexcept;

// Compute capabilities that the library has CUDA kernels for, e.g. "8.0, 9.0"; empty where it was built without.
MLA_PASS_EXPORT const char* mla_pass_cuda_capabilities() noexcept;

// Number of CUDA devices and the newest CUDA that the driver serves, e.g. 13000.
MLA_PASS_EXPORT int mla_pass_cuda_devices(std::int32_t* count, std::int32_t* version, char* message,
                                          std::size_t room) noexcept;

// The name of one of them, as its message.
MLA_PASS_EXPORT int mla_pass_cuda_device_name(std::int32_t device, char* message, std::size_t room) noexcept;
