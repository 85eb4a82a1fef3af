// The levels' 1x1 convolutions on the pooled map, with folded normalisation and ReLU.
#include "folded_norm.cuh"
#include "pyramid_reduce.cuh"

namespace pspnet_fast::cuda {
namespace {

// Many rows: what blocks read from the L2 cache counts. Few: how many blocks there are, and a whole column of weights
// is read by one. So few that most multiprocessors would be idle: how much is on its way from memory at once, and how
// often it is waited for. Multiply-adds take more time than reads: then, more blocks.
template <class T>
struct Shapes {
  using Large = Shape<64, 64, 128, 3, 2, 2, 2>;
  using Small = Shape<64, 32, 128, 4, 2, 1, 4>;
  using Least = Shape<32, 16, 256, 4, 1, 1, 8>;
};
template <>
struct Shapes<float> {
  using Large = Shape<64, 64, 64, 4, 1, 2, 4>;
  using Small = Shape<32, 32, 128, 4, 1, 1, 8>;
  using Least = Small;
};
template <>
struct Shapes<double> {
  using Large = Shapes<__half>::Small;
  using Small = Large;
  using Least = Large;
};
constexpr int64_t kBlocksOfLarge = 64;   // from as many on: two for a multiprocessor of half of them
constexpr int64_t kBlocksOfSmall = 100;  // likewise: most multiprocessors have one

// reduced[n, p, r] = f(sum over c of pooled[n, p, c] * weight[r, c]): the weights of p's level, f its normalisation.
// Layout: both operands in 16-byte vectors along c (`vectors`), or any alignment.
// A block takes a tile of rows and output channels of a level; channels change fastest.
// Traffic: weights once a block of rows, pooled once a block of columns, mostly from the L2 cache; reduced once. Read
// 4.8 times at N = 16; instructions a product of two numbers: 0.15 by tensor cores.
template <class T, class Shape, bool vectors>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1)
    reduce(const __grid_constant__ PyramidReduceArgs args, int column_blocks) {
  PSP_SHARED(unsigned char, shared, (kProductBytes<T, Shape>));
  constexpr int V = vectors ? kVector<T> : 1;
  int64_t row_block = blockIdx.x / column_blocks;
  const int level = level_of_block(args.levels, args.N, Shape::kRows, row_block);
  const Operand<T, true> pooled = {static_cast<const T*>(args.pooled), static_cast<int>(args.C),
                                   rows_of_level(args.levels, level, args.N)};
  const Operand<T, true> weight = {static_cast<const T*>(args.weights[level]), pooled.length, plain_rows(args.R)};
  T* const reduced = static_cast<T*>(args.reduced);
  product_tile<T, Shape, vectors>(
      shared, pooled, weight, static_cast<int>(row_block) * Shape::kRows,
      static_cast<int>(blockIdx.x % column_blocks) * Shape::kColumns, [&](int m, int r, acc_t<T>(&values)[V]) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const FoldedNorm<T> norm(args.norm[level], args.norm_dtype, args.eps[level], r + v);
          values[v] = norm(values[v], args.relu);
        }
        store_narrow(reduced + pooled.rows.at(m).row * args.R + r, values);
      });
}

template <class Shape>
int64_t blocks_of(const PyramidReduceArgs& args) {
  return row_blocks(args.levels, args.N, Shape::kRows) * divide_up(args.R, Shape::kColumns);
}

template <class T, class Shape, bool vectors>
cudaError_t launch_reduce(const PyramidReduceArgs& args, void* stream) {
  return launch(reduce<T, Shape, vectors>, blocks_of<Shape>(args), kThreads, 0, stream, args,
                static_cast<int>(divide_up(args.R, Shape::kColumns)));
}

}  // namespace

int pyramid_reduce(const PyramidReduceArgs& args, void* stream) {
  if (!rows_fit_int(args.levels, args.N, args.C, args.R)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Large = typename Shapes<T>::Large;
    using Small = typename Shapes<T>::Small;
    using Least = typename Shapes<T>::Least;
    const bool vectors = vectors_of_rows<T>(args.pooled, args.C) && vectors_of_rows<T>(args.reduced, args.R) &&
                         vectors_of_weights<T>(args.weights, args.levels, args.C);
    if (!vectors) return launch_reduce<T, Small, false>(args, stream);
    if (blocks_of<Large>(args) >= kBlocksOfLarge) return launch_reduce<T, Large, true>(args, stream);
    return blocks_of<Small>(args) >= kBlocksOfSmall ? launch_reduce<T, Small, true>(args, stream)
                                                    : launch_reduce<T, Least, true>(args, stream);
  });
}

}  // namespace pspnet_fast::cuda
