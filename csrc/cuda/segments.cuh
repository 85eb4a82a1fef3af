// The edges of every level's bins cut an axis into segments; each bin is a whole number of them.
#pragma once

#include <algorithm>
#include <vector>

#include "common.cuh"

namespace pspnet_fast::cuda {

constexpr int kMaxSegments = 127;

struct Segments {
  int count;
  bool single;  // each pixel is a segment: more edges than the table holds
  int edge[kMaxSegments + 1];

  __device__ __forceinline__ int start(int segment) const { return single ? segment : edge[segment]; }

  // The segment that holds a pixel; `count` for the pixel after the last.
  __device__ __forceinline__ int containing(int at) const {
    if (single) return at;
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (edge[middle] <= at) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Long segments are cut further, so that few and large bins still give work to many blocks.
inline Segments make_segments(int levels, const int* bins, int size) {
  Segments segments = {size, true, {}};
  std::vector<int> edges = {0, size};
  for (int level = 0; level < levels; ++level) {
    if (bins[level] >= std::min(size, kMaxSegments)) return segments;
    for (int bin = 0; bin < bins[level]; ++bin) {
      edges.push_back(start_index<int>(bin, bins[level], size));
      edges.push_back(end_index<int>(bin, bins[level], size));
    }
  }
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());

  const int64_t longest = std::max<int64_t>(16, divide_up(size, kMaxSegments / 2));
  int count = 0;
  for (size_t i = 0; i + 1 < edges.size(); ++i) {
    const int64_t length = edges[i + 1] - edges[i], parts = divide_up(length, longest);
    if (count + parts > kMaxSegments) return segments;
    for (int64_t part = 0; part < parts; ++part) {
      segments.edge[count++] = static_cast<int>(edges[i] + length * part / parts);
    }
  }
  segments.edge[count] = size;
  segments.count = count;
  segments.single = false;
  return segments;
}

}  // namespace pspnet_fast::cuda
