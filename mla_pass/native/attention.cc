#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>

#include "levels.h"
#include "scratch.h"

// Conversions of single numbers; this file is compiled for the same processors as the scalar kernels.
#define MLA_PASS_ISA scalar
#include "vec_scalar.h"

namespace mla_pass {
namespace {

std::atomic<std::uint64_t> copied{0};

// Queries of a tile in the absorbed form, and in the expanded form, where all of them share one decoding of the cache.
constexpr Index kTileRows = 32;
constexpr Index kMacroRows = 2048;
constexpr Index kLeastMacroRows = 256;
// Fewer keys are not worth a part of their own: it starts every level of bands anew and adds a term to the join.
constexpr Index kLeastKeys = 256;
// Numbers of latent queries of blocks that are made at a time, 512 KB: a second-level cache.
constexpr Index kBandFloats = 131072;

Index padded(Index count) { return (count + kPad - 1) / kPad * kPad; }
Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// Runs work(i) for each i on all threads; the first exception of any is thrown here once all are done.
template <class Work>
void parallel(const Threads& threads, Index count, const Work& work) {
  struct Shared {
    const Work& work;
    std::mutex mutex;
    std::exception_ptr failed;
  } shared{work, {}, nullptr};
  const auto task = [](void* user, std::size_t i) {
    auto& mine = *static_cast<Shared*>(user);
    try {
      mine.work(static_cast<Index>(i));
    } catch (const std::exception&) {
      const std::lock_guard<std::mutex> lock(mine.mutex);
      if (!mine.failed) mine.failed = std::current_exception();
    }
  };
  threads.run(threads.self, static_cast<std::size_t>(count), task, &shared);
  if (shared.failed) std::rethrow_exception(shared.failed);
}

template <class T>
const Kernels<T>& kernels_of(const Isa& isa);
template <>
const Kernels<float>& kernels_of(const Isa& isa) {
  return isa.f32;
}
template <>
const Kernels<Half>& kernels_of(const Isa& isa) {
  return isa.f16;
}
template <>
const Kernels<Bfloat>& kernels_of(const Isa& isa) {
  return isa.bf16;
}

// ---- cache

// Of a cache, whose type `checked` has accepted.
Storage storage_of(int type) {
  switch (static_cast<Type>(type)) {
    case Type::float16:
      return Storage::float16;
    case Type::bfloat16:
      return Storage::bfloat16;
    case Type::int8:
      return Storage::int8;
    case Type::uint8:
      return Storage::float8;
    default:
      return Storage::float32;
  }
}

// A present, which is stored as its past is.
Stored stored_in(const void* present, const Tensor& past, Index numbers) {
  return {present, storage_of(past.type), numbers, past.dims[3]};
}

// Rows of the past to where the present begins its sequences; nothing to do when they are one buffer.
void carry_over(const Sizes& size, const Tensor& past, void* present, const Threads& threads) {
  if (past.data == present) return;
  const Index row = past.dims[3] * element_bytes(storage_of(past.type)), bytes = past.dims[2] * row;
  if (bytes == 0) return;
  parallel(threads, size.batch, [&](Index b) {
    std::memcpy(static_cast<char*>(present) + b * size.capacity * row, past.as<char>() + b * bytes,
                static_cast<std::size_t>(bytes));
  });
  copied.fetch_add(static_cast<std::uint64_t>(bytes * size.batch), std::memory_order_relaxed);
}

template <class S, class Number>
void narrow_all(Index count, const Number& number, void* to) {
  for (Index i = 0; i < count; ++i) scalar::narrow(number(i), static_cast<S*>(to) + i);
}

// The least code whose step holds `top` within `largest`, so far as there are codes.
int least_code(float top, float largest) {
  if (!(top > 0)) return -128;
  const double exact = std::ceil(kOctave * std::log2(static_cast<double>(top) / static_cast<double>(largest)));
  return static_cast<int>(std::clamp(exact, -128.0, 127.0));
}

// What a row of eight bits is made of: the nearest q, ties to even, and codes.
struct Whole {
  using Stored = std::int8_t;
  static constexpr float largest = kLargestWhole;
  static Stored nearest(float q) { return static_cast<Stored>(std::nearbyint(q)); }
  static Stored code(int c) { return static_cast<Stored>(c); }
};

struct Small {
  using Stored = Float8;
  static constexpr float largest = kLargestFloat8;
  // A magnitude in [2^e, 2^(e + 1)) lies m steps of 2^(e - 3) from zero, m in [8, 16], and has the bits 8 (e + 6) + m;
  // so do all below 2^-6, with e = -6.
  static Stored nearest(float q) {
    const float magnitude = std::abs(q);
    const int e = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
    const int bits = 8 * (e + 6) + static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - e)));
    return {static_cast<std::uint8_t>(bits | (std::signbit(q) ? 0x80 : 0))};
  }
  static Stored code(int c) { return {static_cast<std::uint8_t>(c + 128)}; }
};

