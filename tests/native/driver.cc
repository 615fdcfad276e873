// The kernels without ONNX Runtime, to run under sanitizers: random nodes against a plain float64 attention, the
// library's own threads, buffers that end where the tensors end, and random bad input that must be refused.
//
//   mla_pass_driver [seconds] [seed]
#include <atomic>
#include <chrono>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <thread>

#include "attention.h"
#include "entry.h"
#include "isa.h"
#include "pool.h"
#include "scratch.h"

#define MLA_PASS_ISA scalar
#include "vec_scalar.h"

// Every allocation of the process is counted: a step of a size seen before must not make one.
static std::atomic<long> allocations{0};

void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, std::align_val_t align) {
  ++allocations;
  const auto to = static_cast<std::size_t>(align);
  if (void* p = std::aligned_alloc(to, (size + to - 1) / to * to)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

using namespace mla_pass;
using Complex = std::complex<double>;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "FAILED: %s\n", message.c_str());
  std::exit(1);
}

struct Random {
  std::mt19937_64 engine;
  Index below(Index n) { return static_cast<Index>(engine() % static_cast<std::uint64_t>(n)); }
  bool chance(double p) { return std::uniform_real_distribution<double>()(engine) < p; }
  double normal() { return std::normal_distribution<double>()(engine); }
  double uniform(double a, double b) { return std::uniform_real_distribution<double>(a, b)(engine); }
  Index pick(std::initializer_list<Index> of) { return *(of.begin() + below(static_cast<Index>(of.size()))); }
};

// A tensor in memory of exactly its size, so that AddressSanitizer sees one element too many.
struct Buffer {
  std::unique_ptr<std::byte[]> data;
  std::size_t count = 0;

  template <class T>
  void fill(const std::vector<double>& values) {
    count = values.size();
    data.reset(new std::byte[count * sizeof(T)]);
    for (std::size_t i = 0; i < count; ++i) {
      T x;
      if constexpr (std::is_integral_v<T>) {
        x = static_cast<T>(values[i]);
      } else if constexpr (std::is_same_v<T, Float8>) {  // given as its bits
        x.bits = static_cast<std::uint8_t>(values[i]);
      } else {
        scalar::narrow(static_cast<float>(values[i]), &x);
      }
      std::memcpy(data.get() + i * sizeof(T), &x, sizeof x);
    }
  }
};

template <class T>
double at(const void* data, Index i) {
  T x;
  std::memcpy(&x, static_cast<const std::byte*>(data) + static_cast<std::size_t>(i) * sizeof(T), sizeof x);
  return static_cast<double>(scalar::to_float(x));
}

template <class T>
constexpr Type number_of() {
  if constexpr (std::is_same_v<T, std::int64_t>) return Type::int64;
  else if constexpr (std::is_same_v<T, std::int8_t>) return Type::int8;
  else if constexpr (std::is_same_v<T, Float8>) return Type::uint8;
  else return type_of<T>();
}

// Calls work with a value of the type that a cache is stored as.
template <class Work>
auto with_type(Type type, const Work& work) {
  switch (type) {
    case Type::float16:
      return work(Half{});
    case Type::bfloat16:
      return work(Bfloat{});
    case Type::int8:
      return work(std::int8_t{});
    case Type::uint8:
      return work(Float8{});
    default:
      return work(float{});
  }
}

// A random node with its inputs, outputs and, in plain loops, what they mean.
template <class T>
struct Node {
  Attributes a{};
  Inputs in{};
  Buffer buffer[kInputs], context, present[2];
  Index batch, fresh, total, capacity, angles;
  Type stored[2];  // of the two parts of a row

