// Logits at the pixels of an upsampled map: a thread owns a pixel and walks over the classes.
#pragma once

#include <cmath>
#include <limits>

#include "common.cuh"

namespace pspnet_fast::cuda {

constexpr int kTileX = 32, kTileY = kThreads / kTileX;  // pixels of a block

template <class A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

// 2^x by the special function unit, wrong by two units in the last place at most; 0 below the normal numbers.
#ifndef PSP_EXP2
#define PSP_EXP2(x, result) asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x))
#endif
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  PSP_EXP2(x, result);
  return result;
}
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

template <class A>
__device__ __forceinline__ bool is_finite(A x) {
  return x - x == 0;
}

template <class A>
constexpr A kLog2E = A(1.44269504088896340736);

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// The pixel of this thread, image by image, tile by tile.
struct Pixel {
  int64_t n;
  int x, y;
};

__device__ __forceinline__ Pixel pixel_of_thread(int H, int W) {
  const int across = (W + kTileX - 1) / kTileX, down = (H + kTileY - 1) / kTileY;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) / across;
  return {tile / down, static_cast<int>(blockIdx.x % across) * kTileX + static_cast<int>(threadIdx.x),
          static_cast<int>(tile % down) * kTileY + static_cast<int>(threadIdx.y)};
}

inline int64_t count_tiles(int64_t N, int64_t H, int64_t W) { return N * divide_up(H, kTileY) * divide_up(W, kTileX); }

template <class A>
__device__ __forceinline__ A bilinear(A top_left, A top_right, A bottom_left, A bottom_right, A right, A bottom) {
  return (1 - bottom) * ((1 - right) * top_left + right * top_right) +
         bottom * ((1 - right) * bottom_left + right * bottom_right);
}

template <class A>
__device__ __forceinline__ A mix_infinite(A low, A high, A lambda) {
  if (high == -INFINITY && (lambda == 0 || low == high)) return low;
  return (1 - lambda) * low + lambda * high;
}

// The four pixels of the logits around one of the map, with their weights.
template <class T>
struct Corners {
  const T *top_left, *top_right, *bottom_left, *bottom_right;  // of class 0
  acc_t<T> right, bottom;
  int64_t stride_c;

  template <class Args>
  __device__ __forceinline__ Corners(const Args& args, int64_t n, int x, int y) : stride_c(args.logits.stride_c) {
    const int h = static_cast<int>(args.h), w = static_cast<int>(args.w);
    const auto row =
        source_index<acc_t<T>>(y, source_scale<acc_t<T>>(h, args.H, args.align_corners), h, args.align_corners);
    const auto column =
        source_index<acc_t<T>>(x, source_scale<acc_t<T>>(w, args.W, args.align_corners), w, args.align_corners);
    // a copy where nothing is interpolated, as in torch: no NaN beside a NaN
    const int below = h == args.H ? row.low : row.high, beside = w == args.W ? column.low : column.high;
    top_left = pixel<const T>(args.logits, n, 0, row.low, column.low);
    top_right = pixel<const T>(args.logits, n, 0, row.low, beside);
    bottom_left = pixel<const T>(args.logits, n, 0, below, column.low);
    bottom_right = pixel<const T>(args.logits, n, 0, below, beside);
    right = column.lambda, bottom = row.lambda;
  }

  // Top left, top right, bottom left, bottom right.
  __device__ __forceinline__ const T* of(int corner) const {
    return corner == 0 ? top_left : corner == 1 ? top_right : corner == 2 ? bottom_left : bottom_right;
  }

  // The interpolated logits of the classes [k, k + V); V > 1 needs channels-last logits in aligned vectors.
  // A logit of -infinity makes them NaN where its weight is 0, and does not count there if `careful`.
  template <int V>
  __device__ __forceinline__ void at(int k, acc_t<T> (&values)[V], bool careful) const {
    const int64_t offset = k * stride_c;
    acc_t<T> a[V], b[V], c[V], d[V];
    load_wide(top_left + offset, a);
    load_wide(top_right + offset, b);
    load_wide(bottom_left + offset, c);
    load_wide(bottom_right + offset, d);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (careful) {
        values[v] = mix_infinite(mix_infinite(a[v], b[v], right), mix_infinite(c[v], d[v], right), bottom);
      } else {
        values[v] = bilinear(a[v], b[v], c[v], d[v], right, bottom);
      }
    }
  }
};

// Kernels count classes and along an axis in int.
template <class Args>
bool classes_fit_int(const Args& args) {
  constexpr int64_t most = INT_MAX - kThreads;
  return args.K <= most && args.h <= most && args.w <= most && args.H <= most && args.W <= most;
}

}  // namespace pspnet_fast::cuda
