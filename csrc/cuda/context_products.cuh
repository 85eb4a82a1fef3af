// Interpolation along an axis as a product with a matrix of weights, for the tensor cores: what context's forward and
// backward share. Weights, and sums on their way to a second product, are two summands of 8 bits or more each.
#pragma once

#include "seen.cuh"
#include "tensor_cores.cuh"

namespace pspnet_fast::cuda {

// Values that one access writes.
template <class T, int count>
struct alignas(count * sizeof(T)) Together {
  T values[count];
};

// Whether every architecture that is compiled for has tensor cores; the host must know.
#if defined(__CUDA_ARCH_LIST__)
constexpr bool kProducts = [] {
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (architecture < 800) return false;
  }
  return true;
}();
#else
constexpr bool kProducts = true;
#endif

// Two neighbours in a register.
template <class T>
__device__ __forceinline__ unsigned pack(float first, float second) {
  unsigned bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&bits, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

// Two neighbours, each as a sum of two T.
struct Split {
  unsigned high, low;
};
template <class T>
__device__ __forceinline__ Split split(float first, float second) {
  const unsigned high = pack<T>(first, second);
  T rounded[2];
  memcpy(static_cast<void*>(rounded), &high, 4);
  return {high, pack<T>(first - widen(rounded[0]), second - widen(rounded[1]))};
}

// The first, or the second, elements of two pairs.
__device__ __forceinline__ unsigned first_of(unsigned a, unsigned b) { return (a & 0xffff) | (b << 16); }
__device__ __forceinline__ unsigned second_of(unsigned a, unsigned b) { return (a >> 16) | (b & 0xffff0000); }

// What pixels take of a cell that is seen through a tap.
struct alignas(16) SeenCell {
  float scale;
  int cell, last, shift;

  // Outside the map the tap sees nothing.
  __device__ __forceinline__ float weight(int pixel, int size, Interpolation interpolation) const {
    const int at = pixel + shift;
    if (at < 0 || at >= size) return 0;
    const float position = source_position<float>(at, scale, interpolation);
    const float clamped = min(max(position, 0.0f), static_cast<float>(last));
    return max(0.0f, 1 - fabsf(clamped - static_cast<float>(cell)));
  }
};

// Cell `cell` of `bins`, seen through tap `tap` of `taps`.
__device__ __forceinline__ SeenCell seen_cell(int cell, int bins, int tap, int taps, int dilation, int size,
                                              Interpolation interpolation) {
  return {source_scale<float>(bins, size, interpolation), cell, bins - 1, tap_shift(tap, taps, dilation)};
}

// One that no pixel takes anything of.
__device__ __forceinline__ SeenCell no_cell() { return {0, 0, 0, INT_MIN / 2}; }

// Number `number` of all that are seen along an axis; beyond the last, no cell.
__device__ __forceinline__ SeenCell seen_cell(const int* bins, int count, int number, int taps, int dilation, int size,
                                              Interpolation interpolation) {
  if (number >= count) return no_cell();
  const Seen seen = seen_of(bins, taps, number);
  return seen_cell(seen.cell, bins[seen.level], seen.tap, taps, dilation, size, interpolation);
}

}  // namespace pspnet_fast::cuda
