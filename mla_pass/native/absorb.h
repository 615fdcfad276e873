// The absorbed form: queries are pulled through key_up and meet the latents themselves.
//
// Counted per cached row and head in multiply-adds: orders * k for the scores, p for the rope part, w for the sum of
// values; and for each level of m pairs in blocks of B rows, 2 m orders (k + 1) / B for the latent queries of its
// blocks (mla_pass/fold/arithmetic.py counts the same). Bytes per cached row: r + p numbers for all heads together, so
// that 32 heads at r = 512 do 61 multiply-adds for each number read.
#pragma once

#include "prepare.h"
#include "weigh.h"

namespace mla_pass::MLA_PASS_ISA {

// Latent queries of the block that the next keys lie in, for every level of bands. A level's queries are those of the
// coarser levels, moved to its own first row, plus its own pairs'; the finest level's meet the cache.
template <class T>
class BandQueries {
 public:
  BandQueries(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, const AbsorbScratch& scratch)
      : p_(p), size_(p.size), tile_(tile), queries_(queries), scratch_(scratch), rows_(rows_of(tile)) {
    for (Index level = 0; level < size_.levels; ++level) present_[level] = -1;
  }

  // Make the queries of the blocks that hold cache row `key`.
  void enter(Index key) {
    bool stale = false;
    for (Index level = size_.levels - 1; level >= 0; --level) {
      const Index block = key / p_.level[level].block;
      stale = stale || block != present_[level];
      if (!stale) continue;
      inherit(level, block * p_.level[level].block);
      add_pairs(level, block * p_.level[level].block);
      present_[level] = block;
    }
  }

  Index block() const { return p_.level[0].block; }
  const float* query(Index order) const { return scratch_.query[0] + order * rows_ * queries_.key_width; }
  const float* mean(Index order) const { return scratch_.mean[0] + order * rows_; }

 private:
  // What the coarser level, or all that stands still, gives to the block that starts at `first`.
  void inherit(Index level, Index first) {
    const Index width = queries_.key_width;
    float *query = scratch_.query[level], *mean = scratch_.mean[level];
    const bool coarsest = level + 1 == size_.levels;
    const float* from = coarsest ? queries_.still : scratch_.query[level + 1];
    const float* from_mean = coarsest ? queries_.still_mean : scratch_.mean[level + 1];
    if (size_.orders == 1) return move(from, from, 0.0f, rows_ * width, query, from_mean, from_mean, mean);
    float *slope = query + rows_ * width, *mean_slope = mean + rows_;
    if (coarsest) {
      move(from, from, 0.0f, rows_ * width, query, from_mean, from_mean, mean);
      fill(slope, rows_ * width, 0.0f);
      return fill(mean_slope, rows_, 0.0f);
    }
    const Index block = p_.level[level + 1].block;
    const float moved = static_cast<float>(first % block);
    move(from, from + rows_ * width, moved, rows_ * width, query, from_mean, from_mean + rows_, mean);
    widen(from + rows_ * width, slope, rows_ * width);
    widen(from_mean + rows_, mean_slope, rows_);
  }

  // query = base + moved * slope, and the means alike.
  void move(const float* base, const float* slope, float moved, Index count, float* query, const float* base_mean,
            const float* slope_mean, float* mean) const {
    if (moved == 0.0f) {
      widen(base, query, count);
      return widen(base_mean, mean, rows_);
    }
    const Vec by = splat(moved);
    for (Index i = 0; i < count; i += Vec::width) store(query + i, fma(by, load(slope + i), load(base + i)));
    for (Index i = 0; i < rows_; ++i) mean[i] = base_mean[i] + moved * slope_mean[i];
  }

