// What the cross entropy's forward and backward have in common.
//
// A pixel's loss: focus[t] * (lse - z_t) + sum over k of smooth[k] * (lse - z_k), t the target,
// focus[t] = (1 - label_smoothing) * weight[t], smooth[k] = label_smoothing / K * weight[k].
//
// Both walk along a column of up to kRows pixels between the same four logits: a class's logits there are t + lambda d,
// one multiply-add a pixel, and its exponential one instruction more.
#pragma once

#include <algorithm>

#include "axis.cuh"
#include "logits.cuh"

namespace pspnet_fast::cuda {

constexpr int kRows = 8;  // pixels of a column

// Logits are taken less the greatest of their own pixel of the source: interpolated, these bound the logits of a pixel
// of the map, and no maximum over its classes is needed. Where a greatest logit is farther from 0 than this, is
// infinite or NaN, pixels go a slow way: rounding would make the softmaxes of forward and backward differ by more than
// 1e-4.
constexpr int kMostLogit = 256;
constexpr int kLowestPower = -(1 << 30);  // of 2: exponentials of less are 0, also after interpolation

// label_smoothing, as it is used: no kernel of floats does arithmetic in double.
template <class A>
struct Smoothing {
  A focus, share;

  template <class Args>
  explicit Smoothing(const Args& args)
      : focus(static_cast<A>(1 - static_cast<double>(args.label_smoothing))),
        share(static_cast<A>(static_cast<double>(args.label_smoothing) / static_cast<double>(args.K))) {}
};

template <class T, class Args>
__device__ __forceinline__ acc_t<T> weight_of(const Args& args, int k) {
  return args.weight == nullptr ? acc_t<T>(1) : static_cast<const acc_t<T>*>(args.weight)[k];
}

// The sum over k of smooth[k].
template <class T, class Args>
__device__ __forceinline__ acc_t<T> sum_of_smooth(const Args& args, acc_t<T> share) {
  if (args.weight == nullptr || share == 0) return share * static_cast<acc_t<T>>(args.K);
  acc_t<T> sum = 0;
  for (int k = 0; k < args.K; ++k) sum += weight_of<T>(args, k);
  return share * sum;
}

constexpr int kIgnored = -1, kUnknown = -2;  // targets that are no class

// The classes of pixels by their numbers; one below 0 is no pixel. All are on their way before the first is waited for.
template <class Target, class Args, int kCount>
__device__ __forceinline__ void read_targets(const Args& args, const int64_t (&pixels)[kCount],
                                             int (&targets)[kCount]) {
  const Target* const from = static_cast<const Target*>(args.target);
  Target values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = from[pixels[i] < 0 ? 0 : pixels[i]];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const auto target = static_cast<int64_t>(values[i]);
    targets[i] = pixels[i] < 0 || target == args.ignore_index ? kIgnored
                 : target >= 0 && target < args.K             ? static_cast<int>(target)
                                                              : kUnknown;
  }
}

template <class Args, int kCount>
__device__ __forceinline__ void targets_of(const Args& args, const int64_t (&pixels)[kCount], int (&targets)[kCount]) {
  switch (args.target_type) {
    case IntType::kUInt8:
      return read_targets<uint8_t>(args, pixels, targets);
    case IntType::kInt16:
      return read_targets<int16_t>(args, pixels, targets);
    case IntType::kInt32:
      return read_targets<int32_t>(args, pixels, targets);
    default:
      return read_targets<int64_t>(args, pixels, targets);
  }
}

template <class Args>
__device__ __forceinline__ int target_at(const Args& args, int64_t pixel) {
  int target[1];
  targets_of(args, {pixel}, target);
  return target[0];
}

constexpr int kLoads = 8;  // on their way at once

// The logits of every `step`-th class from `first` on; the last stands for those after it.
template <class T, class Args>
__device__ __forceinline__ void read_classes(const Args& args, const T* logits, int first, int step,
                                             T (&values)[kLoads]) {
  const int last = static_cast<int>(args.K) - 1;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) values[i] = logits[min(first + i * step, last) * args.logits.stride_c];
}

