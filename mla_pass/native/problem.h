// What one execution of LatentAttention is, as plain data.
//
// This header is read by translation units compiled for different instruction sets, so it holds no function: an inline
// function would be emitted by each of them and the linker would keep any one, perhaps one this processor cannot run.
//
// Letters as in mla_pass/onnx/body.py: B batch, S new tokens, T total; H heads, G kv groups, D head size, V value head
// size; r rank, p rope dims, k key_rank, w = r - value_offset, n un-rotated dims of which m pairs turn in bands.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mla_pass {

using Index = std::ptrdiff_t;

struct Half {
  std::uint16_t bits;
};

struct Bfloat {
  std::uint16_t bits;
};

// A float8 E4M3 number of at most 448: what a cache of uint8 holds.
struct Float8 {
  std::uint8_t bits;
};

// How the numbers of a cached row are stored: as float32, 16 bits, or 8 bits in kSegments segments of equal length (the
// last ones shorter), whose codes c follow the row's numbers: x = q * 2^(c / kOctave). See mla_pass/storage.py.
enum class Storage { float32, float16, bfloat16, int8, float8 };
constexpr Index kSegments = 4;
constexpr int kOctave = 8;
// Of a q.
constexpr float kLargestWhole = 127, kLargestFloat8 = 448;

inline Index element_bytes(Storage as) {
  return as == Storage::float32 ? 4 : as == Storage::float16 || as == Storage::bfloat16 ? 2 : 1;
}
inline bool has_codes(Storage as) { return as == Storage::int8 || as == Storage::float8; }
// Whether bfloat16 holds such numbers, those of 8 bits before their scale.
inline bool is_narrow(Storage as) { return as == Storage::bfloat16 || has_codes(as); }

// Codes, as rows of either element type hold them.
inline int code_of(const std::int8_t* stored) { return *stored; }
inline int code_of(const Float8* stored) { return stored->bits - 128; }

// One tensor of the cache: rows of `numbers` numbers that take `width` elements each. A token's row, the latent and the
// rope part behind it, lies in two of them: the first `split` numbers in one, the others in the other.
struct Stored {
  const void* data;
  Storage as;
  Index numbers;
  Index width;
};

// A run of band pairs [begin, end) that turn in blocks of `block` rows.
struct Level {
  Index block;
  Index begin;
  Index end;
};

constexpr Index kMaxLevels = 16;
// Floats in the widest vector; rows of scratch matrices are padded to it, so that whole vectors can be stored.
constexpr Index kPad = 16;
// Cached rows that are scored, weighed and summed at a time: at r + p = 576 they are 147 KB in float32, which stay in
// a second-level cache between their two readings, beside what is laid across of them. A multiple of kPad.
constexpr Index kChunk = 64;
// A matrix unit's tile: rows, which are dwords of a row, too; and bfloat16 numbers of a row.
constexpr Index kTileSide = 16;
constexpr Index kTileDepth = 32;
// Runs of a row's numbers at one scale: segments of both parts, one of which may hold latents and rope dims.
constexpr Index kMostRuns = 2 * kSegments + 1;

struct Sizes {
  Index batch, fresh, total;
  Index heads, groups;
  Index rank, key_rank, value_offset, value_rank, rope_dim, nope_dim, split;
  Index query_dim;  // numbers a head of the query input has: D, or n + p without query_map
  Index value_dim;  // numbers a head of the context has: V, or w without value_up
  Index pairs, orders, levels;
  Index finest;   // level, the first whose pairs are absorbed in the absorbed form, or `levels` for none; see levels.h
  Index decoded;  // pairs of the levels before it: their keys are decoded there
  Index capacity;       // rows of the present tensors
  Index angles;         // columns of the cosine and sine tables
  Index bias_batch;     // elements between sequences of attention_bias, 0 where all share one
  Index bias_head;      // the same between heads
  Index position_step;  // elements between sequences of position_ids, 0 where all share one
  Index window;         // 0: none
  bool causal;
  float scale, softcap;
  bool exact;  // total is T; otherwise, in memory of a device, the most that T can be
};

// Pointers to row-major tensors; null where an optional input is absent. The presents already hold the new rows when
// a kernel reads them.
template <class T>
struct Problem {
  Sizes size;
  Level level[kMaxLevels];
  const Index* rope_index;
  const Index* band_index;
  const float* fit;  // [2][m][2]: the complex fits A0 and A1 of every band pair, see body.py
  const Index* depth;  // [m]: columns of key_up past which it is zero for a band pair and all before it, in every group
  const T* query;
  Stored part[2];
  const float* cos;
  const float* sin;
  const std::int64_t* position_ids;
  const std::int64_t* padding_mask;
  const Index* first_kept;  // [B]: rows before it are all hidden by the padding mask
  const T* attention_bias;
  const T* query_map;
  const T* key_up;
  const float* key_mean;
  const T* value_up;
  T* context;
};

// Queries that meet the cache together: some heads of some new tokens of one sequence, each one row of a matrix.
// Row of (head, token): head-major, head * tokens + token, or token-major, token * heads + head, both from zero.
struct Tile {
  Index batch;
  Index head, heads;
  Index token, tokens;
  bool token_major;
};

