// Every kernel but attend and combine, through the shim, against float64 written from what the operator means.
//
// A case that differs is told with its number, place and tolerance; the program's status is 1 then.
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "append.cuh"
#include "host.h"
#include "params.h"
#include "product_shared.h"
#include "shim.h"

namespace mla_pass::cuda {
namespace {

using Bits = std::vector<std::uint16_t>;

constexpr std::size_t index(long long i) { return static_cast<std::size_t>(i); }

int failures = 0;
std::string running;

void expect(bool good, const std::string& what) {
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s: %s\n", running.c_str(), what.c_str());
}

// A NaN is near nothing.
void near(double got, double want, double tolerance, const std::string& what) {
  expect(std::abs(got - want) <= tolerance, what + " is " + std::to_string(got) + ", expected " +
                                                std::to_string(want) + " within " + std::to_string(tolerance));
}

std::string at(std::initializer_list<int> index) {
  std::string out = "[";
  for (const int i : index) out += (out.size() > 1 ? ", " : "") + std::to_string(i);
  return out + "]";
}

// Of a model's type, and what half a place of a number of size 1 is.
template <class T>
struct Model;
template <>
struct Model<F16> {
  static constexpr double rounding = 0x1p-11;
  static constexpr Kernel append = Kernel::append_f16, map = Kernel::map_f16, fix = Kernel::fix_f16,
                          absorb = Kernel::absorb_f16, expand = Kernel::expand_f16, decode = Kernel::decode_f16;
};
template <>
struct Model<BF16> {
  static constexpr double rounding = 0x1p-8;
  static constexpr Kernel append = Kernel::append_bf16, map = Kernel::map_bf16, fix = Kernel::fix_bf16,
                          absorb = Kernel::absorb_bf16, expand = Kernel::expand_bf16, decode = Kernel::decode_bf16;
};
// Of sums in float32 over products, beside the products' magnitudes.
constexpr double kSumming = 0x1p-20;
// What nobody may read, and what a kernel has not written.
constexpr std::uint16_t kPoison = 0xffff;

class Draw {
 public:
  explicit Draw(unsigned seed) : random_(seed) {}
  double normal() { return normal_(random_); }
  int below(int count) { return static_cast<int>(random_() % static_cast<unsigned>(count)); }
  template <class T>
  Bits numbers(std::size_t count, double size = 1) {
    Bits out(count);
    for (auto& x : out) x = T::narrow(static_cast<float>(size * normal()));
    return out;
  }
  std::vector<float> floats(std::size_t count) {
    std::vector<float> out(count);
    for (auto& x : out) x = static_cast<float>(normal());
    return out;
  }

 private:
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
};

template <class T>
double number(const Bits& bits, long long i) {
  return T::widen(bits[index(i)]);
}

struct Turn {
  double re, im;
};
Turn operator*(Turn a, Turn b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }

// Angles of some columns, tables of them, and bands over some of them.
struct Angles {
  std::vector<double> theta;
  std::vector<float> cos, sin;
  int positions;

  Angles(int columns, int rows, Draw& draw) : positions(rows) {
    for (int i = 0; i < columns; ++i) theta.push_back(0.02 + 0.05 * std::abs(draw.normal()) / (1 + i));
    for (int row = 0; row < rows; ++row) {
      for (const double t : theta) {
        cos.push_back(static_cast<float>(std::cos(t * row)));
        sin.push_back(static_cast<float>(std::sin(t * row)));
      }
    }
  }
  Tables tables() const { return {cos.data(), sin.data(), static_cast<int>(theta.size()), positions}; }
  Turn at(int column, double row) const {
    const double angle = theta[index(column)] * row;
    return {std::cos(angle), std::sin(angle)};
  }
};

struct Fits {
  std::vector<float> a0, a1, fit;  // fit: [m][4], in float64 rounded once
  Bands bands{};