  // The level's own pairs, turned to the block's first row and pulled through key_up.
  void add_pairs(Index level, Index first) {
    const Index begin = p_.level[level].begin, pairs = p_.level[level].end - begin;
    turn(begin, pairs, first);
    for (Index order = 0; order < size_.orders; ++order) {
      for_groups(size_, tile_, [&](const GroupRun& run) {
        const float* turned = scratch_.turned + (order * rows_ + run.row) * 2 * pairs;
        float* query = scratch_.query[level] + (order * rows_ + run.row) * queries_.key_width;
        float* mean = scratch_.mean[level] + order * rows_ + run.row;
        for (Index part = 0; part < 2; ++part) {  // real, imaginary
          const Index at = run.group * size_.nope_dim + part * size_.pairs + begin;
          sums(run.rows, size_.key_rank, pairs, Left{turned + part * pairs, 2 * pairs, 1},
               p_.key_up + at * size_.key_rank, size_.key_rank, query, queries_.key_width);
          for (Index i = 0; i < run.rows; ++i) {
            mean[i] += dot(turned + i * 2 * pairs + part * pairs, p_.key_mean + at, pairs);
          }
        }
      });
    }
  }

  // conj(fit) * exp(j theta (row - first)) * q for every row of the tile, pairs from `begin`. The angle's table is read
  // at |row - first|: only without a causal mask may a block lie ahead of the query.
  void turn(Index begin, Index pairs, Index first) {
    for (Index token = 0; token < tile_.tokens; ++token) {
      const Index ahead = cache_row(size_, tile_, token) - first;
      const Index distance = ahead < 0 ? -ahead : ahead;
      const float sign = ahead < 0 ? -1.0f : 1.0f;
      const float *cos = p_.cos + distance * size_.angles, *sin = p_.sin + distance * size_.angles;
      for (Index order = 0; order < size_.orders; ++order) {
        const float* fit = p_.fit + (order * size_.pairs + begin) * 2;
        float *re = scratch_.turn, *im = re + pairs;
        for (Index i = 0; i < pairs; ++i) {
          const Index column = p_.band_index[begin + i];
          const float c = cos[column], s = sign * sin[column];
          re[i] = c * fit[2 * i] + s * fit[2 * i + 1];
          im[i] = s * fit[2 * i] - c * fit[2 * i + 1];
        }
        for (Index head = 0; head < tile_.heads; ++head) {
          const Index row = row_at(tile_, head, token);
          multiply(queries_.dims + row * queries_.width + begin, re, im, pairs,
                   scratch_.turned + (order * rows_ + row) * 2 * pairs);
        }
      }
    }
  }

  // (x + j y) * (re + j im), x and y size_.pairs apart, to `out` with `pairs` between the parts.
  void multiply(const float* __restrict x, const float* __restrict re, const float* __restrict im, Index pairs,
                float* __restrict out) const {
    const float* __restrict y = x + size_.pairs;
    for (Index i = 0; i < pairs; ++i) {
      out[i] = x[i] * re[i] - y[i] * im[i];
      out[pairs + i] = x[i] * im[i] + y[i] * re[i];
    }
  }

