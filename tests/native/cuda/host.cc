#include "host.h"

#include <cstring>
#include <memory>
#include <string>

#include "kernels.h"
#include "params.h"

namespace mla_pass::cuda {
namespace {

struct Entry {
  const char* name;
  int threads;
  std::size_t parameter_bytes;
  void (*run)(const void* parameters);
};

constexpr Entry kEntries[] = {
#define MLA_KERNEL(name, parameters, threads, call)                        \
  {#name, threads, sizeof(parameters), [](const void* given) {             \
     const parameters& p = *static_cast<const parameters*>(given);         \
     call;                                                                 \
   }},
#include "kernels.def"
#undef MLA_KERNEL
};

// Bounds that every device has, see the CUDA programming guide.
constexpr unsigned kMostAcross = 0x7fffffffu, kMostDeep = 65535u;

std::string text(Grid grid) {
  return "(" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")";
}

}  // namespace

const char* kernel_name(Kernel kernel) { return kEntries[static_cast<int>(kernel)].name; }

void CpuDevice::launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters,
                       std::size_t parameter_bytes) {
  const Entry& entry = kEntries[static_cast<int>(kernel)];
  const auto refuse = [&](const std::string& what) { throw shim::Fault(std::string(entry.name) + what); };
  if (parameter_bytes != entry.parameter_bytes) {
    refuse(" is given " + std::to_string(parameter_bytes) + " bytes of parameters; expected " +
           std::to_string(entry.parameter_bytes));
  }
  if (shared_bytes > shared_bytes_) {
    refuse(" asks for " + std::to_string(shared_bytes) + " bytes of shared memory; the device has " +
           std::to_string(shared_bytes_));
  }
  if (grid.x - 1 >= kMostAcross || grid.y - 1 >= kMostDeep || grid.z - 1 >= kMostDeep) {
    refuse(" is launched on a grid of " + text(grid) + " CTAs; expected 1 to 2147483647, 65535 and 65535");
  }
  // A copy of its own, as on a device: what runs over its end is found.
  const auto copy = std::make_unique<unsigned char[]>(parameter_bytes);
  std::memcpy(copy.get(), parameters, parameter_bytes);
  ++launches_;
  shim::launch(entry.name, grid, entry.threads, shared_bytes, [&] { entry.run(copy.get()); }, options_);
}

}  // namespace mla_pass::cuda