template <class As, class Number>
void pack(Index count, const Number& number, typename As::Stored* to) {
  const Index length = ceil_div(count, kSegments);
  for (Index segment = 0; segment < kSegments; ++segment) {
    const Index begin = std::min(segment * length, count), end = std::min(begin + length, count);
    float top = 0;
    for (Index i = begin; i < end; ++i) {
      const float x = number(i);
      if (!std::isfinite(x)) {
        throw Refused("input row holds a number that is not finite; expected numbers that 8 bits can hold: store the "
                      "cache as float16, or repair the model");
      }
      top = std::max(top, std::abs(x));
    }
    const int code = least_code(top, As::largest);
    const float inverse = 1.0f / scalar::step_of(code);
    for (Index i = begin; i < end; ++i) {
      to[i] = As::nearest(std::clamp(number(i) * inverse, -As::largest, As::largest));
    }
    to[count + segment] = As::code(code);
  }
}

// Stores number(0), number(1), ... as a row of a present.
template <class Number>
void put(const Stored& present, Index row, const Number& number) {
  const Index at = row * present.width, count = present.numbers;
  void* data = const_cast<void*>(present.data);  // a present is written here and read everywhere else
  switch (present.as) {
    case Storage::float32:
      return narrow_all<float>(count, number, static_cast<float*>(data) + at);
    case Storage::float16:
      return narrow_all<Half>(count, number, static_cast<Half*>(data) + at);
    case Storage::bfloat16:
      return narrow_all<Bfloat>(count, number, static_cast<Bfloat*>(data) + at);
    case Storage::int8:
      return pack<Whole>(count, number, static_cast<std::int8_t*>(data) + at);
    case Storage::float8:
      return pack<Small>(count, number, static_cast<Float8*>(data) + at);
  }
}

template <class T>
void store_row(const Problem<T>& p, const T* row, Index position, Index to) {
  const Sizes& size = p.size;
  const Index half = size.rope_dim / 2;
  const T *re = row + size.rank, *im = re + half;
  const float *cos = p.cos + position * size.angles, *sin = p.sin + position * size.angles;
  const auto number = [&](Index i) {
    if (i < size.rank) return scalar::to_float(row[i]);
    const bool real = i < size.rank + half;
    const Index pair = i - size.rank - (real ? 0 : half);
    const float c = cos[p.rope_index[pair]], s = sin[p.rope_index[pair]];
    const float x = scalar::to_float(re[pair]), y = scalar::to_float(im[pair]);
    return real ? x * c - y * s : x * s + y * c;
  };
  const Stored& first = p.part[0];
  if (size.split <= size.rank && first.as == storage_of(static_cast<int>(type_of<T>()))) {
    std::copy_n(row, size.split, static_cast<T*>(const_cast<void*>(first.data)) + to * first.width);
  } else {
    put(first, to, number);
  }
  put(p.part[1], to, [&](Index i) { return number(size.split + i); });
}

template <class T>
void store_rows(const Problem<T>& p, const T* row, const Threads& threads) {
  const Sizes& size = p.size;
  constexpr Index kRowsAtATime = 64;
  const Index runs = ceil_div(size.fresh, kRowsAtATime);
  parallel(threads, size.batch * runs, [&](Index i) {
    const Index b = i / runs, begin = i % runs * kRowsAtATime;
    for (Index s = begin; s < std::min(size.fresh, begin + kRowsAtATime); ++s) {
      store_row(p, row + (b * size.fresh + s) * (size.rank + size.rope_dim), p.position_ids[b * size.position_step + s],
                b * size.capacity + size.total - size.fresh + s);
    }
  });
}

// ---- what all tiles share

