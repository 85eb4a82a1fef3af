// Binds pyramid_context_ and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kMostSeen = 4096;  // cells seen through the taps of one axis; pspnet_fast/ops/checks.py states it too

Window window_of(const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& dilation, const Levels& levels) {
  STD_TORCH_CHECK(kernel_size.size() == 2 && dilation.size() == 2, "kernel_size and dilation must be (height, width)");
  for (int axis = 0; axis < 2; ++axis) {
    const int* bins = axis == 0 ? levels.bins_h : levels.bins_w;
    STD_TORCH_CHECK(kernel_size[axis] > 0 && kernel_size[axis] % 2 == 1 && kernel_size[axis] <= kMostSeen,
                    "kernel_size must be odd, from 1 to ", kMostSeen);
    STD_TORCH_CHECK(dilation[axis] > 0 && dilation[axis] <= int64_t{1} << 16, "dilation must be from 1 to 2^16");
    STD_TORCH_CHECK(first_seen(bins, levels.count, 1) * kernel_size[axis] <= kMostSeen,
                    "kernel_size times the sum of the bins must be at most ", kMostSeen);
  }
  return {static_cast<int>(kernel_size[0]), static_cast<int>(kernel_size[1]), static_cast<int>(dilation[0]),
          static_cast<int>(dilation[1])};
}

void pyramid_context(const Tensor& conv, const Tensor& taps, std::vector<Tensor> norm, double eps, bool relu,
                     std::vector<int64_t> bins, std::vector<int64_t> kernel_size, std::vector<int64_t> dilation,
                     bool align_corners) {
  const Levels levels = levels_of(bins);
  const Window window = window_of(kernel_size, dilation, levels);
  STD_TORCH_CHECK(conv.dim() == 4, "conv must have 4 dimensions");
  const int64_t N = conv.size(0), O = conv.size(1), H = conv.size(2), W = conv.size(3);
  STD_TORCH_CHECK(H > 0 && W > 0, "conv must have a pixel");
  check_like("taps", taps, {N, levels.first[levels.count], window.size_h * window.size_w, O}, conv);
  PyramidContextArgs args{dtype_of(conv), is_channels_last(conv), align_corners, N, O, H, W, levels, window};
  args.norm_dtype = args.dtype, args.eps = eps, args.relu = relu;
  std::vector<Tensor> norms;
  if (!norm.empty()) {
    STD_TORCH_CHECK(norm.size() == 4, "norm must list four tensors");
    args.norm_dtype = dtype_of(norm[0]);
    STD_TORCH_CHECK(args.norm_dtype == args.dtype || args.norm_dtype == DType::kFloat32,
                    "norm must be float32 or have the dtype of conv");
    for (size_t i = 0; i < norm.size(); ++i) {
      check_like("norm", norm[i], {O}, norm[0]);
      STD_TORCH_CHECK(norm[i].device() == conv.device(), "norm must be on the device of conv");
      norms.push_back(torch::stable::contiguous(norm[i]));
      args.norm[i] = norms[i].data_ptr();
    }
  }
  if (N == 0 || O == 0) return;
  STD_TORCH_CHECK(native(conv, args.channels_last).data_ptr() == conv.data_ptr(),
                  "conv must be contiguous or channels-last");
  const Tensor dense = torch::stable::contiguous(taps);
  args.taps = dense.data_ptr();
  args.conv = image_of(conv);
  PSP_LAUNCH(pyramid_context, conv, args);
}

Tensor pyramid_context_backward(const Tensor& grad_conv, std::vector<int64_t> bins, std::vector<int64_t> kernel_size,
                                std::vector<int64_t> dilation, bool align_corners) {
  const Levels levels = levels_of(bins);
  const Window window = window_of(kernel_size, dilation, levels);
  STD_TORCH_CHECK(grad_conv.dim() == 4, "grad_conv must have 4 dimensions");
  const int64_t N = grad_conv.size(0), O = grad_conv.size(1), H = grad_conv.size(2), W = grad_conv.size(3);
  STD_TORCH_CHECK(H > 0 && W > 0, "grad_conv must have a pixel");
  const Tensor grad_taps = new_tensor(grad_conv, {N, levels.first[levels.count], window.size_h * window.size_w, O});
  if (N == 0 || O == 0) return grad_taps;
  PyramidContextBackwardArgs args{
      dtype_of(grad_conv), is_channels_last(grad_conv), align_corners, N, O, H, W, levels, window};
  const Tensor grad = native(grad_conv, args.channels_last);
  args.grad_conv = image_of(grad);
  args.grad_taps = grad_taps.data_ptr();
  PSP_WORKSPACE(pyramid_context_backward, grad_conv, args);
  PSP_LAUNCH(pyramid_context_backward, grad_conv, args);
  return grad_taps;
}

}  // namespace

PSP_KERNELS(m) {
  m.impl("pyramid_context_", TORCH_BOX(&pyramid_context));
  m.impl("pyramid_context_backward", TORCH_BOX(&pyramid_context_backward));
}

}  // namespace pspnet_fast
