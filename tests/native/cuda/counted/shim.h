// The shim, counting what kernels do on their way: what benchmarks/gpu_counts.py says they do is held against it.
// Stands before ../ among the folders of headers, so that kernels include it in the shim's place.
#pragma once

#include "../shim.h"

namespace mla_pass::cuda::counted {

// Of single threads: a warp's instruction counts 32 times.
struct Counts {
  long long products, matrices, copied_bytes;
};
inline Counts counts;

template <class T>
void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  ++counts.products;
  mma<T>(d, a, b0, b1);
}
inline void load(std::uint32_t (&r)[4], const void* row) {
  ++counts.matrices;
  load_matrices(r, row);
}
inline void load_transposed(std::uint32_t (&r)[4], const void* row) {
  ++counts.matrices;
  load_matrices_transposed(r, row);
}
inline void copy(void* shared, const void* global, int bytes) {
  counts.copied_bytes += bytes;
  copy_async(shared, global, bytes);
}

}  // namespace mla_pass::cuda::counted

#define mma counted::multiply
#define load_matrices counted::load
#define load_matrices_transposed counted::load_transposed
#define copy_async counted::copy
