// Small whole numbers that host and device work out alike.
#pragma once

#if defined(__CUDACC__)
#define MLA_BOTH __host__ __device__
#else
#define MLA_BOTH
#endif

namespace mla_pass::cuda {

MLA_BOTH constexpr int least(int a, int b) { return b < a ? b : a; }
MLA_BOTH constexpr int greatest(int a, int b) { return b > a ? b : a; }
MLA_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
MLA_BOTH constexpr int up8(int x) { return (x + 7) & ~7; }
MLA_BOTH constexpr int up16(int x) { return (x + 15) & ~15; }

}  // namespace mla_pass::cuda
