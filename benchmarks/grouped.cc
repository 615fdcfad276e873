// Grouped-query attention of one token over a float32 cache, written by hand as the honest thing to be faster than:
// keys and values are read once, scores of a chunk stay in the first-level cache, softmax is online. Compile as a
// shared library with -O3 -march=native -ffast-math -fopenmp.
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace {

typedef float Loose __attribute__((vector_size(kBytes), aligned(4)));

constexpr int kHeadDim = 128, kHeads = 4, kChunk = 64, kKeys = 4;
constexpr int kVectors = kHeadDim / kLanes;
// Sums of this many vectors of a value row and all heads of the group stay in registers.
constexpr int kSums = std::min(4, kVectors);

Lanes load(const float* p) { return *reinterpret_cast<const Loose*>(p); }

float sum(Lanes x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// scores[kHeads][kChunk] of `keys` keys, a multiple of kKeys; a tile of kKeys keys meets all heads.
void dots(const float* query, const float* key, int keys, float* scores) {
  for (int first = 0; first < keys; first += kKeys) {
    Lanes total[kHeads][kKeys] = {};
    for (int at = 0; at < kHeadDim; at += kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j) {
        const Lanes k = load(key + (first + j) * kHeadDim + at);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) total[h][j] += load(query + h * kHeadDim + at) * k;
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int j = 0; j < kKeys; ++j) scores[h * kChunk + first + j] = sum(total[h][j]);
    }
  }
}

// context[kHeads][kHeadDim] += weights[kHeads][kChunk] values[keys][kHeadDim]
void sums(const float* weights, const float* value, int keys, float* context) {
  for (int at = 0; at < kHeadDim; at += kSums * kLanes) {
    Lanes total[kHeads][kSums];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kSums; ++v) total[h][v] = load(context + h * kHeadDim + at + v * kLanes);
    }
    for (int key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < kSums; ++v) {
        const Lanes x = load(value + key * kHeadDim + at + v * kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) total[h][v] += weights[h * kChunk + key] * x;
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kSums; ++v) *reinterpret_cast<Loose*>(context + h * kHeadDim + at + v * kLanes) = total[h][v];
    }
  }
}

void attend(const float* query, const float* key, const float* value, long rows, float scale, float* context) {
  float top[kHeads], mass[kHeads] = {};
  std::fill_n(top, kHeads, -INFINITY);
  std::fill_n(context, kHeads * kHeadDim, 0.0f);
  for (long first = 0; first < rows; first += kChunk) {
    float weights[kHeads * kChunk];
    dots(query, key + first * kHeadDim, kChunk, weights);
    for (int h = 0; h < kHeads; ++h) {
      float* w = weights + h * kChunk;
      float most = top[h], added = 0;
      for (int i = 0; i < kChunk; ++i) most = std::max(most, w[i] * scale);
      for (int i = 0; i < kChunk; ++i) added += w[i] = std::exp(w[i] * scale - most);
      const float kept = std::exp(top[h] - most);
      for (int i = 0; i < kHeadDim; ++i) context[h * kHeadDim + i] *= kept;
      mass[h] = mass[h] * kept + added;
      top[h] = most;
    }
    sums(weights, value + first * kHeadDim, kChunk, context);
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kHeadDim; ++i) context[h * kHeadDim + i] /= mass[h];
  }
}

}  // namespace

// query, context [groups * 4][128]; keys, values [groups][rows][128], rows a multiple of 64.
extern "C" void grouped_query(const float* query, const float* keys, const float* values, long groups, long rows,
                              float scale, int threads, float* context) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long g = 0; g < groups; ++g) {
    const long at = g * kHeads * kHeadDim, cache = g * rows * kHeadDim;
    attend(query + at, keys + cache, values + cache, rows, scale, context + at);
  }
}
