// Adds the softmax of upsampled logits to a map of probabilities.
#include <cstdlib>
#include <type_traits>

#include "columns.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kRowsAtOnce = 4;                       // whose probabilities a thread has in flight
constexpr float kSmallestSum = 1.0f / (1ull << 63);  // below it the terms are too close to 0
constexpr float kLowestPower = -1e30f;               // of 2: exponentials of less are 0, at the least weight, too

// Logits as powers of 2, relative to the greatest.
__device__ __forceinline__ void to_powers(float (&logits)[kClassVector], float greatest) {
#pragma unroll
  for (int v = 0; v < kClassVector; ++v) logits[v] = max((logits[v] - greatest) * kLog2E<float>, kLowestPower);
}

// One pixel, class by class: the greatest logit, the sum of exponentials, the additions. The logits are interpolated
// anew each time.
template <class T>
__device__ __forceinline__ void softmax_pixel(const UpsampleSoftmaxAccumulateArgs& args, int64_t n, int y, int x) {
  const int K = static_cast<int>(args.K);
  const Corners<T> corners(args, n, args.mirrored ? static_cast<int>(args.W) - 1 - x : x, y);

  // Two instances of the whole, since a flag would cost registers. False: nothing is added, the sum is NaN.
  const auto add = [&](auto chosen) {
    constexpr bool careful = decltype(chosen)::value;
    acc_t<T> value[1];
    corners.template at<1>(0, value, careful);
    acc_t<T> greatest = value[0], sum = 0;
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      corners.template at<1>(k, value, careful);
      greatest = value[0] > greatest ? value[0] : greatest;
    }
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      corners.template at<1>(k, value, careful);
      sum += exponential(value[0] - greatest);
    }
    if (!careful && sum != sum) return false;
    const acc_t<T> scale = static_cast<acc_t<T>>(args.weight) / sum;
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      corners.template at<1>(k, value, careful);
      *pixel<acc_t<T>>(args.probabilities, n, k, y, x) += scale * exponential(value[0] - greatest);
    }
    return true;
  };
  if (!add(std::false_type{})) add(std::true_type{});
}

// Any size and dtype. A block takes a tile of pixels, a thread one pixel.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_pixels(const __grid_constant__ UpsampleSoftmaxAccumulateArgs args) {
  const Pixel at = pixel_of_thread(static_cast<int>(args.H), static_cast<int>(args.W));
  if (at.x < args.W && at.y < args.H) softmax_pixel<T>(args, at.n, at.y, at.x);
}

// The same up, in float. A block takes a strip of columns, a thread one column. Logits are taken less the greatest of
// the column's rows of logits: interpolated, these bound a pixel's logits, and no maximum is needed.
// Layout: logits and probabilities of any strides.
// Traffic: probabilities read and written once, which takes the time; a block reads the logits around it once.
// Instructions a class and pixel: 22 for K = 150.
template <class T>
__global__ void __launch_bounds__(kColumnThreads, kNewer ? 4 : 5)
    softmax_columns(const __grid_constant__ UpsampleSoftmaxAccumulateArgs args, ColumnShare share) {
  PixelColumn<T> column(args, share, args.mirrored);
  if (column.count == 0) return;
  float most_above = -INFINITY, most_below = -INFINITY;
  column.for_each_class(args, [&](int, auto& above, auto& below) {
#pragma unroll
    for (int v = 0; v < kClassVector; ++v) {
      most_above = max(most_above, above[v]);
      most_below = max(most_below, below[v]);
    }
  });

  // The sums of exponentials, then what these are multiplied by; 0 for a pixel that goes the slow way.
  float scale[kColumnPixels] = {};
  if (column.is_usual()) {
    column.for_each_class(args, [&](int, auto& above, auto& below) {
      to_powers(above, most_above);
      to_powers(below, most_below);
#pragma unroll
      for (int i = 0; i < kColumnPixels; ++i) {
        if (i % kRowsAtOnce == 0 && i >= column.count) break;
#pragma unroll
        for (int v = 0; v < kClassVector; ++v) scale[i] += exp2_fast(column.at(i, above[v], below[v]));
      }
    });
#pragma unroll
    for (int i = 0; i < kColumnPixels; ++i) {
      const bool is_fast = column.is_usual(column.at(i, most_above, most_below)) && scale[i] >= kSmallestSum;
      scale[i] = is_fast ? static_cast<float>(args.weight) / scale[i] : 0;
    }

    // Beyond the column's last pixel, that one is computed and written again.
    int offsets[kColumnPixels];
#pragma unroll
    for (int i = 0; i < kColumnPixels; ++i) {
      offsets[i] = min(i, column.count - 1) * static_cast<int>(args.probabilities.stride_h);
    }
    column.for_each_class(args, [&](int k, auto& above, auto& below) {
      to_powers(above, most_above);
      to_powers(below, most_below);
      const int classes = min(static_cast<int>(args.K) - k, kClassVector);
      float* const to = pixel<float>(args.probabilities, column.n, k, column.top, column.x);
      const int64_t stride_c = args.probabilities.stride_c;
#pragma unroll
      for (int first = 0; first < kColumnPixels; first += kRowsAtOnce) {
        if (first >= column.count) break;
        float before[kClassVector][kRowsAtOnce];
#pragma unroll
        for (int v = 0; v < kClassVector; ++v) {
          if (v >= classes) break;
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) before[v][i] = to[v * stride_c + offsets[first + i]];
        }
#pragma unroll
        for (int v = 0; v < kClassVector; ++v) {
          if (v >= classes) break;
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) {
            const float power = column.at(first + i, above[v], below[v]);
            to[v * stride_c + offsets[first + i]] = before[v][i] + scale[first + i] * exp2_fast(power);
          }
        }
      }
    });
  }
  unsigned done = 0;  // a bit for each pixel
#pragma unroll
  for (int i = 0; i < kColumnPixels; ++i) done |= static_cast<unsigned>(scale[i] != 0) << i;
#pragma unroll 1
  for (int i = 0; i < (column.x < args.W ? column.count : 0); ++i) {
    if (i >= kColumnPixels || (done >> i & 1) == 0) softmax_pixel<T>(args, column.n, column.top + i, column.x);
  }
}

}  // namespace

int upsample_softmax_accumulate(const UpsampleSoftmaxAccumulateArgs& args, void* stream) {
  if (!classes_fit_int(args)) return cudaErrorInvalidValue;
  ColumnShare share = make_columns(args);
  if (std::abs(args.probabilities.stride_h) > INT_MAX / kColumnPixels) share.across = 0;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (share.across > 0) {
        return launch(softmax_columns<T>, count_column_blocks(args, share), kColumnThreads, share.bytes(), stream, args,
                      share);
      }
    }
    return launch(softmax_pixels<T>, count_tiles(args.N, args.H, args.W), dim3(kTileX, kTileY), 0, stream, args);
  });
}

}  // namespace pspnet_fast::cuda