// Rows [first, end) of the cache that a query sees, padding aside; where its bias starts, or null.
template <class T>
struct Sight {
  Index first, end;
  const T* bias;
};

// The queries of a tile, ready to meet keys.
template <class T>
struct Queries {
  float* dims;  // [rows][width]: n un-rotated dims, then p rotated rope dims
  Index width;
  float* raw;  // [rows][raw_width]: the query as it came, where query_map is given
  Index raw_width;
  Sight<T>* sight;    // [rows]
  float* still;       // [rows][key_width]: latent queries of all that no band turns (absorbed form)
  float* still_mean;  // [rows]: what the keys' mean adds to their scores
  Index key_width;    // k padded
};

// Attention over part of the cache, not yet divided by the sum: a tile may meet the cache in several parts.
struct Partial {
  float* sum;  // [rows, 16s][value_width], and 16 more
  float* top;  // [rows]: largest score met, -inf for none
  float* mass;  // [rows]: sum of exp(score - top)
  Index value_width;
};

// Room for a chunk of cached rows as float32: two matrices, or one of whole rows where the tensors do not split latent
// from rope; null where what is stored can be read as it lies.
struct ChunkScratch {
  float* latent;  // [kChunk][latent_step]
  float* rope;    // [kChunk][rope_step]
  Index latent_step, rope_step;
};

// Room for a chunk's latents as operands in bfloat16, see packed.h; null where they are met in float32. `columns` is at
// least a row's numbers, every run of them at one scale rounded up to whole tiles, and a tile's depth more.
struct PackedScratch {
  std::uint16_t* rows;     // [kChunk][columns]
  std::uint32_t* keys;     // [columns / 2][kChunk + 16]
  std::uint32_t* values;   // [kChunk / 2][columns]
  float* scales;           // [runs][kChunk + 16]
  std::uint16_t* left;     // [2][rows, 16s][columns]
  std::uint16_t* fine;     // [2][rows of fine_up, 16s][columns], and 16 more rows
  std::uint16_t* weights;  // [2][rows, 16s][kChunk]
  Index columns;
};

// Room for one thread in the absorbed form.
struct AbsorbScratch {
  Index blocks;              // of the finest level whose queries are made at a time; at most kPad
  float* query[kMaxLevels];  // [orders][rows][blocks][key_width]: latent queries of some blocks of the level
  float* mean[kMaxLevels];   // [orders][rows][kPad]
  float* turned;             // [orders][2][pairs][rows * blocks], of the level that takes most
  float* turn;               // [orders][pairs of the widest level][2][kPad]
  float* scores;             // [rows][kChunk + kPad]
  float* slopes;             // the same, for the order that follows the offset
  float* across;             // [rope_dim + key_rank][rows, 16s]: queries, where they are laid across
  float* keys;               // [key_rank + rope_dim][kChunk + kPad]: a chunk laid across
  float* fine_up;            // [decoded][2][groups of a tile][key_width]
  float* fine_query;         // [rows][2 * decoded], turned to their rows
  float* fine_keys;          // [decoded][2][groups of a tile][kChunk + kPad]
  float* fine_turn;          // [decoded][2][kChunk + kPad]
  ChunkScratch chunk;
  PackedScratch packed;
};

// Room for one thread in the expanded form.
struct ExpandScratch {
  float* key_up;   // [n][key_width] of one group
  float* latents;  // [key_rank][kChunk + kPad]: a chunk laid across
  ChunkScratch chunk;
  float* keys;    // [n + p][kChunk + kPad]: decoded, turned, with the rope part behind them
  float* values;  // [kChunk][value_width]
  float* scores;  // [query rows at a time][kChunk + kPad]
  Index key_width;
};

// Room for finishing a tile.
struct FinishScratch {
  float* sum;  // [rows][value_width]
  float* out;  // [rows][out_width]
  Index out_width;
};

// Query rows that meet a chunk of keys at a time in the expanded form.
constexpr Index kQueryRows = 32;

// The work that is written once and compiled for every instruction set.
template <class T>
struct Kernels {
  // Map, split and rotate a tile's queries. `expanded`: bands turn to their own rows and nothing is absorbed.
  void (*prepare)(const Problem<T>&, const Tile&, bool expanded, const Queries<T>&);
  // Meet rows [begin, end) of the cache, latents as they are.
  void (*absorb)(const Problem<T>&, const Tile&, const Queries<T>&, Index begin, Index end, const AbsorbScratch&,
                 const Partial&);
  // Join the parts of a tile, decode the values, write the context.
  void (*finish)(const Problem<T>&, const Tile&, const Partial* parts, Index count, const FinishScratch&);
  // Meet the whole cache, keys and values decoded chunk by chunk. The tile lies within one kv group.
  void (*expand)(const Problem<T>&, const Tile&, const Queries<T>&, const ExpandScratch&, const Partial&);
};

// What meets latents stored as bfloat16 or in 8 bits in the absorbed form: float32 numbers, float32 numbers as sums of
// two of bfloat16, or everything rounded to bfloat16. Sums are float32.
enum class Meeting { float32, two_terms, bfloat16 };

struct Isa {
  const char* name;
  Meeting narrow;
  Kernels<float> f32;
  Kernels<Half> f16;
  Kernels<Bfloat> bf16;
};

}  // namespace mla_pass
