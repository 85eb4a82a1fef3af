// Binds pyramid_upsample_concat_ and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

// The channels of every level, R each, must lie in the map.
void check_room(const char* name, const Tensor& map, int64_t offset, const Levels& levels, int64_t R) {
  PSP_CHECK(map.size(2) > 0 && map.size(3) > 0, name, " must have a pixel");
  PSP_CHECK(R >= 0 && R <= INT_MAX && holds(map.size(1), offset, levels.count * R), name,
            " has too few channels: ", map.size(1), " for ", levels.count, " levels of ", R, " from offset ", offset,
            " on");
}

void pyramid_upsample_concat(const Tensor& concat, const Tensor& reduced, int64_t offset, std::vector<int64_t> bins,
                             bool align_corners) {
  const Levels levels = levels_of(bins);
  check_map("concat", concat);
  PSP_CHECK(reduced.dim() == 3, "reduced must have 3 dimensions, but has ", reduced.dim());
  const int64_t N = concat.size(0), H = concat.size(2), W = concat.size(3), R = reduced.size(2);
  check_like("reduced", reduced, {N, levels.first[levels.count], R}, concat);
  check_room("concat", concat, offset, levels, R);
  if (N == 0 || R == 0) return;
  PyramidUpsampleConcatArgs args{dtype_of(concat), is_channels_last(concat), align_corners, N, R, H, W, levels};
  PSP_CHECK(is_native(concat, args.channels_last), "concat must be contiguous or channels-last");
  const Region written = region_of(concat).narrow(1, offset, levels.count * R);
  check_written("concat", written);
  check_apart("reduced", reduced, "concat", written);
  const Tensor dense_reduced = dense(reduced);
  args.reduced = dense_reduced.data_ptr();
  args.context = image_of(concat, offset);
  PSP_LAUNCH(pyramid_upsample_concat, concat, args);
}

Tensor pyramid_upsample_concat_backward(const Tensor& grad_concat, int64_t offset, int64_t R, std::vector<int64_t> bins,
                                        bool align_corners) {
  const Levels levels = levels_of(bins);
  check_map("grad_concat", grad_concat);
  const int64_t N = grad_concat.size(0), H = grad_concat.size(2), W = grad_concat.size(3);
  check_room("grad_concat", grad_concat, offset, levels, R);
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
  PSP_IMPL(m, "pyramid_upsample_concat_", pyramid_upsample_concat);
  PSP_IMPL(m, "pyramid_upsample_concat_backward", pyramid_upsample_concat_backward);
}

}  // namespace pspnet_fast
