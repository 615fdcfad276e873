#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "../contract.h"
#include "image.h"
#include "params.h"

namespace mla_pass::cuda {
namespace {

// ---- the part of the driver's interface that is used, written from its binary interface: builds need no header of it

using Result = int;
using Handle = void*;

enum Attribute : int {
  kProcessors = 16,
  kCacheBytes = 38,
  kMajor = 75,
  kMinor = 76,
  kSharedBytes = 97,  // of a CTA, where it opts in
};
constexpr int kMaxDynamicSharedBytes = 8;  // an attribute of a function
constexpr int kFreeSharedBytes = 48 << 10;  // what needs no opting in

constexpr Result kNoBinaryForDevice = 209, kUnsupportedPtx = 222;
constexpr int kLeastMajor = 8;

// Every function by its name in libcuda.
#define MLA_CUDA_FUNCTIONS(X)                                                                                      \
  X(cuGetErrorName, (Result, const char**))                                                                        \
  X(cuInit, (unsigned))                                                                                            \
  X(cuDriverGetVersion, (int*))                                                                                    \
  X(cuDeviceGetCount, (int*))                                                                                      \
  X(cuDeviceGet, (int*, int))                                                                                      \
  X(cuDeviceGetName, (char*, int, int))                                                                            \
  X(cuDeviceGetAttribute, (int*, int, int))                                                                        \
  X(cuDevicePrimaryCtxRetain, (Handle*, int))                                                                      \
  X(cuCtxGetCurrent, (Handle*))                                                                                    \
  X(cuCtxGetDevice, (int*))                                                                                        \
  X(cuCtxPushCurrent_v2, (Handle))                                                                                 \
  X(cuCtxPopCurrent_v2, (Handle*))                                                                                 \
  X(cuModuleLoadData, (Handle*, const void*))                                                                      \
  X(cuModuleGetFunction, (Handle*, Handle, const char*))                                                           \
  X(cuFuncSetAttribute, (Handle, int, int))                                                                        \
  X(cuLaunchKernel, (Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**, \
                     void**))

struct Driver {
#define MLA_CUDA_FUNCTION(name, parameters) Result(*name) parameters;
  MLA_CUDA_FUNCTIONS(MLA_CUDA_FUNCTION)
#undef MLA_CUDA_FUNCTION

