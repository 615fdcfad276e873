// Queries of a tile against the rows of a chunk: their scores before scale, mask and the pairs that are decoded.
//
// Where the tile's queries fill vectors they are laid across (products.h). That costs a tile about a sixth of a
// product with one row for each query; so it is done once for all chunks where no band turns the queries, and else once
// for a block of at least a vector of rows.
#pragma once

#include "bands.h"
#include "chunk.h"

namespace mla_pass::MLA_PASS_ISA {

constexpr Index kScoreStep = kChunk + kPad;

// s += offset * slopes, and the means: columns [0, keys) of every row. A row's mean stands each `mean_step`.
inline void follow(Index rows, Index keys, float offset, const float* slopes, const float* mean,
                   const float* mean_slope, Index mean_step, float* s, Index step) {
  for (Index row = 0; row < rows; ++row) {
    const float constant = mean[row * mean_step], slope = mean_slope[row * mean_step];
    for (Index i = 0; i < keys; ++i) {
      const float delta = offset + static_cast<float>(i);
      s[row * step + i] += constant + delta * (slopes[row * step + i] + slope);
    }
  }
}

inline void add_mean(Index rows, Index keys, const float* mean, Index mean_step, float* s, Index step) {
  for (Index row = 0; row < rows; ++row) {
    for (Index i = 0; i < keys; ++i) s[row * step + i] += mean[row * mean_step];
  }
}

template <class T>
class Meeting {
 public:
  // `turning`: whether queries of latents are given block by block.
  Meeting(const Problem<T>& p, const Tile& tile, const Queries<T>& queries, bool turning, const AbsorbScratch& scratch)
      : size_(p.size), queries_(queries), slopes_(scratch.slopes), across_(scratch.across), rows_(rows_of(tile)),
        lanes_(whole_vectors(rows_)), has_mean_(p.key_up != nullptr) {
    if (!fills_lanes(rows_)) return;
    transpose(rope(), rows_, size_.rope_dim, queries.width, across_, lanes_);
    if (!turning && size_.nope_dim > 0) lay(0, queries.still, queries.key_width);
  }

  // s [rows][kScoreStep] = products with `keys` rows where no band turns the queries.
  void still(Index keys, const Chunk& chunk, float* s, Ahead& ahead) const {
    const Index first = size_.nope_dim > 0 ? 0 : 1;
    if (fills_lanes(rows_)) {
      const Span spans[2] = {laid(0, chunk), laid_rope(chunk)};
      dots_across(spans + first, 2 - first, rows_, keys, s, kScoreStep, ahead);
    } else {
      const Span spans[2] = {as_it_lies(queries_.still, queries_.key_width, chunk), rope_as_it_lies(chunk)};
      dots(spans + first, 2 - first, rows_, keys, s, kScoreStep, ahead);
    }
    if (first == 0 && has_mean_) add_mean(rows_, keys, queries_.still_mean, 1, s, kScoreStep);
  }

  // The same with `keys` rows from `key` on that lie in one block of every level, whose queries `bands` has made.
  void block(const BandQueries<T>& bands, Index key, Index keys, const Chunk& chunk, float* s, Ahead& ahead) {
    const bool across = fills_lanes(rows_) && keys >= Vec::width;
    if (across && laid_block_ != key / bands.block()) {
      for (Index order = 0; order < size_.orders; ++order) lay(order, bands.query(order, key), bands.step());
      laid_block_ = key / bands.block();
    }
    for (Index order = 0; order < size_.orders; ++order) {
      float* to = order == 0 ? s : slopes_;
      const int count = order == 0 ? 2 : 1;  // the rope part knows no slope
      if (across) {
        const Span spans[2] = {laid(order, chunk), laid_rope(chunk)};
        dots_across(spans, count, rows_, keys, to, kScoreStep, ahead);
      } else {
        const Span spans[2] = {as_it_lies(bands.query(order, key), bands.step(), chunk), rope_as_it_lies(chunk)};
        dots(spans, count, rows_, keys, to, kScoreStep, ahead);
      }
    }
    if (size_.orders == 1) return add_mean(rows_, keys, bands.mean(0, key), kPad, s, kScoreStep);
    follow(rows_, keys, static_cast<float>(key % bands.block()), slopes_, bands.mean(0, key), bands.mean(1, key), kPad,
           s, kScoreStep);
  }

 private:
  const float* rope() const { return queries_.dims + size_.nope_dim; }

  // Where an order's queries of latents are laid across, behind the rope part's.
  float* place(Index order) const { return across_ + (size_.rope_dim + order * size_.key_rank) * lanes_; }

  void lay(Index order, const float* x, Index step) const {
    transpose(x, rows_, size_.key_rank, step, place(order), lanes_);
  }

  Span laid(Index order, const Chunk& chunk) const {
    return {place(order), lanes_, chunk.latent.data, chunk.latent.step, size_.key_rank};
  }
  Span laid_rope(const Chunk& chunk) const {
    return {across_, lanes_, chunk.rope.data, chunk.rope.step, size_.rope_dim};
  }
  Span as_it_lies(const float* x, Index step, const Chunk& chunk) const {
    return {x, step, chunk.latent.data, chunk.latent.step, size_.key_rank};
  }
  Span rope_as_it_lies(const Chunk& chunk) const {
    return {rope(), queries_.width, chunk.rope.data, chunk.rope.step, size_.rope_dim};
  }

  const Sizes& size_;
  const Queries<T>& queries_;
  float *const slopes_, *const across_;
  const Index rows_, lanes_;
  const bool has_mean_;
  Index laid_block_ = -1;
};

}  // namespace mla_pass::MLA_PASS_ISA