  Fits(const Angles& angles, const std::vector<int>& blocks, int decoded, int orders, Draw& draw) {
    bands.pairs = static_cast<int>(blocks.size());
    bands.decoded = decoded;
    bands.orders = orders;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      a0.push_back(static_cast<float>(draw.normal()));
      a1.push_back(orders == 1 ? 0.0f : static_cast<float>(draw.normal() / blocks[i]));
      bands.index[i] = static_cast<std::uint16_t>((i * 5 + 3) % angles.theta.size());
      bands.block[i] = blocks[i];
      const double middle = 0.5 * (blocks[i] - 1);
      const Turn turn = angles.at(bands.index[i], middle);
      const Turn constant = turn * Turn{a0[i], -a1[i] * middle}, slope = turn * Turn{0, a1[i]};
      for (const double x : {constant.re, constant.im, slope.re, slope.im}) fit.push_back(static_cast<float>(x));
      const bool absorbed = static_cast<int>(i) >= decoded;
      if (absorbed && (bands.absorbed == 0 || bands.level[bands.absorbed - 1].block != blocks[i])) {
        bands.level[bands.absorbed++] = {blocks[i], static_cast<int>(i), static_cast<int>(i)};
      }
      if (absorbed) ++bands.level[bands.absorbed - 1].end;
    }
    bands.fit = fit.data();
  }
  // A0 + A1 offset
  Turn at(int pair, double offset) const {
    const float* a = fit.data() + pair * 4;
    return {a[0] + offset * a[2], a[1] + offset * a[3]};
  }
};

std::vector<shim::Options> ways() {
  std::vector<shim::Options> out;
  for (const auto copies : {shim::Copies::deferred, shim::Copies::eager}) {
    for (const auto order : {shim::Order::forward, shim::Order::backward}) out.push_back({copies, order});
  }
  return out;
}

template <class P>
void launch(const shim::Options& way, Kernel kernel, Grid grid, int shared, const P& parameters) {
  CpuDevice(way).launch(kernel, grid, index(shared), &parameters, sizeof parameters);
}

Grid grid_of(int x, int y = 1, int z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

// ---- setup

struct Spans {
  std::vector<Span> span;
  std::vector<float> fit;
};

Spans set_up(Setup p, std::int64_t total, const std::vector<std::int64_t>& positions,
             const std::vector<std::int64_t>& mask, const shim::Options& way) {
  Spans out{std::vector<Span>(index(p.batch), Span{-7, -7, -7, -7}),
            std::vector<float>(index(4 * p.pairs))};
  p.total = &total;
  p.position_ids = positions.data();
  p.padding_mask = mask.empty() ? nullptr : mask.data();
  p.span = out.span.data();
  p.fit = out.fit.data();
  launch(way, Kernel::setup, grid_of(p.batch), 64, p);
  return out;
}

void test_setup(const shim::Options& way) {
  running = "setup";
  Draw draw(1);
  const Angles angles(9, 4000, draw);
  const Fits fits(angles, {1, 4, 64, 128, 512, 2048}, 0, 2, draw);
  Setup p{};
  p.batch = 3;
  p.fresh = 2;
  p.position_step = 2;
  p.bound = p.mask_step = 3000;
  p.tables = angles.tables();
  p.pairs = fits.bands.pairs;
  for (int i = 0; i < p.pairs; ++i) {
    p.index[i] = fits.bands.index[i];
    p.block[i] = fits.bands.block[i];
    p.a0[i] = fits.a0[index(i)];
    p.a1[i] = fits.a1[index(i)];
  }
  const std::vector<std::int64_t> positions = {0, 3999, 5, 6, 7, 8};
  const auto is = [&](const Span& s, int total, int first, int end, int bad, const char* what) {
    expect(s.total == total && s.first == first && s.end == end && s.bad == bad,
           std::string(what) + " is " + at({s.total, s.first, s.end, s.bad}));
  };
  Spans made = set_up(p, 2500, positions, {}, way);
  for (const Span& span : made.span) is(span, 2500, 0, 2500, 0, "a plain span");
  for (std::size_t i = 0; i < made.fit.size(); ++i) near(made.fit[i], fits.fit[i], 3e-6, "fit " + std::to_string(i));
  // Masks: hidden first and last, all hidden, one row shown; rows behind T do not count.
  std::vector<std::int64_t> mask(9000, 1);
  for (int i = 0; i < 1500; ++i) mask[index(i)] = 0;
  for (int i = 2400; i < 2500; ++i) mask[index(i)] = 0;
  for (int i = 3000; i < 5500; ++i) mask[index(i)] = 0;
  for (int i = 6000; i < 9000; ++i) mask[index(i)] = i == 6000 + 2499;
  made = set_up(p, 2500, positions, mask, way);
  is(made.span[0], 2500, 1500, 2400, 0, "hidden first and last");
  expect(made.span[1].first >= made.span[1].end && made.span[1].bad == 0, "a span all of which is hidden shows a row");
  is(made.span[2], 2500, 2499, 2500, 0, "one row shown");
  for (const std::int64_t total : {1, -4, 3001}) is(set_up(p, total, positions, {}, way).span[1], 0, 0, 0, 1, "total");
  p.exact = 1;
  is(set_up(p, 2500, positions, {}, way).span[0], 0, 0, 0, 1, "less than an exact total");
  is(set_up(p, 3000, positions, {}, way).span[0], 3000, 0, 3000, 0, "an exact total");
  p.exact = 0;
  p.bound = 5000;
  is(set_up(p, 4001, positions, {}, way).span[0], 0, 0, 0, 1, "more rows than the bands' tables have");
  made = set_up(p, 2500, {0, 4000, 5, 6, -1, 8}, {}, way);
  is(made.span[0], 2500, 0, 2500, 1, "a position behind the tables");
  is(made.span[1], 2500, 0, 2500, 0, "a sequence beside it");
  is(made.span[2], 2500, 0, 2500, 1, "a position before the tables");
  p.position_step = 0;
  is(set_up(p, 2500, {0, 4000}, {}, way).span[2], 2500, 0, 2500, 1, "a position that all share");
}

// ---- append

double scale_of(int code) { return std::exp2(code / 8.0); }

int code_of(double top, double largest) {
  if (!(top > 0)) return -128;
  return static_cast<int>(std::fmin(127, std::fmax(-128, std::ceil(8 * std::log2(top / largest)))));
}

// The 127 magnitudes of a float8 E4M3, of which the nearest, ties to even bits, is looked for.
int float8_bits(double q) {
  static const std::vector<double> magnitudes = [] {
    std::vector<double> out;
    for (int bits = 0; bits < 127; ++bits) {
      out.push_back(bits < 8 ? bits * 0x1p-9 : std::ldexp(8 + bits % 8, bits / 8 - 10));
    }
    return out;
  }();
  int best = 0;
  for (int bits = 1; bits < 127; ++bits) {
    const double now = std::abs(magnitudes[index(bits)] - std::abs(q));
    const double before = std::abs(magnitudes[index(best)] - std::abs(q));
    if (now < before || (now == before && bits % 2 == 0)) best = bits;
  }
  return best | (std::signbit(q) ? 0x80 : 0);
}

struct AppendCase {
  const char* name;
  int rank, rope_dim, split;
  Stored as[2];
  double size;  // of the numbers
};

template <class T>
struct Appended {
  AppendCase c;
  int batch = 2, fresh = 3, capacity = 11, total = 9;
  Bits row;
  std::vector<std::int64_t> positions;
  std::vector<std::uint16_t> rope_index;
  std::vector<unsigned char> part[2];
  std::vector<Span> span;
  Append p{};

  Appended(const AppendCase& given, const Angles& angles, Draw& draw) : c(given) {
    row = draw.numbers<T>(index(batch * fresh * (c.rank + c.rope_dim)), c.size);
    for (int i = 0; i < batch * fresh; ++i) positions.push_back(draw.below(angles.positions));
    p.position_step = fresh;
    p.batch = batch;
    p.fresh = fresh;
    p.capacity = capacity;
    p.rank = c.rank;
    p.rope_dim = c.rope_dim;
    p.split = c.split;
    p.tables = angles.tables();
    for (int i = 0; i < c.rope_dim / 2; ++i) {
      p.rope_index[i] = static_cast<std::uint16_t>((i * 3 + 1) % angles.theta.size());
    }
    for (int i = 0; i < 2; ++i) {
      const int numbers = i == 0 ? c.split : c.rank + c.rope_dim - c.split;
      const int bytes = c.as[i] == Stored::model ? 2 * numbers : numbers + 4;
      part[i].assign(index(batch * capacity * bytes), 0xff);
      p.part[i] = {part[i].data(), numbers, bytes, c.as[i]};
    }
    span.assign(2, Span{total, 0, total, 0});
  }

  void run(const shim::Options& way) {
    p.row = row.data();
    p.position_ids = positions.data();
    p.span = span.data();
    launch(way, Model<T>::append, grid_of(fresh, batch), 64, p);
  }

  // What is to be stored, in float32 as the CPU kernel has it.
  float want(int b, int s, int i) const {
    const long long from = static_cast<long long>(b * fresh + s) * (c.rank + c.rope_dim);
    if (i < c.rank) return static_cast<float>(number<T>(row, from + i));
    const int half = c.rope_dim / 2, pair = (i - c.rank) % half;
    const long long angle = positions[index(b * fresh + s)] * p.tables.angles + p.rope_index[pair];
    const float cos = p.tables.cos[angle], sin = p.tables.sin[angle];
    const float x = T::widen(row[index(from + c.rank + pair)]);
    const float y = T::widen(row[index(from + c.rank + half + pair)]);
    const volatile float a = i - c.rank < half ? x * cos : x * sin, d = i - c.rank < half ? y * sin : y * cos;
    return i - c.rank < half ? a - d : a + d;
  }

  const unsigned char* stored(int which, int b, int row_of) const {
    return part[which].data() + index(b * capacity + row_of) * index(p.part[which].bytes);
  }

  void check_eight(int which, int b, int s) const {
    const Part& part = p.part[which];
    const unsigned char* got = stored(which, b, total - fresh + s);
    const bool whole = part.as == Stored::int8;
    const int first = which == 0 ? 0 : c.split, length = (part.numbers + 3) / 4;
    const float largest = whole ? 127 : 448;
    for (int segment = 0; segment < 4; ++segment) {
      const int begin = std::min(segment * length, part.numbers), end = std::min(begin + length, part.numbers);
      float top = 0;
      for (int i = begin; i < end; ++i) top = std::fmax(top, std::abs(want(b, s, first + i)));
      const int code = code_of(top, largest);
      const unsigned char bits_of_code = got[part.numbers + segment];
      const int stored_code = whole ? static_cast<signed char>(bits_of_code) : bits_of_code - 128;
      expect(stored_code == code, "code " + at({which, b, s, segment}) + " is " + std::to_string(stored_code) +
                                      ", expected " + std::to_string(code));
      const float inverse = 1.0f / static_cast<float>(scale_of(code));
      for (int i = begin; i < end; ++i) {
        const float q = std::fmin(std::fmax(want(b, s, first + i) * inverse, -largest), largest);
        const int bits = whole ? static_cast<int>(std::nearbyint(q)) & 0xff : float8_bits(q);
        expect(got[i] == bits, "q " + at({which, b, s, i}) + " is " + std::to_string(got[i]) + ", expected " +
                                   std::to_string(bits));
      }
    }
  }

  void check() const {
    for (int which = 0; which < 2; ++which) {
      for (int b = 0; b < batch; ++b) {
        for (int r = 0; r < capacity; ++r) {
          const unsigned char* got = stored(which, b, r);
          const bool written = r >= total - fresh && r < total;
          for (int i = 0; !written && i < p.part[which].bytes; ++i) expect(got[i] == 0xff, "a row beside is written");
          if (!written) continue;
          if (p.part[which].as != Stored::model) {
            check_eight(which, b, r - total + fresh);
            continue;
          }
          for (int i = 0; i < p.part[which].numbers; ++i) {
            std::uint16_t bits;
            __builtin_memcpy(&bits, got + 2 * i, 2);
            const int at_row = (which == 0 ? 0 : c.split) + i;
            expect(bits == T::narrow(want(b, r - total + fresh, at_row)), "number " + at({which, b, r, i}));
          }
        }
      }
    }
  }
};

template <class T>
void test_append(const shim::Options& way) {
  Draw draw(2);
  const Angles angles(9, 50, draw);
  for (const AppendCase& c : {
           AppendCase{"append, model's type", 24, 8, 24, {Stored::model, Stored::model}, 1},
           AppendCase{"append, cut amid latents", 23, 6, 9, {Stored::model, Stored::int8}, 3},
           AppendCase{"append, cut amid rope dims", 17, 16, 25, {Stored::float8, Stored::model}, 0.3},
           AppendCase{"append, 8 bits", 130, 0, 130, {Stored::int8, Stored::float8}, 100},
           AppendCase{"append, one part empty", 21, 8, 0, {Stored::int8, Stored::float8}, 1e-4},
           AppendCase{"append, zeros", 9, 4, 9, {Stored::float8, Stored::int8}, 0},
           AppendCase{"append, subnormal", 9, 4, 9, {Stored::float8, Stored::int8}, 1e-7},
       }) {
    running = c.name;
    Appended<T> a(c, angles, draw);
    a.run(way);
    a.check();
    for (const Span& span : a.span) expect(span.bad == 0, "a good row is bad");
  }
  running = "append, bad numbers and positions";
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Appended<T> a({"", 23, 6, 9, {Stored::model, Stored::int8}, 1}, angles, draw);
    a.row[29 + 14] = T::narrow(bad);  // sequence 0, token 1, latent 14, of 8 bits
    a.positions[5] = 50;              // sequence 1, token 2
    a.run(way);
    expect(a.span[0].bad == 1, "a row that 8 bits cannot hold is not bad");
    for (int i = 0; i < a.p.part[1].bytes; ++i) {
      expect(a.stored(1, 0, 7)[i] == 0xff, "such a row is written");
      expect(a.stored(1, 1, 8)[i] == 0xff, "a row of no position is written in 8 bits");
    }
    for (int i = 0; i < 9; ++i) {
      std::uint16_t bits;
      __builtin_memcpy(&bits, a.stored(0, 1, 8) + 2 * i, 2);
      expect(std::isnan(T::widen(bits)), "a row of no position is a number");
    }
    a.check_eight(1, 0, 0);
    a.check_eight(1, 1, 1);
  }
  running = "append, no total";
  Appended<T> a({"", 8, 4, 8, {Stored::model, Stored::model}, 1}, angles, draw);
  a.span[1] = {0, 0, 0, 1};
  a.run(way);
  for (int i = 0; i < a.capacity * 16; ++i) {
    expect(a.stored(0, 1, 0)[i] == 0xff, "a sequence without a total is written");
  }
}

// Around every threshold of codes, a place of float32 at a time.
void test_thresholds() {
  running = "codes' thresholds";
  for (const Stored as : {Stored::int8, Stored::float8}) {
    const float largest = as == Stored::int8 ? 127 : 448;
    for (int code = -130; code < 130; ++code) {
      float top = static_cast<float>(largest * scale_of(code));
      for (int i = 0; i < 3; ++i) top = std::nextafter(top, 0.0f);
      for (int i = 0; i < 7; ++i, top = std::nextafter(top, std::numeric_limits<float>::max())) {
        expect(least_code(as, top) == code_of(top, largest), "code of " + std::to_string(top));
      }
    }
    for (const float top : {0.0f, 1e-45f, std::numeric_limits<float>::max()}) {
      expect(least_code(as, top) == code_of(top, largest), "code of " + std::to_string(top));
    }
  }
}

// Numbers of every size through the kernel, one a segment.
void test_codes(const shim::Options& way) {
  running = "append, every code";
  Draw draw(3);
  const Angles angles(1, 2, draw);
  // bfloat16 and float16 numbers of every size, each a segment's only number.
  for (const Stored as : {Stored::int8, Stored::float8}) {
    const auto sweep = [&](auto type) {
      using T = decltype(type);
      std::vector<std::uint16_t> tops;
      for (int bits = 0; bits < 0x8000; bits += 5) {
        if (std::isfinite(T::widen(static_cast<std::uint16_t>(bits)))) tops.push_back(static_cast<std::uint16_t>(bits));
      }
      Appended<T> a({"", 4, 0, 4, {as, Stored::model}, 1}, angles, draw);
      a.batch = a.p.batch = 1;
      a.fresh = a.p.fresh = a.total = a.capacity = a.p.capacity = static_cast<int>(tops.size() / 4);
      tops.resize(index(4 * a.fresh));
      a.row = tops;
      a.positions.assign(index(a.fresh), 0);
      a.part[0].assign(index(a.fresh * 8), 0xff);
      a.p.part[0].data = a.part[0].data();
      a.span.assign(1, Span{a.fresh, 0, a.fresh, 0});
      a.run(way);
      a.check();
    };
    sweep(F16{});
    sweep(BF16{});
  }
}

// ---- carry

void test_carry(const shim::Options& way) {
  running = "carry";
  for (const int bytes : {1, 6, 12, 36, 1152}) {
    for (const int rows : {0, 1, 33}) {
      const int batch = 3, capacity = rows + 2;
      std::vector<unsigned char> past(index(batch * rows * bytes) + 1), present;
      for (std::size_t i = 0; i < past.size(); ++i) past[i] = static_cast<unsigned char>(i * 7 + i / 251);
      present.assign(index(batch * capacity * bytes), 0xee);
      const Carry p{past.data(), present.data(), batch, rows, capacity, bytes};
      launch(way, Kernel::carry, grid_of(std::max(1, (rows * bytes + 16383) / 16384), batch), 0, p);
      for (int b = 0; b < batch; ++b) {
        for (int i = 0; i < capacity * bytes; ++i) {
          const int want = i < rows * bytes ? past[index(b * rows * bytes + i)] : 0xee;
          expect(present[index(b * capacity * bytes + i)] == want, "byte " + at({bytes, rows, b, i}));
        }
      }
    }
  }
}

// ---- map and decode

struct HeadsCase {
  const char* name;
  int groups, per_group, batch, fresh, first, tokens, depth, width;
};

template <class T>
void test_map(const HeadsCase& c, bool mapped, const shim::Options& way) {
  running = std::string("map, ") + c.name + (mapped ? "" : ", no query_map");
  Draw draw(4);
  const int heads = c.groups * c.per_group, depth = mapped ? c.depth : c.width;
  const Bits query = draw.numbers<T>(index(c.batch * c.fresh * heads * depth));
  const Bits weights = draw.numbers<T>(index(c.groups * depth * c.width));
  std::vector<float> dims(index(c.batch * c.tokens * heads * c.width), std::nanf(""));
  Map p{};
  p.query = query.data() + c.first * heads * depth;
  p.query_map = mapped ? weights.data() : nullptr;
  p.query_dim = depth;
  p.width = c.width;
  p.heads = heads;
  p.groups = c.groups;
  p.batch = c.batch;
  p.fresh = c.fresh;
  p.tokens = c.tokens;
  p.dims = dims.data();
  const int rows = c.batch * c.tokens;
  const Grid grid = mapped ? grid_of(ceil_div(rows * c.per_group, 64), ceil_div(c.width, 64), c.groups)
                           : grid_of(ceil_div(rows * heads, 4));
  launch(way, Model<T>::map, grid, mapped ? product_bytes(depth) : 0, p);
  for (int b = 0; b < c.batch; ++b) {
    for (int s = 0; s < c.tokens; ++s) {
      for (int h = 0; h < heads; ++h) {
        const long long from = (static_cast<long long>(b * c.fresh + c.first + s) * heads + h) * depth;
        for (int i = 0; i < c.width; ++i) {
          double want = 0, size = 0;
          for (int k = 0; k < depth; ++k) {
            const long long weight = (static_cast<long long>(h / c.per_group) * depth + k) * c.width + i;
            const double w = mapped ? number<T>(weights, weight) : k == i;
            want += number<T>(query, from + k) * w;
            size += std::abs(number<T>(query, from + k) * w);
          }
          near(dims[index(((b * c.tokens + s) * heads + h) * c.width + i)], want, size * kSumming,
               at({b, s, h, i}));
        }
      }
    }
  }
}

template <class T>
void test_decode(const HeadsCase& c, const shim::Options& way) {
  running = std::string("decode, ") + c.name;
  Draw draw(5);
  const int heads = c.groups * c.per_group;
  Bits joined = draw.numbers<T>(index(c.batch * c.tokens * heads * c.depth));
  const Bits weights = draw.numbers<T>(index(c.groups * c.depth * c.width));
  Bits context(index(c.batch * c.fresh * heads * c.width), 0x1234);
  const int spoiled = (c.batch - 1) * c.tokens * heads * c.depth;  // the last sequence's first row
  for (int i = 0; i < c.depth; ++i) joined[index(spoiled + i)] = T::narrow(std::nanf(""));
  Decode p{joined.data(), weights.data(), c.batch, c.fresh, c.tokens, heads, c.groups, c.depth, c.width,
           context.data() + c.first * heads * c.width};
  const int rows = c.batch * c.tokens * c.per_group;
  launch(way, Model<T>::decode, grid_of(ceil_div(rows, 64), ceil_div(c.width, 64), c.groups),
         product_bytes(c.depth), p);
  for (int b = 0; b < c.batch; ++b) {
    for (int s = 0; s < c.fresh; ++s) {
      for (int h = 0; h < heads; ++h) {
        const long long to = (static_cast<long long>(b * c.fresh + s) * heads + h) * c.width;
        const long long from = (static_cast<long long>(b * c.tokens + s - c.first) * heads + h) * c.depth;
        for (int i = 0; i < c.width; ++i) {
          if (s < c.first || s >= c.first + c.tokens) {
            expect(context[index(to + i)] == 0x1234, "a token beside the run is written");
            continue;
          }
          if (from == spoiled) {
            expect(std::isnan(number<T>(context, to + i)), "a NaN is lost");
            continue;
          }
          double want = 0, size = 0;
          for (int k = 0; k < c.depth; ++k) {
            const double x = number<T>(joined, from + k) *
                             number<T>(weights, (static_cast<long long>(h / c.per_group) * c.depth + k) * c.width + i);
            want += x;
            size += std::abs(x);
          }
          const double tolerance = size * kSumming + std::abs(want) * Model<T>::rounding;
          near(number<T>(context, to + i), want, tolerance, at({b, s, h, i}));
        }
      }
    }
  }
}

template <class T>
void test_heads(const shim::Options& way) {
  for (const HeadsCase& c : {
           HeadsCase{"one row", 1, 1, 1, 1, 0, 1, 16, 24}, HeadsCase{"odd sizes", 3, 7, 2, 3, 0, 3, 21, 13},
           HeadsCase{"several tiles", 2, 16, 2, 5, 0, 5, 72, 136},
           HeadsCase{"a run of tokens", 2, 3, 2, 7, 2, 4, 40, 67},
           HeadsCase{"more than a panel", 1, 2, 1, 2, 0, 2, 1090, 72},
       }) {
    test_map<T>(c, true, way);
    test_map<T>(c, false, way);
    test_decode<T>(c, way);
  }
}

// ---- fix

struct FixCase {
  const char* name;
  std::vector<int> blocks;
  int decoded, still, rope_dim;
  bool expanded;
};

template <class T>
void test_fix(const FixCase& c, const shim::Options& way) {
  running = std::string("fix, ") + c.name;
  Draw draw(6);
  const Angles angles(11, 300, draw);
  const Fits fits(angles, c.blocks, c.decoded, 2, draw);
  const int batch = 3, groups = 2, per_group = 3, heads = 6, tokens = 4, behind = 5, total = 200;
  const int m = fits.bands.pairs, n = 2 * m + c.still, width = n + c.rope_dim, half = c.rope_dim / 2;
  const std::vector<float> dims = draw.floats(index(batch * tokens * heads * width));
  std::vector<std::int64_t> positions;
  for (int i = 0; i < batch * tokens; ++i) positions.push_back(draw.below(300));
  std::vector<Span> span(batch, Span{total, 0, total, 0});
  span[1] = {0, 0, 0, 1};
  Fix p{};
  p.dims = dims.data();
  p.nope_dim = n;
  p.rope_dim = c.rope_dim;
  p.heads = heads;
  p.groups = groups;
  p.batch = batch;
  p.tokens = tokens;
  p.behind = behind;
  p.expanded = c.expanded;
  p.position_ids = positions.data();
  p.position_step = tokens;
  p.span = span.data();
  p.tables = angles.tables();
  p.bands = fits.bands;
  for (int i = 0; i < half; ++i) p.rope_index[i] = static_cast<std::uint16_t>((i * 2 + 1) % 11);
  p.rope_width = up16(c.rope_dim);
  p.fine_width = up8(2 * c.decoded);
  p.key_width = up16(width);
  const int step = c.expanded ? p.key_width : p.rope_width + p.fine_width;
  Bits out(index(batch * heads * tokens * step), kPoison);
  p.out = out.data();
  launch(way, Model<T>::fix, grid_of(ceil_div(batch * heads * tokens, 4)), 0, p);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h) {
      for (int s = 0; s < tokens; ++s) {
        const float* x = dims.data() + ((b * tokens + s) * heads + h) * width;
        std::vector<double> want;
        const auto pairs = [&](int count, int up_to) {
          for (int i = 0; i < count; ++i) {
            const Turn turned = Turn{x[i], x[m + i]} * angles.at(fits.bands.index[i], total - behind - tokens + s);
            want.push_back(turned.re);
            want.push_back(turned.im);
          }
          want.resize(index(up_to), 0.0);
        };
        const auto rope = [&](int up_to) {
          std::vector<double> im;
          for (int i = 0; i < half; ++i) {
            const Turn turned = Turn{x[n + i], x[n + half + i]} *
                                angles.at(p.rope_index[i], static_cast<double>(positions[index(b * tokens + s)]));
            want.push_back(turned.re);
            im.push_back(turned.im);
          }
          want.insert(want.end(), im.begin(), im.end());
          want.resize(index(up_to), 0.0);
        };
        if (c.expanded) {
          pairs(m, 2 * m);
          want.insert(want.end(), x + 2 * m, x + n);
          rope(step);
        } else {
          rope(p.rope_width);
          pairs(c.decoded, step);
        }
        const int row = c.expanded ? ((b * groups + h / per_group) * tokens + s) * per_group + h % per_group
                                   : (b * heads + h) * tokens + s;
        for (int i = 0; i < step; ++i) {
          const double w = span[index(b)].bad ? 0 : want[index(i)];
          near(number<T>(out, static_cast<long long>(row) * step + i), w, std::abs(w) * Model<T>::rounding + 1e-5,
               at({b, h, s, i}));
        }
      }
    }
  }
}