// A rectangle of logits, of rows and columns that may lie outside the map: the nearest stand for those. A block's
// threads share its positions, and `groups` of them the classes of each.
struct Patch {
  int first_row, first_column, rows, columns, thread, threads, groups;

  __device__ __forceinline__ int positions() const { return rows * columns; }

  // Calls visit(position, group, slot, logits of class 0); slots are numbered group by group.
  template <class T, class Args, class F>
  __device__ __forceinline__ void for_each(const Args& args, int64_t n, F visit) const {
    const int count = positions();
    for (int slot = thread; slot < count * groups; slot += threads) {
      const int group = slot / count, p = slot - group * count;
      const int row = min(max(first_row + p / columns, 0), static_cast<int>(args.h) - 1);
      const int column = min(max(first_column + p % columns, 0), static_cast<int>(args.w) - 1);
      visit(p, group, slot, pixel<const T>(args.logits, n, 0, row, column));
    }
  }

  // The greatest logit of each position, NaN if any of its logits is. `partial` has a place for every slot.
  template <class T, class Args>
  __device__ __forceinline__ void find_greatest(const Args& args, int64_t n, acc_t<T>* partial,
                                                acc_t<T>* greatest) const {
    const int count = positions(), K = static_cast<int>(args.K);
    for_each<T>(args, n, [&](int, int group, int slot, const T* logits) {
      acc_t<T> most = -INFINITY;
#pragma unroll 1
      for (int first = group; first < K; first += kLoads * groups) {
        T values[kLoads];
        read_classes(args, logits, first, groups, values);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const acc_t<T> value = widen(values[i]);
          most = value > most || value != value ? value : most;
        }
      }
      partial[slot] = most;
    });
    __syncthreads();
    for (int p = thread; p < count; p += threads) {
      acc_t<T> most = partial[p];
#pragma unroll 1
      for (int group = 1; group < groups; ++group) {
        const acc_t<T> value = partial[group * count + p];
        most = value > most || value != value ? value : most;
      }
      greatest[p] = most;
    }
    __syncthreads();
  }
};

// Whether pixels may go the fast way. One class does not: its loss and gradient are 0 exactly.
template <class Args>
PSP_HOST_DEVICE bool has_fast_way(const Args& args) {
  return args.h <= args.H && args.w <= args.W && args.K > 1;
}

// Whether a pixel may by the greatest logits around it.
template <class A>
__device__ __forceinline__ bool has_fast_way(const A (&greatest)[4]) {
  constexpr A kMost = kMostLogit;
  return fabs(greatest[0]) <= kMost && fabs(greatest[1]) <= kMost && fabs(greatest[2]) <= kMost &&
         fabs(greatest[3]) <= kMost;
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// The logits of a column's pixels, multiply_add(lambda, slope, top), as powers of 2 or as they are. Forward and
// backward must round alike, whatever the compiler makes of sums of products: the softmaxes add up to 1 only so.
template <class A>
struct Line {
  A top, slope;

  __device__ __forceinline__ Line(A top_left, A top_right, A bottom_left, A bottom_right, A left, A right)
      : top(multiply_add(right, top_right, left * top_left)),
        slope(multiply_add(right, bottom_right, left * bottom_left) - top) {}
  __device__ __forceinline__ A at(A lambda) const { return multiply_add(lambda, slope, top); }
};

// What forward stores the log-sum-exp of such a pixel less, so that it loses no digits: the bound of its logits.
template <class A>
__device__ __forceinline__ A bound_of(const A (&greatest)[4], A right, A bottom) {
  return Line<A>(greatest[0], greatest[1], greatest[2], greatest[3], 1 - right, right).at(bottom);
}

// A logit as a power of 2, relative to the greatest of its pixel; finite also where these are not.
template <class A>
__device__ __forceinline__ A power_of(A logit, A greatest) {
  const A power = (logit - greatest) * kLog2E<A>;
  return power > static_cast<A>(kLowestPower) ? power : static_cast<A>(kLowestPower);
}

}  // namespace pspnet_fast::cuda
