// Binds upsample_softmax_accumulate_ to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

void upsample_softmax_accumulate(const Tensor& probabilities, const Tensor& logits, int64_t top, int64_t left,
                                 int64_t H, int64_t W, bool align_corners, bool mirrored, double weight) {
  check_map("probabilities", probabilities);
  check_map("logits", logits);
  check_size(H, W);
  const int64_t N = logits.size(0), K = logits.size(1), h = logits.size(2), w = logits.size(3);
  PSP_CHECK(K > 0 && h > 0 && w > 0, "logits must have a class and a pixel");
  PSP_CHECK(probabilities.scalar_type() == accumulate_type(logits) && probabilities.device() == logits.device(),
            "probabilities must be float32, float64 for float64 logits, on the device of logits");
  PSP_CHECK(probabilities.size(0) == N && probabilities.size(1) == K && holds(probabilities.size(2), top, H) &&
                holds(probabilities.size(3), left, W),
            "probabilities must have the images and classes of logits and hold the window");
  if (N == 0) return;
  const Region written = region_of(probabilities).narrow(2, top, H).narrow(3, left, W);
  check_written("probabilities", written);
  check_apart("logits", logits, "probabilities", written);
  UpsampleSoftmaxAccumulateArgs args{dtype_of(logits), align_corners,           mirrored, N, K, h, w, H, W,
                                     image_of(logits), image_of(probabilities), weight};
  char* const data = static_cast<char*>(args.probabilities.data);
  const int64_t offset = top * args.probabilities.stride_h + left * args.probabilities.stride_w;
  args.probabilities.data = data + offset * element_size(probabilities.scalar_type());
  PSP_LAUNCH(upsample_softmax_accumulate, logits, args);
}

}  // namespace

PSP_KERNELS(m) { PSP_IMPL(m, "upsample_softmax_accumulate_", upsample_softmax_accumulate); }

}  // namespace pspnet_fast
