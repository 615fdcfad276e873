// The absorbed form on a matrix unit, for latents that bfloat16 holds exactly: those stored as bfloat16 or in 8 bits.
//
// A chunk of cached rows becomes two operands, each made once for all heads: `keys`, pairs of latent columns by rows,
// and `values`, pairs of rows by latent columns. Queries, key_up and attention weights are float32 and meet them in two
// bfloat16 terms, high and low, whose sum keeps 16 bits of each number; sums are float32. The scales of a coded row
// belong to runs of columns, so that products are made run by run and scaled as float32.
//
// Counted per cached row: each operand moves a number once in and once out, whatever the number of heads; a product of
// tiles is 16 x 16 x 32 multiply-adds in 16 cycles, and there are two for every number, where vectors do 32 a cycle.
#pragma once

#include "bfloat.h"
#include "fine.h"
#include "weigh.h"

namespace mla_pass::MLA_PASS_ISA {

constexpr Index kKeysStep = kChunk + kTileSide;

inline Index rounded_up(Index count, Index to) { return (count + to - 1) / to * to; }

// All tiles are of full size: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

class TileUse {
 public:
  TileUse() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTileSide;
    }
    _tile_loadconfig(&config);
  }
  ~TileUse() { _tile_release(); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};

// x[16][16] to out, rows and columns exchanged: what lies in a lane does not matter.
inline void transpose(const std::uint32_t* x, Index step, std::uint32_t* out, Index out_step) {
  transpose_tile<true>(reinterpret_cast<const float*>(x), 16, 16, step, reinterpret_cast<float*>(out), out_step);
}

// A float32 operand in two bfloat16 terms: [rows][step] high, and the same low; over `depth` columns of the latents, and
// rope dims if `rope`.
struct Terms {
  const std::uint16_t *high, *low;
  Index step, depth;
  bool rope;
};

inline void split(__m512 x, std::uint16_t* high, std::uint16_t* low) {
  const __m256i top = (__m256i)_mm512_cvtneps_pbh(x);
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(top), 16)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), top);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), (__m256i)_mm512_cvtneps_pbh(rest));
}

template <class T>
class Tiles {
 public:
  Tiles(const Problem<T>& p, const PackedScratch& scratch) : p_(p), size_(p.size), scratch_(scratch) {
    lay_part(0, 0, size_.split);
    lay_part(1, size_.split, size_.rank + size_.rope_dim);
  }

  // Whether the rope part is here, too: where it is stored as what the tiles take.
  bool rope() const { return size_.rope_dim > 0 && runs_ > 0 && run_[runs_ - 1].end == size_.rank + size_.rope_dim; }

  // Latents of `count` rows from row `first` on, as both operands.
  void read(Index first, Index count) {
    for (Index key = 0; key < kChunk; ++key) {
      for (Index i = 0; i < runs_; ++i) read_run(run_[i], first + key, key, key < count);
    }
    for (Index i = 0; i < runs_; ++i) {
      if (read_by_keys(run_[i])) lay_keys(run_[i]);
      if (has_values(run_[i])) lay_values(run_[i]);
    }
  }

  // Rows x [rows][step] over the latents' first key_rank columns, and rows of rope dims [rows][rope_step] where they are
  // given and here, as left operands in `room` [2][rows, 16s][columns].
  Terms left(const float* x, Index rows, Index step, const float* rope, Index rope_step, std::uint16_t* room) const {
    const Terms terms = {room, room + rounded_up(rows, kTileSide) * columns_, columns_, size_.key_rank, rope != nullptr};
    std::uint16_t* low = room + rounded_up(rows, kTileSide) * columns_;
    for (Index row = 0; row < rows; ++row) {
      for (Index i = 0; i < runs_; ++i) {
        const Run& run = run_[i];
        const Index length = key_columns(run, terms), at = row * columns_ + run.place;
        const float* from = run.begin < size_.rank ? x + row * step + run.begin
                                                   : rope + row * rope_step + run.begin - size_.rank;
        for (Index c = 0; c < rounded_up(length, kTileDepth); c += 16) {
          split(_mm512_maskz_loadu_ps(lanes_below(length, c), from + c), room + at + c, low + at + c);
        }
      }
    }
    return terms;
  }

  // `x` from a row on, without rope dims, that reads the first `depth` columns of the latents.
  Terms rows_of(const Terms& x, Index row, Index depth) const {
    return {x.high + row * x.step, x.low + row * x.step, x.step, depth, false};
  }