  const Problem<T>& p_;
  const Sizes& size_;
  const Tile& tile_;
  const Queries<T>& queries_;
  const AbsorbScratch& scratch_;
  const Index rows_;
  Index present_[kMaxLevels];
};

// Cached rows as float32: where they lie, or unpacked into scratch.
struct Rows {
  const float* data;
  Index step;
};

struct Chunk {
  Rows latent, rope;
};

inline Rows read_rows(const Stored& from, Index first, Index count, float* to, Index step) {
  if (from.as == Storage::float32) return {static_cast<const float*>(from.data) + first * from.width, from.width};
  for (Index i = 0; i < count; ++i) unpack(from, first + i, to + i * step);
  return {to, step};
}

// `count` rows from row `first` of both tensors.
template <class T>
inline Chunk read_chunk(const Problem<T>& p, Index first, Index count, const ChunkScratch& scratch) {
  const Sizes& size = p.size;
  if (size.split == size.rank) {
    return {read_rows(p.part[0], first, count, scratch.latent, scratch.latent_step),
            read_rows(p.part[1], first, count, scratch.rope, scratch.rope_step)};
  }
  for (Index i = 0; i < count; ++i) {
    float* row = scratch.latent + i * scratch.latent_step;
    unpack(p.part[0], first + i, row);
    unpack(p.part[1], first + i, row + size.split);
  }
  return {{scratch.latent, scratch.latent_step}, {scratch.latent + size.rank, scratch.latent_step}};
}

// s += offset * slopes, and the means: columns [0, keys) of every row.
inline void follow(Index rows, Index keys, float offset, const float* slopes, const float* mean,
                   const float* mean_slope, float* s, Index step) {
  for (Index row = 0; row < rows; ++row) {
    for (Index i = 0; i < keys; ++i) {
      const float delta = offset + static_cast<float>(i);
      s[row * step + i] += mean[row] + delta * (slopes[row * step + i] + mean_slope[row]);
    }
  }
}

inline void add_mean(Index rows, Index keys, const float* mean, float* s, Index step) {
  for (Index row = 0; row < rows; ++row) {
    for (Index i = 0; i < keys; ++i) s[row * step + i] += mean[row];
  }
}

constexpr Index kScoreStep = kChunk + kPad;

// Products of a tile's queries with `keys` rows of the cache that lie in one block of every level.
template <class T>
inline void meet(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, const BandQueries<T>& bands,
                 Index offset, Index keys, const Rows& latent, const Rows& rope, const AbsorbScratch& scratch,
                 float* s) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  const bool turning = size.levels > 0;
  const float* query = turning ? bands.query(0) : queries.still;
  const Span spans[2] = {
      {queries.dims + size.nope_dim, queries.width, rope.data, rope.step, size.rope_dim},
      {query, queries.key_width, latent.data, latent.step, size.key_rank},
  };
  dots(spans, size.nope_dim > 0 ? 2 : 1, rows, keys, s, kScoreStep);
  if (size.nope_dim == 0 || !p.key_up) return;
  if (size.orders == 1) return add_mean(rows, keys, turning ? bands.mean(0) : queries.still_mean, s, kScoreStep);
  const Span slope = {bands.query(1), queries.key_width, latent.data, latent.step, size.key_rank};
  dots(&slope, 1, rows, keys, scratch.slopes, kScoreStep);
  follow(rows, keys, static_cast<float>(offset), scratch.slopes, bands.mean(0), bands.mean(1), s, kScoreStep);
}

template <class T>
void absorb(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, Index begin, Index end,
            const AbsorbScratch& scratch, const Partial& part) {
  const Sizes& size = p.size;
  const Index rows = rows_of(tile);
  BandQueries<T> bands(p, tile, queries, scratch);
  start(part, rows);
  for (Index first = begin; first < end; first += kChunk) {
    const Index keys = least(kChunk, end - first), at = tile.batch * size.capacity + first;
    const auto [latent, rope] = read_chunk(p, at, keys, scratch.chunk);
    for (Index key = 0; key < keys;) {
      Index stop = keys, offset = 0;
      if (size.levels > 0) {
        bands.enter(first + key);
        offset = (first + key) % bands.block();
        stop = least(keys, key + bands.block() - offset);
      }
      meet(p, tile, queries, bands, offset, stop - key, Rows{latent.data + key * latent.step, latent.step},
           Rows{rope.data + key * rope.step, rope.step}, scratch, scratch.scores + key);
      key = stop;
    }
    const Scoring<T> how = {size.scale, size.softcap, first, keys, hidden_keys(p, tile, first, keys)};
    weigh(how, queries.sight, rows, scratch.scores, kScoreStep, part, 0);
    sums(rows, size.value_rank, keys, Left{scratch.scores, kScoreStep, 1}, latent.data + size.value_offset,
         latent.step, part.sum, part.value_width);
  }
}

}  // namespace mla_pass::MLA_PASS_ISA