  explicit Node(Random& random) {
    a.kv_groups = random.pick({1, 2, 3});
    a.num_heads = a.kv_groups * random.pick({1, 2, 5, 33});
    a.rank = random.pick({16, 32, 7, 22});
    a.key_rank = 1 + random.below(a.rank);
    a.value_offset = random.below(a.rank);
    a.rope_dim = 2 * random.below(6);
    a.split = random.chance(0.6) ? a.rank : random.below(a.rank + a.rope_dim + 1);
    a.causal = random.chance(0.8);
    a.shared_buffer = random.chance(0.6);
    a.local_window_size = random.pick({-1, -1, 1, 9, 90});
    a.softcap = random.chance(0.3) ? 2.0f : 0.0f;
    batch = 1 + random.below(3);
    fresh = random.pick({1, 1, 1, 2, 7, 40});
    const Index past = random.pick({0, 1, 30, 63, 64, 100, 600});
    total = past + fresh;
    capacity = a.shared_buffer ? total + random.below(4) : past;
    const bool key_up = random.chance(0.75), query_map = random.chance(0.5), value_up = random.chance(0.6);
    draw_bands(random, key_up);
    const Index width = a.nope_dim + a.rope_dim, head = query_map ? 1 + random.below(12) : width;
    const Index w = a.rank - a.value_offset;
    a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width + 1)));
    give(kQuery, random, {batch, fresh, a.num_heads * head});
    give(kRow, random, {batch, fresh, a.rank + a.rope_dim});
    for (Type& type : stored) {
      type = static_cast<Type>(random.pick({static_cast<Index>(type_of<T>()), static_cast<Index>(Type::float16),
                                            static_cast<Index>(Type::bfloat16), static_cast<Index>(Type::int8),
                                            static_cast<Index>(Type::uint8)}));
    }
    give_cache(kPastLatent, random, stored[0], numbers(0));
    give_cache(kPastRope, random, stored[1], numbers(1));
    give_tables(random);
    if (random.chance(0.5)) give_mask(random);
    if (random.chance(0.3)) {
      give(kAttentionBias, random,
           {random.chance(0.5) ? 1 : batch, random.chance(0.5) ? 1 : a.num_heads, fresh, total});
    }
    if (query_map) give(kQueryMap, random, {a.kv_groups, head, width});
    if (key_up) {
      give_key_up(random);
      give(kKeyMean, random, {a.kv_groups, a.nope_dim});
    }
    if (value_up) give(kValueUp, random, {a.kv_groups, w, 1 + random.below(17)});
  }

  void draw_bands(Random& random, bool key_up) {
    a.nope_dim = a.key_rank;
    angles = a.rope_dim / 2 + 12;
    for (Index i = 0; i < a.rope_dim / 2; ++i) a.rope_index.push_back(random.below(angles));
    if (!key_up) return;
    Index block = random.pick({1, 4, 16});
    const bool follows = random.chance(0.6);
    for (Index level = random.below(4); level > 0; --level, block *= random.pick({2, 4})) {
      for (Index i = 1 + random.below(3); i > 0; --i) {
        a.band_index.push_back(random.below(angles));
        a.band_block.push_back(block);
        a.band_a0.push_back(static_cast<float>(random.uniform(-1, 1)));
        a.band_a1.push_back(follows ? static_cast<float>(random.uniform(-1, 1) / static_cast<double>(block)) : 0.0f);
      }
    }
    a.nope_dim = 2 * static_cast<Index>(a.band_index.size()) + random.below(5);
  }

  template <class U = T>
  void put(Input input, const std::vector<double>& values, std::initializer_list<Index> dims) {
    buffer[input].template fill<U>(values);
    Tensor& tensor = in[input];
    tensor.given = true;
    tensor.data = buffer[input].data.get();
    tensor.rank = 0;
    for (const Index dim : dims) tensor.dims[static_cast<std::size_t>(tensor.rank++)] = dim;
    tensor.type = static_cast<int>(number_of<U>());
  }

  // Numbers of about 0.5, or those of eight bits and the codes of steps that make them such.
  void give_cache(Input input, Random& random, Type type, Index numbers) {
    const Index width = stored_width(numbers, type);
    std::vector<double> values(static_cast<std::size_t>(batch * capacity * width));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const bool code = static_cast<Index>(i) % width >= numbers;
      const double sign = random.below(2) == 0 ? 0 : 128;
      values[i] = code                  ? static_cast<double>(random.below(16) + (type == Type::int8 ? -60 : 56))
                  : type == Type::int8  ? static_cast<double>(random.below(255) - 127)
                  : type == Type::uint8 ? sign + static_cast<double>(random.below(127))
                                        : 0.5 * random.normal();
    }
    with_type(type, [&](auto x) { put<decltype(x)>(input, values, {batch, 1, capacity, width}); });
  }

  // Of a row, in one of the two tensors.
  Index numbers(int part) const { return part == 0 ? a.split : a.rank + a.rope_dim - a.split; }

  // A number of a present row, latents before the rope part.
  double number(Index row, Index column) const {
    const int part = column < a.split ? 0 : 1;
    const Index place = part == 0 ? column : column - a.split, count = numbers(part);
    const Index width = stored_width(count, stored[part]);
    const void* data = present[part].data.get();
    const double x = with_type(stored[part], [&](auto kind) { return at<decltype(kind)>(data, row * width + place); });
    if (width == count) return x;
    const Index code = row * width + count + place / ((count + 3) / 4);
    const auto* byte = static_cast<const std::uint8_t*>(data) + code;
    return x * std::exp2((stored[part] == Type::int8 ? at<std::int8_t>(data, code) : *byte - 128.0) / 8);
  }

  void give(Input input, Random& random, std::initializer_list<Index> dims) {
    Index count = 1;
    for (const Index dim : dims) count *= dim;
    std::vector<double> values(static_cast<std::size_t>(count));
    for (double& x : values) x = 0.5 * random.normal();
    put(input, values, dims);
  }

  // Half of the time the pairs of the finest blocks read few columns.
  void give_key_up(Random& random) {
    const auto pairs = static_cast<Index>(a.band_index.size());
    const bool staggered = random.chance(0.5);
    std::vector<double> values;
    for (Index row = 0; row < a.kv_groups * a.nope_dim; ++row) {
      const Index dim = row % a.nope_dim, pair = dim % std::max<Index>(pairs, 1);
      const bool few = staggered && dim < 2 * pairs;
      const Index last = few ? 2 * pair + row / a.nope_dim : a.key_rank;
      for (Index c = 0; c < a.key_rank; ++c) values.push_back(c > last ? 0 : 0.5 * random.normal());
    }
    put<T>(kKeyUp, values, {a.kv_groups, a.nope_dim, a.key_rank});
  }

  void give_tables(Random& random) {
    const Index rows = std::max<Index>(total, 2);
    std::vector<double> cos, sin, theta(static_cast<std::size_t>(angles));
    for (double& x : theta) x = random.uniform(0.001, 0.05);
    for (Index t = 0; t < rows; ++t) {
      for (const double x : theta) {
        cos.push_back(std::cos(x * static_cast<double>(t)));
        sin.push_back(std::sin(x * static_cast<double>(t)));
      }
    }
    put<float>(kCos, cos, {rows, angles});
    put<float>(kSin, sin, {rows, angles});
    const Index sequences = random.chance(0.5) ? 1 : batch;
    std::vector<double> positions(static_cast<std::size_t>(sequences * fresh));
    for (double& x : positions) x = static_cast<double>(random.below(rows));
    put<std::int64_t>(kPositionIds, positions, {sequences, fresh});
    put<std::int64_t>(kTotalLength, {static_cast<double>(total)}, {1});
  }

  void give_mask(Random& random) {
    std::vector<double> mask(static_cast<std::size_t>(batch * total), 1.0);
    for (Index b = 0; b < batch; ++b) {
      const Index pad = random.chance(0.1) ? total : random.below(total);
      std::fill_n(mask.begin() + b * total, pad, 0.0);
      if (random.chance(0.3)) mask[static_cast<std::size_t>(b * total + random.below(total))] = 0.0;
    }
    put<std::int64_t>(kPaddingMask, mask, {batch, total});
  }

  // ---- what it means

  double input(Input i, Index index) const { return at<T>(in[i].data, index); }
  Complex angle(Index row, Index column) const {
    const Index i = std::abs(row) * angles + column;
    const double s = at<float>(in[kSin].data, i);
    return {at<float>(in[kCos].data, i), row < 0 ? -s : s};
  }

  // One head's query after query_map.
  std::vector<double> query(Index b, Index s, Index h, Index head) const {
    const Index from = ((b * fresh + s) * a.num_heads + h) * head, width = a.nope_dim + a.rope_dim;
    std::vector<double> out(static_cast<std::size_t>(width));
    for (Index i = 0; i < width; ++i) {
      double& x = out[static_cast<std::size_t>(i)];
      if (!in[kQueryMap].given) {
        x = input(kQuery, from + i);
        continue;
      }
      const Index group = h / (a.num_heads / a.kv_groups);
      for (Index d = 0; d < head; ++d) x += input(kQuery, from + d) * input(kQueryMap, (group * head + d) * width + i);
    }
    return out;
  }

  double score(const std::vector<double>& q, const Sizes& size, Index b, Index s, Index h, Index t) const {
    const Index group = h / (a.num_heads / a.kv_groups), n = a.nope_dim, half = a.rope_dim / 2, row = total - fresh + s;
    const Index present_row = (b * size.capacity + t);
    const auto dim = [&](Index i) { return q[static_cast<std::size_t>(i)]; };
    std::vector<double> key(static_cast<std::size_t>(n));
    for (Index i = 0; i < n; ++i) {
      double& x = key[static_cast<std::size_t>(i)];
      if (!in[kKeyUp].given) {
        x = number(present_row, i);
        continue;
      }
      x = input(kKeyMean, group * n + i);
      for (Index c = 0; c < a.key_rank; ++c) {
        x += input(kKeyUp, (group * n + i) * a.key_rank + c) * number(present_row, c);
      }
    }
    double out = 0;
    const Index pairs = size.pairs;
    for (Index i = 0; i < pairs; ++i) {
      const auto pair = static_cast<std::size_t>(i);
      const double block = static_cast<double>(a.band_block[pair]), middle = (block - 1) / 2;
      const double first = std::floor(static_cast<double>(t) / block) * block, delta = static_cast<double>(t) - first - middle;
      const Complex one = angle(1, a.band_index[pair]);
      const double theta = std::arg(one);
      const Complex fit(a.band_a0[pair], a.band_a1[pair] * delta);
      const Complex ahead = angle(row - static_cast<Index>(first), a.band_index[pair]);
      const Complex turned = Complex(dim(i), dim(pairs + i)) * ahead;
      out += (std::conj(turned) * std::polar(1.0, theta * middle) * fit *
              Complex(key[pair], key[static_cast<std::size_t>(pairs + i)])).real();
    }
    for (Index i = 2 * pairs; i < n; ++i) out += dim(i) * key[static_cast<std::size_t>(i)];
    const Index sequence = in[kPositionIds].dims[0] == 1 ? 0 : b;
    const std::int64_t position = in[kPositionIds].template as<std::int64_t>()[sequence * fresh + s];
    for (Index i = 0; i < half; ++i) {
      const Complex turn = angle(position, a.rope_index[static_cast<std::size_t>(i)]);
      out += (std::conj(Complex(dim(n + i), dim(n + half + i)) * turn) *
              Complex(number(present_row, a.rank + i), number(present_row, a.rank + half + i)))
                 .real();
    }
    out *= a.scale;
    if (a.softcap > 0) out = a.softcap * std::tanh(out / a.softcap);
    if (in[kAttentionBias].given) {
      const Tensor& bias = in[kAttentionBias];
      const Index at_b = bias.dims[0] == 1 ? 0 : b, at_h = bias.dims[1] == 1 ? 0 : h;
      out += input(kAttentionBias, ((at_b * bias.dims[1] + at_h) * fresh + s) * total + t);
    }
    const bool hidden = (a.causal && t > row) || (a.local_window_size > 0 && row - t >= a.local_window_size) ||
                        (in[kPaddingMask].given && in[kPaddingMask].template as<std::int64_t>()[b * total + t] == 0);
    return hidden ? -INFINITY : out;
  }

  // What an instruction set may be off by: more where it rounds queries, maps and weights to bfloat16.
  double allowed(const Isa& isa, double tolerance) const {
    const auto narrow = [&](int part) { return stored[part] != Type::float32 && stored[part] != Type::float16; };
    const bool rounded = (a.split == 0 || narrow(0)) && (a.split >= a.rank || narrow(1));
    return isa.narrow == Meeting::bfloat16 && rounded ? tolerance + 5e-2 : tolerance;
  }

  // Largest error of the context of one random head of one random token.
  double error(const Sizes& size, Random& random) const {
    const Index b = random.below(batch), s = random.below(fresh), h = random.below(a.num_heads);
    const std::vector<double> q = query(b, s, h, size.query_dim);
    std::vector<double> weight(static_cast<std::size_t>(total));
    double top = -INFINITY, mass = 0;
    for (Index t = 0; t < total; ++t) top = std::max(top, weight[static_cast<std::size_t>(t)] = score(q, size, b, s, h, t));
    for (double& x : weight) mass += x = std::isinf(top) ? 0 : std::exp(x - top);
    const Index w = size.value_rank, group = h / (a.num_heads / a.kv_groups);
    std::vector<double> mixed(static_cast<std::size_t>(w));
    for (Index t = 0; t < total; ++t) {
      for (Index c = 0; c < w; ++c) {
        const double x = number(b * size.capacity + t, a.value_offset + c);
        mixed[static_cast<std::size_t>(c)] += mass > 0 ? weight[static_cast<std::size_t>(t)] * x / mass : 0;
      }
    }
    double worst = 0;
    for (Index i = 0; i < size.value_dim; ++i) {
      double want = in[kValueUp].given ? 0 : mixed[static_cast<std::size_t>(i)];
      for (Index c = 0; in[kValueUp].given && c < w; ++c) {
        want += mixed[static_cast<std::size_t>(c)] * input(kValueUp, (group * w + c) * size.value_dim + i);
      }
      const double got = at<T>(context.data.get(), ((b * fresh + s) * a.num_heads + h) * size.value_dim + i);
      const double off = std::abs(got - want) / (1 + std::abs(want));
      worst = off > worst || std::isnan(off) ? off : worst;
    }
    return worst;
  }
};

