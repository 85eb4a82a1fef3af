// Binds upsample_argmax to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kMostByteClasses = 256;

std::tuple<Tensor, Tensor> upsample_argmax(const Tensor& logits, int64_t H, int64_t W, bool align_corners,
                                           bool return_confidence) {
  using torch::headeronly::ScalarType;
  check_map("logits", logits);
  check_size(H, W);
  const int64_t N = logits.size(0), K = logits.size(1), h = logits.size(2), w = logits.size(3);
  PSP_CHECK(K > 0 && h > 0 && w > 0, "logits must have a class and a pixel");
  const bool byte = K <= kMostByteClasses;
  const Tensor classes = new_tensor(logits, {N, H, W}, byte ? ScalarType::Byte : ScalarType::Int);
  const std::vector<int64_t> sizes = return_confidence ? std::vector<int64_t>{N, H, W} : std::vector<int64_t>{0};
  const Tensor confidence = new_tensor(logits, sizes, accumulate_type(logits));
  if (N == 0) return {classes, confidence};
  UpsampleArgmaxArgs args{dtype_of(logits), align_corners, N, K, h, w, H, W, image_of(logits)};
  args.int_type = byte ? IntType::kUInt8 : IntType::kInt32;
  args.classes = classes.data_ptr();
  args.confidence = return_confidence ? confidence.data_ptr() : nullptr;
  PSP_LAUNCH(upsample_argmax, logits, args);
  return {classes, confidence};
}

}  // namespace

PSP_KERNELS(m) { PSP_IMPL(m, "upsample_argmax", upsample_argmax); }

}  // namespace pspnet_fast
