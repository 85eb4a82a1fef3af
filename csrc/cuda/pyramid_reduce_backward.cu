// The backward of the levels' 1x1 convolutions: two products for each level.
#include "pyramid_reduce.cuh"

namespace pspnet_fast::cuda {
namespace {

// Blocks read both products' operands from the L2 cache: as large as the sums of a thread allow.
template <class T>
struct BackwardShape {
  using type = Shape<128, 128, 64, 3, 2, 4, 1>;
};
template <>
struct BackwardShape<float> {
  using type = Shape<64, 64, 64, 4, 1, 2, 4>;  // four sums of fewer terms each round less
};
template <>
struct BackwardShape<double> {
  using type = Shape<64, 64, 64, 4, 2, 2, 2>;
};

// Of all levels: tiles of grad_pooled, then of grad_weights.
struct BackwardBlocks {
  int64_t of_pooled, of_weights;
  int columns;  // tiles along C, which change fastest

  template <class Shape>
  static BackwardBlocks of(const PyramidReduceBackwardArgs& args) {
    const int64_t columns = divide_up(args.C, Shape::kColumns);
    return {row_blocks(args.levels, args.N, Shape::kRows) * columns,
            args.levels.count * divide_up(args.R, Shape::kRows) * columns, static_cast<int>(columns)};
  }
};

// grad_pooled[m, c] = sum over r of grad_reduced[m, r] * weight[r, c], m a row of a level, and
// grad_weights[r, c] = sum over m of grad_reduced[m, r] * pooled[m, c].
// Layout: all in 16-byte vectors along r and c (`vectors`), or any alignment.
// A block takes a tile of one of them.
// Traffic: weights once a block of rows, pooled once a block of output channels, grad_reduced once a block of columns
// of either, mostly from the L2 cache; both gradients are written once. Read 2.9 times at
// N = 16; instructions a product of two numbers: 0.12 by tensor cores.
template <class T, bool vectors>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && vectors ? 2 : 1)
    reduce_backward(const __grid_constant__ PyramidReduceBackwardArgs args,
                    const __grid_constant__ BackwardBlocks blocks) {
  using Shape = typename BackwardShape<T>::type;
  PSP_SHARED(unsigned char, shared, (kProductBytes<T, Shape>));
  constexpr int V = vectors ? kVector<T> : 1;
  const int C = static_cast<int>(args.C), R = static_cast<int>(args.R);
  const bool of_pooled = blockIdx.x < blocks.of_pooled;
  int64_t row_block = (blockIdx.x - (of_pooled ? 0 : blocks.of_pooled)) / blocks.columns;
  const int first_c = static_cast<int>(blockIdx.x % blocks.columns) * Shape::kColumns;
  const auto* const grad_reduced = static_cast<const T*>(args.grad_reduced);
  if (of_pooled) {
    const int level = level_of_block(args.levels, args.N, Shape::kRows, row_block);
    const Operand<T, true> grad = {grad_reduced, R, rows_of_level(args.levels, level, args.N)};
    const Operand<T, false> weight = {static_cast<const T*>(args.weights[level]), C, plain_rows(R)};
    T* const to = static_cast<T*>(args.grad_pooled);
    product_tile<T, Shape, vectors>(
        shared, grad, weight, static_cast<int>(row_block) * Shape::kRows, first_c,
        [&](int m, int c, acc_t<T>(&values)[V]) { store_narrow(to + grad.rows.at(m).row * args.C + c, values); });
  } else {
    const int row_blocks = static_cast<int>(divide_up(R, Shape::kRows));
    const int level = static_cast<int>(row_block / row_blocks);
    const Rows rows = rows_of_level(args.levels, level, args.N);
    const Operand<T, false> grad = {grad_reduced, R, rows}, pooled = {static_cast<const T*>(args.pooled), C, rows};
    T* const to = static_cast<T*>(args.grad_weights) + level * args.R * args.C;
    product_tile<T, Shape, vectors>(
        shared, grad, pooled, static_cast<int>(row_block % row_blocks) * Shape::kRows, first_c,
        [&](int r, int c, acc_t<T>(&values)[V]) { store_narrow(to + r * args.C + c, values); });
  }
}

}  // namespace

int pyramid_reduce_backward(const PyramidReduceBackwardArgs& args, void* stream) {
  if (!rows_fit_int(args.levels, args.N, args.C, args.R)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = vectors_of_rows<T>(args.pooled, args.C) && vectors_of_rows<T>(args.grad_pooled, args.C) &&
                         vectors_of_rows<T>(args.grad_weights, args.C) &&
                         vectors_of_rows<T>(args.grad_reduced, args.R) &&
                         vectors_of_weights<T>(args.weights, args.levels, args.C);
    const auto blocks = BackwardBlocks::of<typename BackwardShape<T>::type>(args);
    return launch(vectors ? reduce_backward<T, true> : reduce_backward<T, false>, blocks.of_pooled + blocks.of_weights,
                  kThreads, 0, stream, args, blocks);
  });
}

}  // namespace pspnet_fast::cuda
