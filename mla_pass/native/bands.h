// Latent queries of the blocks that cached rows lie in: the bands of block rotation on the query's side.
//
// A level's queries are those of the coarser levels, moved to the first rows of its own blocks, plus its own pairs',
// turned to there and pulled through key_up; the finest level's meet the cache. Pairs of the shortest blocks are
// none of these (see fine.h). Several neighbouring blocks are made at a time: they share key_up, so that heads times
// blocks are the rows of one product, and block numbers are what fills the lanes of a vector where pairs are turned.
#pragma once

#include "prepare.h"

namespace mla_pass::MLA_PASS_ISA {

template <class T>
class BandQueries {
 public:
  BandQueries(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, const AbsorbScratch& scratch)
      : p_(p), size_(p.size), tile_(tile), queries_(queries), scratch_(scratch), rows_(rows_of(tile)),
        finest_(p.size.finest) {
    for (Index level = 0; level < size_.levels; ++level) blocks_[level] = {-1, 0};
  }

  // Calls work(row, rows) for the run of rows of every finest block within [begin, end), its queries made. Rows are
  // asked for in order and in one piece, and none from `limit` on.
  template <class Work>
  void for_blocks(Index begin, Index end, Index limit, const Work& work) {
    while (begin < end) {
      if (begin >= made_) enter(begin, least(limit, (begin / block() + scratch_.blocks) * block()));
      const Index stop = least(end, (begin / block() + 1) * block());
      work(begin, stop - begin);
      begin = stop;
    }
  }

  // Whether there is any level here.
  bool turning() const { return finest_ < size_.levels; }
  // Rows of a finest block.
  Index block() const { return p_.level[finest_].block; }
  // The tile's latent queries for the finest block that holds cache row `key`: a row each `step()`.
  const float* query(Index order, Index key) const {
    return at(finest_, order, 0, key / block() - blocks_[finest_].first);
  }
  Index step() const { return blocks_[finest_].count * queries_.key_width; }
  // What the keys' mean adds to their scores: a row each kPad.
  const float* mean(Index order, Index key) const {
    return mean_at(finest_, order, 0) + key / block() - blocks_[finest_].first;
  }

 private:
  struct Blocks {
    Index first, count;
  };

  float* at(Index level, Index order, Index row, Index block) const {
    const Index count = blocks_[level].count;
    return scratch_.query[level] + ((order * rows_ + row) * count + block) * queries_.key_width;
  }
  float* mean_at(Index level, Index order, Index row) const {
    return scratch_.mean[level] + (order * rows_ + row) * kPad;
  }

  // Make the queries of all blocks that hold rows [begin, end), `blocks` of the finest level at most.
  void enter(Index begin, Index end) {
    made_ = end;
    bool stale = false;
    for (Index level = size_.levels - 1; level >= finest_; --level) {
      const Index block = p_.level[level].block;
      const Blocks now = {begin / block, (end - 1) / block - begin / block + 1};
      stale = stale || now.first != blocks_[level].first || now.count != blocks_[level].count;
      if (!stale) continue;
      blocks_[level] = now;
      inherit(level);
      add_pairs(level);
    }
  }

  // What the coarser level, or all that stands still, gives to each block.
  void inherit(Index level) {
    const Index above = level + 1;
    for (Index block = 0; block < blocks_[level].count; ++block) {
      const Index first = (blocks_[level].first + block) * p_.level[level].block;
      for (Index row = 0; row < rows_; ++row) {
        if (above == size_.levels) {
          begin_with_still(level, row, block);
          continue;
        }
        const Index size = p_.level[above].block;
        hand_down(level, row, block, first / size - blocks_[above].first, static_cast<float>(first % size));
      }
    }
  }

  void begin_with_still(Index level, Index row, Index block) {
    const Index width = queries_.key_width;
    widen(queries_.still + row * width, at(level, 0, row, block), width);
    mean_at(level, 0, row)[block] = queries_.still_mean[row];
    if (size_.orders == 1) return;
    fill(at(level, 1, row, block), width, 0.0f);
    mean_at(level, 1, row)[block] = 0.0f;
  }

  // query = base + moved * slope, and the means alike, from block `parent` of the level above.
  void hand_down(Index level, Index row, Index block, Index parent, float moved) {
    const Index width = queries_.key_width, above = level + 1;
    const float *base = at(above, 0, row, parent), *slope = at(above, 1, row, parent);
    float* query = at(level, 0, row, block);
    const float mean = mean_at(above, 0, row)[parent];
    if (size_.orders == 1) {
      widen(base, query, width);
      mean_at(level, 0, row)[block] = mean;
      return;
    }
    float* own_slope = at(level, 1, row, block);
    const Vec by = splat(moved);
    for (Index i = 0; i < width; i += Vec::width) {
      const Vec down = load(slope + i);
      store(query + i, fma(by, down, load(base + i)));
      store(own_slope + i, down);
    }
    const float mean_slope = mean_at(above, 1, row)[parent];
    mean_at(level, 0, row)[block] = mean + moved * mean_slope;
    mean_at(level, 1, row)[block] = mean_slope;
  }

