// The compiled CUDA kernels that the op library carries.
#pragma once

#include <cstddef>

namespace mla_pass::cuda {

// A fatbin: machine code of several architectures, and PTX for the rest, from which the driver takes what a device
// runs. Empty where the library was built without nvcc.
struct Image {
  const void* data;
  std::size_t bytes;
  const char* capabilities;  // that there is machine code for, e.g. "8.0, 9.0"
  const char* toolkit;       // version of CUDA that compiled them
};

Image image();

}  // namespace mla_pass::cuda
