// A kernel that uses every name of simt.h, so that each is known to compile and what it becomes can be looked up in the
// PTX.
#include "simt.h"

namespace mla_pass::cuda {

struct Names {
  const std::uint16_t* in;
  float* out;
  std::uint16_t* bits;
  std::int32_t* flag;
};

template <class T>
MLA_DEVICE void use_names(const Names& p) {
  auto* row = reinterpret_cast<std::uint16_t*>(shared_memory()) + thread().x * 8;
  const Place at = block(), count = grid();
  copy_async(row, p.in + (at.x + count.x * (at.y + count.y * at.z)) * threads() * 8 + thread().x * 8, warp() * 8);
  copy_commit();
  copy_wait<1>();
  copy_wait<0>();
  barrier();
  std::uint32_t a[4], b[4];
  load_matrices(a, row);
  load_matrices_transposed(b, row);
  warp_barrier();
  float d[4] = {};
  MLA_UNROLL
  for (int i = 0; i < 4; i += 2) mma<T>(d, a, b[i], b[i + 1]);
  d[0] += shuffle_xor(d[1], 1) + shuffle(d[2], 3);
  const int i = shuffle_xor(lane(), 2) + shuffle(lane(), 5);
  d[1] = exp2(d[0]) + log2(d[1]) + tanh(d[2]) + sqrt(d[3]) + fast_exp2(min(d[0], max(d[1], 1.0f)));
  if (d[3] > T::widen(p.in[i])) atomic_or(p.flag, max(min(i, 2), 1));
  p.out[thread().x] = d[0] + d[1];
  p.bits[thread().x] = T::narrow(d[2]);
  reinterpret_cast<std::uint32_t*>(p.out)[thread().x + threads()] = T::pack(d[0], d[3]);
}

#if defined(__CUDACC__)
extern "C" __global__ void __launch_bounds__(128) names_f16(const __grid_constant__ Names p) { use_names<F16>(p); }
extern "C" __global__ void __launch_bounds__(128) names_bf16(const __grid_constant__ Names p) { use_names<BF16>(p); }
#else
template void use_names<F16>(const Names& p);
template void use_names<BF16>(const Names& p);
#endif

}  // namespace mla_pass::cuda
