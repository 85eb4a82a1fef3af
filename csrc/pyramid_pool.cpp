// Binds pyramid_pool and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

Tensor pyramid_pool(const Tensor& input, std::optional<Tensor> concat, int64_t offset, std::vector<int64_t> bins) {
  check_map("input", input);
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  PSP_CHECK(C > 0 && H > 0 && W > 0, "input must have at least one channel and one pixel");
  PyramidPoolArgs args{dtype_of(input), is_channels_last(input), N, C, H, W, levels_of(bins)};
  if (concat) {
    check_map("concat", *concat);
    PSP_CHECK(holds(concat->size(1), offset, C), "concat has too few channels: ", concat->size(1), " for ", C,
              " from offset ", offset, " on");
    check_like("concat", *concat, {N, concat->size(1), H, W}, input);
    args.channels_last = is_channels_last(*concat);
    PSP_CHECK(is_native(*concat, args.channels_last), "concat must be contiguous or channels-last");
    const Region written = region_of(*concat).narrow(1, offset, C);
    check_written("concat", written);
    if (!same_places(region_of(input), written)) {  // else the copy is there already
      check_apart("input", input, "concat", written);
      args.concat = image_of(*concat, offset);
    }
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
  check_size(H, W);
  PSP_CHECK(grad_pooled.dim() == 3 && grad_pooled.size(2) <= INT_MAX,
            "grad_pooled must have 3 dimensions, the last of at most ", INT_MAX);
  const int64_t N = grad_pooled.size(0), C = grad_pooled.size(2);
  check_like("grad_pooled", grad_pooled, {N, levels.first[levels.count], C}, grad_pooled);
  PyramidPoolBackwardArgs args{dtype_of(grad_pooled), channels_last, N, C, H, W, levels};
  const Tensor grad_input = new_map(grad_pooled, N, C, H, W, channels_last);
  Tensor grad_copy;
  if (grad_concat) {
    check_map("grad_concat", *grad_concat);
    PSP_CHECK(holds(grad_concat->size(1), offset, C), "grad_concat has too few channels: ", grad_concat->size(1),
              " for ", C, " from offset ", offset, " on");
    check_like("grad_concat", *grad_concat, {N, grad_concat->size(1), H, W}, grad_pooled);
    if (N == 0 || C == 0) return grad_input;
    grad_copy = native(*grad_concat, channels_last);
    args.grad_concat = image_of(grad_copy, offset);
  }
  if (N == 0 || C == 0) return grad_input;
  const Tensor dense_pooled = dense(grad_pooled);
  args.grad_pooled = dense_pooled.data_ptr();
  args.grad_input = image_of(grad_input);
  PSP_LAUNCH(pyramid_pool_backward, grad_pooled, args);
  return grad_input;
}

Tensor new_concat(const Tensor& input, int64_t channels) {
  PSP_CHECK(input.dim() == 4, "input must have 4 dimensions, but has ", input.dim());
  PSP_CHECK(channels >= 0, "channels must be at least 0, but are ", channels);
  dtype_of(input);
  return new_map(input, input.size(0), channels, input.size(2), input.size(3), is_channels_last(input));
}

}  // namespace

PSP_KERNELS(m) {
  PSP_IMPL(m, "new_concat", new_concat);
  PSP_IMPL(m, "pyramid_pool", pyramid_pool);
  m.impl("pyramid_pool_alone", &boxed<"pyramid_pool", &pyramid_pool_alone>);  // users know it as that
  PSP_IMPL(m, "pyramid_pool_backward", pyramid_pool_backward);
}

}  // namespace pspnet_fast
