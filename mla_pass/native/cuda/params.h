// What a launch of each CUDA kernel is given, as plain data. It travels by value in the parameter space, so that a
// captured graph keeps it: nothing in here may change from one replay to the next. How far the cache is filled does;
// it is read on the device, see Span.
//
// Read by host code, by nvcc and by the tests' CPU build alike; it holds no function.
//
// Letters as in ../problem.h: B batch, S new tokens, T total; H heads, G kv groups, V value head size; r rank, p rope
// dims, k key_rank, w = r - value_offset, n un-rotated dims of which m pairs turn in bands. R = H * S query rows of a
// sequence in the absorbed form, head-major: row = head * S + token; R = (H / G) * S of one kv group in the expanded
// form, token-major: row = token * (H / G) + head. up8, up16: rounded up to a multiple.
#pragma once

#include <cstdint>

namespace mla_pass::cuda {

constexpr int kMaxBandPairs = 128;
constexpr int kMaxRopePairs = 256;
constexpr int kMaxLevels = 16;
// Rows a tile of queries has at the most, see Attend.
constexpr int kMaxTileRows = 64;
// Bytes that a CTA of carry moves; query rows of a CTA of fix, and of map without weights: a warp each.
constexpr int kCarryBytes = 16384;
constexpr int kQueryWarps = 4;

// How numbers of a cached row lie: 16 bits of the model's type, or 8 bits with codes behind them (see ../problem.h).
enum class Stored : std::int32_t { model, int8, float8 };

// One of the two tensors of the cache, [B][capacity] rows of `bytes` bytes that hold `numbers` numbers. A row's first
// `split` numbers are in part 0, the others in part 1.
struct Part {
  unsigned char* data;
  std::int32_t numbers;
  std::int32_t bytes;
  Stored as;
};

// Of one sequence, made on the device once a call by `setup`.
struct Span {
  std::int32_t total;  // T, or 0 where total_length contradicts the sizes
  std::int32_t first;  // the first row that the padding mask shows
  std::int32_t end;    // one behind the last; first >= end where all is hidden
  std::int32_t bad;    // 1 where the context is to be NaN: total is 0, a position is not in the tables, or a new row
                       // has no 8-bit form
};

struct Level {
  std::int32_t block, begin, end;  // band pairs [begin, end) turn in blocks of `block` rows
};

// The node's bands. Pairs [0, decoded) are decoded in `attend`, whatever their block; levels[0 .. absorbed) hold the
// others, whose blocks are `levels[0].block` rows and more.
struct Bands {
  std::int32_t pairs, decoded, orders, absorbed;
  Level level[kMaxLevels];
  const float* fit;  // [m][4]: complex A0, A1 of every pair, as make_fit in ../attention.cc; made by `setup`
  std::uint16_t index[kMaxBandPairs];  // columns of the tables
  std::int32_t block[kMaxBandPairs];
};

struct Tables {
  const float* cos;  // [positions][angles]
  const float* sin;
  std::int32_t angles, positions;
};

// ---- setup: spans and fits. One CTA a sequence.
struct Setup {
  const std::int64_t* total;         // [1]
  const std::int64_t* padding_mask;  // [B][mask_step], or null
  std::int32_t mask_step;
  const std::int64_t* position_ids;  // [B or 1][S]
  std::int32_t position_step;        // S, or 0 where all sequences share one row
  std::int32_t batch, fresh;
  std::int32_t bound;  // the most T can be; exactly T where `exact`
  std::int32_t exact;
  Tables tables;
  std::int32_t pairs;
  std::uint16_t index[kMaxBandPairs];
  std::int32_t block[kMaxBandPairs];
  float a0[kMaxBandPairs], a1[kMaxBandPairs];
  Span* span;  // [B]
  float* fit;  // [m][4]
};

// ---- append: the new rows, rotated, rounded, packed, into the present. One CTA a row. Rows whose position is not in
// the tables become NaN; of 8 bits, where no number is one, they are not written, nor are rows that are not finite.
struct Append {
  const std::uint16_t* row;  // [B][S][r + p], model type
  const std::int64_t* position_ids;
  std::int32_t position_step;
  std::int32_t batch, fresh, capacity, rank, rope_dim, split;
  Part part[2];  // presents
  Tables tables;
  Span* span;  // `bad` is set where a row has no 8-bit form
  std::uint16_t rope_index[kMaxRopePairs];
};

// ---- carry: past rows into a present that is not the past's memory.
struct Carry {
  const unsigned char* past;  // [B][rows][bytes]
  unsigned char* present;     // [B][capacity][bytes]
  std::int32_t batch, rows, capacity, bytes;
};

// How `attend` uses shared memory, as attend_shared.h works it out: numbers are of 16 bits, offsets in bytes.
struct AttendShared {
  std::int32_t rope_column, fine_column, columns;  // where a key's rope dims begin, its decoded dims, and where it ends
  std::int32_t tile_step, varying_step, fixed_width, fixed_step, weight_step;  // numbers between rows
  std::int32_t tile, raw[2], varying, fixed, weights, tops, sights, work;
  std::int32_t tile_bytes, varying_bytes;  // between two of them
  std::int32_t tiles, varyings;            // how many there are of each: 1 or 2
  std::int32_t direct;                     // keys are copied straight into the tile
  std::int32_t total;
};

// ---- attend: queries meet rows [begin, end) of the cache, or of its expansion.
//
// grid (tiles of query rows, problems, splits). A problem is a sequence (absorbed form) or a sequence's kv group
// (expanded form), problem = (sequence - first_sequence) * groups_apart + group. Each split keeps the running top, mass
// and sum of its share of the keys; `resume` goes on from what an earlier launch left there, over other keys.
//
// A key as attend sees it is a row of columns in shared memory:
//     absorbed   [latent, r up16][rope, up16(p)][decoded dims of the tile's groups, up8(2 decoded) each; all up16]
//     expanded   [key, key_width][value, up8(V)]        (what `expand` wrote; key_width = up16(n + p))
struct Attend {
  // Queries. `varying` meets the first key_width columns (absorbed: up16(k) of them) and differs from block to block;
  // `fixed` meets rope columns and decoded dims (a row's own group's) and does not. Expanded: `varying` alone.
  const std::uint16_t* varying;  // [problems][blocks][orders][R][key_width]
  const float* mean;             // [problems][blocks][orders][R] added to the products, or null
  const std::uint16_t* fixed;    // [problems][R][rope_width + fine_width], or null
  std::int32_t key_width;        // a multiple of 16; 0 where there are no un-rotated dims
  std::int32_t rope_width;       // up16(p)
  std::int32_t fine_width;       // up8(2 decoded)
  std::int32_t orders;           // 1 or 2; of order 1 the product counts times (row - first row of its block)
  std::int32_t block;            // rows a block of `varying` has, a multiple of 64; 0: one block for all rows
  std::int32_t blocks;           // a problem has in this launch
  std::int32_t rows;             // R
  std::int32_t tile_rows;        // query rows of a CTA: at most the kernel's, fewer where decoded dims would not fit
  std::int32_t tokens;           // S, or of a run of the new tokens
  std::int32_t behind;           // new tokens behind the run: a query's cache row is T - behind - tokens + token
  std::int32_t heads;            // of a problem: H, or H / G
  std::int32_t per_group;        // H / G
  std::int32_t groups_apart;     // problems a sequence has: 1, or G
  std::int32_t token_major;      // how a row tells head and token
  std::int32_t first_sequence;