  // The level's own pairs, turned to the blocks' first rows and pulled through key_up.
  void add_pairs(Index level) {
    const Index begin = p_.level[level].begin, pairs = p_.level[level].end - begin, count = blocks_[level].count;
    const Index plane = rows_ * count;
    for (Index token = 0; token < tile_.tokens; ++token) {
      make_factors(level, token);
      for (Index head = 0; head < tile_.heads; ++head) turn(level, row_at(tile_, head, token), plane);
    }
    for (Index order = 0; order < size_.orders; ++order) {
      for_groups(size_, tile_, [&](const GroupRun& run) {
        const float* turned = scratch_.turned + order * 2 * pairs * plane + run.row * count;
        const T* up = p_.key_up + (run.group * size_.nope_dim + begin) * size_.key_rank;
        const Term<T> terms[2] = {
            {{turned, 1, plane}, up, size_.key_rank, pairs},
            {{turned + pairs * plane, 1, plane}, up + size_.pairs * size_.key_rank, size_.key_rank, pairs},
        };
        sums(run.rows * count, size_.key_rank, terms, 2, at(level, order, run.row, 0), queries_.key_width);
      });
    }
  }

  // conj(fit) * exp(j theta (row - first row of the block)) for a token's row: [order][pair][re, im][block]. The angle's
  // table is read at |row - first|: only without a causal mask may a block lie ahead of the query.
  void make_factors(Index level, Index token) {
    const Index begin = p_.level[level].begin, pairs = p_.level[level].end - begin;
    const Index row = cache_row(size_, tile_, token), count = blocks_[level].count;
    float* factors = scratch_.turn;
    for (Index i = 0; i < pairs; ++i) {
      float cos[kPad] = {}, sin[kPad] = {};
      const Index column = p_.band_index[begin + i];
      for (Index block = 0; block < count; ++block) {
        const Index ahead = row - (blocks_[level].first + block) * p_.level[level].block;
        const Index place = (ahead < 0 ? -ahead : ahead) * size_.angles + column;
        cos[block] = p_.cos[place];
        sin[block] = ahead < 0 ? -p_.sin[place] : p_.sin[place];
      }
      for (Index order = 0; order < size_.orders; ++order) {
        const float* fit = p_.fit + (order * size_.pairs + begin + i) * 2;
        const Vec re = splat(fit[0]), im = splat(fit[1]);
        float* out = factors + (order * pairs + i) * 2 * kPad;
        for (Index x = 0; x < kPad; x += Vec::width) {
          const Vec c = load(cos + x), s = load(sin + x);
          store(out + x, fma(s, im, mul(c, re)));
          store(out + kPad + x, sub(mul(s, re), mul(c, im)));
        }
      }
    }
  }

  // One row's pairs, turned for every block, and what they add to the mean's scores.
  void turn(Index level, Index row, Index plane) {
    const Index begin = p_.level[level].begin, pairs = p_.level[level].end - begin, count = blocks_[level].count;
    const float* x = queries_.dims + row * queries_.width + begin;
    const float* y = x + size_.pairs;
    const Index per_group = size_.heads / size_.groups, head = tile_.token_major ? row % tile_.heads : row / tile_.tokens;
    const float* mean = p_.key_mean + (tile_.head + head) / per_group * size_.nope_dim + begin;
    for (Index order = 0; order < size_.orders; ++order) {
      float* sum = mean_at(level, order, row);
      float* turned = scratch_.turned + order * 2 * pairs * plane + row * count;
      for (Index i = 0; i < pairs; ++i) {
        const float* factor = scratch_.turn + (order * pairs + i) * 2 * kPad;
        const Vec a = splat(x[i]), b = splat(y[i]), mean_re = splat(mean[i]), mean_im = splat(mean[size_.pairs + i]);
        for (Index block = 0; block < count; block += Vec::width) {
          const Vec c = load(factor + block), s = load(factor + kPad + block);
          const Vec re = sub(mul(a, c), mul(b, s)), im = fma(a, s, mul(b, c));
          const Index lanes = least(Vec::width, count - block);
          store_first(turned + i * plane + block, re, lanes);
          store_first(turned + (pairs + i) * plane + block, im, lanes);
          store(sum + block, fma(re, mean_re, fma(im, mean_im, load(sum + block))));
        }
      }
    }
  }

  const Problem<T>& p_;
  const Sizes& size_;
  const Tile& tile_;
  const Queries<T>& queries_;
  const AbsorbScratch& scratch_;
  const Index rows_;
  const Index finest_;  // level
  Index made_ = 0;  // the end of the rows whose blocks' queries are at hand
  Blocks blocks_[kMaxLevels];
};

}  // namespace mla_pass::MLA_PASS_ISA
