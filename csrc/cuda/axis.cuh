// One axis of a bilinear interpolation: `size` pixels between `bins` cells or logits.
#pragma once

#include "common.cuh"

namespace pspnet_fast::cuda {

template <class T>
struct Axis {
  int bins, size;
  bool align_corners;
  acc_t<T> scale;

  __device__ __forceinline__ Axis(int bins, int64_t size, bool align_corners)
      : bins(bins),
        size(static_cast<int>(size)),
        align_corners(align_corners),
        scale(source_scale<acc_t<T>>(bins, size, align_corners)) {}

  __device__ __forceinline__ SourceIndex<acc_t<T>> at(int pixel) const {
    return source_index<acc_t<T>>(pixel, scale, bins, align_corners);
  }
  // The weight of the next cell after `low`; the last cell has none and takes the whole.
  __device__ __forceinline__ acc_t<T> weight_of_next(int pixel) const {
    const SourceIndex<acc_t<T>> source = at(pixel);
    return source.high > source.low ? source.lambda : acc_t<T>(0);
  }
  // The first pixel whose `low` is at least `cell`; `size` if there is none.
  __device__ __forceinline__ int start(int cell) const {
    int begin = 0, end = size;
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (at(middle).low >= cell) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }
};

}  // namespace pspnet_fast::cuda