// A0 and A1 of every pair: exp(j theta (block - 1) / 2) times a0 - j a1 (block - 1) / 2, and times j a1. The angle of
// one row is read off the tables' row 1, which is unambiguous below pi.
void make_fit(const Layout& layout, const Sizes& size, const float* cos, const float* sin, float* fit) {
  for (Index i = 0; i < size.pairs; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const Index column = size.angles + layout.band_index[at];
    const double theta = std::atan2(static_cast<double>(sin[column]), static_cast<double>(cos[column]));
    const double middle = static_cast<double>(layout.attributes.band_block[at] - 1) / 2;
    const double c = std::cos(theta * middle), s = std::sin(theta * middle);
    const double a0 = layout.attributes.band_a0[at], a1 = layout.attributes.band_a1[at], down = a1 * middle;
    float *constant = fit + 2 * i, *slope = constant + 2 * size.pairs;
    constant[0] = static_cast<float>(c * a0 + s * down);
    constant[1] = static_cast<float>(s * a0 - c * down);
    slope[0] = static_cast<float>(-s * a1);
    slope[1] = static_cast<float>(c * a1);
  }
}

// Past depth[i] columns key_up holds zeros for band pairs up to i, in every group. Folding lays latents so that the
// pairs of the finest blocks read few (mla_pass/fold/staggered.py).
template <class T>
void find_depth(const Sizes& size, const T* key_up, Index* depth) {
  Index most = 0;
  for (Index pair = 0; pair < size.pairs; ++pair) {
    for (Index part = 0; part < 2 * size.groups; ++part) {
      const Index row = part / 2 * size.nope_dim + part % 2 * size.pairs + pair;
      const T* up = key_up + row * size.key_rank;
      Index end = size.key_rank;
      while (end > most && scalar::to_float(up[end - 1]) == 0.0f) --end;
      most = end;
    }
    depth[pair] = most;
  }
}

// Rows of each sequence before the first that its padding mask shows.
void find_first_kept(const Sizes& size, const std::int64_t* mask, Index* first) {
  for (Index b = 0; b < size.batch; ++b) {
    const std::int64_t *begin = mask + b * size.total, *end = begin + size.total;
    first[b] = std::find_if(begin, end, [](std::int64_t kept) { return kept != 0; }) - begin;
  }
}

struct Common {
  float *fit, *key_mean;
  Index *first_kept, *depth;
};

Common lay_common(const Sizes& size, Carver& carver) {
  return {carver.take<float>(4 * size.pairs), carver.take<float>(size.groups * size.nope_dim),
          carver.take<Index>(size.batch), carver.take<Index>(size.pairs)};
}

template <class T>
Problem<T> make_problem(const Layout& layout, const Sizes& size, const Inputs& inputs, const Outputs& outputs,
                        const Common& common) {
  Problem<T> p{};
  p.size = size;
  std::copy(layout.levels.begin(), layout.levels.end(), p.level);
  p.rope_index = layout.rope_index.data();
  p.band_index = layout.band_index.data();
  p.query = inputs[kQuery].as<T>();
  p.part[0] = stored_in(outputs.present_latent, inputs[kPastLatent], size.split);
  p.part[1] = stored_in(outputs.present_rope, inputs[kPastRope], size.rank + size.rope_dim - size.split);
  p.cos = inputs[kCos].as<float>();
  p.sin = inputs[kSin].as<float>();
  p.position_ids = inputs[kPositionIds].as<std::int64_t>();
  p.padding_mask = inputs[kPaddingMask].as<std::int64_t>();
  p.attention_bias = inputs[kAttentionBias].as<T>();
  p.query_map = inputs[kQueryMap].as<T>();
  p.key_up = inputs[kKeyUp].as<T>();
  p.value_up = inputs[kValueUp].as<T>();
  p.context = static_cast<T*>(outputs.context);
  make_fit(layout, size, p.cos, p.sin, common.fit);
  p.fit = common.fit;
  if (p.key_up) {
    const T* mean = inputs[kKeyMean].as<T>();
    for (Index i = 0; i < size.groups * size.nope_dim; ++i) common.key_mean[i] = scalar::to_float(mean[i]);
    p.key_mean = common.key_mean;
    find_depth(size, p.key_up, common.depth);
    p.depth = common.depth;
  }
  if (p.padding_mask) {
    find_first_kept(size, p.padding_mask, common.first_kept);
    p.first_kept = common.first_kept;
  }
  return p;
}

// ---- scratch of one tile

