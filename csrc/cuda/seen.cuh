// Cells of the pyramid seen through the taps of a convolution: their numbers, and the pixels that they have part in.
#pragma once

#include "axis.cuh"

namespace pspnet_fast::cuda {

// A cell of a level on one axis, seen through a tap; `first` is the number of the level's first (first_seen).
struct Seen {
  int level, tap, cell, first;
};

__device__ __forceinline__ Seen seen_of(const int* bins, int taps, int number) {
  Seen seen = {0, 0, 0, 0};
  while (number - seen.first >= bins[seen.level] * taps) seen.first += bins[seen.level++] * taps;
  seen.tap = (number - seen.first) / bins[seen.level];
  seen.cell = (number - seen.first) % bins[seen.level];
  return seen;
}

inline int seen_cells(const Levels& levels, const int* bins, int taps) { return first_seen(bins, levels.count, taps); }

// Number in [P, size_h * size_w] of cell (i, j) of a level seen through tap (u, v).
__device__ __forceinline__ int64_t tap_of(const Levels& levels, const Window& window, int level, int i, int j, int u,
                                          int v) {
  const int64_t cell = levels.first[level] + static_cast<int64_t>(i) * levels.bins_w[level] + j;
  return (cell * window.size_h + u) * window.size_w + v;
}

// The same the other way round.
struct Tap {
  int level, i, j, u, v;

  __device__ __forceinline__ Tap(const Levels& levels, const Window& window, int64_t number) {
    const int taps = window.size_h * window.size_w, cell = static_cast<int>(number / taps);
    const int tap = static_cast<int>(number % taps);
    level = level_of(levels, cell);
    i = (cell - levels.first[level]) / levels.bins_w[level];
    j = (cell - levels.first[level]) % levels.bins_w[level];
    u = tap / window.size_w;
    v = tap % window.size_w;
  }
};

PSP_HOST_DEVICE int64_t count_taps(const Levels& levels, const Window& window) {
  return int64_t{levels.first[levels.count]} * window.size_h * window.size_w;
}

// The sum over the pixels that `cell`, seen through a tap, has part in: starts(i) is the first pixel whose lower cell
// is i or later, next(pixel, lower) the weight of the cell after the lower one, which has none unless it `blends`. Only
// outputs in [begin, end) count.
template <class A, class Starts, class Next, class Value>
__device__ __forceinline__ void for_part_of(int cell, bool blends, int shift, int begin, int end, Starts starts,
                                            Next next, Value add) {
  const int own = starts(cell), last = min(starts(cell + 1), end + shift);
  const int first = !blends ? own : cell > 0 ? starts(cell - 1) : 0;
  for (int p = max(first, begin + shift); p < min(own, last); ++p) {
    add(p - shift, next(p, cell - 1));
  }
  for (int p = max(own, begin + shift); p < last; ++p) add(p - shift, A(1) - next(p, cell));
}

PSP_HOST_DEVICE int tap_shift(int tap, int taps, int dilation) { return tap_pixel<int>(0, tap, taps, dilation); }

// Whether all that the kernels count fits int.
inline bool fits(const Levels& levels, const Window& window, int64_t O, int64_t H, int64_t W) {
  return fits_int(levels, O, H, W) && H * (W + 32) <= INT_MAX - kThreads && count_taps(levels, window) <= INT_MAX;
}

}  // namespace pspnet_fast::cuda
