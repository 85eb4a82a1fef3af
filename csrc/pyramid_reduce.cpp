// Binds pyramid_reduce and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

// Contiguous weights [R, C] of every level; they may come as 1x1 convolution weights [R, C, 1, 1].
std::vector<Tensor> weight_matrices(const std::vector<Tensor>& weights, const Levels& levels, const Tensor& pooled) {
  PSP_CHECK(static_cast<int>(weights.size()) == levels.count, "weights must list one tensor a level");
  std::vector<Tensor> result;
  for (const Tensor& weight : weights) {
    PSP_CHECK((weight.dim() == 2 || weight.dim() == 4) && weight.size(0) <= INT_MAX,
              "weights must be (R, C) or (R, C, 1, 1), R at most ", INT_MAX);
    std::vector<int64_t> sizes{weights[0].size(0), pooled.size(2)};
    sizes.resize(weight.dim(), 1);
    check_like("weights", weight, sizes, pooled);
    result.push_back(dense(weight));
  }
  return result;
}

void check_pooled(const Tensor& pooled, const Levels& levels) {
  PSP_CHECK(pooled.dim() == 3 && pooled.size(1) == levels.first[levels.count] && pooled.size(2) > 0 &&
                pooled.size(2) <= INT_MAX,
            "pooled must be (N, cells of bins, C), C from 1 to ", INT_MAX);
}

Tensor pyramid_reduce(const Tensor& pooled, std::vector<Tensor> weights, std::vector<Tensor> norm,
                      std::vector<double> eps, bool relu, std::vector<int64_t> bins) {
  const Levels levels = levels_of(bins);
  check_pooled(pooled, levels);
  const std::vector<Tensor> matrices = weight_matrices(weights, levels, pooled);
  const int64_t N = pooled.size(0), C = pooled.size(2), R = matrices[0].size(0);
  PyramidReduceArgs args{dtype_of(pooled), N, C, R, levels};
  args.norm_dtype = args.dtype, args.relu = relu;
  std::vector<Tensor> norms;
  if (!norm.empty()) {
    PSP_CHECK(norm.size() == matrices.size() * 4 && eps.size() == matrices.size(),
              "norm must list four tensors and eps one number a level");
    args.norm_dtype = dtype_of(norm[0]);
    PSP_CHECK(args.norm_dtype == args.dtype || args.norm_dtype == DType::kFloat32,
              "norm must be float32 or have the dtype of pooled");
    for (size_t i = 0; i < norm.size(); ++i) {
      check_like("norm", norm[i], {R}, norm[0]);
      PSP_CHECK(norm[i].device() == pooled.device(), "norm must be on the device of pooled");
      norms.push_back(dense(norm[i]));
      args.norm[i / 4][i % 4] = norms[i].data_ptr();
    }
    std::copy(eps.begin(), eps.end(), args.eps);
  }
  for (int l = 0; l < levels.count; ++l) args.weights[l] = matrices[l].data_ptr();
  const Tensor reduced = new_tensor(pooled, {N, levels.first[levels.count], R});
  if (N == 0) return reduced;
  const Tensor dense_pooled = dense(pooled);
  args.pooled = dense_pooled.data_ptr();
  args.reduced = reduced.data_ptr();
  PSP_LAUNCH(pyramid_reduce, pooled, args);
  return reduced;
}

std::tuple<Tensor, Tensor> pyramid_reduce_backward(const Tensor& grad_reduced, const Tensor& pooled,
                                                   std::vector<Tensor> weights, std::vector<int64_t> bins) {
  const Levels levels = levels_of(bins);
  check_pooled(pooled, levels);
  const std::vector<Tensor> matrices = weight_matrices(weights, levels, pooled);
  const int64_t N = pooled.size(0), C = pooled.size(2), R = matrices[0].size(0);
  check_like("grad_reduced", grad_reduced, {N, pooled.size(1), R}, pooled);
  PyramidReduceBackwardArgs args{dtype_of(pooled), N, C, R, levels};
  for (int l = 0; l < levels.count; ++l) args.weights[l] = matrices[l].data_ptr();
  const Tensor dense_grad = dense(grad_reduced), dense_pooled = dense(pooled);
  args.grad_reduced = dense_grad.data_ptr();
  args.pooled = dense_pooled.data_ptr();
  const Tensor grad_pooled = new_tensor(pooled, {N, pooled.size(1), C});
  Tensor grad_weights = new_tensor(pooled, {levels.count, R, C});
  if (N == 0) return {grad_pooled, torch::stable::zero_(grad_weights)};
  args.grad_pooled = grad_pooled.data_ptr();
  args.grad_weights = grad_weights.data_ptr();
  PSP_LAUNCH(pyramid_reduce_backward, pooled, args);
  return {grad_pooled, grad_weights};
}

}  // namespace

PSP_KERNELS(m) {
  PSP_IMPL(m, "pyramid_reduce", pyramid_reduce);
  PSP_IMPL(m, "pyramid_reduce_backward", pyramid_reduce_backward);
}

}  // namespace pspnet_fast
