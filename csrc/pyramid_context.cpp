// Binds pyramid_context_ and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kMostSeen = 4096;  // cells seen through the taps of one axis; pspnet_fast/ops/checks.py states it too

Window window_of(const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& dilation, const Levels& levels) {
  PSP_CHECK(kernel_size.size() == 2 && dilation.size() == 2, "kernel_size and dilation must be (height, width)");
  for (int axis = 0; axis < 2; ++axis) {
    const int* bins = axis == 0 ? levels.bins_h : levels.bins_w;
    PSP_CHECK(kernel_size[axis] > 0 && kernel_size[axis] % 2 == 1 && kernel_size[axis] <= kMostSeen,
              "kernel_size must be odd, from 1 to ", kMostSeen);
    PSP_CHECK(dilation[axis] > 0 && dilation[axis] <= int64_t{1} << 16, "dilation must be from 1 to 2^16");
    PSP_CHECK(first_seen(bins, levels.count, 1) * kernel_size[axis] <= kMostSeen,
              "kernel_size times the sum of the bins must be at most ", kMostSeen);
  }
  return {static_cast<int>(kernel_size[0]), static_cast<int>(kernel_size[1]), static_cast<int>(dilation[0]),
          static_cast<int>(dilation[1])};
}

Interpolation interpolation_of(int64_t mode) {
  PSP_CHECK(mode >= Interpolation::kBilinear && mode <= Interpolation::kNearest,
            "interpolation must be 0 (bilinear), 1 (bilinear, corners aligned) or 2 (nearest)");
  return Interpolation(static_cast<Interpolation::Mode>(mode));
}

void pyramid_context(const Tensor& conv, const Tensor& taps, std::vector<Tensor> norm, double eps, bool relu,
                     std::vector<int64_t> bins, std::vector<int64_t> kernel_size, std::vector<int64_t> dilation,
                     int64_t interpolation, bool accumulate) {
  const Levels levels = levels_of(bins);
  const Window window = window_of(kernel_size, dilation, levels);
  check_map("conv", conv);
  const int64_t N = conv.size(0), O = conv.size(1), H = conv.size(2), W = conv.size(3);
  PSP_CHECK(H > 0 && W > 0, "conv must have a pixel");
  const Region written = region_of(conv);
  check_written("conv", written);
  check_like("taps", taps, {N, levels.first[levels.count], window.size_h * window.size_w, O}, conv);
  check_apart("taps", taps, "conv", written);
  PyramidContextArgs args{dtype_of(conv), is_channels_last(conv), interpolation_of(interpolation), N, O, H, W, levels,
                          window};
  args.norm_dtype = args.dtype, args.eps = eps, args.relu = relu, args.accumulate = accumulate;
  std::vector<Tensor> norms;
  if (!norm.empty()) {
    PSP_CHECK(norm.size() == 4, "norm must list four tensors");
    args.norm_dtype = dtype_of(norm[0]);
    PSP_CHECK(args.norm_dtype == args.dtype || args.norm_dtype == DType::kFloat32,
              "norm must be float32 or have the dtype of conv");
    for (size_t i = 0; i < norm.size(); ++i) {
      check_like("norm", norm[i], {O}, norm[0]);
      PSP_CHECK(norm[i].device() == conv.device(), "norm must be on the device of conv");
      check_apart("norm", norm[i], "conv", written);
      norms.push_back(dense(norm[i]));
      args.norm[i] = norms[i].data_ptr();
    }
  }
  if (N == 0 || O == 0) return;
  PSP_CHECK(is_native(conv, args.channels_last), "conv must be contiguous or channels-last");
  const Tensor dense_taps = dense(taps);
  args.taps = dense_taps.data_ptr();
  args.conv = image_of(conv);
  PSP_LAUNCH(pyramid_context, conv, args);
}

Tensor pyramid_context_backward(const Tensor& grad_conv, std::vector<int64_t> bins, std::vector<int64_t> kernel_size,
                                std::vector<int64_t> dilation, int64_t interpolation) {
  const Levels levels = levels_of(bins);
  const Window window = window_of(kernel_size, dilation, levels);
  check_map("grad_conv", grad_conv);
  const int64_t N = grad_conv.size(0), O = grad_conv.size(1), H = grad_conv.size(2), W = grad_conv.size(3);
  PSP_CHECK(H > 0 && W > 0, "grad_conv must have a pixel");
  const Tensor grad_taps = new_tensor(grad_conv, {N, levels.first[levels.count], window.size_h * window.size_w, O});
  if (N == 0 || O == 0) return grad_taps;
  PyramidContextBackwardArgs args{
      dtype_of(grad_conv), is_channels_last(grad_conv), interpolation_of(interpolation), N, O, H, W, levels, window};
  const Tensor grad = native(grad_conv, args.channels_last);
  args.grad_conv = image_of(grad);
  args.grad_taps = grad_taps.data_ptr();
  PSP_WORKSPACE(pyramid_context_backward, grad_conv, args);
  PSP_LAUNCH(pyramid_context_backward, grad_conv, args);
  return grad_taps;
}

}  // namespace

PSP_KERNELS(m) {
  PSP_IMPL(m, "pyramid_context_", pyramid_context);
  PSP_IMPL(m, "pyramid_context_backward", pyramid_context_backward);
}

}  // namespace pspnet_fast
