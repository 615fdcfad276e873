// The context: joined sums of latents, pulled through value_up. A sequence whose sums are NaN stays NaN.
#pragma once

#include "heads.cuh"

namespace mla_pass::cuda {

template <class T>
MLA_DEVICE void decode(const Decode& p) {
  product_of_heads<T>(p, p.joined, p.tokens, p.value_rank, p.value_up, p.value_dim,
                      [&](const HeadRow& place, int at, float low, float high) {
                        store_pair<T>(p.context + place.of(p.fresh, p.heads) * p.value_dim, at, p.value_dim, low, high);
                      });
}

}  // namespace mla_pass::cuda