template <class T>
Queries<T> lay_queries(const Problem<T>& p, Index rows, bool expanded, Carver& carver) {
  const Sizes& size = p.size;
  Queries<T> q{};
  q.width = padded(size.nope_dim + size.rope_dim);
  q.dims = carver.take<float>(rows * q.width);
  if (p.query_map) {
    q.raw_width = padded(size.query_dim);
    q.raw = carver.take<float>(rows * q.raw_width);
  }
  q.sight = carver.take<Sight<T>>(rows);
  q.key_width = padded(size.key_rank);
  if (!expanded) {
    q.still = carver.take<float>(rows * q.key_width);
    q.still_mean = carver.take<float>(rows);
  }
  return q;
}

Partial lay_partial(Index rows, Index value_width, Carver& carver) {
  return {carver.take<float>((padded(rows) + 1) * std::max<Index>(value_width, kPad)), carver.take<float>(rows),
          carver.take<float>(rows), value_width};
}

Index widest_level(const Level* levels, Index count) {
  Index most = 0;
  for (Index i = 0; i < count; ++i) most = std::max(most, levels[i].end - levels[i].begin);
  return most;
}

template <class T>
ChunkScratch lay_chunk(const Problem<T>& p, Carver& carver) {
  const Sizes& size = p.size;
  ChunkScratch s{};
  const bool whole = size.split != size.rank;
  if (whole || p.part[0].as != Storage::float32) {
    s.latent_step = padded(whole ? size.rank + size.rope_dim : size.rank);
    s.latent = carver.take<float>(kChunk * s.latent_step);
  }
  if (!whole && p.part[1].as != Storage::float32) {
    s.rope_step = padded(size.rope_dim);
    s.rope = carver.take<float>(kChunk * s.rope_step);
  }
  return s;
}

// Blocks of one level that so many rows can touch, wherever they begin.
Index blocks_touched(Index rows, Index block) { return (rows + block - 2) / block + 1; }

// As many blocks of the finest level at a time as stay in the caches next to a core: heads times blocks are the rows of
// the products that make their queries.
template <class T>
void lay_bands(const Problem<T>& p, Index rows, Carver& carver, AbsorbScratch& s) {
  const Sizes& size = p.size;
  const Index first = size.finest;
  if (first == size.levels) return;
  const Index query = size.orders * rows * padded(size.key_rank), finest = p.level[first].block;
  s.blocks = std::clamp<Index>(kBandFloats / query, 1, kPad);
  const Index reach = s.blocks * finest;
  Index most = 0;
  for (Index level = first; level < size.levels; ++level) {
    const Level& band = p.level[level];
    const Index blocks = std::min(s.blocks, blocks_touched(reach, band.block));
    s.query[level] = carver.take<float>(blocks * query);
    s.mean[level] = carver.take<float>(size.orders * rows * kPad);
    most = std::max(most, (band.end - band.begin) * rows * blocks);
  }
  s.turned = carver.take<float>(size.orders * 2 * most);
  s.turn = carver.take<float>(size.orders * widest_level(p.level, size.levels) * 2 * kPad);
}

// Whether all latents are stored as what is met in bfloat16, and there are scores to make of them.
template <class T>
bool in_bfloat(const Problem<T>& p) {
  const Sizes& size = p.size;
  return size.nope_dim > 0 && (size.split == 0 || is_narrow(p.part[0].as)) &&
         (size.split >= size.rank || is_narrow(p.part[1].as));
}

template <class T>
PackedScratch lay_packed(const Problem<T>& p, Index rows, Index fine_rows, Carver& carver) {
  const bool runs = has_codes(p.part[0].as) || has_codes(p.part[1].as);
  const Index columns = (ceil_div(p.size.rank + p.size.rope_dim, kTileDepth) + (runs ? kMostRuns : 3)) * kTileDepth;
  PackedScratch s{};
  s.rows = carver.take<std::uint16_t>(kChunk * columns);
  s.keys = carver.take<std::uint32_t>(columns / 2 * (kChunk + kTileSide));
  s.values = carver.take<std::uint32_t>(kChunk / 2 * columns);
  s.scales = carver.take<float>(kMostRuns * (kChunk + kTileSide));
  s.left = carver.take<std::uint16_t>(2 * padded(rows) * columns);
  s.fine = carver.take<std::uint16_t>((2 * padded(fine_rows) + kTileSide) * columns);  // runs end within a tile
  s.weights = carver.take<std::uint16_t>(2 * padded(rows) * kChunk);
  s.columns = columns;
  return s;
}

