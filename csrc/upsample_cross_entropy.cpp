// Binds upsample_cross_entropy and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

// Zero to three dimensions in the type that the arithmetic is done in.
Tensor new_accumulators(const Tensor& logits, const std::vector<int64_t>& sizes) {
  using torch::headeronly::ScalarType;
  return new_tensor(logits, sizes, dtype_of(logits) == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
}

// Fills in what forward and backward have in common; the tensors returned hold what `args` points to.
template <class Args>
std::vector<Tensor> set_inputs(Args& args, const Tensor& logits, const Tensor& target,
                               const std::optional<Tensor>& weight, bool align_corners, int64_t ignore_index,
                               double label_smoothing, int64_t reduction) {
  check_map("logits", logits);
  PSP_CHECK(target.dim() == 3 && target.size(0) == logits.size(0), "logits must be (N, K, h, w) and target (N, H, W)");
  PSP_CHECK(target.device() == logits.device(), "target must be on the device of logits");
  PSP_CHECK(reduction >= 0 && reduction <= 2, "reduction must be 0, 1 or 2");
  args.dtype = dtype_of(logits), args.channels_last = is_channels_last(logits), args.align_corners = align_corners;
  args.target_type = int_type_of("target", target), args.reduction = static_cast<Reduction>(reduction);
  args.N = logits.size(0), args.K = logits.size(1), args.h = logits.size(2), args.w = logits.size(3);
  args.H = target.size(1), args.W = target.size(2);
  check_size(args.H, args.W);
  PSP_CHECK(args.K > 0 && args.h > 0 && args.w > 0, "logits must have a class and a pixel");
  args.ignore_index = ignore_index, args.label_smoothing = label_smoothing;
  std::vector<Tensor> held{native(logits, args.channels_last), dense(target)};
  args.logits = image_of(held[0]), args.target = held[1].data_ptr();
  if (weight) {
    check_like("weight", *weight, {args.K}, new_accumulators(logits, {}));
    held.push_back(dense(*weight));
    args.weight = held[2].data_ptr();
  }
  return held;
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                                                          std::optional<Tensor> weight, bool align_corners,
                                                          int64_t ignore_index, double label_smoothing,
                                                          int64_t reduction) {
  UpsampleCrossEntropyArgs args{};
  const auto held = set_inputs(args, logits, target, weight, align_corners, ignore_index, label_smoothing, reduction);
  const std::vector<int64_t> sizes{args.N, args.H, args.W};
  const Tensor loss = new_accumulators(logits, reduction == 0 ? sizes : std::vector<int64_t>{});
  const Tensor lse = new_accumulators(logits, sizes), total_weight = new_accumulators(logits, {});
  args.loss = loss.data_ptr(), args.lse = lse.data_ptr(), args.total_weight = total_weight.data_ptr();
  int64_t bad_pixel = -1;
  args.bad_pixel = &bad_pixel;
  PSP_WORKSPACE(upsample_cross_entropy, logits, args);
  PSP_LAUNCH(upsample_cross_entropy, logits, args);
  if (bad_pixel >= 0) {
    const int64_t value = dispatch_int(args.target_type, [&](auto zero) {
      return static_cast<int64_t>(static_cast<const decltype(zero)*>(args.target)[bad_pixel]);
    });
    PSP_CHECK_INDEX(false, "target must be from 0 to ", args.K - 1, " or ignore_index ", ignore_index, ", but is ",
                    value, " at pixel (", bad_pixel / args.W / args.H, ", ", bad_pixel / args.W % args.H, ", ",
                    bad_pixel % args.W, ")");
  }
  return {loss, lse, total_weight};
}

Tensor upsample_cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                       std::optional<Tensor> weight, const Tensor& lse, const Tensor& total_weight,
                                       bool align_corners, int64_t ignore_index, double label_smoothing,
                                       int64_t reduction) {
  UpsampleCrossEntropyBackwardArgs args{};
  const auto held = set_inputs(args, logits, target, weight, align_corners, ignore_index, label_smoothing, reduction);
  const std::vector<int64_t> sizes{args.N, args.H, args.W};
  check_like("lse", lse, sizes, new_accumulators(logits, {}));
  check_like("grad_loss", grad_loss, reduction == 0 ? sizes : std::vector<int64_t>{}, lse);
  check_like("total_weight", total_weight, {}, lse);
  const Tensor grad_logits = new_map(logits, args.N, args.K, args.h, args.w, args.channels_last);
  if (args.N == 0) return grad_logits;
  const Tensor dense_grad = dense(grad_loss), dense_lse = dense(lse);
  args.grad_loss = dense_grad.data_ptr(), args.lse = dense_lse.data_ptr();
  args.total_weight = total_weight.data_ptr();
  args.grad_logits = image_of(grad_logits);
  PSP_LAUNCH(upsample_cross_entropy_backward, logits, args);
  return grad_logits;
}

}  // namespace

PSP_KERNELS(m) {
  PSP_IMPL(m, "upsample_cross_entropy", upsample_cross_entropy);
  PSP_IMPL(m, "upsample_cross_entropy_backward", upsample_cross_entropy_backward);
}

}  // namespace pspnet_fast
