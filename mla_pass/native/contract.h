// What the operator asks of its node and of its inputs, checked in one place and told in one sentence.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace mla_pass {

// Bad input: what was found, what was expected.
class Refused : public std::runtime_error {
 public:
  explicit Refused(const std::string& message) : std::runtime_error("LatentAttention: " + message) {}
};

// Right in itself, but nothing that the kernels at hand compute: whoever has other kernels may take them.
class Unsupported : public Refused {
 public:
  using Refused::Refused;
};

// Element types by ONNX's numbers.
enum class Type : int { float32 = 1, uint8 = 2, int8 = 3, int64 = 7, float16 = 10, bfloat16 = 16 };

template <class T>
constexpr Type type_of();
template <>
constexpr Type type_of<float>() {
  return Type::float32;
}
template <>
constexpr Type type_of<Half>() {
  return Type::float16;
}
template <>
constexpr Type type_of<Bfloat>() {
  return Type::bfloat16;
}

enum Input : int {
  kQuery,
  kRow,
  kPastLatent,
  kPastRope,
  kCos,
  kSin,
  kPositionIds,
  kTotalLength,
  kPaddingMask,  // this one and all that follow are optional
  kAttentionBias,
  kQueryMap,
  kKeyUp,
  kKeyMean,
  kValueUp,
  kInputs
};
constexpr int kRequired = kPaddingMask;
extern const std::array<const char*, kInputs> kInputNames;

// Of which kind an input's elements are: the model's float type, float32, int64, or what a cache is stored as.
enum class Kind { model, float32, int64, stored };
Kind kind_of(int input);

// Elements that a stored row of so many numbers takes.
Index stored_width(Index numbers, Type type);

struct Tensor {
  static constexpr Index kMaxRank = 8;
  bool given = false;
  const void* data = nullptr;
  int type = 0;
  Index rank = 0;
  std::array<Index, kMaxRank> dims{};

  template <class T>
  const T* as() const {
    return given ? static_cast<const T*>(data) : nullptr;
  }
};

using Inputs = std::array<Tensor, kInputs>;

struct Attributes {
  std::int64_t num_heads, kv_groups, rank, key_rank, value_offset, rope_dim, nope_dim, split, local_window_size,
      causal, shared_buffer;
  std::vector<std::int64_t> rope_index, band_index, band_block;
  float scale, softcap;
  std::vector<float> band_a0, band_a1;
};

// Everything that follows from the node alone.
struct Layout {
  Attributes attributes;
  std::vector<Index> rope_index, band_index;
  std::vector<Level> levels;
  Index orders;
};

// Throws Refused when the attributes contradict themselves.
Layout checked(const Attributes& attributes);

// Where inputs lie: in memory that can be read here, or in a device's.
enum class Memory { host, device };

// All sizes of one execution. Throws Refused naming the first input that is not as it should be; what it accepts,
// kernels may read and write without another look. Inputs on a device are known by type and shape alone: what
// total_length, position_ids and padding_mask hold is for kernels there to check, and `total` is the most T can be
// where no shape tells T.
Sizes checked(const Layout& layout, const Inputs& inputs, Type model, Memory memory = Memory::host);

// New tokens from which the expanded form takes fewer multiply-adds than the absorbed one; Variant.expand_from in
// mla_pass/onnx/body.py counts the same. No number of tokens: the largest Index.
Index expand_from(const Layout& layout, const Sizes& size, bool key_up, bool value_up);

}  // namespace mla_pass