void run_here(void*, std::size_t count, void (*task)(void*, std::size_t), void* user) {
  for (std::size_t i = 0; i < count; ++i) task(user, i);
}

template <class T>
void check_node(Random& random, double tolerance) {
  Node<T> node(random);
  const Layout layout = checked(node.a);
  const Sizes size = checked(layout, node.in, type_of<T>());
  const auto sized = [](Buffer& buffer, Type type, Index count) {
    const double nothing = type == Type::int8 ? -128 : type == Type::uint8 ? 0x7f : NAN;
    const std::vector<double> unwritten(static_cast<std::size_t>(count), nothing);
    with_type(type, [&](auto x) { buffer.template fill<decltype(x)>(unwritten); });
  };
  sized(node.context, type_of<T>(), size.batch * size.fresh * size.heads * size.value_dim);
  for (int part = 0; part < 2; ++part) {
    sized(node.present[part], node.stored[part],
          size.batch * size.capacity * node.in[part == 0 ? kPastLatent : kPastRope].dims[3]);
  }
  const Outputs outputs = {node.context.data.get(), node.present[0].data.get(), node.present[1].data.get()};
  Index workers = random.pick({1, 2, 3});
  const Threads threads = own_threads(workers);
  for (Index i = 0; const Isa* isa = usable_isa(i); ++i) {
    for (const Form form : {Form::absorbed, Form::expanded, Form::counted}) {
      run<T>(layout, size, node.in, outputs, *isa, form, threads);
      const double error = node.error(size, random);
      if (!(error < node.allowed(*isa, tolerance))) {
        fail(std::string(isa->name) + " form " + std::to_string(static_cast<int>(form)) + ": error " +
             std::to_string(error));
      }
    }
  }
}

