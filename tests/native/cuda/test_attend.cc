// attend and combine through the shim, against float64.
//
// A case draws queries, a cache as it is stored, tables, masks; the oracle below reads the same bytes and works out
// what the operator means, row by row. Whatever no query may see is NaN, or as large as 16 bits hold where it lies
// between rows that are seen. Exit status 1 names the cases that fail.
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attend_shared.h"
#include "host.h"
#include "params.h"
#include "simt.h"

namespace {

using namespace mla_pass::cuda;
using Complex64 = std::complex<double>;

constexpr double kNaN64 = std::numeric_limits<double>::quiet_NaN();

enum class Hide { nothing, first, inside, last, all };

struct Case {
  std::string name;
  bool bfloat = false;
  Stored as[2] = {Stored::model, Stored::model};
  int batch = 1, heads = 4, groups = 1, tokens = 1;
  int rank = 64, key_rank = 64, rope = 16, split = 64, value_offset = 0;
  std::vector<int> decoded_blocks;  // of the decoded pairs
  int absorbed_pairs = 0;           // only their number matters here: where imaginary parts lie in key_up
  int orders = 1, block = 0;
  int total = 65;                   // of the first sequence; each further one has 17 fewer
  int splits = 1, tile = 64, stages = 2, rows = 16, tile_rows = 0;
  std::vector<int> waves;           // ends of the launches before the last one
  bool causal = true;
  int window = 0;
  float softcap = 0;
  int bias = 0;                     // 1: of its own for each sequence and head; 2: shared by all
  Hide hide = Hide::nothing;
  bool expanded = false;            // key_rank columns of keys, then values
  int bad = -1;                     // a sequence
  int behind = 0;
  int first_sequence = 0;           // problems of the sequences before it are another launch's
};

int up(int x, int to) { return (x + to - 1) / to * to; }

// ---- numbers as they are stored

std::uint16_t narrow(const Case& c, float x) { return c.bfloat ? BF16::narrow(x) : F16::narrow(x); }
double widen(const Case& c, std::uint16_t bits) {
  return static_cast<double>(c.bfloat ? BF16::widen(bits) : F16::widen(bits));
}

double float8(unsigned bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return bits & 128 ? -magnitude : magnitude;
}

struct Rows {
  Part part{};
  std::vector<unsigned char> bytes;

  Rows(Stored as, int numbers, int count) {
    part = {nullptr, numbers, as == Stored::model ? 2 * numbers : numbers + 4, as};
    bytes.resize(static_cast<std::size_t>(count) * static_cast<std::size_t>(part.bytes));
  }
  unsigned char* row(int i) { return bytes.data() + static_cast<std::ptrdiff_t>(i) * part.bytes; }

  // Sets a row at random, around 1; all NaN; or all large.
  void draw(const Case& c, int i, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int x = 0; x < part.numbers; ++x) {
      const float drawn = normal(random);
      if (part.as == Stored::model) {
        put(i, x, narrow(c, drawn));
      } else if (part.as == Stored::int8) {
        row(i)[x] = static_cast<unsigned char>(std::lround(std::clamp(drawn * 40, -127.0f, 127.0f)));
      } else {
        // Exponents of 1 to 15 in three bits less than a magnitude's seven.
        row(i)[x] = static_cast<unsigned char>((drawn < 0 ? 128 : 0) | (random() % 48 + 8));
      }
    }
    for (int x = 0; part.as != Stored::model && x < 4; ++x) {
      const int code = (part.as == Stored::int8 ? -44 : 2) + static_cast<int>(random() % 9) - 4;
      row(i)[part.numbers + x] = static_cast<unsigned char>(part.as == Stored::int8 ? code : code + 128);
    }
  }
  void spoil(const Case& c, int i, bool nan) {
    for (int x = 0; x < part.numbers; ++x) {
      if (part.as == Stored::model) {
        put(i, x, narrow(c, nan ? std::numeric_limits<float>::quiet_NaN() : 300.0f));
      } else {
        row(i)[x] = 126;
      }
    }
    for (int x = 0; part.as != Stored::model && x < 4; ++x) {
      row(i)[part.numbers + x] = static_cast<unsigned char>(part.as == Stored::int8 ? 40 : 128);
    }
  }
  double number(const Case& c, int i, int x) {
    if (part.as == Stored::model) {
      std::uint16_t bits;
      std::memcpy(&bits, row(i) + 2 * x, sizeof bits);
      return widen(c, bits);
    }
    const int segment = x / ((part.numbers + 3) / 4), code = row(i)[part.numbers + segment];
    const bool whole = part.as == Stored::int8;
    const double q = whole ? static_cast<signed char>(row(i)[x]) : float8(row(i)[x]);
    return q * std::exp2((whole ? static_cast<signed char>(code) : code - 128) / 8.0);
  }

