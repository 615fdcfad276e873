// What kernels use of the machine. Two implementations of the same names: device.cuh for nvcc, and shim.h, of the
// tests, which runs kernels on a CPU.
//
//   MLA_DEVICE                                 marks a function of the device
//   MLA_UNROLL                                 before a loop: unroll it whole
//   struct F16, BF16                           a model's type: widen(bits) -> float, narrow(float) -> bits (nearest
//                                              even), pack(low, high) -> two numbers in a register
//   Place thread(), block(), grid()            x, y, z;  int lane(), int warp(), int threads() in a CTA
//   unsigned char* shared_memory()             dynamic, 128-byte aligned
//   void barrier(), warp_barrier()             order memory; what follows orders none
//   float shuffle_xor(float, int), int shuffle_xor(int, int)        over all 32 lanes; also shuffle(x, lane)
//   float exp2, log2, tanh, sqrt (float)       good to 2 ulp
//   float fast_exp2(float)                     2^-22 relative; results below the smallest normal number are 0
//   min, max                                   of two numbers of one type
//   void atomic_or(int32*, int32)
//   void mma<T>(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1)   m16n8k16, d += a b
//   void load_matrices(uint32 (&r)[4], const void*)                 ldmatrix.x4; load_matrices_transposed alike
//   void copy_async(void* shared, const void* global, int bytes)    16 bytes to aligned shared memory, from an aligned
//                                              address, of which `bytes` (0 to 16) are read and the others zeroed
//   void copy_commit();  template <int N> void copy_wait()          groups, as cp.async has them
#pragma once

#if defined(__CUDACC__)
#include "device.cuh"
#else
#include "shim.h"
#endif
