// Batch normalisation and ReLU of all levels, and the running statistics, in one launch; and their backward.
#include "common.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kBlock = 512;            // threads
constexpr int kRows = kBlock / kWarp;  // cells that a block reads at once, one a warp, 32 channels each
constexpr int kInFlight = 4;           // cells that a thread reads before it uses the first of them

template <class T>
__device__ __forceinline__ acc_t<T> norm_value(const void* values, DType dtype, int64_t r) {
  return dtype == DType::kFloat32 ? static_cast<acc_t<T>>(static_cast<const float*>(values)[r])
                                  : widen(static_cast<const T*>(values)[r]);
}

template <class T>
__device__ __forceinline__ void set_norm_value(void* values, DType dtype, int64_t r, acc_t<T> value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(values)[r] = static_cast<float>(value);
  } else {
    static_cast<T*>(values)[r] = narrow<T>(value);
  }
}

// A thread's channel r of a level, and its cells: every sixteenth of the level's in all images.
struct Column {
  int level, warp, lane;
  int64_t r;
  unsigned cells, first, P, values;

  template <class Args>
  __device__ __forceinline__ explicit Column(const Args& args)
      : level(static_cast<int>(blockIdx.x) % args.levels.count),
        warp(static_cast<int>(threadIdx.x) / kWarp),
        lane(static_cast<int>(threadIdx.x) % kWarp),
        r(int64_t{blockIdx.x} / args.levels.count * kWarp + lane),
        cells(static_cast<unsigned>(args.levels.first[level + 1] - args.levels.first[level])),
        first(static_cast<unsigned>(args.levels.first[level])),
        P(static_cast<unsigned>(args.levels.first[args.levels.count])),
        values(static_cast<unsigned>(args.N) * cells) {}

  // Calls use(index of a value, load(index)) for each of the thread's cells.
  template <class Load, class Use>
  __device__ __forceinline__ void for_cells(int64_t R, const Load& load, const Use& use) const {
    if (r >= R) return;
    const unsigned step_images = kRows / cells, step_cells = kRows % cells;
    unsigned n = static_cast<unsigned>(warp) / cells, cell = static_cast<unsigned>(warp) % cells;
    for (unsigned m = static_cast<unsigned>(warp); m < values; m += kRows * kInFlight) {
      int64_t at[kInFlight];
      decltype(load(int64_t{})) read[kInFlight] = {};
#pragma unroll
      for (unsigned i = 0; i < kInFlight; ++i) {
        at[i] = m + i * kRows < values ? static_cast<int64_t>(n * P + first + cell) * R + r : -1;
        if (at[i] >= 0) read[i] = load(at[i]);
        n += step_images;
        cell += step_cells;
        if (cell >= cells) cell -= cells, ++n;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at[i] >= 0) use(at[i], read[i]);
      }
    }
  }
};

// The sum of a channel's values over the block's warps, in their order.
template <class A>
__device__ __forceinline__ A sum_warps(A value, A* shared, const Column& column) {
  __syncthreads();  // what was here before has been read
  shared[column.warp * kWarp + column.lane] = value;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int warp = 0; warp < kRows; ++warp) sum += shared[warp * kWarp + column.lane];
  return sum;
}

// A block takes 32 channels of a level. Traffic: reduced three times, of which the caches serve two; output once.
// Instructions a vector: 700 for 16 images of 50 cells, most of them a block's, not a vector's.
template <class T>
__global__ void __launch_bounds__(kBlock) batch_norm_levels(const __grid_constant__ PyramidBatchNormArgs args) {
  using A = acc_t<T>;
  PSP_SHARED(A, shared, kBlock);
  const Column column(args);
  const int level = column.level;
  const int64_t r = column.r;
  const bool inside = r < args.R;
  const T* const x = static_cast<const T*>(args.reduced);
  const auto value_at = [&](int64_t at) { return widen(x[at]); };
  A mean = 0, variance = 0;
  if (args.batch[level]) {  // the same for the whole block
    const A count = static_cast<A>(column.values);
    column.for_cells(args.R, value_at, [&](int64_t, A value) { mean += value; });
    mean = sum_warps(mean, shared, column) / count;
    A error = 0;  // of the mean, a sum of large values with the roundings of such: the deviations tell it
    column.for_cells(args.R, value_at, [&](int64_t, A value) {
      const A deviation = value - mean;
      error += deviation;
      variance += deviation * deviation;
    });
    error = sum_warps(error, shared, column);
    variance = sum_warps(variance, shared, column) - error * (error / count);
    mean += error / count;
    if (inside && column.warp == 0 && args.running_mean[level] != nullptr) {
      const A share = static_cast<A>(args.momentum[level]), rest = A(1) - share;
      const A before = norm_value<T>(args.running_mean[level], args.norm_dtype, r);
      const A variance_before = norm_value<T>(args.running_var[level], args.norm_dtype, r);
      set_norm_value<T>(args.running_mean[level], args.norm_dtype, r, share * mean + rest * before);
      set_norm_value<T>(args.running_var[level], args.norm_dtype, r,
                        share * (variance / (count - A(1))) + rest * variance_before);
    }
    variance /= count;
  } else if (inside) {
    mean = norm_value<T>(args.running_mean[level], args.norm_dtype, r);
    variance = norm_value<T>(args.running_var[level], args.norm_dtype, r);
  }
  A scale = A(1) / sqrt(variance + static_cast<A>(args.eps[level]));
  if (inside && column.warp == 0) {
    A* const kept = static_cast<A*>(args.statistics) + level * args.R + r;
    kept[0] = mean;
    kept[args.levels.count * args.R] = scale;
  }
  A shift = 0;
  if (inside && args.weight[level] != nullptr) scale *= norm_value<T>(args.weight[level], args.norm_dtype, r);
  if (inside && args.bias[level] != nullptr) shift = norm_value<T>(args.bias[level], args.norm_dtype, r);
  column.for_cells(args.R, value_at, [&](int64_t at, A value) {
    const A normalised = (value - mean) * scale + shift;
    static_cast<T*>(args.output)[at] = narrow<T>(args.relu && normalised < A(0) ? A(0) : normalised);
  });
}

