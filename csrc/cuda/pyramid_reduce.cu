// The levels' 1x1 convolutions on the pooled map, with folded normalisation and ReLU; and their backward.
#include "common.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Row m of a level's matrices is its cell m % cells of image m / cells: the row's number in [N * P].
struct LevelRows {
  int64_t P, first, cells, count;

  __device__ __forceinline__ LevelRows(const Levels& levels, int level, int64_t N)
      : P(levels.first[levels.count]),
        first(levels.first[level]),
        cells(levels.first[level + 1] - levels.first[level]),
        count(N * cells) {}
  __device__ __forceinline__ int64_t operator[](int64_t m) const {
    const unsigned row = static_cast<unsigned>(m), size = static_cast<unsigned>(cells);
    return row / size * P + first + row % size;
  }
};

// Sums each of 32 values over the lanes of a warp: lane i gets the sum of values[i].
template <class A>
__device__ __forceinline__ A sum_lanes(A (&values)[kWarp]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int distance = kWarp / 2 >> step;
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < kWarp / 2; ++i) {
      if (i >= distance) break;
      const A keep = upper ? values[i + distance] : values[i], give = upper ? values[i] : values[i + distance];
      values[i] = keep + __shfl_xor_sync(kAllLanes, give, distance);
    }
  }
  return values[0];
}

template <class T>
__device__ __forceinline__ acc_t<T> norm_value(const void* values, DType dtype, int64_t r) {
  return dtype == DType::kFloat32 ? static_cast<acc_t<T>>(static_cast<const float*>(values)[r])
                                  : widen(static_cast<const T*>(values)[r]);
}

constexpr int kTileRows = 8, kTileColumns = 4;    // outputs of a warp: one a lane
constexpr int kBlockRows = 2, kBlockColumns = 4;  // warps of a block

// Blocks that cover the rows of all levels up to `level`.
template <int rows_of_block>
PSP_HOST_DEVICE int64_t row_blocks(const Levels& levels, int level, int64_t N) {
  return divide_up(N * (levels.first[level + 1] - levels.first[level]), rows_of_block);
}

// reduced[n, p, r] = f(sum over c of pooled[n, p, c] * weight[r, c]): the weights of p's level, f its normalisation.
// Layout: both operands in 16-byte vectors along c (V > 1), or any alignment (V == 1).
// A warp takes 8 rows x 4 columns of a level, its lanes share out c; a block is 2 x 4 warps that meet in the L1 cache.
// Traffic: weights and pooled once a block, mostly from the L2 cache; reduced is written once.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    reduce(const __grid_constant__ PyramidReduceArgs args, int column_blocks) {
  int64_t row_block = blockIdx.x / column_blocks;
  int level = 0;
  for (; row_block >= row_blocks<kTileRows * kBlockRows>(args.levels, level, args.N); ++level) {
    row_block -= row_blocks<kTileRows * kBlockRows>(args.levels, level, args.N);
  }
  const LevelRows rows(args.levels, level, args.N);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = (row_block * kBlockRows + warp / kBlockColumns) * kTileRows;
  const int64_t column = (blockIdx.x % column_blocks * int64_t{kBlockColumns} + warp % kBlockColumns) * kTileColumns;
  if (row >= rows.count || column >= args.R) return;  // a whole warp

  const T* left[kTileRows];
  const T* right[kTileColumns];
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    left[i] = static_cast<const T*>(args.pooled) + rows[min(row + i, rows.count - 1)] * args.C;
  }
