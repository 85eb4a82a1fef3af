// Index mathematics of pyramid pooling and bilinear interpolation, for host and device alike; includes no torch header.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define PSP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PSP_HOST_DEVICE inline
#endif

namespace pspnet_fast {

constexpr int kMaxLevels = 16;

// The bins of every level. A cell is one bin of one level; cells are numbered level by level, row by row,
// so that the pooled map is [N, P, C] with P = first[count].
struct Levels {
  int count;
  int bins_h[kMaxLevels], bins_w[kMaxLevels];
  int first[kMaxLevels + 1];
};

// Adaptive pooling (ATen/native/AdaptivePooling.h): bin i of `bins` covers [start_index, end_index) of `size` pixels.
// Indices are int64_t unless the caller names a narrower type that holds (bins + 1) * (size + 1).
template <class index_t = int64_t>
using Index = std::common_type_t<index_t>;  // not deduced from arguments

template <class index_t = int64_t>
PSP_HOST_DEVICE index_t start_index(Index<index_t> i, Index<index_t> bins, Index<index_t> size) {
  return i * size / bins;
}
template <class index_t = int64_t>
PSP_HOST_DEVICE index_t end_index(Index<index_t> i, Index<index_t> bins, Index<index_t> size) {
  return ((i + 1) * size + bins - 1) / bins;
}

// The bins that cover pixel `at` are [first_bin, last_bin]: the inverse of start_index and end_index.
template <class index_t = int64_t>
PSP_HOST_DEVICE index_t first_bin(Index<index_t> at, Index<index_t> bins, Index<index_t> size) {
  return at * bins / size;
}
template <class index_t = int64_t>
PSP_HOST_DEVICE index_t last_bin(Index<index_t> at, Index<index_t> bins, Index<index_t> size) {
  return ((at + 1) * bins - 1) / size;
}

// F.interpolate's mode: "bilinear" with either align_corners, from which it is made, or "nearest".
struct Interpolation {
  enum Mode : int { kBilinear, kAlignCorners, kNearest } mode;

  PSP_HOST_DEVICE constexpr Interpolation(bool align_corners) : mode(align_corners ? kAlignCorners : kBilinear) {}
  PSP_HOST_DEVICE constexpr explicit Interpolation(Mode mode) : mode(mode) {}
  // Whether a pixel may take part of two cells.
  PSP_HOST_DEVICE constexpr bool blends() const { return mode != kNearest; }
};

// Interpolation along one axis (ATen/native/UpSample.h): pixel `at` of `size` is
// (1 - lambda) * source[low] + lambda * source[high]. The nearest cell is both.
template <class acc_t>
struct SourceIndex {
  int low, high;
  acc_t lambda;
};

template <class acc_t>
PSP_HOST_DEVICE acc_t source_scale(int bins, int64_t size, Interpolation interpolation) {
  if (interpolation.mode == Interpolation::kAlignCorners)
    return size > 1 ? static_cast<acc_t>(bins - 1) / static_cast<acc_t>(size - 1) : acc_t(0);
  return static_cast<acc_t>(bins) / static_cast<acc_t>(size);
}

// Where pixel `at` lies among the source's, whose first is at 0: before it, if negative. The nearest is found in
// float32 whatever the dtype, as torch does.
template <class acc_t>
PSP_HOST_DEVICE acc_t source_position(int64_t at, acc_t scale, Interpolation interpolation) {
  if (!interpolation.blends()) {
    return static_cast<acc_t>(static_cast<int>(static_cast<float>(scale) * static_cast<float>(at)));
  }
  return interpolation.mode == Interpolation::kAlignCorners
             ? scale * static_cast<acc_t>(at)
             : scale * (static_cast<acc_t>(at) + acc_t(0.5)) - acc_t(0.5);
}

template <class acc_t>
PSP_HOST_DEVICE SourceIndex<acc_t> source_index(int64_t at, acc_t scale, int bins, Interpolation interpolation) {
  acc_t real = source_position<acc_t>(at, scale, interpolation);
  if (real < acc_t(0)) real = acc_t(0);
  int low = static_cast<int>(real);
  if (low > bins - 1) low = bins - 1;
  if (!interpolation.blends()) return {low, low, acc_t(0.5)};
  acc_t lambda = real - static_cast<acc_t>(low);
  if (lambda > acc_t(1)) lambda = acc_t(1);
  return {low, low + (low < bins - 1 ? 1 : 0), lambda};
}

// The window of a convolution that keeps the size of its input: odd sizes, padded by (size / 2) * dilation zeros.
struct Window {
  int size_h, size_w;
  int dilation_h, dilation_w;
};

// The pixel that tap `tap` of `taps` reads for output `at`; outside the map it reads a zero of the padding.
template <class index_t = int64_t>
PSP_HOST_DEVICE index_t tap_pixel(Index<index_t> at, int tap, int taps, int dilation) {
  return at + static_cast<index_t>(tap - taps / 2) * dilation;
}

// Cells seen through every tap of one axis are numbered level by level, tap by tap: the number before those of a level.
PSP_HOST_DEVICE int first_seen(const int* bins, int level, int taps) {
  int sum = 0;
  for (int l = 0; l < level; ++l) sum += bins[l];
  return sum * taps;
}

}  // namespace pspnet_fast
