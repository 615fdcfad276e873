// A libcuda for machines without a device: keeps contexts, modules and the limits of a launch as the CUDA driver does,
// and writes every call into a journal, one JSON object a line.
//
// Environment: FAKE_CUDA_JOURNAL, the file; FAKE_CUDA_FAIL, what fails and how, e.g. "cuInit=100 cuLaunchKernel=1";
// FAKE_CUDA_CAPABILITY, of its two devices, e.g. "9.0". Built with FAKE_CUDA_OLD it lacks a function.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "launch.h"
#include "params.h"
#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

// Of fake_cuda_runs.cc, where that is linked.
__attribute__((weak)) void carry_out(mla_pass::cuda::Kernel kernel, mla_pass::cuda::Grid grid, unsigned shared_bytes,
                                     const void* parameters);

namespace {

using namespace mla_pass::cuda;

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500;
constexpr int kDevices = 2, kShared = 163 << 10, kFreeShared = 48 << 10;

// ---- the journal

// A line of it: members are added one by one.
class Line {
 public:
  explicit Line(const char* call) { add("call", std::string(call)); }
  Line& add(const char* name, const std::string& value) { return raw(name, '"' + value + '"'); }
  Line& add(const char* name, std::int64_t value) { return raw(name, std::to_string(value)); }
  Line& add(const char* name, const void* value) {
    return raw(name, std::to_string(reinterpret_cast<std::uintptr_t>(value)));
  }
  Line& raw(const char* name, const std::string& json) {
    text_ += (text_.empty() ? "\"" : ", \"") + std::string(name) + "\": " + json;
    return *this;
  }
  std::string object() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

std::recursive_mutex mutex;

void write(const Line& line) {
  const char* path = std::getenv("FAKE_CUDA_JOURNAL");
  if (path == nullptr) return;
  std::FILE* file = std::fopen(path, "a");
  if (file == nullptr) std::abort();
  std::fprintf(file, "%s\n", line.object().c_str());
  std::fclose(file);
}

// What FAKE_CUDA_FAIL says of a function; 0: nothing.
int failure_of(const char* function) {
  const char* all = std::getenv("FAKE_CUDA_FAIL");
  std::istringstream words(all == nullptr ? "" : all);
  const std::string start = std::string(function) + "=";
  for (std::string word; words >> word;) {
    if (word.compare(0, start.size(), start) == 0) return std::stoi(word.substr(start.size()));
  }
  return kSuccess;
}

// Every function begins by this.
#define FAKE_CALL(line)                                        \
  const std::lock_guard<std::recursive_mutex> lock(mutex);     \
  write(line);                                                 \
  if (const int failure = failure_of(__func__)) return failure

// ---- contexts, modules, functions

struct Context {
  int device;
};

struct Module {
  const Context* context;
};

struct Function {
  const Module* module;
  Kernel kernel;
  int shared_bytes = kFreeShared;
};

Context primary[kDevices] = {{0}, {1}};
thread_local std::vector<Context*> current;

struct Entry {
  const char* name;
  unsigned threads;
  std::string (*describe)(const void* parameters);
};

// ---- parameters: what tells whether pointers and strides got where they belong

std::string part_of(const Part& part) {
  return Line("part").add("data", part.data).add("numbers", part.numbers).add("bytes", part.bytes)
      .add("as", static_cast<int>(part.as)).object();
}

template <class P>
std::string parts_of(const P& p) {
  return "[" + part_of(p.part[0]) + ", " + part_of(p.part[1]) + "]";
}

std::string describe(const Setup& p) {
  return Line("Setup").add("total", p.total).add("padding_mask", p.padding_mask).add("position_ids", p.position_ids)
      .add("position_step", p.position_step).add("bound", p.bound).add("exact", p.exact).add("span", p.span)
      .add("cos", p.tables.cos).add("sin", p.tables.sin).object();
}
std::string describe(const Append& p) {
  return Line("Append").add("row", p.row).add("capacity", p.capacity).add("span", p.span).raw("part", parts_of(p))
      .object();
}
std::string describe(const Carry& p) {
  return Line("Carry").add("past", p.past).add("present", p.present).add("rows", p.rows).add("capacity", p.capacity)
      .add("bytes", p.bytes).object();
}
std::string describe(const Attend& p) {
  return Line("Attend").add("varying", p.varying).add("span", p.span).add("sum", p.sum).add("parts", p.parts)
      .add("capacity", p.capacity).add("begin", p.begin).add("end", p.end).add("splits", p.splits)
      .raw("part", parts_of(p)).object();
}
std::string describe(const Combine& p) {
  return Line("Combine").add("sum", p.sum).add("span", p.span).add("out", p.out).object();
}
std::string describe(const Map& p) {
  return Line("Map").add("query", p.query).add("query_map", p.query_map).add("dims", p.dims).object();
}
std::string describe(const Fix& p) { return Line("Fix").add("dims", p.dims).add("out", p.out).object(); }
std::string describe(const Absorb& p) {
  return Line("Absorb").add("dims", p.dims).add("key_up", p.key_up).add("key_mean", p.key_mean)
      .add("varying", p.varying).object();
}
std::string describe(const Expand& p) {
  return Line("Expand").add("key_up", p.key_up).add("value_up", p.value_up).add("out", p.out)
      .raw("part", parts_of(p)).object();
}
std::string describe(const Decode& p) {
  return Line("Decode").add("joined", p.joined).add("value_up", p.value_up).add("context", p.context).object();
}

constexpr Entry kEntries[] = {
#define MLA_KERNEL(name, parameters, threads, call) \
  {#name, threads, [](const void* given) { return describe(*static_cast<const parameters*>(given)); }},
#include "kernels.def"
#undef MLA_KERNEL
};

}  // namespace

FAKE_EXPORT int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names = {
      {1, "CUDA_ERROR_INVALID_VALUE"},   {2, "CUDA_ERROR_OUT_OF_MEMORY"},          {100, "CUDA_ERROR_NO_DEVICE"},
      {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
      {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {400, "CUDA_ERROR_INVALID_HANDLE"},
      {500, "CUDA_ERROR_NOT_FOUND"},     {719, "CUDA_ERROR_LAUNCH_FAILED"},
  };
  const auto found = names.find(error);
  if (found == names.end()) return kInvalidValue;
  *name = found->second;
  return kSuccess;
}

FAKE_EXPORT int cuInit(unsigned flags) {
  FAKE_CALL(Line("cuInit").add("flags", flags));
  return kSuccess;
}

FAKE_EXPORT int cuDriverGetVersion(int* version) {
  *version = 12080;
  return kSuccess;
}

FAKE_EXPORT int cuDeviceGetCount(int* count) {
  *count = kDevices;
  return kSuccess;
}

FAKE_EXPORT int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidValue;
  *device = 10 + ordinal;  // handles are not numbers of devices
  return kSuccess;
}

FAKE_EXPORT int cuDeviceGetName(char* name, int room, int device) {
  std::snprintf(name, static_cast<std::size_t>(room), "Fake %d", device - 10);
  return kSuccess;
}

FAKE_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  FAKE_CALL(Line("cuDeviceGetAttribute").add("attribute", attribute).add("device", device));
  const char* capability = std::getenv("FAKE_CUDA_CAPABILITY");
  if (capability == nullptr) capability = "8.0";
  const std::map<int, int> values = {{16, 108}, {38, 40 << 20}, {75, capability[0] - '0'}, {76, capability[2] - '0'},
                                     {97, kShared}};
  const auto found = values.find(attribute);
  if (found == values.end()) return kInvalidValue;
  *value = found->second;
  return kSuccess;
}

FAKE_EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  FAKE_CALL(Line("cuDevicePrimaryCtxRetain").add("device", device));
  *context = &primary[device - 10];
  return kSuccess;
}