 private:
  void put(int i, int x, std::uint16_t bits) { std::memcpy(row(i) + 2 * x, &bits, sizeof bits); }
};

// ---- a case's data

struct Data {
  const Case& c;
  std::mt19937 random;
  int problems_of_sequence, heads, rows, problems, capacity, key_width, rope_width, fine_width, pairs, nope, blocks;
  int value_dim, sum_width;
  std::vector<Span> span;
  std::vector<std::int64_t> mask;
  std::vector<Rows> part;
  std::vector<std::uint16_t> varying, fixed, key_up, key_mean, bias;  // varying: of all blocks
  std::vector<float> mean, cos, sin, fit;
  Bands bands{};
  int angles = 0, mask_step = 0, bias_head = 0, bias_batch = 0;

  explicit Data(const Case& given) : c(given), random(static_cast<unsigned>(std::hash<std::string>{}(given.name))) {
    problems_of_sequence = c.expanded ? c.groups : 1;
    heads = c.heads / problems_of_sequence;
    rows = heads * c.tokens;
    problems = c.batch * problems_of_sequence;
    capacity = c.total + 5;
    key_width = up(c.key_rank, 16);
    rope_width = c.expanded ? 0 : up(c.rope, 16);
    const int decoded = static_cast<int>(c.decoded_blocks.size());
    fine_width = up(2 * decoded, 8);
    pairs = decoded + c.absorbed_pairs;
    nope = 2 * pairs + 3;
    blocks = c.block > 0 ? (c.total + c.block - 1) / c.block : 1;
    value_dim = c.rank - c.value_offset;
    sum_width = up(value_dim, 8);
    draw_spans();
    draw_keys();
    draw_queries();
    draw_bands();
    if (c.bias > 0) draw_bias();
  }

  int total(int sequence) const { return std::max(c.total - 17 * sequence, c.tokens + c.behind); }
  float normal(float deviation = 1) { return std::normal_distribution<float>(0, deviation)(random); }
  std::uint16_t drawn(float deviation) { return narrow(c, normal(deviation)); }

  void draw_spans() {
    mask_step = c.total + 3;
    mask.assign(static_cast<std::size_t>(c.batch * mask_step), 1);
    for (int b = 0; b < c.batch; ++b) {
      const int t = total(b);
      for (int i = 0; i < t; ++i) shown(b, i) = c.hide == Hide::nothing || !hidden(i, t);
      Span s = {t, 0, t, b == c.bad};
      while (s.first < t && shown(b, s.first) == 0) ++s.first;
      while (s.end > 0 && shown(b, s.end - 1) == 0) --s.end;
      span.push_back(s);
    }
  }
  std::int64_t& shown(int b, int row) { return mask[static_cast<std::size_t>(b * mask_step + row)]; }
  bool hidden(int row, int t) const {
    switch (c.hide) {
      case Hide::first:
        return row < t / 3 + 1;
      case Hide::inside:
        return row % 7 == 3;
      case Hide::last:
        return row >= t - t / 4 - 1;
      default:
        return c.hide == Hide::all;
    }
  }

  // Rows of cache b, or of an expansion's problem b.
  void draw_keys() {
    const int held = c.expanded ? problems : c.batch;
    if (c.expanded) {
      part.emplace_back(Stored::model, key_width + sum_width, held * capacity);
    } else {
      part.emplace_back(c.as[0], c.split, held * capacity);
      part.emplace_back(c.as[1], c.rank + c.rope - c.split, held * capacity);
    }
    for (Rows& rows_of : part) {
      for (int b = 0; b < held; ++b) {
        const int sequence = b * c.batch / held;
        const Span& s = span[static_cast<std::size_t>(sequence)];
        for (int i = 0; i < capacity; ++i) {
          const bool seen = i >= s.first && i < s.end;
          if (seen && shown(sequence, i) != 0) {
            rows_of.draw(c, b * capacity + i, random);
          } else {
            rows_of.spoil(c, b * capacity + i, !seen);
          }
        }
      }
      rows_of.part.data = rows_of.bytes.data();
    }
  }

  void draw_queries() {
    const int width = rope_width + fine_width;
    const float deviation = 1 / std::sqrt(static_cast<float>(c.key_rank + c.rope + 2));
    for (int i = 0; i < problems * blocks; ++i) {
      for (int order = 0; order < c.orders; ++order) {
        for (int row = 0; row < rows; ++row) {
          const float of_order = order == 0 ? 1.0f : 1.0f / static_cast<float>(c.block);
          mean.push_back(normal(of_order));
          for (int x = 0; x < key_width; ++x) varying.push_back(x < c.key_rank ? drawn(deviation * of_order) : 0);
        }
      }
    }
    const int decoded = static_cast<int>(c.decoded_blocks.size());
    for (int i = 0; i < problems * rows; ++i) {
      for (int x = 0; x < width; ++x) {
        const bool real = x < rope_width ? x < c.rope : x - rope_width < 2 * decoded;
        fixed.push_back(real ? drawn(deviation) : 0);
      }
    }
  }

