// A whole call of LatentAttention in the memory of a CUDA device. The host sees types, shapes and addresses, never what
// lies there.
#pragma once

#include "../attention.h"
#include "plan.h"

namespace mla_pass::cuda {

// Whether there are kernels in this build; where there are none, calls are refused.
bool has_kernels();

struct Call {
  Sizes size;
  Plan plan;
};

// Columns of an attention_bias: as many as rows are filled, or more, as masks of a fixed width have.
enum class Bias { exact, any_width };

// What the inputs make of a call on a device, which is asked for its sizes and nothing more. Throws Refused where the
// inputs are not as they should be, Unsupported where they are and no kernel takes them.
Call make_call(const Layout& layout, const Inputs& inputs, Form form, int device, Bias bias);

// Puts the call on a stream of that device. `scratch` is of plan.scratch_bytes, at a multiple of 256, and free again
// once the stream got here.
void run(const Call& call, const Inputs& inputs, const Outputs& outputs, int device, void* stream, void* scratch);

}  // namespace mla_pass::cuda