  // Keys: the cache, or the expansion, where part[0] is [problems][end - begin] rows and part[1] is unused.
  Part part[2];
  std::int32_t parts;            // 2: the cache, 1: the expansion
  std::int32_t capacity;         // rows between problems
  std::int32_t rank, rope_dim, split;  // 0 in the expanded form

  // Decoded pairs (absorbed form), see Bands.
  const std::uint16_t* key_up;   // [G][n][k]
  const std::uint16_t* key_mean; // [G][n]
  std::int32_t nope_dim, key_rank;
  Tables tables;

  // Values are columns [value_column, value_column + value_dim) of a key.
  std::int32_t value_column, value_dim;

  // Which keys a row sees and what its scores become.
  const Span* span;                  // [B]
  const std::int64_t* padding_mask;  // [B][mask_step], or null
  std::int32_t mask_step;
  const std::uint16_t* bias;         // model type; elements between sequences, heads and tokens, 0 where shared
  std::int64_t bias_batch, bias_head, bias_token;
  std::int32_t window, causal;
  float scale, softcap;

  std::int32_t begin, end;  // cache rows of this launch; begin is a multiple of block, or of 64
  std::int32_t resume;
  std::int32_t splits;

  std::int32_t tile;    // keys at a time: 64 or 32
  std::int32_t stages;  // tiles in flight: 1 or 2
  AttendShared shared;  // of all that is above, see attend_shared.h

