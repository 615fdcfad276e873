// Greedy generation with a converted model from C++; every cache tensor is one buffer, written in place.
//
//     c++ -std=c++17 -O2 -I ORT/include examples/generate.cc -L ORT/lib -lonnxruntime -o generate    # 1.17 or newer
//     ./generate latent/ 20 504 3575 282 4649 314    # the folder, how many tokens to add, the prompt's token ids
//
// `mla-pass convert model/ latent/ --bundle` lays the op library beside the model; without it the model runs on stock
// operators. The cache is of the default kind (`--cache shared`). Token ids go in and come out, one a line.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

int main(int count, char** words) try {
  if (count < 4) return std::puts("usage: generate FOLDER NEW_TOKENS TOKEN_ID..."), 2;
  const std::filesystem::path folder = words[1], library = folder / "libmla_pass.so";
  std::vector<std::int64_t> ids;
  for (int i = 3; i < count; ++i) ids.push_back(std::atoll(words[i]));
  const std::int64_t end = static_cast<std::int64_t>(ids.size()) + std::atoll(words[2]);

  Ort::Env env;
  Ort::SessionOptions options;
  if (std::filesystem::exists(library)) options.RegisterCustomOpsLibrary(library.c_str());
  Ort::Session session(env, (folder / "model.onnx").c_str(), options);
  Ort::IoBinding binding(session);
  Ort::AllocatorWithDefaultOptions allocator;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);

  // Output 0 is the logits. The inputs of rank 4 are the cache, [batch, 1, rows, width], in the order of the other
  // outputs; each is bound to both.
  const std::string logits_name = session.GetOutputNameAllocated(0, allocator).get();
  std::vector<Ort::Value> caches;
  for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
    const Ort::TypeInfo info = session.GetInputTypeInfo(i);
    std::vector<std::int64_t> shape = info.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 4) continue;
    shape = {1, 1, end, shape[3]};
    const auto type = info.GetTensorTypeAndShapeInfo().GetElementType();
    caches.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), type));
    binding.BindInput(session.GetInputNameAllocated(i, allocator).get(), caches.back());
    binding.BindOutput(session.GetOutputNameAllocated(caches.size(), allocator).get(), caches.back());
  }

  std::vector<std::int64_t> mask, position;
  const auto bind = [&](const char* name, std::int64_t* data, std::int64_t length) {
    const std::int64_t shape[] = {1, length};
    binding.BindInput(name, Ort::Value::CreateTensor(memory, data, static_cast<std::size_t>(length), shape, 2));
  };
  for (std::int64_t past = 0, total; (total = static_cast<std::int64_t>(ids.size())) < end; past = total) {
    // The whole prompt at first, then one token at a time.
    mask.resize(ids.size(), 1);
    while (static_cast<std::int64_t>(position.size()) < total) position.push_back(position.size());
    bind("input_ids", ids.data() + past, total - past);
    bind("position_ids", position.data() + past, total - past);
    bind("attention_mask", mask.data(), total);
    binding.BindOutput(logits_name.c_str(), memory);  // anew: its shape changes
    session.Run(Ort::RunOptions(), binding);
    const Ort::Value logits = std::move(binding.GetOutputValues().back());  // [1, total - past, vocabulary]
    const std::int64_t vocabulary = logits.GetTensorTypeAndShapeInfo().GetShape()[2];
    const float* last = logits.GetTensorData<float>() + (total - past - 1) * vocabulary;
    ids.push_back(std::max_element(last, last + vocabulary) - last);
    std::printf("%lld\n", static_cast<long long>(ids.back()));
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "generate: %s\n", error.what());
  return 1;
}
