// Binds pyramid_split_weight and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

using torch::headeronly::ScalarType;

// Whether the elements lie densely in one of the two layouts.
bool lies_in(const Tensor& weight, bool channels_last) {
  if (!channels_last) return weight.is_contiguous();
  int64_t stride = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (weight.size(d) != 1 && weight.stride(d) != stride) return false;
    stride *= weight.size(d);
  }
  return true;
}

Tensor dense_in(const Tensor& weight, bool channels_last) {
  return lies_in(weight, channels_last) ? weight : copy_of(weight, channels_last);
}

void check_dtypes(ScalarType weight, ScalarType parts) {
  PSP_CHECK(
      weight == parts || (weight == ScalarType::Float && (parts == ScalarType::BFloat16 || parts == ScalarType::Half)),
      "the parts must have the dtype of the weight, or bfloat16 or float16 where it is float32");
}

PyramidSplitWeightArgs make_args(const Tensor& parts, int64_t O, int64_t dense, int64_t L, int64_t R, int64_t taps,
                                 bool dense_first, bool channels_last) {
  PSP_CHECK(O > 0 && dense > 0 && L > 0 && L <= kMaxLevels && R > 0 && taps > 0 && O <= INT_MAX && taps <= INT_MAX &&
                dense + L * R <= INT_MAX,
            "a weight must have output channels, dense ones, those of 1 to ", kMaxLevels, " levels and taps");
  PyramidSplitWeightArgs args{dtype_of(parts), dtype_of(parts), channels_last, O, dense, L, R, taps};
  args.first_dense = dense_first ? 0 : L * R, args.first_level = dense_first ? dense : 0;
  return args;
}

std::tuple<Tensor, Tensor> pyramid_split_weight(const Tensor& weight, int64_t dense, bool dense_first, int64_t levels,
                                                ScalarType dtype) {
  check_map("weight", weight);
  const int64_t O = weight.size(0), C = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  PSP_CHECK(dense > 0 && dense < C && levels > 0 && (C - dense) % levels == 0, "weight must have ", dense,
            " dense channels and as many for each of ", levels, " levels, but has ", C);
  check_dtypes(weight.scalar_type(), dtype);
  const bool channels_last = is_channels_last(weight);
  const int64_t R = (C - dense) / levels;
  PyramidSplitWeightArgs args = make_args(weight, O, dense, levels, R, kh * kw, dense_first, channels_last);
  const Tensor dense_weight = new_tensor(weight, {O, dense, kh, kw}, dtype, channels_last);
  const Tensor matrices = new_tensor(weight, {levels, kh * kw * O, R}, dtype);
  const Tensor source = dense_in(weight, channels_last);
  args.dtype = dtype_of(matrices);
  args.weight = source.data_ptr();
  args.dense_weight = dense_weight.data_ptr();
  args.matrices = matrices.data_ptr();
  PSP_LAUNCH(pyramid_split_weight, weight, args);
  return {dense_weight, matrices};
}

Tensor pyramid_split_weight_backward(const Tensor& grad_dense, const Tensor& grad_matrices, bool dense_first,
                                     bool channels_last, ScalarType dtype) {
  check_map("grad_dense", grad_dense);
  PSP_CHECK(grad_matrices.dim() == 3, "grad_matrices must have 3 dimensions, but has ", grad_matrices.dim());
  const int64_t O = grad_dense.size(0), dense = grad_dense.size(1), kh = grad_dense.size(2), kw = grad_dense.size(3);
  const int64_t L = grad_matrices.size(0), R = grad_matrices.size(2);
  PSP_CHECK(O <= INT_MAX && R <= INT_MAX && kh * kw <= INT_MAX, "grad_dense and grad_matrices are too large");
  check_like("grad_matrices", grad_matrices, {L, kh * kw * O, R}, grad_dense);
  check_dtypes(dtype, grad_dense.scalar_type());
  PyramidSplitWeightArgs args = make_args(grad_dense, O, dense, L, R, kh * kw, dense_first, channels_last);
  const Tensor grad_weight = new_tensor(grad_dense, {O, dense + L * R, kh, kw}, dtype, channels_last);
  const Tensor first = dense_in(grad_dense, channels_last), second = pspnet_fast::dense(grad_matrices);
  args.weight_dtype = dtype_of(grad_weight);
  args.weight = grad_weight.data_ptr();
  args.dense_weight = first.data_ptr();
  args.matrices = second.data_ptr();
  PSP_LAUNCH(pyramid_split_weight_backward, grad_dense, args);
  return grad_weight;
}

}  // namespace

PSP_KERNELS(m) {
  PSP_IMPL(m, "pyramid_split_weight", pyramid_split_weight);
  PSP_IMPL(m, "pyramid_split_weight_backward", pyramid_split_weight_backward);
}

}  // namespace pspnet_fast