FAKE_EXPORT int cuCtxGetCurrent(void** context) {
  *context = current.empty() ? nullptr : current.back();
  return kSuccess;
}

FAKE_EXPORT int cuCtxGetDevice(int* device) {
  if (current.empty()) return kInvalidContext;
  *device = 10 + current.back()->device;
  return kSuccess;
}

FAKE_EXPORT int cuCtxPushCurrent_v2(void* context) {
  FAKE_CALL(Line("cuCtxPushCurrent_v2").add("context", context));
  current.push_back(static_cast<Context*>(context));
  return kSuccess;
}

FAKE_EXPORT int cuCtxPopCurrent_v2(void** context) {
  FAKE_CALL(Line("cuCtxPopCurrent_v2"));
  if (current.empty()) return kInvalidContext;
  *context = current.back();
  current.pop_back();
  return kSuccess;
}

// Of the tests: another context of a device, current from now on.
FAKE_EXPORT int fake_cuda_enter(int ordinal) {
  current.push_back(new Context{ordinal});
  return kSuccess;
}

FAKE_EXPORT int cuModuleLoadData(void** module, const void* image) {
  std::uint32_t magic = 0;
  std::memcpy(&magic, image, sizeof magic);
  FAKE_CALL(Line("cuModuleLoadData").add("magic", magic).add("device", current.empty() ? -1 : current.back()->device));
  if (current.empty()) return kInvalidContext;
  *module = new Module{current.back()};
  return kSuccess;
}

FAKE_EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  FAKE_CALL(Line("cuModuleGetFunction").add("name", std::string(name)));
  for (int i = 0; i < static_cast<int>(Kernel::count); ++i) {
    if (std::strcmp(kEntries[i].name, name) != 0) continue;
    *function = new Function{static_cast<Module*>(module), static_cast<Kernel>(i)};
    return kSuccess;
  }
  return kNotFound;
}

FAKE_EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  auto& mine = *static_cast<Function*>(function);
  FAKE_CALL(Line("cuFuncSetAttribute").add("name", std::string(kEntries[static_cast<int>(mine.kernel)].name))
                .add("attribute", attribute).add("value", value));
  if (attribute != 8 || value > kShared) return kInvalidValue;
  mine.shared_bytes = value;
  return kSuccess;
}

#ifndef FAKE_CUDA_OLD
FAKE_EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads,
                               unsigned threads_y, unsigned threads_z, unsigned shared_bytes, void* stream,
                               void** parameters, void** extra) {
  const auto& mine = *static_cast<Function*>(function);
  const Entry& entry = kEntries[static_cast<int>(mine.kernel)];
  FAKE_CALL(Line("cuLaunchKernel").add("name", std::string(entry.name))
                .raw("grid", "[" + std::to_string(grid_x) + ", " + std::to_string(grid_y) + ", " +
                                 std::to_string(grid_z) + "]")
                .add("threads", threads).add("shared_bytes", shared_bytes).add("stream", stream)
                .add("device", current.empty() ? -1 : current.back()->device)
                .raw("parameters", entry.describe(parameters[0])));
  if (current.empty() || mine.module->context != current.back()) return kInvalidHandle;
  const bool flat = threads_y == 1 && threads_z == 1 && threads == entry.threads && extra == nullptr;
  if (!flat || shared_bytes > static_cast<unsigned>(mine.shared_bytes)) return kInvalidValue;
  if (carry_out != nullptr) carry_out(mine.kernel, {grid_x, grid_y, grid_z}, shared_bytes, parameters[0]);
  return kSuccess;
}
#endif