// ---- absorb

struct AbsorbCase {
  const char* name;
  std::vector<int> blocks;
  int decoded, orders, still, key_rank, groups, per_group, tokens, begin, end, total;
  bool causal = true;
  int window = 0, first = 0, shares = 1, behind = 3;
};

template <class T>
void test_absorb(const AbsorbCase& c, const shim::Options& way) {
  running = std::string("absorb, ") + c.name;
  Draw draw(7);
  const Angles angles(13, std::max(c.total, 2), draw);
  const Fits fits(angles, c.blocks, c.decoded, c.orders, draw);
  const Bands& bands = fits.bands;
  const int m = bands.pairs, n = 2 * m + c.still, k = c.key_rank, heads = c.groups * c.per_group, rope = 4;
  const int sequences = 2, first_sequence = 1, width = n + rope, rows = heads * c.tokens;
  const bool blocky = bands.absorbed > 0;
  Absorb p{};
  p.block = blocky ? bands.level[0].block : 0;
  p.blocks = blocky ? (c.end - c.begin + p.block - 1) / p.block : 1;
  p.orders = blocky ? c.orders : 1;
  const std::vector<float> dims = draw.floats(index(3 * c.tokens * heads * width));
  const Bits key_up = draw.numbers<T>(index(c.groups * n * k)), mean = draw.numbers<T>(index(c.groups * n));
  const std::vector<Span> span(3, Span{c.total, c.first, c.total, 0});
  p.key_width = up16(k);
  Bits varying(index(sequences * p.blocks * p.orders * rows * p.key_width), kPoison);
  std::vector<float> means(varying.size() / index(p.key_width), std::nanf(""));
  p.dims = dims.data();
  p.key_up = key_up.data();
  p.key_mean = mean.data();
  p.nope_dim = n;
  p.rope_dim = rope;
  p.key_rank = k;
  p.heads = heads;
  p.groups = c.groups;
  p.tokens = c.tokens;
  p.behind = c.behind;
  p.window = c.window;
  p.causal = c.causal;
  p.first_sequence = first_sequence;
  p.sequences = sequences;
  p.begin = c.begin;
  p.end = c.end;
  p.span = span.data();
  p.tables = angles.tables();
  p.bands = bands;
  p.varying = varying.data();
  p.mean = means.data();
  launch(way, Model<T>::absorb,
         grid_of(ceil_div(c.per_group * c.tokens * p.blocks, 64), c.shares, sequences * c.groups * p.orders),
         product_bytes(n - 2 * c.decoded), p);
  for (int b = 0; b < sequences; ++b) {
    for (int block = 0; block < p.blocks; ++block) {
      for (int row = 0; row < rows; ++row) {
        const int h = row / c.tokens, s = row % c.tokens, own = c.total - c.behind - c.tokens + s;
        const int begin = blocky ? c.begin + block * p.block : 0, end = blocky ? begin + p.block : 1 << 30;
        const int first_seen = std::max(c.first, c.window > 0 ? own - s - c.window + 1 : 0);
        const int end_seen = c.causal ? c.total - c.behind : c.total;
        if (begin >= end_seen || end <= first_seen) continue;
        const float* x = dims.data() + (((first_sequence + b) * c.tokens + s) * heads + h) * width;
        for (int order = 0; order < p.orders; ++order) {
          // The left operand in float64, a dim each, of which those of pairs are turned.
          std::vector<double> left(index(n), 0.0);
          for (int i = 2 * m; i < n && order == 0; ++i) left[index(i)] = x[i];
          for (int i = c.decoded; i < m; ++i) {
            const int at_row = begin / bands.block[i] * bands.block[i];
            Turn fit = fits.at(i, begin - at_row);
            if (order == 1) fit = {fits.fit[index(4 * i + 2)], fits.fit[index(4 * i + 3)]};
            const Turn turned = Turn{x[i], x[m + i]} * angles.at(bands.index[i], own - at_row) * Turn{fit.re, -fit.im};
            left[index(i)] = turned.re;
            left[index(m + i)] = turned.im;
          }
          const long long to = ((static_cast<long long>(b) * p.blocks + block) * p.orders + order) * rows + row;
          const int group = h / c.per_group;
          double want_mean = 0, size_mean = 0;
          for (int i = 0; i < n; ++i) {
            const double y = left[index(i)] * number<T>(mean, group * n + i);
            want_mean += y;
            size_mean += std::abs(y);
          }
          near(means[index(to)], want_mean, size_mean * 1e-5 + 1e-5, "mean " + at({b, block, order, row}));
          for (int column = 0; column < p.key_width; ++column) {
            double want = 0, square = 0;
            for (int i = 0; i < n && column < k; ++i) {
              const double y = left[index(i)] * number<T>(key_up, (static_cast<long long>(group) * n + i) * k + column);
              want += y;
              square += y * y;
            }
            // The left operand's roundings, which are independent: six times their deviation; and the result's.
            const double tolerance = (6 * std::sqrt(square) + std::abs(want)) * Model<T>::rounding + 2e-5;
            near(number<T>(varying, to * p.key_width + column), want, tolerance, at({b, block, order, row, column}));
          }
        }
      }
    }
  }
}