template <class T>
AbsorbScratch lay_absorb(const Problem<T>& p, Index rows, Meeting narrow, Carver& carver) {
  const Sizes& size = p.size;
  AbsorbScratch s{};
  lay_bands(p, rows, carver, s);
  const Index dims = 2 * size.decoded, groups = std::min(size.groups, rows);  // of a tile: it has a row of each
  const bool packs = narrow != Meeting::float32;
  if (packs && in_bfloat(p)) s.packed = lay_packed(p, rows, groups * dims, carver);
  if (size.decoded > 0) {
    s.fine_up = carver.take<float>(groups * dims * padded(size.key_rank));
    s.fine_query = carver.take<float>(rows * dims);
    s.fine_keys = carver.take<float>(groups * dims * (kChunk + kPad));
    s.fine_turn = carver.take<float>(dims * (kChunk + kPad));
  }
  s.scores = carver.take<float>(rows * (kChunk + kPad));
  if (size.orders > 1 || packs) s.slopes = carver.take<float>(rows * (kChunk + kPad));
  s.across = carver.take<float>((size.rope_dim + size.key_rank) * padded(rows));
  s.keys = carver.take<float>((size.rope_dim + size.key_rank) * (kChunk + kPad));
  s.chunk = lay_chunk(p, carver);
  return s;
}

template <class T>
ExpandScratch lay_expand(const Problem<T>& p, Carver& carver) {
  const Sizes& size = p.size;
  ExpandScratch s{};
  s.key_width = padded(size.key_rank);
  if (p.key_up) {
    s.key_up = carver.take<float>(size.nope_dim * s.key_width);
    s.latents = carver.take<float>(size.key_rank * (kChunk + kPad));
  }
  s.chunk = lay_chunk(p, carver);
  s.keys = carver.take<float>((size.nope_dim + size.rope_dim) * (kChunk + kPad));
  s.values = carver.take<float>(kChunk * padded(size.value_dim));
  s.scores = carver.take<float>(kQueryRows * (kChunk + kPad));
  return s;
}

template <class T>
FinishScratch lay_finish(const Problem<T>& p, Index rows, Index value_width, Carver& carver) {
  const Index out = padded(p.size.value_dim);
  return {carver.take<float>(rows * value_width), p.value_up ? carver.take<float>(rows * out) : nullptr, out};
}

// ---- tiles

// Tiles of one shape that cover all queries. Within a tile tokens come before heads: tokens of one kv group share its
// up-projection.
struct Tiling {
  Index heads, tokens;           // of a tile
  Index head_tiles, token_tiles;  // of a sequence
  bool token_major;

  Index count(const Sizes& size) const { return size.batch * head_tiles * token_tiles; }

  Tile at(const Sizes& size, Index i) const {
    const Index head = i / token_tiles % head_tiles * heads, token = i % token_tiles * tokens;
    return {i / token_tiles / head_tiles,       head, std::min(heads, size.heads - head), token,
            std::min(tokens, size.fresh - token), token_major};
  }
};

Tiling absorbed_tiling(const Sizes& size) {
  const Index per_group = size.heads / size.groups;
  Tiling t{};
  t.tokens = std::clamp<Index>(kTileRows / per_group, 1, size.fresh);
  t.heads = per_group > kTileRows ? kTileRows
                                  : std::min(size.heads, per_group * std::max<Index>(1, kTileRows / (per_group * t.tokens)));
  t.head_tiles = ceil_div(size.heads, t.heads);
  t.token_tiles = ceil_div(size.fresh, t.tokens);
  return t;
}

Tiling expanded_tiling(const Sizes& size, Index workers) {
  const Index per_group = size.heads / size.groups;
  Tiling t{};
  t.token_major = true;
  t.heads = per_group;
  t.head_tiles = size.groups;
  const Index wanted = ceil_div(2 * workers, size.batch * size.groups);
  const Index rows = std::clamp(ceil_div(size.fresh, wanted) * per_group, kLeastMacroRows, kMacroRows);
  t.tokens = std::clamp<Index>(rows / per_group, 1, size.fresh);
  t.token_tiles = ceil_div(size.fresh, t.tokens);
  return t;
}

struct Range {
  Index begin, end;
};

