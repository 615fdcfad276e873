// Linked to fake_cuda.cc it carries launches out, on this machine's memory.
#include <cstddef>

#include "host.h"
#include "params.h"

void carry_out(mla_pass::cuda::Kernel kernel, mla_pass::cuda::Grid grid, unsigned shared_bytes,
               const void* parameters) {
  using namespace mla_pass::cuda;
  static const std::size_t sizes[] = {
#define MLA_KERNEL(name, parameters, threads, call) sizeof(parameters),
#include "kernels.def"
#undef MLA_KERNEL
  };
  static CpuDevice device;
  device.launch(kernel, grid, shared_bytes, parameters, sizes[static_cast<int>(kernel)]);
}