  // What asking for the next rows is worth beside tiles was not measured: it is not done here.
  // s[row][key] = x[row] . latent[key] for keys [key, key + keys) of the chunk; columns up to whole tiles are written.
  void products(const Terms& x, Index rows, Index key, Index keys, float* s, Index step, Ahead&) const {
    for (Index row = 0; row < rows; row += kTileSide) {
      const Index height = least(kTileSide, rows - row);
      float* to = s + row * step;
      Index done = 0;
      for (; keys - done > 3 * kTileSide; done += 4 * kTileSide) product_tiles<FourTiles>(x, row, height, key + done, to + done, step);
      for (; done < keys; done += kTileSide) product_tiles<OneTile>(x, row, height, key + done, to + done, step);
    }
  }

  // sum[row] += weight[row] times the values of `keys` rows; weights s [rows][step].
  void weighted(Index rows, Index keys, const float* s, Index step, const Partial& part, Ahead&) const {
    for (Index i = 0; i < runs_; ++i) {
      const Run& run = run_[i];
      if (!has_values(run)) continue;
      if (i == 0 || run.scaled() || run_[i - 1].scaled() || !has_values(run_[i - 1])) {
        split_weights(run, rows, keys, s, step);
      }
      const Index begin = greatest(run.begin, size_.value_offset), columns = run.end - begin;
      for (Index row = 0; row < rows; row += kTileSide) {
        float* sum = part.sum + row * part.value_width + begin - size_.value_offset;
        const std::uint16_t* high = scratch_.weights + row * kChunk;
        sum_tiles(high, high + rounded_up(rows, kTileSide) * kChunk, run.place, columns, sum, part.value_width);
      }
    }
  }

 private:
  // Columns [begin, end) of the row, latents or rope dims, that lie side by side in a part from its number `from` on,
  // all at one scale; `place` in operands, where every run starts at whole tiles.
  struct Run {
    Index begin, end, part, from, place;
    Index code = -1;  // the element of a stored row that holds the run's scale, if it has one

    bool scaled() const { return code >= 0; }
  };

  // The runs of a part that holds columns [begin, end) of the row; a part of another type holds none.
  void lay_part(Index part, Index begin, Index end) {
    const Stored& from = p_.part[part];
    const Index numbers = end - begin;
    const bool coded = has_codes(from.as);
    if (numbers == 0 || !is_narrow(from.as)) return;
    const Index length = coded ? (numbers + kSegments - 1) / kSegments : numbers;
    for (Index at = begin, segment = 0; at < end; at += length, ++segment) {
      const Index stop = least(at + length, end), middle = least(greatest(at, size_.rank), stop);
      const Index code = coded ? numbers + segment : -1;
      add_run({at, middle, part, at - begin, 0, code});
      add_run({middle, stop, part, middle - begin, 0, code});
    }
  }

  void add_run(Run run) {
    if (run.begin == run.end) return;
    run.place = columns_;
    run_[runs_++] = run;
    columns_ += rounded_up(run.end - run.begin, kTileDepth);
  }

  // Columns of a run that products with x are made of.
  Index key_columns(const Run& run, const Terms& x) const {
    if (run.begin >= size_.rank) return x.rope ? run.end - run.begin : 0;
    return greatest(0, least(run.end, x.depth) - run.begin);
  }

  bool read_by_keys(const Run& run) const { return run.begin >= size_.rank || run.begin < size_.key_rank; }

  bool has_values(const Run& run) const { return run.begin < size_.rank && run.end > size_.value_offset; }

