// What CpuDevice refuses to launch, and that it launches the rest. Tells what differs; the status is 1 then.
#include <cstdio>
#include <string>
#include <vector>

#include "host.h"
#include "params.h"

namespace mla_pass::cuda {
namespace {

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

struct Copied {
  std::vector<unsigned char> past, present;
  Carry parameters;
};

Copied make() {
  constexpr int kBatch = 2, kRows = 5, kCapacity = 7, kBytes = 48;
  Copied c;
  for (int i = 0; i < kBatch * kRows * kBytes; ++i) c.past.push_back(static_cast<unsigned char>(i * 7));
  c.present.assign(kBatch * kCapacity * kBytes, 0);
  c.parameters = {c.past.data(), c.present.data(), kBatch, kRows, kCapacity, kBytes};
  return c;
}

void check_launch() {
  Copied c = make();
  CpuDevice device;
  // As many CTAs as there could be work for, however the kernel shares it out.
  const Grid grid = {64, static_cast<unsigned>(c.parameters.batch), 1};
  device.launch(Kernel::carry, grid, 0, &c.parameters, sizeof c.parameters);
  const int kept = c.parameters.rows * c.parameters.bytes, step = c.parameters.capacity * c.parameters.bytes;
  for (int b = 0; b < c.parameters.batch; ++b) {
    for (int i = 0; i < step; ++i) {
      const int got = c.present[static_cast<std::size_t>(b * step + i)];
      const int want = i < kept ? c.past[static_cast<std::size_t>(b * kept + i)] : 0;
      expect(got == want, "carry: byte " + std::to_string(i) + " of sequence " + std::to_string(b) + " is " +
                              std::to_string(got) + ", expected " + std::to_string(want));
    }
  }
  expect(device.launches() == 1, "a launch is not counted");
  expect(std::string(kernel_name(Kernel::carry)) == "carry", "the name of carry");
}

void expect_refused(Grid grid, std::size_t shared_bytes, std::size_t parameter_bytes, const std::string& said) {
  Copied c = make();
  CpuDevice device({}, 4096);
  std::string got;
  try {
    device.launch(Kernel::carry, grid, shared_bytes, &c.parameters, parameter_bytes);
  } catch (const shim::Fault& fault) {
    got = fault.what();
  }
  expect(got.find(said) != std::string::npos, "expected a refusal with '" + said + "', got '" + got + "'");
  expect(device.launches() == 0, "a refused launch is counted");
}

int run() {
  check_launch();
  expect_refused({1, 1, 1}, 0, sizeof(Carry) - 1, "carry is given");
  expect_refused({1, 1, 1}, 4097, sizeof(Carry), "carry asks for 4097 bytes of shared memory; the device has 4096");
  expect_refused({0, 1, 1}, 0, sizeof(Carry), "carry is launched on a grid of (0, 1, 1)");
  expect_refused({1, 65536, 1}, 0, sizeof(Carry), "carry is launched on a grid of (1, 65536, 1)");
  expect_refused({1, 1, 65536}, 0, sizeof(Carry), "carry is launched on a grid of (1, 1, 65536)");
  expect_refused({0x80000000u, 1, 1}, 0, sizeof(Carry), "carry is launched on a grid of (2147483648, 1, 1)");
  std::printf("%d failures\n", failures);
  return failures > 0 ? 1 : 0;
}

}  // namespace
}  // namespace mla_pass::cuda

int main() { return mla_pass::cuda::run(); }
