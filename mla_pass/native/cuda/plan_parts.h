// Steps of make_plan, each in a file of its own.
#pragma once

#include "plan.h"
#include "sizes.h"

namespace mla_pass::cuda {

// Throws Unsupported: what was found, and what was expected.
[[noreturn]] void refuse(const std::string& what);

inline Index divided_up(Index a, Index b) { return (a + b - 1) / b; }
// Of sizes that were checked to be no larger.
inline int narrow(Index x) { return static_cast<int>(x); }

// parameters.cc: which pairs are decoded, and the kernels' own structs, for plan.expanded.
void fill_parameters(const Layout& layout, const Sizes& size, const Inputs& inputs, Plan& plan);

// tiling.cc: how runs of `tokens` meet the keys of plan.wave, with splits whose states take at most `state_bytes`.
Tiling tiling_of(const Plan& plan, const Device& device, int tokens, Index state_bytes);

}  // namespace mla_pass::cuda