// A node through the C entry, its cache written in place: by several callers at once, who share the layout.
struct Caller {
  std::vector<MlaPassTensor> inputs;
  MlaPassTensor context;
  char message[256] = "";
  int failed = 0;

  template <class T>
  Caller(Node<T>& node, const Sizes& size) : context(given(node.context.data.get(), static_cast<int>(type_of<T>()))) {
    for (const Tensor& tensor : node.in) {
      inputs.push_back(given(const_cast<void*>(tensor.data), tensor.given ? tensor.type : 0));
      inputs.back().rank = static_cast<std::int32_t>(tensor.rank);
      std::copy(tensor.dims.begin(), tensor.dims.end(), inputs.back().dims);
    }
    context.rank = 3;
    context.dims[0] = size.batch;
    context.dims[1] = size.fresh;
    context.dims[2] = size.heads * size.value_dim;
  }

  static MlaPassTensor given(void* data, int type) { return {data, type, 0, {}}; }
  void call(void* layout) { failed = mla_pass_attend(layout, inputs.data(), &context, 3, message, sizeof message); }
};

// What it points to is `a`'s.
MlaPassAttributes as_entry(const Attributes& a) {
  const auto count = [](const auto& values) { return static_cast<std::int64_t>(values.size()); };
  const auto ints = [&](const auto& values) { return MlaPassInts{values.data(), count(values)}; };
  const auto floats = [&](const auto& values) { return MlaPassFloats{values.data(), count(values)}; };
  return {a.num_heads, a.kv_groups, a.rank, a.key_rank, a.value_offset, a.rope_dim, a.nope_dim, a.split,
          a.local_window_size, a.causal, a.shared_buffer, ints(a.rope_index), ints(a.band_index), ints(a.band_block),
          floats(a.band_a0), floats(a.band_a1), a.scale, a.softcap};
}

