// Binds pyramid_upsample_concat_ and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

void pyramid_upsample_concat(const Tensor& concat, const Tensor& reduced, int64_t offset, std::vector<int64_t> bins,
                             bool align_corners) {
  const Levels levels = levels_of(bins);
  STD_TORCH_CHECK(concat.dim() == 4 && reduced.dim() == 3, "concat must have 4 dimensions and reduced 3");
  const int64_t N = concat.size(0), H = concat.size(2), W = concat.size(3), R = reduced.size(2);
  check_like("reduced", reduced, {N, levels.first[levels.count], R}, concat);
  STD_TORCH_CHECK(offset >= 0 && concat.size(1) >= offset + levels.count * R && H > 0 && W > 0,
                  "concat has too few channels or no pixel");
  if (N == 0 || R == 0) return;
  PyramidUpsampleConcatArgs args{dtype_of(concat), is_channels_last(concat), align_corners, N, R, H, W, levels};
  STD_TORCH_CHECK(native(concat, args.channels_last).data_ptr() == concat.data_ptr(),
                  "concat must be contiguous or channels-last");
  const Tensor dense = torch::stable::contiguous(reduced);
  args.reduced = dense.data_ptr();
  args.context = image_of(concat, offset);
  PSP_LAUNCH(pyramid_upsample_concat, concat, args);
}

Tensor pyramid_upsample_concat_backward(const Tensor& grad_concat, int64_t offset, int64_t R, std::vector<int64_t> bins,
                                        bool align_corners) {
  const Levels levels = levels_of(bins);
  STD_TORCH_CHECK(grad_concat.dim() == 4, "grad_concat must have 4 dimensions");
  const int64_t N = grad_concat.size(0), H = grad_concat.size(2), W = grad_concat.size(3);
  STD_TORCH_CHECK(offset >= 0 && R >= 0 && grad_concat.size(1) >= offset + levels.count * R && H > 0 && W > 0,
                  "grad_concat has too few channels or no pixel");
  const Tensor grad_reduced = new_tensor(grad_concat, {N, levels.first[levels.count], R});
  if (N == 0 || R == 0) return grad_reduced;
  PyramidUpsampleConcatBackwardArgs args{
      dtype_of(grad_concat), is_channels_last(grad_concat), align_corners, N, R, H, W, levels};
  const Tensor grad = native(grad_concat, args.channels_last);
  args.grad_context = image_of(grad, offset);
  args.grad_reduced = grad_reduced.data_ptr();
  PSP_WORKSPACE(pyramid_upsample_concat_backward, grad_concat, args);
  PSP_LAUNCH(pyramid_upsample_concat_backward, grad_concat, args);
  return grad_reduced;
}

}  // namespace

PSP_KERNELS(m) {
  m.impl("pyramid_upsample_concat_", TORCH_BOX(&pyramid_upsample_concat));
  m.impl("pyramid_upsample_concat_backward", TORCH_BOX(&pyramid_upsample_concat_backward));
}

}  // namespace pspnet_fast
