// Every kernel as a function of the device, by the name that kernels.def gives it.
//
// 512 threads are to find room on an SM, 128 registers each: with fewer ptxas spills, left to itself it takes more. Of
// wide kernels 384 are: three CTAs of 16 query rows or one of 32. Their keys are of 384 numbers and more, so that
// shared memory seldom has room for others.
#include "kernels.h"

using namespace mla_pass::cuda;

#define MLA_ENTRY(name, parameters, threads, resident, call)                             \
  extern "C" __global__ void __launch_bounds__(threads, (resident) / (threads)) name(    \
      const __grid_constant__ parameters p) {                                            \
    call;                                                                                \
  }
#define MLA_KERNEL(name, parameters, threads, call) MLA_ENTRY(name, parameters, threads, 512, call)
#define MLA_WIDE_KERNEL(name, parameters, threads, call) MLA_ENTRY(name, parameters, threads, 384, call)
#include "kernels.def"
#undef MLA_KERNEL
#undef MLA_ENTRY
