// Binds confusion_matrix_ to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

void confusion_matrix(const Tensor& counts, const Tensor& prediction, const Tensor& target, int64_t ignore_index) {
  PSP_CHECK(counts.scalar_type() == torch::headeronly::ScalarType::Long && counts.dim() == 2 &&
                counts.size(0) == counts.size(1) && counts.size(0) > 0 && counts.is_contiguous(),
            "counts must be a contiguous int64 (K, K)");
  const auto sizes = prediction.sizes(), target_sizes = target.sizes();
  PSP_CHECK(std::equal(sizes.begin(), sizes.end(), target_sizes.begin(), target_sizes.end()),
            "prediction and target must have one shape");
  PSP_CHECK(prediction.device() == target.device() && counts.device() == target.device(),
            "counts, prediction and target must be on one device");
  ConfusionMatrixArgs args{target.numel(), counts.size(0), ignore_index, int_type_of("prediction", prediction),
                           int_type_of("target", target)};
  if (args.pixels == 0) return;
  const Region written = region_of(counts);
  check_apart("prediction", prediction, "counts", written);
  check_apart("target", target, "counts", written);
  const Tensor predicted = dense(prediction), labelled = dense(target);
  args.prediction = predicted.data_ptr();
  args.target = labelled.data_ptr();
  args.counts = static_cast<int64_t*>(counts.data_ptr());
  PSP_LAUNCH(confusion_matrix, target, args);
}

}  // namespace

PSP_KERNELS(m) { PSP_IMPL(m, "confusion_matrix_", confusion_matrix); }

}  // namespace pspnet_fast