#pragma unroll
  for (int j = 0; j < kTileColumns; ++j) {
    right[j] = static_cast<const T*>(args.weights[level]) + min(column + j, args.R - 1) * args.C;
  }
  acc_t<T> sums[kTileRows * kTileColumns] = {};
  for (int64_t c = lane * V; c < args.C; c += kWarp * V) {
    T pooled[kTileRows][V], weights[kTileColumns][V];
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) load(left[i] + c, pooled[i]);
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) load(right[j] + c, weights[j]);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      acc_t<T> factors[kTileColumns];
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) factors[j] = widen(weights[j][v]);
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        const acc_t<T> value = widen(pooled[i][v]);
#pragma unroll
        for (int j = 0; j < kTileColumns; ++j) sums[i * kTileColumns + j] += value * factors[j];
      }
    }
  }

  acc_t<T> value = sum_lanes(sums);
  const int64_t m = row + lane / kTileColumns, r = column + lane % kTileColumns;
  if (m >= rows.count || r >= args.R) return;
  const auto& [weight, bias, mean, variance] = args.norm[level];
  if (mean != nullptr) value -= norm_value<T>(mean, args.norm_dtype, r);
  if (variance != nullptr) {
    value /= sqrt(norm_value<T>(variance, args.norm_dtype, r) + static_cast<acc_t<T>>(args.eps[level]));
  }
  if (weight != nullptr) value *= norm_value<T>(weight, args.norm_dtype, r);
  if (bias != nullptr) value += norm_value<T>(bias, args.norm_dtype, r);
  if (args.relu && value < 0) value = 0;
  static_cast<T*>(args.reduced)[rows[m] * args.R + r] = narrow<T>(value);
}

constexpr int kBackwardRows = 8, kBackwardWarps = 4;

// What the two products of the backward have in common: out[i, c] = sum over k of left(i, k) * right(k)[c].
// grad_pooled: i is a row of a level, k an output channel.
template <class T>
struct GradPooled {
  using type = T;
  const PyramidReduceBackwardArgs& args;
  int level;
  LevelRows rows;

  __device__ GradPooled(const PyramidReduceBackwardArgs& args, int level)
      : args(args), level(level), rows(args.levels, level, args.N) {}
  PSP_HOST_DEVICE static int64_t blocks(const PyramidReduceBackwardArgs& args, int level) {
    return row_blocks<kBackwardRows>(args.levels, level, args.N);
  }
  __device__ int64_t count() const { return rows.count; }
  __device__ int64_t depth() const { return args.R; }
  __device__ T left(int64_t i, int64_t k) const {
    return static_cast<const T*>(args.grad_reduced)[rows[i] * args.R + k];
  }
  __device__ const T* right(int64_t k) const { return static_cast<const T*>(args.weights[level]) + k * args.C; }
  __device__ T* out(int64_t i) const { return static_cast<T*>(args.grad_pooled) + rows[i] * args.C; }
};

// grad_weights: i is an output channel, k a row of a level.
template <class T>
struct GradWeights {
  using type = T;
  const PyramidReduceBackwardArgs& args;
  int level;
  LevelRows rows;

  __device__ GradWeights(const PyramidReduceBackwardArgs& args, int level)
      : args(args), level(level), rows(args.levels, level, args.N) {}
  PSP_HOST_DEVICE static int64_t blocks(const PyramidReduceBackwardArgs& args, int) {
    return divide_up(args.R, kBackwardRows);
  }
  __device__ int64_t count() const { return args.R; }
  __device__ int64_t depth() const { return rows.count; }
  __device__ T left(int64_t i, int64_t k) const {
    return static_cast<const T*>(args.grad_reduced)[rows[k] * args.R + i];
  }
  __device__ const T* right(int64_t k) const { return static_cast<const T*>(args.pooled) + rows[k] * args.C; }
  __device__ T* out(int64_t i) const { return static_cast<T*>(args.grad_weights) + (level * args.R + i) * args.C; }
};