  void draw_bands() {
    angles = 2 * pairs + 1;
    for (int i = 0; i < capacity * angles; ++i) {
      const double angle = i / angles * std::pow(100.0, -(i % angles) / static_cast<double>(angles));
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
    const float deviation = 1 / std::sqrt(static_cast<float>(c.key_rank));
    for (int i = 0; i < c.groups * nope * c.key_rank; ++i) key_up.push_back(drawn(deviation));
    for (int i = 0; i < c.groups * nope; ++i) key_mean.push_back(drawn(1));
    bands.pairs = pairs;
    bands.decoded = static_cast<int>(c.decoded_blocks.size());
    bands.orders = c.orders;
    for (int i = 0; i < pairs; ++i) {
      bands.index[i] = static_cast<std::uint16_t>(2 * (pairs - 1 - i) + 1);
      bands.block[i] = i < bands.decoded ? c.decoded_blocks[static_cast<std::size_t>(i)] : 64;
      const bool exact = bands.block[i] == 1;
      const float slope = 1.0f / static_cast<float>(bands.block[i]);
      for (int x = 0; x < 4; ++x) fit.push_back(exact ? x == 0 : normal(x < 2 ? 1 : slope));
    }
  }

  void draw_bias() {
    bias_head = c.bias == 1 ? c.tokens * capacity : 0;
    bias_batch = c.bias == 1 ? c.heads * bias_head : 0;
    const int count = c.bias == 1 ? c.batch * bias_batch : c.tokens * capacity;
    for (int i = 0; i < count; ++i) bias.push_back(drawn(1));
  }
};

// ---- the oracle

struct Query {
  int sequence, problem, row, head, token;  // head: of all
};

class Oracle {
 public:
  explicit Oracle(Data& data) : d_(data), c_(data.c) {}

  // A context, [value_dim].
  std::vector<double> context(const Query& q) {
    const auto width = static_cast<std::size_t>(d_.value_dim);
    const Span& s = d_.span[static_cast<std::size_t>(q.sequence)];
    if (s.bad) return std::vector<double>(width, kNaN64);
    const int self = s.total - c_.behind - c_.tokens + q.token;
    std::vector<std::pair<int, double>> scores;
    double top = -std::numeric_limits<double>::infinity(), mass = 0;
    for (int i = 0; i < s.total; ++i) {
      if (d_.shown(q.sequence, i) == 0 || (c_.causal && i > self) || (c_.window > 0 && i <= self - c_.window)) continue;
      scores.emplace_back(i, score(q, i));
      top = std::max(top, scores.back().second);
    }
    std::vector<double> sum(width, 0.0);
    for (const auto& [i, x] : scores) {
      const double weight = std::exp(x - top);
      mass += weight;
      for (int v = 0; v < d_.value_dim; ++v) sum[static_cast<std::size_t>(v)] += weight * value(q, i, v);
    }
    for (double& x : sum) x = mass > 0 ? x / mass : 0;
    return sum;
  }

 private:
  static double at(const std::vector<float>& x, int i) { return static_cast<double>(x[static_cast<std::size_t>(i)]); }
  double at(const std::vector<std::uint16_t>& x, int i) const { return widen(c_, x[static_cast<std::size_t>(i)]); }

  // Number x of a token's row: latents, then rope dims.
  double stored(const Query& q, int row, int x) {
    const int part = x >= c_.split;
    return d_.part[static_cast<std::size_t>(part)].number(c_, q.sequence * d_.capacity + row, x - part * c_.split);
  }
  double key(const Query& q, int row, int x) {
    return c_.expanded ? d_.part[0].number(c_, q.problem * d_.capacity + row, x) : stored(q, row, x);
  }
  double value(const Query& q, int row, int x) {
    return c_.expanded ? d_.part[0].number(c_, q.problem * d_.capacity + row, d_.key_width + x)
                       : stored(q, row, c_.value_offset + x);
  }

