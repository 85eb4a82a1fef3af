// Binds upsample_softmax_accumulate_ to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

void upsample_softmax_accumulate(const Tensor& probabilities, const Tensor& logits, int64_t top, int64_t left,
                                 int64_t H, int64_t W, bool align_corners, bool mirrored, double weight) {
  STD_TORCH_CHECK(probabilities.dim() == 4 && logits.dim() == 4, "probabilities and logits must have 4 dimensions");
  const int64_t N = logits.size(0), K = logits.size(1), h = logits.size(2), w = logits.size(3);
  STD_TORCH_CHECK(K > 0 && h > 0 && w > 0 && H > 0 && W > 0, "logits and size must have a class and a pixel");
  STD_TORCH_CHECK(probabilities.scalar_type() == accumulate_type(logits) && probabilities.device() == logits.device(),
                  "probabilities must be float32, float64 for float64 logits, on the device of logits");
  STD_TORCH_CHECK(probabilities.size(0) == N && probabilities.size(1) == K && top >= 0 && left >= 0 &&
                      top <= probabilities.size(2) - H && left <= probabilities.size(3) - W,
                  "probabilities must have the images and classes of logits and hold the window");
  if (N == 0) return;
  UpsampleSoftmaxAccumulateArgs args{dtype_of(logits), align_corners,           mirrored, N, K, h, w, H, W,
                                     image_of(logits), image_of(probabilities), weight};
  char* const data = static_cast<char*>(args.probabilities.data);
  const int64_t offset = top * args.probabilities.stride_h + left * args.probabilities.stride_w;
  args.probabilities.data = data + offset * element_size(probabilities);
  PSP_LAUNCH(upsample_softmax_accumulate, logits, args);
}

}  // namespace

PSP_KERNELS(m) { m.impl("upsample_softmax_accumulate_", TORCH_BOX(&upsample_softmax_accumulate)); }

}  // namespace pspnet_fast