template <class T>
void check_entry(Random& random, double tolerance) {
  const Random before = random;
  constexpr int kCallers = 3;
  std::vector<Node<T>> nodes;
  for (int i = 0; i < kCallers; ++i) {
    random = before;  // the same node, in memory of its own
    nodes.emplace_back(random);
  }
  char message[256] = "";
  const MlaPassAttributes attributes = as_entry(nodes[0].a);
  void* layout = mla_pass_layout(&attributes, message, sizeof message);
  if ((layout != nullptr) != (nodes[0].a.shared_buffer != 0)) fail(std::string("a layout, or none: ") + message);
  if (layout == nullptr) return;
  const Sizes size = checked(checked(nodes[0].a), nodes[0].in, type_of<T>());
  std::vector<Caller> callers;
  std::vector<std::thread> threads;
  for (Node<T>& node : nodes) {
    node.context.template fill<T>(
        std::vector<double>(static_cast<std::size_t>(size.batch * size.fresh * size.heads * size.value_dim), NAN));
    callers.emplace_back(node, size);
  }
  for (Caller& caller : callers) threads.emplace_back([&caller, layout] { caller.call(layout); });
  for (std::thread& thread : threads) thread.join();
  mla_pass_layout_free(layout);
  for (int i = 0; i < kCallers; ++i) {
    Node<T>& node = nodes[static_cast<std::size_t>(i)];
    if (callers[static_cast<std::size_t>(i)].failed) fail(callers[static_cast<std::size_t>(i)].message);
    std::swap(node.present[0], node.buffer[kPastLatent]);
    std::swap(node.present[1], node.buffer[kPastRope]);
    const double error = node.error(size, random);
    if (!(error < node.allowed(*usable_isa(0), tolerance))) fail("through the entry: error " + std::to_string(error));
  }
}