// Rows of the cache that some query of the tile sees, hidden ones in their midst aside.
template <class T>
Range seen_by(const Problem<T>& p, const Tile& tile) {
  const Sizes& size = p.size;
  const Index row = size.total - size.fresh + tile.token;
  Range seen = {size.window > 0 ? std::max<Index>(0, row - size.window + 1) : 0,
                size.causal ? row + tile.tokens : size.total};
  if (p.first_kept) seen.begin = std::max(seen.begin, p.first_kept[tile.batch]);
  seen.begin = std::min(seen.begin, seen.end);
  return seen;
}

// The i-th of `count` nearly equal parts, cut at whole chunks.
Range part_of(const Range& all, Index i, Index count) {
  const Index step = ceil_div(ceil_div(all.end - all.begin, count), kChunk) * kChunk;
  return {std::min(all.end, all.begin + i * step), std::min(all.end, all.begin + (i + 1) * step)};
}

template <class T>
void run_expanded(const Problem<T>& p, const Kernels<T>& kernels, const Threads& threads) {
  const Tiling tiling = expanded_tiling(p.size, threads.workers);
  const Index rows = tiling.heads * tiling.tokens, value_width = padded(p.size.value_dim);
  struct Room {
    Queries<T> queries;
    ExpandScratch expand;
    Partial partial;
    FinishScratch finish;
  };
  const auto lay = [&](Carver& carver) {
    Room room{};
    room.queries = lay_queries(p, rows, true, carver);
    room.expand = lay_expand(p, carver);
    room.partial = lay_partial(rows, value_width, carver);
    room.finish = lay_finish(p, rows, value_width, carver);
    return room;
  };
  const std::size_t bytes = bytes_of(lay);
  parallel(threads, tiling.count(p.size), [&](Index i) {
    const Lease lease(bytes);
    Carver carver(lease.data());
    const Room room = lay(carver);
    const Tile tile = tiling.at(p.size, i);
    kernels.prepare(p, tile, true, room.queries);
    kernels.expand(p, tile, room.queries, room.expand, room.partial);
    kernels.finish(p, tile, &room.partial, 1, room.finish);
  });
}

// Every tile by itself, from its queries to its context: where there are tiles enough for all threads.
template <class T>
void run_absorbed_whole(const Problem<T>& p, const Isa& isa, const Tiling& tiling, const Threads& threads) {
  const Kernels<T>& kernels = kernels_of<T>(isa);
  const Index rows = tiling.heads * tiling.tokens, value_width = padded(p.size.value_rank);
  struct Room {
    Queries<T> queries;
    AbsorbScratch absorb;
    Partial partial;
    FinishScratch finish;
  };
  const auto lay = [&](Carver& carver) {
    Room room{};
    room.queries = lay_queries(p, rows, false, carver);
    room.absorb = lay_absorb(p, rows, isa.narrow, carver);
    room.partial = lay_partial(rows, value_width, carver);
    room.finish = lay_finish(p, rows, value_width, carver);
    return room;
  };
  const std::size_t bytes = bytes_of(lay);
  parallel(threads, tiling.count(p.size), [&](Index i) {
    const Lease lease(bytes);
    Carver carver(lease.data());
    const Room room = lay(carver);
    const Tile tile = tiling.at(p.size, i);
    const Range seen = seen_by(p, tile);
    kernels.prepare(p, tile, false, room.queries);
    kernels.absorb(p, tile, room.queries, seen.begin, seen.end, room.absorb, room.partial);
    kernels.finish(p, tile, &room.partial, 1, room.finish);
  });
}

