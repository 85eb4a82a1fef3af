// What both directions of pyramid_context_ share on the CPU, from the cells seen through a convolution's weights
// (taps):
//   context[h, w] = sum over levels, u, v, i, j of (S_u A_h)[h, i] (S_v A_w)[w, j] taps[i, j, u, v],
// A the interpolation matrices and S_u A the same with rows shifted by tap u; one axis after the other.
#pragma once

#include "seen_axis.h"
#include "vectors.h"

namespace pspnet_fast::cpu {

template <class T, class Args>
struct ContextBase {
  using acc_t = acc_type<T>;
  const Args& a;
  SeenAxis<acc_t> vertical, horizontal;

  explicit ContextBase(const Args& args)
      : a(args),
        vertical(a.levels, a.levels.bins_h, a.H, a.window.size_h, a.window.dilation_h, a.interpolation),
        horizontal(a.levels, a.levels.bins_w, a.W, a.window.size_w, a.window.dilation_w, a.interpolation) {}

  PSP_INLINE int64_t seen_cells() const {
    return int64_t{a.levels.first[a.levels.count]} * a.window.size_h * a.window.size_w;
  }
  // Number of a cell seen through both taps in [P, size_h * size_w], from its columns on either axis.
  PSP_INLINE int64_t seen(int column_h, int column_w) const {
    const auto &h = vertical.columns[column_h], &w = horizontal.columns[column_w];
    const int64_t cell = a.levels.first[h.level] + h.cell * a.levels.bins_w[h.level] + w.cell;
    return (cell * a.window.size_h + h.tap) * a.window.size_w + w.tap;
  }
  // The horizontal columns of the level of a vertical one.
  PSP_INLINE int begin_w(int column_h) const { return horizontal.first[vertical.columns[column_h].level]; }
  PSP_INLINE int end_w(int column_h) const {
    const int level = vertical.columns[column_h].level;
    return horizontal.first[level] + a.window.size_w * a.levels.bins_w[level];
  }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Channels of a chunk, of which `each` elements for every channel are to stay in the second-level cache. Planar maps
// have some 64 planes at hand: more cache lines than that, at the same place of planes whose size is a power of two,
// would drive each other out.
template <class acc_t, class Args>
int64_t chunk_channels(const Args& a, int64_t each) {
  constexpr int64_t kCache = int64_t{256} << 10, kStep = 64;
  const int64_t fitting = kCache / (each * static_cast<int64_t>(sizeof(acc_t))) / kStep * kStep;
  return std::clamp(fitting, kStep, a.channels_last ? divide_up(a.O, kStep) * kStep : kStep);
}

}  // namespace pspnet_fast::cpu
