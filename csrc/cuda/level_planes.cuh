// Planar maps of the levels' channels: what blocks that take several planes know of their levels.
#pragma once

#include <algorithm>

#include "axis.cuh"
#include "teams.cuh"

namespace pspnet_fast::cuda {

// The levels of a block's planes, of R channels each: `count` from `first` on, the first level after the last.
struct BlockLevels {
  int first, count, levels;

  __device__ __forceinline__ BlockLevels(int64_t plane, int planes, int64_t R, int levels)
      : first(static_cast<int>(plane / R % levels)),
        count(static_cast<int>(min((plane % R + planes - 1) / R + 1, static_cast<int64_t>(levels)))),
        levels(levels) {}
  __device__ __forceinline__ int level(int number) const {
    return first + number < levels ? first + number : first + number - levels;
  }
  __device__ __forceinline__ int number(int level) const {
    return level < first ? level - first + levels : level - first;
  }
  static int most(int64_t planes, int64_t R, int levels) {
    return static_cast<int>(std::min((planes + R - 2) / R + 1, static_cast<int64_t>(levels)));
  }
};

// Calls visit(number, rows, columns) for a block's levels, with the axes that these are interpolated along.
template <class T, class Args, class F>
__device__ __forceinline__ void for_each_level(const BlockLevels& own, const Args& args, F visit) {
  for (int number = 0; number < own.count; ++number) {
    const int level = own.level(number);
    visit(number, Axis<T>(args.levels.bins_h[level], args.H, args.align_corners),
          Axis<T>(args.levels.bins_w[level], args.W, args.align_corners));
  }
}

// One of [N, levels, R] planes, and where its first cell lies in [N, P, R].
struct LevelPlane {
  int64_t n, channel, first_cell;
  int level, bins_h, bins_w;

  __device__ __forceinline__ LevelPlane(const Levels& levels, int64_t R, int64_t plane) {
    const int64_t channels = levels.count * R;
    n = plane / channels, channel = plane - n * channels;
    level = static_cast<int>(channel / R), bins_h = levels.bins_h[level], bins_w = levels.bins_w[level];
    first_cell = (n * levels.first[levels.count] + levels.first[level]) * R + (channel - level * R);
  }
};

}  // namespace pspnet_fast::cuda
