// One axis of an interpolation: `size` pixels between `bins` cells or logits.
#pragma once

#include "common.cuh"

namespace pspnet_fast::cuda {

template <class T>
struct Axis {
  int bins, size;
  Interpolation interpolation;
  acc_t<T> scale;

  __device__ __forceinline__ Axis(int bins, int64_t size, Interpolation interpolation)
      : bins(bins),
        size(static_cast<int>(size)),
        interpolation(interpolation),
        scale(source_scale<acc_t<T>>(bins, size, interpolation)) {}

  __device__ __forceinline__ SourceIndex<acc_t<T>> at(int pixel) const {
    return source_index<acc_t<T>>(pixel, scale, bins, interpolation);
  }
  // The weight of the next cell after `low`; the last cell has none and takes the whole.
  __device__ __forceinline__ acc_t<T> weight_of_next(int pixel) const {
    const SourceIndex<acc_t<T>> source = at(pixel);
    return source.high > source.low ? source.lambda : acc_t<T>(0);
  }
  // The same of a pixel whose lower cell is known, or of one before it or after the next, which takes nothing or the
  // whole.
  __device__ __forceinline__ acc_t<T> weight_after(int cell, int pixel) const {
    const acc_t<T> beyond = source_position<acc_t<T>>(pixel, scale, interpolation) - static_cast<acc_t<T>>(cell);
    return cell < bins - 1 ? min(max(beyond, acc_t<T>(0)), acc_t<T>(1)) : acc_t<T>(0);
  }
  // The first pixel at or after the centre of a cell; `size` if there is none. A guess, mended where rounding misled
  // it.
  __device__ __forceinline__ int first_at(int cell) const {
    const auto wanted = static_cast<acc_t<T>>(cell),
               half = interpolation.mode == Interpolation::kBilinear ? acc_t<T>(0.5) : acc_t<T>(0);
    const acc_t<T> guess = (wanted + half) / scale - half;
    int pixel = guess > 0 ? (guess < static_cast<acc_t<T>>(size) ? static_cast<int>(guess) : size) : 0;
    while (pixel > 0 && source_position<acc_t<T>>(pixel - 1, scale, interpolation) >= wanted) --pixel;
    while (pixel < size && source_position<acc_t<T>>(pixel, scale, interpolation) < wanted) ++pixel;
    return pixel;
  }
  // The first pixel whose `low` is at least `cell`; `size` if there is none.
  __device__ __forceinline__ int start(int cell) const { return cell <= 0 ? 0 : cell >= bins ? size : first_at(cell); }
};

// Pixels that a pixel of the source has around it, at most: those between two of its centres.
inline int64_t longest_interval(int64_t bins, int64_t size, bool align_corners) {
  if (align_corners && bins > 1 && size > 1) return divide_up(size - 1, bins - 1);
  return align_corners ? size : divide_up(size, bins);
}

}  // namespace pspnet_fast::cuda