template <class T>
void test_latent_queries(const shim::Options& way) {
  running = "absorb, no key_up";
  Draw draw(8);
  const int heads = 3, tokens = 2, n = 21, width = n + 6;
  const std::vector<float> dims = draw.floats(index(heads * tokens * width));
  const Span span{50, 0, 50, 0};
  Absorb p{};
  p.dims = dims.data();
  p.nope_dim = p.key_rank = n;
  p.rope_dim = 6;
  p.heads = heads;
  p.groups = 1;
  p.tokens = tokens;
  p.causal = 1;
  p.sequences = p.orders = p.blocks = 1;
  p.end = 50;
  p.span = &span;
  p.key_width = up16(n);
  Bits varying(index(heads * tokens * p.key_width), kPoison);
  p.varying = varying.data();
  launch(way, Model<T>::absorb, grid_of(1), 0, p);
  for (int row = 0; row < heads * tokens; ++row) {
    for (int i = 0; i < p.key_width; ++i) {
      const float want = i < n ? dims[index((row % tokens * heads + row / tokens) * width + i)] : 0.0f;
      expect(varying[index(row * p.key_width + i)] == T::narrow(want), at({row, i}));
    }
  }
}

// ---- expand

struct ExpandCase {
  const char* name;
  std::vector<int> blocks;
  int still, rope_dim, rank, key_rank, value_offset, value_dim, split;
  Stored as[2];
  int begin, end, total;
  bool key_up = true, value_up = true;
};