  void read_run(const Run& run, Index row, Index key, bool there) {
    const Stored& from = p_.part[run.part];
    if (from.as == Storage::int8) return read_coded(run, static_cast<const std::int8_t*>(from.data), row, key, there);
    if (from.as == Storage::float8) return read_coded(run, static_cast<const Float8*>(from.data), row, key, there);
    const Bfloat* numbers = static_cast<const Bfloat*>(from.data) + row * from.width + run.from;
    std::uint16_t* to = scratch_.rows + key * columns_ + run.place;
    const Index length = there ? run.end - run.begin : 0;
    for (Index c = 0; c < rounded_up(run.end - run.begin, kTileDepth); c += 32) {
      _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(wide_lanes_below(length, c), numbers + c));
    }
  }

  // Whole numbers up to 127 are exact in bfloat16, and so is every float8.
  template <class Q>
  void read_coded(const Run& run, const Q* data, Index row, Index key, bool there) {
    const Q* stored = data + row * p_.part[run.part].width;
    const Q* numbers = stored + run.from;
    std::uint16_t* to = scratch_.rows + key * columns_ + run.place;
    const Index length = there ? run.end - run.begin : 0;
    for (Index c = 0; c < rounded_up(run.end - run.begin, kTileDepth); c += 32) {
      const __m256i q = _mm256_maskz_loadu_epi8(wide_lanes_below(length, c), numbers + c);
      const Vec low = widened(_mm256_castsi256_si128(q), Q{}), high = widened(_mm256_extracti128_si256(q, 1), Q{});
      _mm512_storeu_si512(to + c, (__m512i)_mm512_cvtne2ps_pbh(high.x, low.x));
    }
    scale_at(run)[key] = there ? step_of(code_of(stored + run.code)) : 0.0f;
  }

  float* scale_at(const Run& run) const { return scratch_.scales + (&run - run_) * kKeysStep; }

  // [pair of columns][key] dwords.
  void lay_keys(const Run& run) {
    for (Index pair = 0; pair < rounded_up(run.end - run.begin, kTileDepth) / 2; pair += kTileSide) {
      std::uint32_t* to = scratch_.keys + (run.place / 2 + pair) * kKeysStep;
      for (Index key = 0; key < kChunk; key += kTileSide) {
        const std::uint16_t* from = scratch_.rows + key * columns_ + run.place + 2 * pair;
        transpose(reinterpret_cast<const std::uint32_t*>(from), columns_ / 2, to + key, kKeysStep);
      }
    }
  }

  // [pair of keys][column] dwords, from the run's first value column on; zeros up to whole tiles.
  void lay_values(const Run& run) {
    const Index skipped = greatest(run.begin, size_.value_offset) - run.begin, length = run.end - run.begin - skipped;
    for (Index pair = 0; pair < kChunk / 2; ++pair) {
      const std::uint16_t* from = scratch_.rows + 2 * pair * columns_ + run.place + skipped;
      interleave(from, from + columns_, length, scratch_.values + pair * columns_ + run.place);
    }
  }

  // Results in tiles 0 to 3, left terms in 4 and 5, right operands in 6 and 7. A product is ready after some 52 cycles
  // and takes 16: four results take turns. (GCC reads the numbers of tiles as text: there are no templates over them.)
  struct FourTiles {
    static constexpr Index count = 4;
    static void zero() {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    static void add(const std::uint32_t* keys) {
      _tile_loadd(6, keys, kKeysStep * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, keys + kTileSide, kKeysStep * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, keys + 2 * kTileSide, kKeysStep * 4);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, keys + 3 * kTileSide, kKeysStep * 4);
      _tile_dpbf16ps(3, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, keys + kTileSide, kKeysStep * 4);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, keys, kKeysStep * 4);
      _tile_dpbf16ps(0, 5, 6);
    }
    static void store(float* found) {
      _tile_stored(0, found, kTileSide * 4);
      _tile_stored(1, found + kTileSide * kTileSide, kTileSide * 4);
      _tile_stored(2, found + 2 * kTileSide * kTileSide, kTileSide * 4);
      _tile_stored(3, found + 3 * kTileSide * kTileSide, kTileSide * 4);
    }
  };

  struct OneTile {
    static constexpr Index count = 1;
    static void zero() {
      _tile_zero(0);
      _tile_zero(1);
    }
    static void add(const std::uint32_t* keys) {
      _tile_loadd(6, keys, kKeysStep * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
    }
    static void store(float* found) {
      _tile_stored(0, found, kTileSide * 4);
      alignas(64) float low[kTileSide * kTileSide];
      _tile_stored(1, low, kTileSide * 4);
      for (Index i = 0; i < kTileSide * kTileSide; i += 16) {
        _mm512_store_ps(found + i, _mm512_add_ps(_mm512_load_ps(found + i), _mm512_load_ps(low + i)));
      }
    }
  };

  template <class Few>
  void product_tiles(const Terms& x, Index row, Index height, Index column, float* s, Index step) const {
    alignas(64) float found[Few::count * kTileSide * kTileSide];
    bool fresh = true, waiting = false;
    const auto finish = [&](const Run& run) {
      Few::store(found);
      for (Index tile = 0; tile < Few::count; ++tile) {
        take(found + tile * kTileSide * kTileSide, height, run, column + tile * kTileSide, fresh, s + tile * kTileSide,
             step);
      }
      Few::zero();
      fresh = waiting = false;
    };
    Few::zero();
    for (Index i = 0; i < runs_; ++i) {
      const Run& run = run_[i];
      const Index length = key_columns(run, x);
      if (length == 0) continue;
      if (waiting && run.scaled()) finish(Run{});  // what came before has no scale
      for (Index c = 0; c < length; c += kTileDepth) {
        const Index at = row * x.step + run.place + c;
        _tile_loadd(4, x.high + at, x.step * 2);
        _tile_loadd(5, x.low + at, x.step * 2);
        Few::add(scratch_.keys + (run.place + c) / 2 * kKeysStep + column);
      }
      waiting = true;
      if (run.scaled()) finish(run);
    }
    if (waiting) finish(Run{});
  }

  // A tile of results to s, or added to it, times the scales of its keys.
  void take(const float* found, Index height, const Run& run, Index column, bool fresh, float* s, Index step) const {
    const __m512 scale = run.scaled() ? _mm512_loadu_ps(scale_at(run) + column) : _mm512_set1_ps(1.0f);
    for (Index row = 0; row < height; ++row, s += step) {
      const __m512 y = _mm512_mul_ps(_mm512_load_ps(found + row * kTileSide), scale);
      _mm512_storeu_ps(s, fresh ? y : _mm512_add_ps(y, _mm512_loadu_ps(s)));
    }
  }

  // [2][rows, 16s][kChunk]: weights times the run's scales, zero beyond the last key.
  void split_weights(const Run& run, Index rows, Index keys, const float* s, Index step) const {
    std::uint16_t *high = scratch_.weights, *low = high + rounded_up(rows, kTileSide) * kChunk;
    for (Index row = 0; row < rows; ++row) {
      for (Index key = 0; key < kChunk; key += 16) {
        __m512 x = _mm512_maskz_loadu_ps(lanes_below(keys, key), s + row * step + key);
        if (run.scaled()) x = _mm512_mul_ps(x, _mm512_loadu_ps(scale_at(run) + key));
        split(x, high + row * kChunk + key, low + row * kChunk + key);
      }
    }
  }

  // sum[.][0, columns) += 16 rows of weights, their high and low terms, times the values of a run.
  void sum_tiles(const std::uint16_t* high, const std::uint16_t* low, Index place, Index columns, float* sum,
                 Index step) const {
    for (Index key = 0; key < kChunk; key += kTileDepth) {
      _tile_loadd(6, high + key, kChunk * 2);
      _tile_loadd(7, low + key, kChunk * 2);
      const std::uint32_t* values = scratch_.values + key / 2 * columns_ + place;
      Index c = 0;
      for (; columns - c > 2 * kTileSide; c += 3 * kTileSide) sum_three(values + c, sum + c, step);
      for (; c < columns; c += kTileSide) sum_one(values + c, sum + c, step);
    }
  }

  // Results in tiles 0 to 2, right operands in 3 to 5, weights in 6 and 7.
  void sum_three(const std::uint32_t* values, float* sum, Index step) const {
    _tile_loadd(0, sum, step * 4);
    _tile_loadd(3, values, columns_ * 4);
    _tile_dpbf16ps(0, 6, 3);
    _tile_loadd(1, sum + kTileSide, step * 4);
    _tile_loadd(4, values + kTileSide, columns_ * 4);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(2, sum + 2 * kTileSide, step * 4);
    _tile_loadd(5, values + 2 * kTileSide, columns_ * 4);
    _tile_dpbf16ps(2, 6, 5);
    _tile_dpbf16ps(0, 7, 3);
    _tile_dpbf16ps(1, 7, 4);
    _tile_dpbf16ps(2, 7, 5);
    _tile_stored(0, sum, step * 4);
    _tile_stored(1, sum + kTileSide, step * 4);
    _tile_stored(2, sum + 2 * kTileSide, step * 4);
  }

  void sum_one(const std::uint32_t* values, float* sum, Index step) const {
    _tile_loadd(0, sum, step * 4);
    _tile_loadd(3, values, columns_ * 4);
    _tile_dpbf16ps(0, 6, 3);
    _tile_dpbf16ps(0, 7, 3);
    _tile_stored(0, sum, step * 4);
  }

  const TileUse use_;
  const Problem<T>& p_;
  const Sizes& size_;
  const PackedScratch& scratch_;
  Run run_[kMostRuns];
  Index runs_ = 0, columns_ = 0;
};

template <class T>
using Packed = Tiles<T>;

}  // namespace mla_pass::MLA_PASS_ISA