// The same blocks. Traffic: grad_output, reduced and, after a ReLU, output twice, of which the caches serve one.
// Instructions a vector: 330, likewise.
template <class T>
__global__ void __launch_bounds__(kBlock)
    batch_norm_levels_backward(const __grid_constant__ PyramidBatchNormBackwardArgs args) {
  using A = acc_t<T>;
  PSP_SHARED(A, shared, kBlock);
  const Column column(args);
  const int level = column.level;
  const int64_t r = column.r, at_level = level * args.R + r, all = args.levels.count * args.R;
  const bool inside = r < args.R;
  const T* const x = static_cast<const T*>(args.reduced);
  const A mean = inside ? static_cast<const A*>(args.statistics)[at_level] : A(0);
  const A inverse = inside ? static_cast<const A*>(args.statistics)[all + at_level] : A(0);
  // of the batch's statistics, or none of constants; here, where a division in double has the registers that it needs
  const A share = args.batch[level] ? A(1) / static_cast<A>(column.values) : A(0);
  struct Read {
    A grad, deviation;
  };
  const auto read_at = [&](int64_t at) {  // the gradient before the ReLU
    const A output = args.output != nullptr ? widen(static_cast<const T*>(args.output)[at]) : A(1);
    const A grad = widen(static_cast<const T*>(args.grad_output)[at]);
    return Read{output <= A(0) ? A(0) : grad, widen(x[at]) - mean};
  };
  A sum = 0, product = 0;
  column.for_cells(args.R, read_at, [&](int64_t, const Read& read) {
    sum += read.grad;
    product += read.grad * (read.deviation * inverse);
  });
  sum = sum_warps(sum, shared, column);
  product = sum_warps(product, shared, column);
  if (inside && column.warp == 0) {
    set_norm_value<T>(args.grad_affine, args.norm_dtype, at_level, product);
    set_norm_value<T>(args.grad_affine, args.norm_dtype, all + at_level, sum);
  }
  A scale = inverse;
  if (inside && args.weight[level] != nullptr) scale *= norm_value<T>(args.weight[level], args.norm_dtype, r);
  const A constant = sum * share, slope = product * share * inverse;
  column.for_cells(args.R, read_at, [&](int64_t at, const Read& read) {
    static_cast<T*>(args.grad_reduced)[at] = narrow<T>(scale * (read.grad - constant - read.deviation * slope));
  });
}

template <class Args>
bool fits(const Args& args) {  // cells are counted in 32 bits, with room for a step beyond the last
  return args.R <= INT_MAX && args.N * args.levels.first[args.levels.count] <= INT_MAX;
}

template <class Args>
int64_t blocks_of(const Args& args) {
  return args.levels.count * divide_up(args.R, kWarp);
}

}  // namespace

int pyramid_batch_norm(const PyramidBatchNormArgs& args, void* stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    return launch(batch_norm_levels<decltype(zero)>, blocks_of(args), kBlock, 0, stream, args);
  });
}

int pyramid_batch_norm_backward(const PyramidBatchNormBackwardArgs& args, void* stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    return launch(batch_norm_levels_backward<decltype(zero)>, blocks_of(args), kBlock, 0, stream, args);
  });
}

}  // namespace pspnet_fast::cuda