  double score(const Query& q, int row) {
    double s = 0;
    const int block = c_.block > 0 ? row / c_.block : 0;
    for (int order = 0; order < c_.orders; ++order) {
      const int query = ((q.problem * d_.blocks + block) * c_.orders + order) * d_.rows + q.row;
      double product = at(d_.mean, query);
      for (int x = 0; x < c_.key_rank; ++x) product += at(d_.varying, query * d_.key_width + x) * key(q, row, x);
      s += product * (order == 0 ? 1 : row - block * c_.block);
    }
    const int fixed = (q.problem * d_.rows + q.row) * (d_.rope_width + d_.fine_width);
    for (int x = 0; !c_.expanded && x < c_.rope; ++x) s += at(d_.fixed, fixed + x) * stored(q, row, c_.rank + x);
    for (int i = 0; i < d_.bands.decoded; ++i) {
      const int column = fixed + d_.rope_width + 2 * i;
      const Complex64 query = {at(d_.fixed, column), at(d_.fixed, column + 1)};
      s += (std::conj(query) * pair(q, row, i)).real();
    }
    s *= static_cast<double>(scale());
    if (c_.softcap > 0) s = static_cast<double>(c_.softcap) * std::tanh(s / static_cast<double>(c_.softcap));
    if (c_.bias > 0) s += at(d_.bias, q.sequence * d_.bias_batch + q.head * d_.bias_head + q.token * d_.capacity + row);
    return s;
  }

  Complex64 pair(const Query& q, int row, int i) {
    const int group = q.head / (c_.heads / c_.groups), block = d_.bands.block[i];
    Complex64 key{};
    for (int part = 0; part < 2; ++part) {
      const int dim = group * d_.nope + i + part * d_.pairs;
      double x = at(d_.key_mean, dim);
      for (int k = 0; k < c_.key_rank; ++k) x += at(d_.key_up, dim * c_.key_rank + k) * stored(q, row, k);
      key += part == 0 ? Complex64{x, 0} : Complex64{0, x};
    }
    const int first = row / block * block, angle = first * d_.angles + d_.bands.index[i];
    const Complex64 constant = {at(d_.fit, 4 * i), at(d_.fit, 4 * i + 1)};
    const Complex64 slope = {at(d_.fit, 4 * i + 2), at(d_.fit, 4 * i + 3)};
    const Complex64 turned = {at(d_.cos, angle), at(d_.sin, angle)};
    return key * turned * (constant + slope * static_cast<double>(row - first));
  }

 public:
  static float scale() { return 0.8f; }

