// Chunks of cached rows as float32.
#pragma once

#include "products.h"

namespace mla_pass::MLA_PASS_ISA {

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

// The same laid across, chunk rows in the lanes: [key_rank][kKeyStep], [rope_dim][kKeyStep].
struct AcrossChunk {
  const float *latent, *rope;
};

// What queries meet of `count` rows, laid across in `room`.
inline AcrossChunk lay_across(const Sizes& size, const Chunk& chunk, Index count, float* room) {
  float* rope = room + size.key_rank * kKeyStep;
  transpose(chunk.latent.data, count, size.key_rank, chunk.latent.step, room, kKeyStep);
  transpose(chunk.rope.data, count, size.rope_dim, chunk.rope.step, rope, kKeyStep);
  return {room, rope};
}

inline AcrossChunk from(const AcrossChunk& chunk, Index row) { return {chunk.latent + row, chunk.rope + row}; }

}  // namespace mla_pass::MLA_PASS_ISA
