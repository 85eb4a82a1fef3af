// Binds pyramid_pool and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

Tensor pyramid_pool(const Tensor& input, std::optional<Tensor> concat, int64_t offset, std::vector<int64_t> bins) {
  STD_TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions");
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  STD_TORCH_CHECK(C > 0 && H > 0 && W > 0, "input must have at least one channel and one pixel");
  PyramidPoolArgs args{dtype_of(input), is_channels_last(input), N, C, H, W, levels_of(bins)};
  if (concat) {
    STD_TORCH_CHECK(concat->dim() == 4 && offset >= 0 && concat->size(1) >= offset + C, "concat has too few channels");
    check_like("concat", *concat, {N, concat->size(1), H, W}, input);
    args.channels_last = is_channels_last(*concat);
    STD_TORCH_CHECK(native(*concat, args.channels_last).data_ptr() == concat->data_ptr(),
                    "concat must be contiguous or channels-last");
    args.concat = image_of(*concat, offset);
  }
  const Tensor pooled = new_tensor(input, {N, args.levels.first[args.levels.count], C});
  if (N == 0) return pooled;
  const Tensor source = native(input, args.channels_last);
  args.input = image_of(source);
  args.pooled = pooled.data_ptr();
  PSP_WORKSPACE(pyramid_pool, input, args);
  PSP_LAUNCH(pyramid_pool, input, args);
  return pooled;
}

Tensor pyramid_pool_alone(const Tensor& input, std::vector<int64_t> bins) {
  return pyramid_pool(input, std::nullopt, 0, std::move(bins));
}

Tensor pyramid_pool_backward(const Tensor& grad_pooled, std::optional<Tensor> grad_concat, int64_t offset,
                             std::vector<int64_t> bins, int64_t H, int64_t W, bool channels_last) {
  const Levels levels = levels_of(bins);
  STD_TORCH_CHECK(grad_pooled.dim() == 3 && H > 0 && W > 0, "grad_pooled must have 3 dimensions");
  const int64_t N = grad_pooled.size(0), C = grad_pooled.size(2);
  check_like("grad_pooled", grad_pooled, {N, levels.first[levels.count], C}, grad_pooled);
  PyramidPoolBackwardArgs args{dtype_of(grad_pooled), channels_last, N, C, H, W, levels};
  const Tensor grad_input = new_map(grad_pooled, N, C, H, W, channels_last);
  if (N == 0) return grad_input;
  Tensor grad_copy;
  if (grad_concat) {
    STD_TORCH_CHECK(grad_concat->dim() == 4 && offset >= 0 && grad_concat->size(1) >= offset + C,
                    "grad_concat has too few channels");
    check_like("grad_concat", *grad_concat, {N, grad_concat->size(1), H, W}, grad_pooled);
    grad_copy = native(*grad_concat, channels_last);
    args.grad_concat = image_of(grad_copy, offset);
  }
  const Tensor dense_pooled = torch::stable::contiguous(grad_pooled);
  args.grad_pooled = dense_pooled.data_ptr();
  args.grad_input = image_of(grad_input);
  PSP_LAUNCH(pyramid_pool_backward, grad_pooled, args);
  return grad_input;
}

Tensor new_concat(const Tensor& input, int64_t channels) {
  STD_TORCH_CHECK(input.dim() == 4 && channels >= 0, "input must have 4 dimensions");
  dtype_of(input);
  return new_map(input, input.size(0), channels, input.size(2), input.size(3), is_channels_last(input));
}

}  // namespace

PSP_KERNELS(m) {
  m.impl("new_concat", TORCH_BOX(&new_concat));
  m.impl("pyramid_pool", TORCH_BOX(&pyramid_pool));
  m.impl("pyramid_pool_alone", TORCH_BOX(&pyramid_pool_alone));
  m.impl("pyramid_pool_backward", TORCH_BOX(&pyramid_pool_backward));
}

}  // namespace pspnet_fast