 private:
  Data& d_;
  const Case& c_;
};

// ---- the kernels

Kernel attend_kernel(bool bfloat, int columns, int rows) {
  struct Entry {
    int columns, rows;
    Kernel f16, bf16;
  };
#define MLA_ENTRY(columns, rows) \
  {columns, rows, Kernel::attend_f16_##columns##_##rows, Kernel::attend_bf16_##columns##_##rows}
  static constexpr Entry kEntries[] = {MLA_ENTRY(128, 16), MLA_ENTRY(256, 16), MLA_ENTRY(384, 16), MLA_ENTRY(512, 16),
                                       MLA_ENTRY(128, 32), MLA_ENTRY(256, 32), MLA_ENTRY(384, 32), MLA_ENTRY(512, 32),
                                       MLA_ENTRY(128, 64), MLA_ENTRY(256, 64)};
#undef MLA_ENTRY
  for (const Entry& entry : kEntries) {
    if (entry.columns >= columns && entry.rows == rows) return bfloat ? entry.bf16 : entry.f16;
  }
  std::fprintf(stderr, "no kernel has %d columns and %d rows\n", columns, rows);
  std::exit(2);
}

class Run {
 public:
  Run(Data& data, const shim::Options& options) : d_(data), c_(data.c), device_(options, 227 * 1024) {
    const auto states = static_cast<std::size_t>(d_.problems * c_.splits * d_.rows);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    sum_.assign(states * static_cast<std::size_t>(d_.sum_width), nan);
    top_.assign(states, nan);
    mass_.assign(states, nan);
    out_step_ = d_.value_dim + 3;
    out_.assign(static_cast<std::size_t>(c_.batch * fresh() * c_.heads * out_step_), kUntouched);
  }

  static constexpr std::uint16_t kUntouched = 0x1234;
  int fresh() const { return c_.tokens + c_.behind; }

  void attend() {
    int begin = 0;
    std::vector<int> ends = c_.waves;
    ends.push_back(c_.total);
    for (const int end : ends) {
      for (int first = 0; first < c_.batch;) {
        const int sequences = first < c_.first_sequence ? c_.first_sequence : c_.batch - first;
        launch(begin, end, first, sequences);
        first += sequences;
      }
      begin = end;
    }
  }

  void combine() {
    Combine p{sum_.data(), top_.data(), mass_.data(), c_.batch, d_.problems_of_sequence, c_.splits, d_.rows,
              d_.sum_width, d_.value_dim, c_.tokens, d_.heads, c_.heads / c_.groups, c_.expanded, fresh(),
              d_.span.data(), out_.data(), out_step_};
    const Grid grid = {static_cast<unsigned>(combine_grid(p)), 1, 1};
    device_.launch(c_.bfloat ? Kernel::combine_bf16 : Kernel::combine_f16, grid, 0, &p, sizeof p);
  }

  const std::uint16_t* out(int sequence, int token, int head) const {
    return out_.data() + ((sequence * fresh() + token) * c_.heads + head) * out_step_;
  }
  int out_step() const { return out_step_; }

  // Whether nothing was written of a sequence's state.
  bool untouched(int sequence) const {
    const std::ptrdiff_t count = d_.problems_of_sequence * c_.splits * d_.rows;
    return std::all_of(mass_.begin() + sequence * count, mass_.begin() + (sequence + 1) * count,
                       [](float mass) { return std::isnan(mass); });
  }

 private:
  void launch(int begin, int end, int first, int sequences) {
    Attend p = parameters(begin, end, first, sequences);
    p.shared = attend_shared(p, c_.rows);
    const Grid grid = {static_cast<unsigned>((d_.rows + p.tile_rows - 1) / p.tile_rows),
                       static_cast<unsigned>(sequences * d_.problems_of_sequence), static_cast<unsigned>(c_.splits)};
    device_.launch(attend_kernel(c_.bfloat, d_.value_dim + c_.value_offset % 8, c_.rows), grid,
                   static_cast<std::size_t>(p.shared.total), &p, sizeof p);
  }

  Attend parameters(int begin, int end, int first, int sequences) {
    Attend p{};
    p.block = c_.block;
    p.blocks = c_.block > 0 ? (end - begin + c_.block - 1) / c_.block : 1;
    slice(begin, p.blocks, first * d_.problems_of_sequence, sequences * d_.problems_of_sequence);
    p.varying = varying_.data();
    p.mean = mean_.data();
    const int fixed_width = d_.rope_width + d_.fine_width;
    p.fixed = fixed_width > 0 ? d_.fixed.data() + first * d_.rows * fixed_width : nullptr;
    p.key_width = d_.key_width;
    p.rope_width = d_.rope_width;
    p.fine_width = d_.fine_width;
    p.orders = c_.orders;
    p.rows = d_.rows;
    p.tile_rows = c_.tile_rows > 0 ? c_.tile_rows : c_.rows;
    p.tokens = c_.tokens;
    p.behind = c_.behind;
    p.heads = d_.heads;
    p.per_group = c_.heads / c_.groups;
    p.groups_apart = d_.problems_of_sequence;
    p.token_major = c_.expanded;
    p.first_sequence = first;
    set_keys(p, begin, end, first);
    p.key_up = d_.key_up.data();
    p.key_mean = d_.key_mean.data();
    p.nope_dim = d_.nope;
    p.key_rank = c_.key_rank;
    p.tables = {d_.cos.data(), d_.sin.data(), d_.angles, d_.capacity};
    p.value_column = c_.expanded ? d_.key_width : c_.value_offset;
    p.value_dim = d_.value_dim;
    p.span = d_.span.data();
    p.padding_mask = c_.hide == Hide::nothing ? nullptr : d_.mask.data();
    p.mask_step = d_.mask_step;
    p.bias = c_.bias > 0 ? d_.bias.data() : nullptr;
    p.bias_batch = d_.bias_batch;
    p.bias_head = d_.bias_head;
    p.bias_token = d_.capacity;
    p.window = c_.window;
    p.causal = c_.causal;
    p.scale = Oracle::scale();
    p.softcap = c_.softcap;
    p.begin = begin;
    p.end = end;
    p.resume = begin > 0;
    p.splits = c_.splits;
    p.tile = c_.tile;
    p.stages = c_.stages;
    p.sum = sum_.data();
    p.top = top_.data();
    p.mass = mass_.data();
    p.sum_width = d_.sum_width;
    p.bands = d_.bands;
    p.bands.fit = d_.fit.data();
    return p;
  }

  // The launch's blocks of the queries.
  void slice(int begin, int blocks, int first, int problems) {
    varying_.clear();
    mean_.clear();
    const int from = c_.block > 0 ? begin / c_.block : 0, rows = c_.orders * d_.rows;
    for (int problem = first; problem < first + problems; ++problem) {
      const std::ptrdiff_t at = (problem * d_.blocks + from) * rows, count = blocks * rows;
      mean_.insert(mean_.end(), d_.mean.begin() + at, d_.mean.begin() + at + count);
      varying_.insert(varying_.end(), d_.varying.begin() + at * d_.key_width,
                      d_.varying.begin() + (at + count) * d_.key_width);
    }
  }

  void set_keys(Attend& p, int begin, int end, int first) {
    if (!c_.expanded) {
      p.part[0] = d_.part[0].part;
      p.part[1] = d_.part[1].part;
      p.parts = 2;
      p.capacity = d_.capacity;
      p.rank = c_.rank;
      p.rope_dim = c_.rope;
      p.split = c_.split;
      return;
    }
    p.part[0] = d_.part[0].part;
    p.parts = 1;
    p.capacity = end - begin;
    expansion_.clear();
    for (int problem = first * d_.problems_of_sequence; problem < d_.problems; ++problem) {
      expansion_.insert(expansion_.end(), d_.part[0].row(problem * d_.capacity + begin),
                        d_.part[0].row(problem * d_.capacity + end));
    }
    p.part[0].data = expansion_.data();
  }

  Data& d_;
  const Case& c_;
  CpuDevice device_;
  std::vector<float> sum_, top_, mass_, mean_;
  std::vector<std::uint16_t> varying_, out_;
  std::vector<unsigned char> expansion_;
  int out_step_ = 0;
};

// ---- comparison

// Keys, weights and contexts are rounded to 16 bits once each; a sum of weighed values is no larger than the values.
double tolerance(const Case& c, double expected) {
  return (c.bfloat ? 0x1p-9 : 0x1p-12) * (4 + std::abs(expected));
}

double g_worst[2] = {};  // of the tolerance

bool close(const Case& c, double expected, double found) {
  if (std::isnan(expected) || std::isnan(found)) return std::isnan(expected) && std::isnan(found);
  const double error = std::abs(found - expected) / tolerance(c, expected);
  g_worst[c.bfloat] = std::max(g_worst[c.bfloat], error);
  return error <= 1;
}

// Empty where all is well.
std::string compared(Data& data, const Run& run) {
  const Case& c = data.c;
  Oracle oracle(data);
  for (int b = 0; b < c.batch; ++b) {
    if (b == c.bad && !run.untouched(b)) return "the bad sequence " + std::to_string(b) + " was met with";
    for (int token = 0; token < c.tokens; ++token) {
      for (int head = 0; head < c.heads; ++head) {
        const int group = head / data.heads, local = head % data.heads;
        const Query query = {b, b * data.problems_of_sequence + group,
                             c.expanded ? token * data.heads + local : local * c.tokens + token, head, token};
        const std::vector<double> expected = oracle.context(query);
        const std::uint16_t* found = run.out(b, token, head);
        for (int x = 0; x < run.out_step(); ++x) {
          const bool good = x < data.value_dim ? close(c, expected[static_cast<std::size_t>(x)], widen(c, found[x]))
                                               : found[x] == Run::kUntouched;
          if (good) continue;
          const double wanted = x < data.value_dim ? expected[static_cast<std::size_t>(x)] : kNaN64;
          return "sequence " + std::to_string(b) + " token " + std::to_string(token) + " head " + std::to_string(head) +
                 " column " + std::to_string(x) + " is " + std::to_string(widen(c, found[x])) + "; expected " +
                 std::to_string(wanted);
        }
      }
    }
  }
  return "";
}

struct Mode {
  const char* name;
  shim::Copies copies;
  shim::Order order;
};

constexpr Mode kModes[] = {{"deferred forward", shim::Copies::deferred, shim::Order::forward},
                           {"eager backward", shim::Copies::eager, shim::Order::backward},
                           {"deferred backward", shim::Copies::deferred, shim::Order::backward},
                           {"eager forward", shim::Copies::eager, shim::Order::forward}};

std::string outcome(const Case& c, const Mode& mode) {
  Data data(c);
  Run run(data, {.copies = mode.copies, .order = mode.order});
  try {
    run.attend();
    run.combine();
  } catch (const shim::Fault& fault) {
    return fault.what();
  }
  return compared(data, run);
}

// ---- cases

// Cases are lists of what is told apart by name; each of a list meets the next of the ways to cut the work.
class Cases {
 public:
  void add(const std::string& name, Case c) {
    constexpr int kTiles[4][2] = {{64, 2}, {32, 2}, {64, 1}, {32, 1}};
    const int i = count_++;
    if (c.tile == 0) {
      c.tile = kTiles[i % 4][0];
      c.stages = kTiles[i % 4][1];
    }
    for (const bool bfloat : {false, true}) {
      c.bfloat = bfloat;
      c.name = name + (bfloat ? " bf16" : " f16") + " tile " + std::to_string(c.tile) + "x" + std::to_string(c.stages);
      all.push_back(c);
    }
  }

  std::vector<Case> all;

 private:
  int count_ = 0;
};

Case base() {
  Case c;
  c.tile = 0;  // the next way
  return c;
}

Case with_bands(int orders, int block, std::vector<int> decoded) {
  Case c = base();
  c.orders = orders;
  c.block = block;
  c.decoded_blocks = std::move(decoded);
  c.absorbed_pairs = block > 0 ? 5 : 0;
  return c;
}

void add_lengths(Cases& cases) {
  constexpr int kSplits[] = {1, 2, 7};
  int i = 0;
  for (const int total : {1, 31, 32, 33, 63, 64, 65, 128, 129, 300, 1000}) {
    Case c = base();
    c.total = total;
    c.splits = kSplits[i++ % 3];
    cases.add("length " + std::to_string(total), c);
    c.tokens = 3;
    c.total = std::max(total, 3);
    c.batch = 2;
    c.splits = kSplits[i % 3];
    cases.add("three tokens of length " + std::to_string(total), c);
  }
}

void add_heads(Cases& cases) {
  constexpr int kRows[] = {16, 32, 64};
  constexpr int kSplits[] = {1, 2, 7};
  int i = 0;
  for (const int heads : {1, 4, 9, 14, 16, 20, 32, 64, 128}) {
    Case c = base();
    c.heads = heads;
    c.total = 97;
    c.rows = kRows[i % 3];
    c.splits = kSplits[i / 3];
    cases.add("heads " + std::to_string(heads), c);
    ++i;
  }
}

void add_rows(Cases& cases) {
  for (const int rope : {0, 8, 64, 128}) {
    Case c = base();
    c.rope = rope;
    cases.add("rope " + std::to_string(rope), c);
    c.as[0] = Stored::int8;
    cases.add("int8, rope " + std::to_string(rope), c);
  }
  for (const int split : {0, 8, 33, 40, 64, 72, 77, 80}) {
    for (const Stored as : {Stored::model, Stored::int8, Stored::float8}) {
      Case c = base();
      c.split = split;
      c.as[0] = c.as[1] = as;
      c.batch = 2;
      c.total = 90;
      c.splits = 2;
      cases.add("split " + std::to_string(split) + " as " + std::to_string(static_cast<int>(as)), c);
    }
  }
  for (const int rank : {8, 24, 37, 80, 128, 250, 256, 384, 512}) {
    Case c = base();
    c.rank = c.split = rank;
    c.key_rank = rank - rank / 3;
    cases.add("rank " + std::to_string(rank), c);
    c.as[0] = rank % 2 ? Stored::int8 : Stored::float8;
    c.rope = 64;
    cases.add("8 bits, rank " + std::to_string(rank), c);
  }
  struct Size {
    int rank, rows;
  };
  for (const Size& size : {Size{256, 32}, {256, 64}, {384, 32}, {512, 32}, {120, 64}}) {
    Case c = with_bands(2, 64, {1, 4});
    c.rank = c.split = size.rank;
    c.key_rank = 32;
    c.heads = 40;
    c.groups = 5;
    c.rows = size.rows;
    cases.add("rank " + std::to_string(size.rank) + " with rows of " + std::to_string(size.rows), c);
  }
  for (const int offset : {1, 5, 8, 13, 24, 63}) {
    Case c = base();
    c.value_offset = offset;
    c.key_rank = 40;
    cases.add("values from " + std::to_string(offset), c);
    c.as[0] = c.as[1] = Stored::float8;
    cases.add("values of 8 bits from " + std::to_string(offset), c);
  }
  Case c = base();
  c.key_rank = 0;
  cases.add("rope alone", c);
}

void add_bands(Cases& cases) {
  for (const int orders : {1, 2}) {
    for (const int block : {64, 128}) {
      Case c = with_bands(orders, block, {});
      c.total = 330;
      c.splits = orders;
      const std::string name = "order " + std::to_string(orders - 1) + ", blocks of " + std::to_string(block);
      for (int i = 0; i < 4; ++i) cases.add(name, c);  // all four ways
      c.as[0] = Stored::int8;
      c.key_rank = 48;
      cases.add(name + ", int8", c);
      c.rows = 32;
      c.heads = 20;
      c.decoded_blocks = {1, 1, 4};
      c.groups = 4;
      cases.add(name + ", with decoded pairs", c);
    }
  }
  struct Shape {
    int per_group, groups, tokens, rows, tile_rows;
  };
  // Up to six groups in a tile of queries, and tiles that begin and end amid a group.
  for (const Shape& shape : {Shape{1, 3, 1, 16, 0}, Shape{3, 3, 1, 16, 0}, Shape{3, 7, 1, 16, 0}, Shape{4, 2, 1, 16, 0},
                             Shape{8, 2, 1, 16, 0}, Shape{8, 3, 1, 16, 12}, Shape{8, 1, 3, 16, 0},
                             Shape{3, 3, 3, 16, 8}, Shape{4, 4, 3, 32, 0}, Shape{4, 16, 1, 64, 0}}) {
    Case c = with_bands(1, 0, {1, 1, 2, 8, 32});
    c.heads = shape.per_group * shape.groups;
    c.groups = shape.groups;
    c.tokens = shape.tokens;
    c.rows = shape.rows;
    c.tile_rows = shape.tile_rows;
    c.total = 100;
    const std::string name = std::to_string(shape.groups) + " groups of " + std::to_string(shape.per_group) + ", " +
                             std::to_string(shape.tokens) + " tokens";
    cases.add(name, c);
    c.key_rank = 37;  // rows of key_up begin at odd numbers
    c.decoded_blocks.resize(4);
    cases.add(name + ", odd key rank", c);
  }
}

void add_sights(Cases& cases) {
  for (const Hide hide : {Hide::first, Hide::inside, Hide::last, Hide::all}) {
    for (const int tokens : {1, 3}) {
      Case c = base();
      c.hide = hide;
      c.tokens = tokens;
      c.batch = 2;
      c.total = 150;
      c.splits = tokens;
      cases.add("hidden rows " + std::to_string(static_cast<int>(hide)) + ", tokens " + std::to_string(tokens), c);
    }
  }
  for (const int window : {1, 5, 64, 100}) {
    Case c = base();
    c.window = window;
    c.tokens = 3;
    c.total = 200;
    c.splits = 2;
    cases.add("window " + std::to_string(window), c);
    c.expanded = true;
    c.tokens = 40;
    c.heads = 4;
    c.groups = 2;
    c.rows = 32;
    cases.add("expanded, window " + std::to_string(window), c);
  }
  Case c = base();
  c.tokens = 3;
  c.causal = false;
  cases.add("not causal", c);
  c.causal = true;
  c.behind = 4;
  cases.add("tokens behind", c);
  c.softcap = 1.5f;
  c.batch = 2;
  cases.add("softcap", c);
  for (const int bias : {1, 2}) {
    c.bias = bias;
    cases.add("bias " + std::to_string(bias), c);
    Case e = c;
    e.expanded = true;
    e.groups = 2;
    cases.add("expanded, bias " + std::to_string(bias), e);
  }
  c = base();
  c.batch = 3;
  c.bad = 1;
  c.splits = 2;
  cases.add("a bad sequence", c);
  c.first_sequence = 2;
  cases.add("two runs of sequences", c);
  c.waves = {64};
  c.total = 120;
  cases.add("two runs of sequences in two waves", c);
}

void add_waves(Cases& cases) {
  for (const std::vector<int>& waves : {std::vector<int>{128}, {64, 256}, {128, 192}}) {
    Case c = with_bands(2, 64, {1, 2});
    c.total = 290;
    c.waves = waves;
    c.splits = 2;
    c.batch = 2;
    const std::string name = "waves to " + std::to_string(waves.back());
    cases.add(name, c);
    c.hide = Hide::first;
    c.value_offset = 3;
    cases.add(name + ", first rows hidden", c);
    c = base();
    c.total = 290;
    c.waves = waves;
    c.expanded = true;
    c.heads = 6;
    c.groups = 2;
    c.tokens = 50;
    c.rows = 64;
    cases.add(name + ", expanded", c);
  }
}

void add_expanded(Cases& cases) {
  for (const int tokens : {1, 17, 64}) {
    for (const int rows : {16, 32, 64}) {
      Case c = base();
      c.expanded = true;
      c.heads = 6;
      c.groups = 2;
      c.tokens = tokens;
      c.rows = rows;
      c.total = 130;
      c.batch = 2;
      c.key_rank = 24;
      c.rank = 33;  // values
      c.splits = rows == 16 ? 2 : 1;
      cases.add("expanded, tokens " + std::to_string(tokens), c);
    }
  }
}

bool failed(const Case& c, const Mode& mode) {
  const std::string what = outcome(c, mode);
  if (what.empty()) return false;
  std::printf("FAILED %s, %s: %s\n", c.name.c_str(), mode.name, what.c_str());
  return true;
}

}  // namespace

// With an argument, only cases whose name contains it, in all modes; otherwise each in one of them, in turn.
int main(int count, char** arguments) {
  Cases cases;
  add_lengths(cases);
  add_heads(cases);
  add_rows(cases);
  add_bands(cases);
  add_sights(cases);
  add_waves(cases);
  add_expanded(cases);
  int failures = 0, runs = 0;
  for (std::size_t i = 0; i < cases.all.size(); ++i) {
    const Case& c = cases.all[i];
    if (count > 1 && c.name.find(arguments[1]) == std::string::npos) continue;
    for (std::size_t mode = 0; mode < std::size(kModes); ++mode) {
      if (count == 1 && mode != (i / 2 + i / 8) % std::size(kModes)) continue;
      ++runs;
      failures += failed(c, kModes[mode]);
    }
  }
  std::printf("%d of %d runs failed; largest error f16 %.2f, bf16 %.2f of the tolerance\n", failures, runs,
              g_worst[0], g_worst[1]);
  return failures > 0 || runs == 0;
}
