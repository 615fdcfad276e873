// Runs the kernels of kernels.def on this machine's memory, through the shim.
#pragma once

#include <cstddef>

#include "launch.h"
#include "shim.h"

namespace mla_pass::cuda {

// Each launch is carried out before the call returns. Throws shim::Fault where a kernel or a launch is wrong.
class CpuDevice : public Launcher {
 public:
  // An A100's shared memory, the smallest of the devices that kernels are built for first.
  static constexpr std::size_t kSharedBytes = 163 * 1024;

  explicit CpuDevice(const shim::Options& options = {}, std::size_t shared_bytes = kSharedBytes)
      : options_(options), shared_bytes_(shared_bytes) {}

  void launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters,
              std::size_t parameter_bytes) override;

  // Launches so far.
  std::size_t launches() const { return launches_; }

 private:
  shim::Options options_;
  std::size_t shared_bytes_, launches_ = 0;
};

// As kernels.def names it.
const char* kernel_name(Kernel kernel);

}  // namespace mla_pass::cuda
