// The CUDA driver, libcuda, loaded when it is first needed: without one the op library loads and serves the CPU.
//
// Functions here throw Unsupported (contract.h) where driver, device and kernels do not go together, and
// std::runtime_error where a call fails.
#pragma once

#include <string>

#include "launch.h"

namespace mla_pass::cuda {

// Of the driver: the newest CUDA that it serves, e.g. 13000 for 13.0.
int driver_version();

int device_count();

std::string device_name(int ordinal);

// Asked of the driver once a device.
const Device& device(int ordinal);

// Launches on a stream, which is null for the default one. For as long as it lives a context of the device `ordinal` is
// current: the one that is already, if it is that device's, and the device's primary context otherwise.
//
// The first one in a context loads the kernels, which a stream that is being captured does not allow: a graph is
// captured of calls like those that ran before. After that nothing is allocated and nothing waits.
class Cuda final : public Launcher {
 public:
  Cuda(int ordinal, void* stream);
  ~Cuda() override;
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;

  void launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters,
              std::size_t parameter_bytes) override;

  struct Loaded;

 private:
  Loaded* loaded_;
  void* stream_;
  bool pushed_;
};

}  // namespace mla_pass::cuda
