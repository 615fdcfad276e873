#pragma once

#include "problem.h"

namespace mla_pass {

// The first of `size.levels` levels whose pairs are absorbed, all coarser ones with it; `size.levels` where none is.
// Pairs of the finer ones are decoded, from `depth` columns of the latent each (Problem.depth). A tile meets the cache
// with `rows` queries of `groups` kv groups.
Index absorbed_from(const Level* levels, const Sizes& size, const Index* depth, Index rows, Index groups);

}  // namespace mla_pass