// Few tiles: each meets the cache in `parts` parts, which are joined afterwards.
template <class T>
void run_absorbed_parts(const Problem<T>& p, const Isa& isa, const Tiling& tiling, Index parts,
                        const Threads& threads) {
  const Kernels<T>& kernels = kernels_of<T>(isa);
  const Index rows = tiling.heads * tiling.tokens, value_width = padded(p.size.value_rank);
  const Index tiles = tiling.count(p.size);
  struct Shared {
    Queries<T>* queries;
    Partial* partial;
  };
  const auto lay_shared = [&](Carver& carver) {
    Shared shared = {carver.take<Queries<T>>(tiles), carver.take<Partial>(tiles * parts)};
    const bool counting = shared.queries == nullptr;
    for (Index i = 0; i < tiles; ++i) {
      const Queries<T> queries = lay_queries(p, rows, false, carver);
      if (!counting) shared.queries[i] = queries;
    }
    for (Index i = 0; i < tiles * parts; ++i) {
      const Partial partial = lay_partial(rows, value_width, carver);
      if (!counting) shared.partial[i] = partial;
    }
    return shared;
  };
  const Lease lease(bytes_of(lay_shared));
  Carver carver(lease.data());
  const Shared shared = lay_shared(carver);
  parallel(threads, tiles,
           [&](Index i) { kernels.prepare(p, tiling.at(p.size, i), false, shared.queries[i]); });
  const auto lay_own = [&](Carver& own) { return lay_absorb(p, rows, isa.narrow, own); };
  const std::size_t bytes = bytes_of(lay_own);
  parallel(threads, tiles * parts, [&](Index i) {
    const Lease room(bytes);
    Carver own(room.data());
    const AbsorbScratch scratch = lay_own(own);
    const Tile tile = tiling.at(p.size, i / parts);
    const Range part = part_of(seen_by(p, tile), i % parts, parts);
    kernels.absorb(p, tile, shared.queries[i / parts], part.begin, part.end, scratch, shared.partial[i]);
  });
  const auto lay_last = [&](Carver& own) { return lay_finish(p, rows, value_width, own); };
  const std::size_t last = bytes_of(lay_last);
  parallel(threads, tiles, [&](Index i) {
    const Lease room(last);
    Carver own(room.data());
    const FinishScratch scratch = lay_last(own);
    kernels.finish(p, tiling.at(p.size, i), shared.partial + i * parts, parts, scratch);
  });
}

template <class T>
void run_absorbed(Problem<T>& p, const Isa& isa, const Threads& threads) {
  const Tiling tiling = absorbed_tiling(p.size);
  const Index groups = ceil_div(tiling.heads, p.size.heads / p.size.groups);
  p.size.finest = absorbed_from(p.level, p.size, p.depth, tiling.heads * tiling.tokens, groups);
  p.size.decoded = p.size.finest > 0 ? p.level[p.size.finest - 1].end : 0;
  const Index wanted = ceil_div(2 * threads.workers, tiling.count(p.size));
  const Index keys = p.size.window > 0 ? std::min(p.size.total, p.size.window + tiling.tokens) : p.size.total;
  const Index parts = threads.workers > 1 ? std::clamp<Index>(keys / kLeastKeys, 1, wanted) : 1;
  if (parts == 1) return run_absorbed_whole(p, isa, tiling, threads);
  run_absorbed_parts(p, isa, tiling, parts, threads);
}

}  // namespace

Form form_from_environment() {
  const char* form = std::getenv("MLA_PASS_FORM");
  if (form == nullptr || *form == '\0') return Form::counted;
  if (std::strcmp(form, "absorbed") == 0) return Form::absorbed;
  if (std::strcmp(form, "expanded") == 0) return Form::expanded;
  throw Refused(std::string("the environment variable MLA_PASS_FORM is '") + form +
                "'; expected absorbed, expanded or nothing");
}

std::uint64_t copied_bytes() { return copied.load(std::memory_order_relaxed); }

template <class T>
void run(const Layout& layout, const Sizes& size, const Inputs& inputs, const Outputs& outputs, const Isa& isa,
         Form form, const Threads& threads) {
  const auto lay = [&](Carver& carver) { return lay_common(size, carver); };
  const Lease lease(bytes_of(lay));
  Carver carver(lease.data());
  Problem<T> p = make_problem<T>(layout, size, inputs, outputs, lay(carver));
  carry_over(size, inputs[kPastLatent], outputs.present_latent, threads);
  carry_over(size, inputs[kPastRope], outputs.present_rope, threads);
  store_rows(p, inputs[kRow].as<T>(), threads);
  const Index from = expand_from(layout, size, p.key_up != nullptr, p.value_up != nullptr);
  const bool expanded = form == Form::counted ? size.fresh >= from : form == Form::expanded;
  if (expanded) return run_expanded(p, kernels_of<T>(isa), threads);
  run_absorbed(p, isa, threads);
}

template void run<float>(const Layout&, const Sizes&, const Inputs&, const Outputs&, const Isa&, Form, const Threads&);
template void run<Half>(const Layout&, const Sizes&, const Inputs&, const Outputs&, const Isa&, Form, const Threads&);
template void run<Bfloat>(const Layout&, const Sizes&, const Inputs&, const Outputs&, const Isa&, Form, const Threads&);

}  // namespace mla_pass