template <class T>
void test_expand(const ExpandCase& c, const shim::Options& way) {
  running = std::string("expand, ") + c.name;
  Draw draw(9);
  const Angles angles(13, c.total, draw);
  const Fits fits(angles, c.blocks, 0, 2, draw);
  const int m = fits.bands.pairs, n = c.key_up ? 2 * m + c.still : c.key_rank, k = c.key_rank;
  const int width = c.rank + c.rope_dim;
  const int w = c.rank - c.value_offset, v = c.value_up ? c.value_dim : w, groups = 2, capacity = c.end + 3;
  const int sequences = 2, first_sequence = 1;
  // Numbers, and the parts that hold them; rows behind the last hold no numbers.
  std::vector<double> rows(index(3 * capacity * width));
  std::vector<unsigned char> part[2];
  Expand p{};
  for (int which = 0; which < 2; ++which) {
    const int first = which == 0 ? 0 : c.split, numbers = which == 0 ? c.split : width - c.split;
    const int bytes = c.as[which] == Stored::model ? 2 * numbers : numbers + 4, length = std::max(1, (numbers + 3) / 4);
    part[which].assign(index(3 * capacity * bytes), 0xff);
    for (int row = 0; row < 3 * capacity; ++row) {
      if (row % capacity >= c.total) continue;
      unsigned char* to = part[which].data() + index(row * bytes);
      int code[4];
      for (int& x : code) x = draw.below(9) - 4;
      for (int i = 0; i < numbers; ++i) {
        double& x = rows[index(row * width + first + i)];
        if (c.as[which] == Stored::model) {
          const std::uint16_t bits = T::narrow(static_cast<float>(draw.normal()));
          __builtin_memcpy(to + 2 * i, &bits, 2);
          x = T::widen(bits);
        } else if (c.as[which] == Stored::int8) {
          const int q = draw.below(255) - 127;
          to[i] = static_cast<unsigned char>(q);
          x = q * scale_of(code[i / length]) / 64;
        } else {
          const int bits = draw.below(127);
          to[i] = static_cast<unsigned char>(bits | (draw.below(2) << 7));
          const double q = bits < 8 ? bits * 0x1p-9 : std::ldexp(8 + bits % 8, bits / 8 - 10);
          x = (to[i] & 0x80 ? -q : q) * scale_of(code[i / length]) / 64;
        }
      }
      for (int i = 0; i < 4 && c.as[which] != Stored::model; ++i) {
        const int stored = code[i] - 48;  // 2^-6 of the numbers above
        to[numbers + i] = static_cast<unsigned char>(c.as[which] == Stored::int8 ? stored : stored + 128);
      }
    }
    p.part[which] = {part[which].data(), numbers, bytes, c.as[which]};
  }
  const Bits key_up = draw.numbers<T>(index(groups * n * k), 0.3);
  const Bits mean = draw.numbers<T>(index(groups * n));
  const Bits value_up = draw.numbers<T>(index(groups * w * v), 0.3);
  const std::vector<Span> span(3, Span{c.total, 0, c.total, 0});
  p.capacity = capacity;
  p.rank = c.rank;
  p.rope_dim = c.rope_dim;
  p.split = c.split;
  p.key_up = c.key_up ? key_up.data() : nullptr;
  p.key_mean = c.key_up ? mean.data() : nullptr;
  p.value_up = c.value_up ? value_up.data() : nullptr;
  p.nope_dim = n;
  p.key_rank = k;
  p.value_offset = c.value_offset;
  p.value_rank = w;
  p.value_dim = v;
  p.groups = groups;
  p.tokens = 1;
  p.causal = 1;
  p.first_sequence = first_sequence;
  p.sequences = sequences;
  p.begin = c.begin;
  p.end = c.end;
  p.span = span.data();
  p.tables = angles.tables();
  p.bands = fits.bands;
  p.key_width = up16(n + c.rope_dim);
  p.step = p.key_width + up8(v);
  Bits out(index(sequences * groups * (c.end - c.begin) * p.step), kPoison);
  p.out = out.data();
  launch(way, Model<T>::expand, grid_of(ceil_div(c.end - c.begin, 64), 2 * groups, sequences),
         product_bytes(std::max(k, w)), p);
  // Numbers of 8-bit rows are rounded to the model's type before they are multiplied.
  const double rounding = Model<T>::rounding;
  for (int b = 0; b < sequences; ++b) {
    for (int g = 0; g < groups; ++g) {
      for (int row = c.begin; row < std::min(c.end, c.total); ++row) {
        const double* x = rows.data() + index(((first_sequence + b) * capacity + row) * width);
        const long long to = (static_cast<long long>(b * groups + g) * (c.end - c.begin) + row - c.begin) * p.step;
        const auto is = [&](int column, double want, double square) {
          const double tolerance = rounding * (6 * std::sqrt(square) + 2 * std::abs(want)) + 1e-5;
          near(number<T>(out, to + column), want, tolerance, at({b, g, row, column}));
        };
        std::vector<double> key(index(n)), square(index(n));
        for (int i = 0; i < n; ++i) {
          key[index(i)] = c.key_up ? number<T>(mean, g * n + i) : x[i];
          for (int j = 0; j < k && c.key_up; ++j) {
            const double y = number<T>(key_up, (static_cast<long long>(g) * n + i) * k + j) * x[j];
            key[index(i)] += y;
            square[index(i)] += y * y;
          }
        }
        for (int i = 0; i < m && c.key_up; ++i) {
          const int block = fits.bands.block[i], first = row / block * block;
          const Turn fit = fits.at(i, row - first);
          const auto re = index(i), im = index(m + i);
          const Turn turned = Turn{key[re], key[im]} * angles.at(fits.bands.index[i], first) * fit;
          const double grown = (square[re] + square[im]) * (fit.re * fit.re + fit.im * fit.im);
          is(2 * i, turned.re, grown);
          is(2 * i + 1, turned.im, grown);
        }
        for (int i = c.key_up ? 2 * m : 0; i < n; ++i) is(i, key[index(i)], square[index(i)]);
        for (int i = n; i < p.key_width; ++i) is(i, i < n + c.rope_dim ? x[c.rank + i - n] : 0, 0);
        for (int i = 0; i < p.step - p.key_width; ++i) {
          double want = 0, sum = 0;
          for (int j = 0; j < w && i < v; ++j) {
            const long long weight = (static_cast<long long>(g) * w + j) * v + i;
            const double y = x[c.value_offset + j] * (c.value_up ? number<T>(value_up, weight) : j == i);
            want += y;
            sum += y * y;
          }
          is(p.key_width + i, want, sum);
        }
      }
    }
  }
}

