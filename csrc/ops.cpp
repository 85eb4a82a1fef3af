// The operators' table of contents: every schema. csrc/<op>.cpp binds each to its CPU and CUDA kernels; gradients and
// the checks that users see stand in pspnet_fast/ops/<op>.py.
//
// (N, C, H, W): the feature map. bins: (bins_h, bins_w) of each level, flattened. P: cells of all levels together.
// R: channels of a level after the reduction. concat: (N, C + L * R, H, W), of which `offset` is the first channel
// meant.
#include <string>

#include "cpu/cpu_kernel.h"
#include "kept_memory.h"
#include "tensors.h"

STABLE_TORCH_LIBRARY(PSPNET_FAST_NAMESPACE, m) {
  // (N, C, H, W) -> (N, channels, H, W), uninitialised, in the dtype, device and memory format of input
  m.def("new_concat(Tensor input, SymInt channels) -> Tensor");

  // (N, C, H, W) -> (N, P, C); copies input into concat, if given, in the same pass
  m.def("pyramid_pool(Tensor input, Tensor(a!)? concat, int offset, int[] bins) -> Tensor");
  // the same without concat: an operator that writes into nothing, as torch's inductor needs it
  m.def("pyramid_pool_alone(Tensor input, int[] bins) -> Tensor");
  m.def(
      "pyramid_pool_backward(Tensor grad_pooled, Tensor? grad_concat, int offset, int[] bins, SymInt height, "
      "SymInt width, bool channels_last) -> Tensor");

  // (N, P, C) -> (N, P, R); norm: weight, bias, running mean, running variance of each level in turn, or empty
  m.def("pyramid_reduce(Tensor pooled, Tensor[] weights, Tensor[] norm, float[] eps, bool relu, int[] bins) -> Tensor");
  m.def(
      "pyramid_reduce_backward(Tensor grad_reduced, Tensor pooled, Tensor[] weights, int[] bins) -> (Tensor, Tensor)");

  // (N, P, R) -> the same after each level's batch norm and ReLU; mean and 1 / deviation of each, (2, L, R). batch: for
  // each level whether the batch's statistics count, not the running ones, which take a share of them. Lists of tensors
  // hold one (R,) a level, or none
  m.def(
      "pyramid_batch_norm(Tensor reduced, Tensor[] weights, Tensor[] biases, Tensor(a!)[] running_means, "
      "Tensor(b!)[] running_vars, int[] batch, float[] momentum, float[] eps, bool relu, int[] bins) -> "
      "(Tensor, Tensor)");
  m.def(
      "pyramid_batch_norm_backward(Tensor grad_output, Tensor reduced, Tensor? output, Tensor[] weights, "
      "Tensor statistics, int[] batch, float[] eps, int[] bins) -> (Tensor, Tensor)");

  // a convolution's weight (O, dense + L * R, kh, kw) by its input channels, the dense ones first or last, in a dtype:
  // (O, dense, kh, kw), and what pyramid_reduce takes for each level, (L, kh * kw * O, R)
  m.def(
      "pyramid_split_weight(Tensor weight, int dense, bool dense_first, int levels, ScalarType dtype) -> "
      "(Tensor, Tensor)");
  m.def(
      "pyramid_split_weight_backward(Tensor grad_dense, Tensor grad_matrices, bool dense_first, bool channels_last, "
      "ScalarType dtype) -> Tensor");

  // (N, P, R) -> the L * R upsampled channels of concat
  m.def(
      "pyramid_upsample_concat_(Tensor(a!) concat, Tensor reduced, int offset, int[] bins, bool align_corners) -> ()");
  m.def(
      "pyramid_upsample_concat_backward(Tensor grad_concat, int offset, SymInt channels, int[] bins, "
      "bool align_corners) -> Tensor");

  // adds to conv (N, O, H, W) what the upsampled levels give to a convolution of it; taps (N, P, taps of the window, O)
  // are the cells seen through its weights. norm: weight, bias, running mean, running variance, or empty; then ReLU.
  // interpolation: 0 bilinear, 1 with align_corners, 2 nearest
  m.def(
      "pyramid_context_(Tensor(a!) conv, Tensor taps, Tensor[] norm, float eps, bool relu, int[] bins, "
      "int[] kernel_size, int[] dilation, int interpolation, bool accumulate) -> ()");
  m.def(
      "pyramid_context_backward(Tensor grad_conv, int[] bins, int[] kernel_size, int[] dilation, int interpolation) "
      "-> Tensor");

  // prediction: logits (N, K, h, w), interpolated at the pixels of an H x W map. classes uint8, int32 from K = 257 on;
  // confidence (0,) unless asked for
  m.def(
      "upsample_argmax(Tensor logits, SymInt height, SymInt width, bool align_corners, bool return_confidence) -> "
      "(Tensor, Tensor)");
  // adds to the window (top, left, height, width) of probabilities (N, K, H, W)
  m.def(
      "upsample_softmax_accumulate_(Tensor(a!) probabilities, Tensor logits, SymInt top, SymInt left, SymInt height, "
      "SymInt width, bool align_corners, bool mirrored, float weight) -> ()");
  // adds to counts (K, K)
  m.def("confusion_matrix_(Tensor(a!) counts, Tensor prediction, Tensor target, int ignore_index) -> ()");

  // logits (N, K, h, w), target (N, H, W) -> loss, log-sum-exp (N, H, W), the sum of the targets' weights; reduction: 0
  // none, 1 mean, 2 sum
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, bool align_corners, int ignore_index, "
      "float label_smoothing, int reduction) -> (Tensor, Tensor, Tensor)");
  m.def(
      "upsample_cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor lse, "
      "Tensor total_weight, bool align_corners, int ignore_index, float label_smoothing, int reduction) -> Tensor");

  // bounds the memory of freed CPU outputs that is kept for the next ones; the bound before
  m.def("keep_memory(int megabytes) -> int");
  // what the library was compiled with and for, as JSON
  m.def("build_info() -> str");
  // the instruction set that the CPU kernels run with
  m.def("cpu_instruction_set() -> str");
}

namespace pspnet_fast {
namespace {

std::string build_info() {
  std::string info = "{\"torch\": \"" TORCH_VERSION "\", \"compiler\": \"" __VERSION__ "\", \"cpu\": ";
  info += PSP_X86_64 ? "[\"baseline\", \"AVX2\", \"AVX-512\"]" : "[\"baseline\"]";
#if defined(PSPNET_FAST_WITH_CUDA)
  const std::string cuda = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return info + ", \"cuda\": \"" + cuda + "\", \"cuda_architectures\": \"" +
         PSP_STRING(PSPNET_FAST_CUDA_ARCHITECTURES) + "\"}";
#else
  return info + ", \"cuda\": null, \"cuda_architectures\": null}";
#endif
}

std::string cpu_instruction_set() {
  switch (cpu::isa()) {
    case cpu::Isa::kAvx512:
      return "AVX-512";
    case cpu::Isa::kAvx2:
      return "AVX2";
    case cpu::Isa::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace
}  // namespace pspnet_fast

STABLE_TORCH_LIBRARY_IMPL(PSPNET_FAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("keep_memory", TORCH_BOX(&pspnet_fast::keep_memory));
  m.impl("build_info", TORCH_BOX(&pspnet_fast::build_info));
  m.impl("cpu_instruction_set", TORCH_BOX(&pspnet_fast::cpu_instruction_set));
}