// Callers at once, tasks that call again, tasks that throw: every task of a job that throws nothing runs once.
void check_pool(Random& random) {
  struct Work {
    std::vector<std::atomic<int>> ran;
    std::size_t thrower;
    Index workers;
  };
  const auto task = [](void* user, std::size_t i) {
    auto& work = *static_cast<Work*>(user);
    if (i % 8 == 5) std::this_thread::sleep_for(std::chrono::microseconds(50));  // the last to end may be any thread's
    ++work.ran[i];
    if (i == work.thrower) throw std::runtime_error("thrown");
    const auto inner = [](void* count, std::size_t) { ++*static_cast<std::atomic<int>*>(count); };
    if (i % 8 == 3) run_on_own(&work.workers, 2, inner, &work.ran[i]);
  };
  const auto call = [&](std::size_t count, bool throws, Index workers) {
    Work work = {std::vector<std::atomic<int>>(count), throws ? count / 2 : count, workers};
    bool thrown = false;
    try {
      run_on_own(&work.workers, count, task, &work);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    if (thrown != throws) fail("an exception that was lost or made up");
    for (std::size_t i = 0; i < count && !throws; ++i) {
      if (work.ran[i] != (i % 8 == 3 ? 3 : 1)) fail("a task that ran " + std::to_string(work.ran[i]) + " times");
    }
  };
  std::vector<std::thread> callers;
  for (Index i = 1 + random.below(3); i > 0; --i) {
    const auto count = static_cast<std::size_t>(random.pick({1, 2, 9, 100}));
    callers.emplace_back([&call, count, throws = random.chance(0.3), workers = random.pick({1, 2, 4})] {
      for (int repeat = 0; repeat < 20; ++repeat) call(count, throws, workers);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// Change one dimension, type or value of one input: it must be refused, or be harmless.
template <class T>
void check_refusal(Random& random) {
  Node<T> node(random);
  const Layout layout = checked(node.a);
  const auto input = static_cast<std::size_t>(random.below(kInputs));
  Tensor& tensor = node.in[input];
  if (!tensor.given) return;
  const Index what = random.below(4);
  if (what == 0) tensor.type = static_cast<int>(random.pick({1, 2, 3, 6, 7, 10, 11, 16}));
  if (what == 1) tensor.rank = std::max<Index>(0, tensor.rank + random.pick({-1, 1}));
  if (what == 2) tensor.dims[static_cast<std::size_t>(random.below(4))] = random.pick({0, 1, 2, 1 << 20});
  if (what == 3) tensor.given = false;
  // Positions are read: one row of them for all sequences must not be told to be a row for each.
  if (input == kPositionIds && what == 2 && tensor.dims[0] > 1) return;
  try {
    (void)checked(layout, node.in, type_of<T>());
  } catch (const Refused& refused) {
    if (std::strstr(refused.what(), "expected") == nullptr) fail(std::string("no word of what was expected: ") + refused.what());
  }
}

void check_halves() {
  for (Index isa_bits = 0; isa_bits < 65536; ++isa_bits) {
    const Half half = {static_cast<std::uint16_t>(isa_bits)};
    const float wide = scalar::to_float(half);
    const int exponent = (half.bits >> 10) & 31, fraction = half.bits & 1023;
    const double sign = half.bits & 0x8000 ? -1 : 1;
    const double want = exponent == 31 ? (fraction ? NAN : INFINITY)
                        : exponent    ? std::ldexp(1024 + fraction, exponent - 25)
                                      : std::ldexp(fraction, -24);
    if (!(wide == sign * want || (std::isnan(wide) && std::isnan(want)))) fail("to_float of half " + std::to_string(half.bits));
    Half back;
    scalar::narrow(wide, &back);
    if (back.bits != half.bits && !std::isnan(wide)) fail("narrow to half " + std::to_string(half.bits));
    if (exponent == 31 || half.bits == 0x7bff || half.bits == 0xfbff) continue;
    const Half next = {static_cast<std::uint16_t>(half.bits + 1)};
    const float middle = (wide + scalar::to_float(next)) / 2;
    scalar::narrow(middle, &back);
    if (back.bits != (half.bits & 1 ? next.bits : half.bits)) fail("ties to even of half " + std::to_string(half.bits));
  }
}

void check_no_allocation() {
  Random random{std::mt19937_64(7)};
  for (int i = 0; i < 20; ++i) {
    Node<Half> node(random);
    const Layout layout = checked(node.a);
    const Sizes size = checked(layout, node.in, Type::float16);
    // Room for the widest type that a row may be stored as.
    std::vector<float> context(static_cast<std::size_t>(size.batch * size.fresh * size.heads * size.value_dim)),
        first(static_cast<std::size_t>(size.batch * size.capacity * (node.numbers(0) + 4))),
        second(static_cast<std::size_t>(size.batch * size.capacity * (node.numbers(1) + 4)));
    const Outputs outputs = {context.data(), first.data(), second.data()};
    for (const Index workers : {Index{1}, Index{8}}) {
      const Threads threads = {nullptr, run_here, workers};
      const auto step = [&] {
        (void)checked(layout, node.in, Type::float16);
        run<Half>(layout, size, node.in, outputs, *usable_isa(0), Form::counted, threads);
      };
      step();
      const long before = allocations;
      step();
      if (allocations != before) fail(std::to_string(allocations - before) + " allocations in a step seen before");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 10;
  const auto seed = static_cast<std::uint64_t>(count > 2 ? std::atoll(arguments[2]) : 1);
  check_halves();
  check_no_allocation();
  const auto start = std::chrono::steady_clock::now();
  long rounds = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++rounds) {
    const std::uint64_t now = seed * 1000003 + static_cast<std::uint64_t>(rounds);
    Random random{std::mt19937_64(now)};
    std::fprintf(stderr, "\rseed %llu ", static_cast<unsigned long long>(now));
    check_node<float>(random, 2e-4);
    check_node<Half>(random, 2e-3);
    check_node<Bfloat>(random, 1.2e-2);
    check_pool(random);
    check_entry<float>(random, 2e-4);
    check_entry<Bfloat>(random, 1.2e-2);
    for (int i = 0; i < 20; ++i) {
      check_refusal<float>(random);
      check_refusal<Half>(random);
    }
  }
  std::string names;
  for (Index i = 0; const Isa* isa = usable_isa(i); ++i) names += std::string(" ") + isa->name;
  std::printf("\n%ld rounds of three nodes agree on%s\n", rounds, names.c_str());
  return rounds > 0 ? 0 : 1;
}
