// Queries of a tile against the rows of a chunk: their scores before scale, mask and the pairs that are decoded.
#pragma once

#include "bands.h"
#include "chunk.h"

namespace mla_pass::MLA_PASS_ISA {

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

// s [rows][kKeyStep] = x [rows][step] times the latents of `keys` rows that are laid across.
inline void meet_latents(const Sizes& size, const float* x, Index rows, Index step, const AcrossChunk& chunk,
                         Index keys, float* s, Ahead& ahead) {
  for (Index row = 0; row < rows; ++row) fill(s + row * kKeyStep, keys, 0.0f);
  meet_keys(x, rows, step, chunk.latent, size.key_rank, keys, s, ahead);
}

// s += the rope part's products.
template <class T>
inline void meet_rope(const Sizes& size, const Queries<T>& queries, Index rows, const float* across, Index keys,
                      float* s, Ahead& ahead) {
  meet_keys(queries.dims + size.nope_dim, rows, queries.width, across, size.rope_dim, keys, s, ahead);
}

// Products where no band turns the queries.
template <class T>
inline void meet_still(const Problem<T>& p, const Queries<T>& queries, Index rows, const AcrossChunk& chunk, Index keys,
                       float* s, Ahead& ahead) {
  for (Index row = 0; row < rows; ++row) fill(s + row * kKeyStep, keys, 0.0f);
  if (p.size.nope_dim > 0) {
    meet_keys(queries.still, rows, queries.key_width, chunk.latent, p.size.key_rank, keys, s, ahead);
  }
  meet_rope(p.size, queries, rows, chunk.rope, keys, s, ahead);
  if (p.size.nope_dim > 0 && p.key_up) add_mean(rows, keys, queries.still_mean, 1, s, kKeyStep);
}

// Products with `keys` rows from `key` on that lie in one block of every level, whose queries `bands` has made.
template <class T>
inline void meet_block(const Problem<T>& p, const Queries<T>& queries, const BandQueries<T>& bands, Index rows,
                       Index key, Index keys, const AcrossChunk& chunk, float* slopes, float* s, Ahead& ahead) {
  meet_latents(p.size, bands.query(0, key), rows, bands.step(), chunk, keys, s, ahead);
  meet_rope(p.size, queries, rows, chunk.rope, keys, s, ahead);
  if (p.size.orders == 1) return add_mean(rows, keys, bands.mean(0, key), kPad, s, kKeyStep);
  meet_latents(p.size, bands.query(1, key), rows, bands.step(), chunk, keys, slopes, ahead);
  follow(rows, keys, static_cast<float>(key % bands.block()), slopes, bands.mean(0, key), bands.mean(1, key), kPad, s,
         kKeyStep);
}

// A tile's queries laid across, once for all chunks: where they fill the lanes and no band turns them.
template <class T>
class QueriesAcross {
 public:
  QueriesAcross(const Problem<T>& p, const Queries<T>& queries, Index rows, float* room)
      : size_(p.size), queries_(queries), mean_(p.key_up ? queries.still_mean : nullptr), room_(room), rows_(rows),
        lanes_(whole_vectors(rows)) {
    transpose(queries.dims + size_.nope_dim, rows, size_.rope_dim, queries.width, room, lanes_);
    if (size_.nope_dim > 0) transpose(queries.still, rows, size_.key_rank, queries.key_width, latents(), lanes_);
  }

  // s [rows][kKeyStep] = products with `keys` rows.
  void meet(Index keys, const Chunk& chunk, float* s, Ahead& ahead) const {
    const Span spans[2] = {
        {room_, lanes_, chunk.rope.data, chunk.rope.step, size_.rope_dim},
        {latents(), lanes_, chunk.latent.data, chunk.latent.step, size_.key_rank},
    };
    meet_queries(spans, size_.nope_dim > 0 ? 2 : 1, rows_, keys, s, ahead);
    if (size_.nope_dim > 0 && mean_) add_mean(rows_, keys, mean_, 1, s, kKeyStep);
  }

 private:
  float* latents() const { return room_ + size_.rope_dim * lanes_; }

  const Sizes& size_;
  const Queries<T>& queries_;
  const float* mean_;
  float* room_;
  const Index rows_, lanes_;
};

}  // namespace mla_pass::MLA_PASS_ISA