  float* sum;   // [B][groups_apart][splits][R][sum_width]
  float* top;   // [B][groups_apart][splits][R], in units of log2
  float* mass;
  std::int32_t sum_width;  // up8(value_dim)

  Bands bands;
};

// ---- combine: joins splits, divides by the mass. A warp for every 128 columns of a query row.
struct Combine {
  const float *sum, *top, *mass;
  std::int32_t batch, groups_apart, splits, rows, sum_width, value_dim;
  std::int32_t tokens, heads, per_group, token_major;
  std::int32_t fresh;  // tokens between sequences of `out`, which points to the first of a run of `tokens`
  const Span* span;
  // [B][fresh][H][out_step], of the model's type: the context, or what value_up decodes.
  std::uint16_t* out;
  std::int32_t out_step;
};

// ---- products on tensor cores, one kernel each.

// Query tokens may be taken in runs of `tokens`: pointers to queries, positions and contexts are then the run's first
// token's, sequences lie `fresh` tokens apart there, and `behind` new tokens follow the run.

// map: queries to [n un-rotated dims | p rope dims], float32 [B][tokens][H][width].
struct Map {
  const std::uint16_t* query;      // [B][fresh][H][query_dim], model type
  const std::uint16_t* query_map;  // [G][query_dim][width], or null: query_dim is width
  std::int32_t query_dim, width;   // width: n + p
  std::int32_t heads, groups, batch, fresh, tokens;
  float* dims;
};

// fix: what of the queries does not depend on the block, rope dims rotated to their positions, see Attend.fixed;
// expanded form: Attend.varying, all else rotated to cache rows. Pairs have re and im side by side in both.
struct Fix {
  const float* dims;  // as Map's
  std::int32_t nope_dim, rope_dim, heads, groups, batch, tokens, behind;
  std::int32_t expanded;
  const std::int64_t* position_ids;
  std::int32_t position_step;
  const Span* span;
  Tables tables;
  Bands bands;
  std::uint16_t rope_index[kMaxRopePairs];
  std::uint16_t* out;
  std::int32_t rope_width, fine_width, key_width;  // expanded: key_width alone
};

// absorb: Attend.varying and Attend.mean of the blocks of rows [begin, end).
struct Absorb {
  const float* dims;  // as Map's
  const std::uint16_t* key_up;  // [G][n][k], or null: n is k and dims are latent queries
  const std::uint16_t* key_mean;  // [G][n]
  std::int32_t nope_dim, rope_dim, key_rank, heads, groups, tokens, behind, window, causal;
  std::int32_t first_sequence, sequences;
  std::int32_t begin, end;
  std::int32_t orders, block, blocks;  // as Attend's
  const Span* span;
  Tables tables;
  Bands bands;
  std::uint16_t* varying;
  float* mean;
  std::int32_t key_width;
};

// expand: keys and values of cache rows [begin, end), turned, [sequences][G][end - begin][step], step = key_width +
// up8(V); numbers behind n + p and behind V are zero. Pairs have re and im side by side, as `fix` has them.
struct Expand {
  Part part[2];
  std::int32_t capacity, rank, rope_dim, split;
  const std::uint16_t* key_up;  // or null: keys are the first n = k latents
  const std::uint16_t* key_mean;
  const std::uint16_t* value_up;  // [G][w][V], or null: values are the last w latents
  std::int32_t nope_dim, key_rank, value_offset, value_rank, value_dim, groups;
  std::int32_t tokens, behind, window, causal;
  std::int32_t first_sequence, sequences, begin, end;
  const Span* span;
  Tables tables;
  Bands bands;
  std::uint16_t* out;
  std::int32_t key_width, step;
};

// decode: context = joined sums * value_up.
struct Decode {
  const std::uint16_t* joined;    // [B][tokens][H][w], model type
  const std::uint16_t* value_up;  // [G][w][V]
  std::int32_t batch, fresh, tokens, heads, groups, value_rank, value_dim;
  std::uint16_t* context;  // [B][fresh][H][V]
};

}  // namespace mla_pass::cuda