// One of the two products above, for all levels.
// Layout: right and out in 16-byte vectors along c (V > 1), or any alignment (V == 1).
// A block takes 8 rows x 32 vectors of a level; its 4 warps share out k and add up in their order.
// Traffic: right once a block, mostly from the L2 cache; out is written once.
template <class Product, int V>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 3)
    reduce_backward(const __grid_constant__ PyramidReduceBackwardArgs args, int column_blocks) {
  using T = typename Product::type;
  PSP_SHARED(acc_t<T>, shared, kBackwardRows * kWarp * V);
  int64_t row_block = blockIdx.x / column_blocks;
  int level = 0;
  for (; row_block >= Product::blocks(args, level); ++level) row_block -= Product::blocks(args, level);
  const Product product(args, level);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = row_block * kBackwardRows, c = (blockIdx.x % column_blocks * int64_t{kWarp} + lane) * V;

  acc_t<T> sums[kBackwardRows][V] = {};
  if (c < args.C) {
    for (int64_t k = warp; k < product.depth(); k += kBackwardWarps) {
      acc_t<T> values[V];
      load_wide(product.right(k) + c, values);
#pragma unroll
      for (int i = 0; i < kBackwardRows; ++i) {
        const acc_t<T> factor = widen(product.left(min(row + i, product.count() - 1), k));
#pragma unroll
        for (int v = 0; v < V; ++v) sums[i][v] += factor * values[v];
      }
    }
  }
  for (int turn = 0; turn < kBackwardWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < kBackwardRows; ++i) {
        acc_t<T>* const share = shared + (i * kWarp + lane) * V;
        acc_t<T> before[V] = {};
        if (turn > 0) load(share, before);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[i][v] += before[v];
        if (turn < kBackwardWarps - 1) {
          store_shared(share, sums[i]);
        } else if (c < args.C && row + i < product.count()) {
          store_narrow(product.out(row + i) + c, sums[i]);
        }
      }
    }
    __syncthreads();
  }
}

template <class Product, int V>
cudaError_t launch_product(const PyramidReduceBackwardArgs& args, void* stream) {
  int64_t row_blocks = 0;
  for (int level = 0; level < args.levels.count; ++level) row_blocks += Product::blocks(args, level);
  const int64_t column_blocks = divide_up(args.C, kWarp * V);
  return launch(reduce_backward<Product, V>, row_blocks * column_blocks, kBackwardWarps * kWarp, 0, stream, args,
                static_cast<int>(column_blocks));
}

template <class T, int V>
cudaError_t launch_backward(const PyramidReduceBackwardArgs& args, void* stream) {
  const cudaError_t error = launch_product<GradPooled<T>, V>(args, stream);
  return error != cudaSuccess ? error : launch_product<GradWeights<T>, V>(args, stream);
}

// Rows of C elements start on 16-byte boundaries.
template <class T>
bool vectors_of_rows(const void* data, int64_t C) {
  return aligned(data) && C % kVector<T> == 0;
}

// Rows of all levels are counted in int.
bool rows_fit_int(const Levels& levels, int64_t N, int64_t C, int64_t R) {
  return C <= INT_MAX && R <= INT_MAX && N * levels.first[levels.count] <= INT_MAX;
}

}  // namespace

size_t pyramid_reduce_workspace(const PyramidReduceArgs&) { return 0; }

int pyramid_reduce(const PyramidReduceArgs& args, void* stream) {
  if (!rows_fit_int(args.levels, args.N, args.C, args.R)) return cudaErrorInvalidValue;
  int64_t blocks = 0;
  for (int level = 0; level < args.levels.count; ++level) {
    blocks += row_blocks<kTileRows * kBlockRows>(args.levels, level, args.N);
  }
  const int64_t column_blocks = divide_up(args.R, kTileColumns * kBlockColumns);
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool vectors = vectors_of_rows<T>(args.pooled, args.C);
    for (int level = 0; level < args.levels.count; ++level) {
      vectors = vectors && vectors_of_rows<T>(args.weights[level], args.C);
    }
    return launch(vectors ? reduce<T, kVector<T>> : reduce<T, 1>, blocks * column_blocks, kThreads, 0, stream, args,
                  static_cast<int>(column_blocks));
  });
}

int pyramid_reduce_backward(const PyramidReduceBackwardArgs& args, void* stream) {
  if (!rows_fit_int(args.levels, args.N, args.C, args.R)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool vectors = vectors_of_rows<T>(args.pooled, args.C) && vectors_of_rows<T>(args.grad_pooled, args.C) &&
                   vectors_of_rows<T>(args.grad_weights, args.C);
    for (int level = 0; level < args.levels.count; ++level) {
      vectors = vectors && vectors_of_rows<T>(args.weights[level], args.C);
    }
    return vectors ? launch_backward<T, kVector<T>>(args, stream) : launch_backward<T, 1>(args, stream);
  });
}

}  // namespace pspnet_fast::cuda