  Driver();
};

std::string told(const Driver& driver, Result result) {
  const char* name = nullptr;
  if (driver.cuGetErrorName(result, &name) != 0 || name == nullptr) name = "an error without a name";
  return std::string(name) + " (" + std::to_string(result) + ")";
}

[[noreturn]] void fail(const Driver& driver, const char* function, Result result, const std::string& doing = "") {
  throw std::runtime_error(std::string("the CUDA driver's ") + function + " failed with " + told(driver, result) +
                           doing);
}

// Calls a function of the driver by name.
#define MLA_CUDA(driver, function, ...)                                                        \
  do {                                                                                         \
    if (const Result result = (driver).function(__VA_ARGS__)) fail(driver, #function, result); \
  } while (false)

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Unsupported(std::string("no CUDA driver is found (") + dlerror() +
                      "); expected libcuda.so.1, which NVIDIA's driver brings");
  }
#define MLA_CUDA_FUNCTION(name, parameters)                                                       \
  name = reinterpret_cast<Result(*) parameters>(dlsym(library, #name));                           \
  if (name == nullptr) {                                                                          \
    throw Unsupported("the CUDA driver has no function " #name "; expected one that serves CUDA " \
                      "11 or newer: install a newer driver");                                     \
  }
  MLA_CUDA_FUNCTIONS(MLA_CUDA_FUNCTION)
#undef MLA_CUDA_FUNCTION
  if (const Result result = cuInit(0)) {
    throw Unsupported("the CUDA driver does not start: cuInit gave " + told(*this, result) +
                      "; expected a device that this process may use");
  }
}

// Made by the first who needs it; one that fails is tried again.
const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

// ---- devices

int attribute(const Driver& driver, Attribute which, int handle) {
  int value = 0;
  MLA_CUDA(driver, cuDeviceGetAttribute, &value, which, handle);
  return value;
}

int handle_of(const Driver& driver, int ordinal) {
  int handle = 0, count = 0;
  MLA_CUDA(driver, cuDeviceGetCount, &count);
  if (ordinal < 0 || ordinal >= count) {
    throw Refused("CUDA device " + std::to_string(ordinal) + " does not exist; expected one of the " +
                  std::to_string(count) + " that the driver has, from 0");
  }
  MLA_CUDA(driver, cuDeviceGet, &handle, ordinal);
  return handle;
}

std::string name_of(const Driver& driver, int handle) {
  char name[256] = "";
  MLA_CUDA(driver, cuDeviceGetName, name, sizeof name, handle);
  return name;
}

struct Card {
  int handle;
  Device device;
  Handle primary;  // its primary context, once somebody needed it
};

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// ---- kernels

Image present_image() {
  const Image kernels = image();
  if (kernels.bytes > 0) return kernels;
  throw Unsupported("the op library was built without CUDA kernels; expected nvcc where it is built: install CUDA's "
                    "compiler and install mla_pass again");
}

struct Entry {
  const char* name;
  unsigned threads;
  std::size_t parameter_bytes;
};

constexpr Entry kEntries[] = {
#define MLA_KERNEL(name, parameters, threads, call) {#name, threads, sizeof(parameters)},
#include "kernels.def"
#undef MLA_KERNEL
};
constexpr std::size_t kKernels = static_cast<std::size_t>(Kernel::count);

}  // namespace

// The kernels in one context.
struct Cuda::Loaded {
  Handle function[kKernels];
  std::atomic<int> shared_bytes[kKernels];  // the most dynamic shared memory that was asked for so far
  std::mutex raising;
};

namespace {

// What was found and loaded in this process. Contexts are known by their address and are never let go, as nobody lets
// a primary context go that others use.
struct State {
  std::mutex mutex;
  std::map<int, Card> cards;
  std::map<Handle, std::unique_ptr<Cuda::Loaded>> loaded;
};

State& state() {
  static State* const all = new State;  // threads may still launch while the process exits
  return *all;
}

// With the state's mutex held.
Card& card_of(const Driver& driver, int ordinal) {
  std::map<int, Card>& cards = state().cards;
  if (const auto known = cards.find(ordinal); known != cards.end()) return known->second;
  Card card{};
  card.handle = handle_of(driver, ordinal);
  card.device.major = attribute(driver, kMajor, card.handle);
  card.device.minor = attribute(driver, kMinor, card.handle);
  card.device.processors = attribute(driver, kProcessors, card.handle);
  card.device.shared_bytes = attribute(driver, kSharedBytes, card.handle);
  card.device.cache_bytes = static_cast<std::size_t>(attribute(driver, kCacheBytes, card.handle));
  if (card.device.major < kLeastMajor) {
    throw Unsupported("CUDA device " + std::to_string(ordinal) + " (" + name_of(driver, card.handle) +
                      ") has compute capability " + std::to_string(card.device.major) + "." +
                      std::to_string(card.device.minor) + "; expected 8.0 or newer");
  }
  return cards.emplace(ordinal, card).first->second;
}

Handle load_module(const Driver& driver, int ordinal, const Card& card) {
  const Image kernels = present_image();
  Handle module = nullptr;
  const Result result = driver.cuModuleLoadData(&module, kernels.data);
  if (result == kNoBinaryForDevice || result == kUnsupportedPtx) {
    int version = 0;
    MLA_CUDA(driver, cuDriverGetVersion, &version);
    throw Unsupported(std::string("the CUDA kernels, built by CUDA ") + kernels.toolkit + " for compute capability " +
                      kernels.capabilities + ", do not load on device " + std::to_string(ordinal) + " (" +
                      name_of(driver, card.handle) + ", " + std::to_string(card.device.major) + "." +
                      std::to_string(card.device.minor) + ") with a driver of CUDA " + version_text(version) + ": " +
                      told(driver, result) + "; expected a driver at least as new as the compiler: install one, or " +
                      "build mla_pass with an older nvcc");
  }
  if (result != 0) fail(driver, "cuModuleLoadData", result, ", loading the kernels of LatentAttention");
  return module;
}

// All functions at once, so that none is left to be loaded while a graph is captured.
std::unique_ptr<Cuda::Loaded> load(const Driver& driver, int ordinal, const Card& card) {
  const Handle module = load_module(driver, ordinal, card);
  auto loaded = std::make_unique<Cuda::Loaded>();
  for (std::size_t i = 0; i < kKernels; ++i) {
    MLA_CUDA(driver, cuModuleGetFunction, &loaded->function[i], module, kEntries[i].name);
    loaded->shared_bytes[i] = kFreeSharedBytes;
  }
  return loaded;
}

// Makes a context of the device current; whether it has to be taken back.
bool enter(const Driver& driver, Card& card) {
  Handle current = nullptr;
  MLA_CUDA(driver, cuCtxGetCurrent, &current);
  if (current != nullptr) {
    int handle = 0;
    MLA_CUDA(driver, cuCtxGetDevice, &handle);
    if (handle == card.handle) return false;
  }
  if (card.primary == nullptr) MLA_CUDA(driver, cuDevicePrimaryCtxRetain, &card.primary, card.handle);
  MLA_CUDA(driver, cuCtxPushCurrent_v2, card.primary);
  return true;
}

void leave(const Driver& driver) {
  Handle left = nullptr;
  driver.cuCtxPopCurrent_v2(&left);  // nobody could be told
}

}  // namespace

int driver_version() {
  int version = 0;
  MLA_CUDA(driver(), cuDriverGetVersion, &version);
  return version;
}

int device_count() {
  int count = 0;
  MLA_CUDA(driver(), cuDeviceGetCount, &count);
  return count;
}

std::string device_name(int ordinal) { return name_of(driver(), handle_of(driver(), ordinal)); }

const Device& device(int ordinal) {
  present_image();
  const Driver& all = driver();
  const std::lock_guard<std::mutex> lock(state().mutex);
  return card_of(all, ordinal).device;
}

Cuda::Cuda(int ordinal, void* stream) : loaded_(nullptr), stream_(stream), pushed_(false) {
  const Driver& all = driver();
  const std::lock_guard<std::mutex> lock(state().mutex);
  Card& card = card_of(all, ordinal);
  pushed_ = enter(all, card);
  try {
    Handle context = nullptr;
    MLA_CUDA(all, cuCtxGetCurrent, &context);
    std::unique_ptr<Loaded>& loaded = state().loaded[context];
    if (loaded == nullptr) loaded = load(all, ordinal, card);
    loaded_ = loaded.get();
  } catch (const std::exception&) {
    if (pushed_) leave(all);
    throw;
  }
}

Cuda::~Cuda() {
  if (pushed_) leave(driver());
}

void Cuda::launch(Kernel kernel, Grid grid, std::size_t shared_bytes, const void* parameters,
                  std::size_t parameter_bytes) {
  const Driver& all = driver();
  const auto at = static_cast<std::size_t>(kernel);
  const Entry& entry = kEntries[at];
  if (parameter_bytes != entry.parameter_bytes) {
    throw std::logic_error(std::string("CUDA kernel ") + entry.name + " was given " + std::to_string(parameter_bytes) +
                           " bytes of parameters; expected " + std::to_string(entry.parameter_bytes));
  }
  const int wanted = static_cast<int>(shared_bytes);
  if (wanted > loaded_->shared_bytes[at].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(loaded_->raising);
    if (wanted > loaded_->shared_bytes[at].load(std::memory_order_relaxed)) {
      MLA_CUDA(all, cuFuncSetAttribute, loaded_->function[at], kMaxDynamicSharedBytes, wanted);
      loaded_->shared_bytes[at].store(wanted, std::memory_order_release);
    }
  }
  void* arguments[] = {const_cast<void*>(parameters)};
  const Result result = all.cuLaunchKernel(loaded_->function[at], grid.x, grid.y, grid.z, entry.threads, 1, 1,
                                           static_cast<unsigned>(shared_bytes), stream_, arguments, nullptr);
  if (result != 0) fail(all, "cuLaunchKernel", result, std::string(", launching ") + entry.name);
}

}  // namespace mla_pass::cuda
