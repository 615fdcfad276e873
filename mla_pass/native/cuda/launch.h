// Who runs CUDA kernels: a driver, or the tests' CPU build. The plan of a call (plan.h) is written against this alone.
#pragma once

#include <cstddef>

namespace mla_pass::cuda {

enum class Kernel : int {
#define MLA_KERNEL(name, parameters, threads, call) name,
#include "kernels.def"
#undef MLA_KERNEL
  count
};

struct Grid {
  unsigned x, y, z;
};

// What decides how a call is cut into launches.
struct Device {
  int major, minor;   // compute capability
  int processors;     // SMs
  int shared_bytes;   // the most dynamic shared memory a CTA may ask for
  std::size_t cache_bytes;  // of the second level
};

class Launcher {
 public:
  virtual ~Launcher() = default;
  // Puts a launch behind all that came before it; `parameters` is copied. Throws where it is refused.
  virtual void launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters,
                      std::size_t parameter_bytes) = 0;
};

}  // namespace mla_pass::cuda
