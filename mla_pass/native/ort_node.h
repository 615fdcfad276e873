// What an operator reads of its node and of a call's tensors, by ONNX Runtime's API.
#pragma once

#include <cstddef>

#include "attention.h"
#include "ort_api.h"

namespace mla_pass::ort {

// Throws Refused naming the attribute that is absent.
Attributes read_attributes(const OrtKernelInfo* info);

// All inputs of a call; those that are absent are not `given`.
Inputs read_inputs(const OrtKernelContext* context);

const OrtValue* input_value(const OrtKernelContext* context, std::size_t index);

// Context and presents of the shapes that the operator promises.
Outputs write_outputs(OrtKernelContext* context, const Inputs& inputs, const Sizes& size);

}  // namespace mla_pass::ort