template <class T>
void test_all(const shim::Options& way) {
  test_append<T>(way);
  test_heads<T>(way);
  for (const FixCase& c : {
           FixCase{"rope alone", {}, 0, 5, 8, false}, FixCase{"no rope dims", {1, 1, 1}, 3, 0, 0, false},
           FixCase{"decoded pairs", {1, 4, 4, 64, 128}, 3, 2, 24, false},
           FixCase{"expanded", {1, 4, 4, 64}, 0, 3, 6, true},
           FixCase{"expanded without rope dims", {}, 0, 9, 0, true},
       }) {
    test_fix<T>(c, way);
  }
  for (const AbsorbCase& c : {
           AbsorbCase{"still dims", {}, 0, 1, 9, 32, 2, 3, 2, 0, 128, 100},
           AbsorbCase{"one level", {64, 64, 64}, 0, 2, 4, 40, 2, 3, 1, 0, 256, 230},
           AbsorbCase{"levels behind decoded ones", {1, 16, 64, 64, 128, 512}, 2, 2, 3, 19, 2, 5, 1, 192, 640, 700},
           AbsorbCase{"order 0", {64, 128}, 0, 1, 0, 72, 1, 9, 2, 64, 320, 320},
           AbsorbCase{"blocks ahead of queries", {64, 128}, 0, 2, 1, 24, 1, 4, 3, 0, 256, 250, false, 0, 0, 1, 130},
           AbsorbCase{"a window", {64, 64}, 0, 2, 2, 24, 1, 16, 3, 0, 640, 600, true, 70, 0},
           AbsorbCase{"hidden rows, shares of columns", {64, 256}, 0, 2, 2, 200, 2, 8, 1, 0, 512, 500, true, 0, 300, 3},
       }) {
    test_absorb<T>(c, way);
  }
  test_latent_queries<T>(way);
  for (const ExpandCase& c : {
           ExpandCase{"plain", {1, 4, 64, 64}, 4, 8, 32, 32, 0, 16, 32, {Stored::model, Stored::model}, 64, 200, 190},
           ExpandCase{"odd sizes", {1, 16}, 3, 6, 23, 17, 5, 9, 11, {Stored::model, Stored::model}, 0, 70, 70},
           ExpandCase{"8 bits", {4, 64}, 2, 8, 40, 33, 7, 20, 40, {Stored::int8, Stored::float8}, 0, 90, 80},
           ExpandCase{"cut amid rope dims", {}, 5, 16, 24, 24, 3, 12, 30, {Stored::float8, Stored::int8}, 0, 40, 40},
           ExpandCase{"no key_up", {}, 0, 8, 24, 24, 8, 12, 24, {Stored::model, Stored::int8}, 0, 66, 66, false, true},
           ExpandCase{"no value_up", {64}, 1, 0, 24, 20, 3, 0, 24, {Stored::int8, Stored::model}, 0, 66, 66, true,
                      false},
       }) {
    test_expand<T>(c, way);
  }
}

// Operands of more numbers than stay in shared memory at a time.
template <class T>
void test_panels(const shim::Options& way) {
  constexpr Stored kModel = Stored::model;
  test_expand<T>({"more than a panel", {64}, 70, 8, 600, 590, 20, 72, 600, {kModel, kModel}, 0, 20, 20}, way);
  test_absorb<T>({"more than a panel", {64, 64}, 0, 2, 520, 72, 1, 2, 1, 0, 128, 120}, way);
}

}  // namespace
}  // namespace mla_pass::cuda

int main() {
  using namespace mla_pass::cuda;
  for (const shim::Options& way : ways()) {
    test_setup(way);
    test_carry(way);
    test_all<F16>(way);
    test_all<BF16>(way);
  }
  test_thresholds();
  test_codes({});
  test_panels<F16>({});
  test_panels<BF16>({});
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0 ? 1 : 0;
}
