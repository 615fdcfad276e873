// Queries to [un-rotated dims | rope dims]: query times query_map, kept as float32.
#pragma once

#include "heads.cuh"

namespace mla_pass::cuda {

// Queries as they are. grid (B * tokens * H rows, kQueryWarps at a time)
template <class T>
MLA_DEVICE void widen_queries(const Map& p) {
  const int row = block().x * kQueryWarps + warp(), place = row / p.heads, head = row % p.heads;
  if (place >= p.batch * p.tokens) return;
  const long long from = static_cast<long long>(place / p.tokens) * p.fresh + place % p.tokens;
  const std::uint16_t* query = p.query + (from * p.heads + head) * p.width;
  float* dims = p.dims + static_cast<long long>(row) * p.width;
  for (int i = lane(); i < p.width; i += 32) dims[i] = T::widen(query[i]);
}

template <class T>
MLA_DEVICE void map(const Map& p) {
  if (!p.query_map) return widen_queries<T>(p);
  product_of_heads<T>(p, p.query, p.fresh, p.query_dim, p.query_map, p.width,
                      [&](const HeadRow& place, int at, float low, float high) {
                        float* dims = p.dims + place.of(p.tokens, p.heads) * p.width;
                        if (at < p.width) dims[at] = low;
                        if (at + 1 < p.width) dims[at + 1] = high;
                      });
}

}  // namespace mla_pass::cuda
