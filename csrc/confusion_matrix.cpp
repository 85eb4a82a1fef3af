// Binds confusion_matrix_ to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

void confusion_matrix(const Tensor& counts, const Tensor& prediction, const Tensor& target, int64_t ignore_index) {
  STD_TORCH_CHECK(counts.scalar_type() == torch::headeronly::ScalarType::Long && counts.dim() == 2 &&
                      counts.size(0) == counts.size(1) && counts.size(0) > 0 && counts.is_contiguous(),
                  "counts must be a contiguous int64 (K, K)");
  const auto sizes = prediction.sizes(), target_sizes = target.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), target_sizes.begin(), target_sizes.end()),
                  "prediction and target must have one shape");
  STD_TORCH_CHECK(prediction.device() == target.device() && counts.device() == target.device(),
                  "counts, prediction and target must be on one device");
  ConfusionMatrixArgs args{target.numel(), counts.size(0), ignore_index, int_type_of("prediction", prediction),
                           int_type_of("target", target)};
  if (args.pixels == 0) return;
  const Tensor predicted = torch::stable::contiguous(prediction), labelled = torch::stable::contiguous(target);
  args.prediction = predicted.data_ptr();
  args.target = labelled.data_ptr();
  args.counts = static_cast<int64_t*>(counts.data_ptr());
  PSP_LAUNCH(confusion_matrix, target, args);
}

}  // namespace

PSP_KERNELS(m) { m.impl("confusion_matrix_", TORCH_BOX(&confusion_matrix)); }

}  // namespace pspnet_fast
