// What a backend implements: one function an op and direction, over raw pointers. csrc/cpu and csrc/cuda hold one
// file an op with these names; csrc/<op>.cpp checks, allocates and calls. Includes no torch header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pyramid_math.h"

namespace pspnet_fast {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class IntType : int { kUInt8, kInt16, kInt32, kInt64 };  // of class indices

// Calls function with a zero of the integer type. Inlined, so that the function is compiled for its caller's
// instruction set.
template <class Function>
inline __attribute__((always_inline)) auto dispatch_int(IntType type, Function&& function) {
  switch (type) {
    case IntType::kUInt8:
      return function(uint8_t{});
    case IntType::kInt16:
      return function(int16_t{});
    case IntType::kInt32:
      return function(int32_t{});
    default:
      return function(int64_t{});
  }
}

// A number among the arguments, in both precisions: a conversion in a kernel would take double precision there.
class Number {
 public:
  Number(double value = 0) : wide_(value), narrow_(static_cast<float>(value)) {}
  PSP_HOST_DEVICE explicit operator double() const { return wide_; }
  PSP_HOST_DEVICE explicit operator float() const { return narrow_; }

 private:
  double wide_;
  float narrow_;
};

// A map of shape [N, C, H, W] by its strides, in elements. Planar maps have stride_w == 1 (or W == 1), channels-last
// maps stride_c == 1 (or C == 1); the other strides are free, so slices of larger tensors need no copy.
struct Image {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

struct PyramidPoolArgs {
  DType dtype;
  bool channels_last;  // of input and concat alike
  int64_t N, C, H, W;
  Levels levels;
  Image input;
  Image concat;  // data == nullptr: none; else the C channels that take a copy of input
  void* pooled;  // [N, P, C]: mean of each cell
  void* workspace;
};

struct PyramidPoolBackwardArgs {
  DType dtype;
  bool channels_last;  // of grad_concat and grad_input alike
  int64_t N, C, H, W;
  Levels levels;
  const void* grad_pooled;  // [N, P, C]
  Image grad_concat;        // data == nullptr: none; else the gradient of the copied channels, added in the same pass
  Image grad_input;
};

struct PyramidReduceArgs {
  DType dtype;
  int64_t N, C, R;
  Levels levels;
  const void* pooled;               // [N, P, C]
  const void* weights[kMaxLevels];  // [R, C] each
  // Folded normalisation: weight, bias, running mean, running variance, [R] each; nullptr: none.
  const void* norm[kMaxLevels][4];
  DType norm_dtype;
  Number eps[kMaxLevels];
  bool relu;
  void* reduced;  // [N, P, R]
};

struct PyramidReduceBackwardArgs {
  DType dtype;
  int64_t N, C, R;
  Levels levels;
  const void* grad_reduced;  // [N, P, R]
  const void* pooled;        // [N, P, C]
  const void* weights[kMaxLevels];
  void* grad_pooled;   // [N, P, C]
  void* grad_weights;  // [L, R, C]
};

struct PyramidBatchNormArgs {
  DType dtype, norm_dtype;
  int64_t N, R;
  Levels levels;
  const void* reduced;  // [N, P, R]
  // [R] of each level in norm_dtype; nullptr: none.
  const void *weight[kMaxLevels], *bias[kMaxLevels];
  void *running_mean[kMaxLevels], *running_var[kMaxLevels];
  bool
      batch[kMaxLevels];  // by the batch's statistics, which the running ones take a share of; else by the running ones
  Number momentum[kMaxLevels], eps[kMaxLevels];
  bool relu;
  void* output;      // [N, P, R]
  void* statistics;  // [2, L, R], float, double for double: mean and 1 / deviation that a level was normalised by
};

struct PyramidBatchNormBackwardArgs {
  DType dtype, norm_dtype;
  int64_t N, R;
  Levels levels;
  const void* grad_output;         // [N, P, R]
  const void* reduced;             // [N, P, R]
  const void* output;              // [N, P, R], after the ReLU; nullptr: there was none
  const void* weight[kMaxLevels];  // as above
  const void* statistics;
  bool batch[kMaxLevels];
  void* grad_reduced;  // [N, P, R]
  void* grad_affine;   // [2, L, R] in norm_dtype: of weight and bias
};

// The weight of a convolution [O, C, taps], C = dense + L * R, and its parts; the backward goes the other way. The
// parts have the weight's dtype, or a lower one for a weight in float32.
struct PyramidSplitWeightArgs {
  DType weight_dtype, dtype;
  bool channels_last;  // of weight and dense_weight: [O, taps, C] in memory
  int64_t O, dense, L, R, taps;
  int64_t first_dense, first_level;  // channels
  void* weight;
  void* dense_weight;  // [O, dense, taps]
  void* matrices;      // [L, taps, O, R]
};

struct PyramidUpsampleConcatArgs {
  DType dtype;
  bool channels_last;
  bool align_corners;
  int64_t N, R, H, W;
  Levels levels;
  const void* reduced;  // [N, P, R]
  Image context;        // [N, L * R, H, W]: the upsampled levels' channels of the concatenation
};

struct PyramidUpsampleConcatBackwardArgs {
  DType dtype;
  bool channels_last;
  bool align_corners;
  int64_t N, R, H, W;
  Levels levels;
  Image grad_context;  // [N, L * R, H, W]
  void* grad_reduced;  // [N, P, R]
  void* workspace;
};

struct PyramidContextArgs {
  DType dtype;
  bool channels_last;
  Interpolation interpolation;
  int64_t N, O, H, W;
  Levels levels;
  Window window;
  const void* taps;  // [N, P, size_h * size_w, O]
  // Folded normalisation: weight, bias, running mean, running variance, [O] each; nullptr: none.
  const void* norm[4];
  DType norm_dtype;
  Number eps;
  bool relu;
  bool accumulate;  // onto what conv holds
  Image conv;       // [N, O, H, W]
};

struct PyramidContextBackwardArgs {
  DType dtype;
  bool channels_last;
  Interpolation interpolation;
  int64_t N, O, H, W;
  Levels levels;
  Window window;
  Image grad_conv;  // [N, O, H, W]
  void* grad_taps;  // [N, P, size_h * size_w, O]
  void* workspace;
};

// ---- prediction: logits [N, K, h, w], interpolated bilinearly at the pixels of H x W maps
// -----------------------------

struct UpsampleArgmaxArgs {
  DType dtype;
  bool align_corners;
  int64_t N, K, h, w, H, W;
  Image logits;      // any strides
  IntType int_type;  // of classes: kUInt8 or kInt32
  void* classes;     // [N, H, W]
  void* confidence;  // nullptr: none; else [N, H, W], float, double for double: the greatest probability
};

struct UpsampleSoftmaxAccumulateArgs {
  DType dtype;
  bool align_corners, mirrored;
  int64_t N, K, h, w, H, W;
  Image logits;         // any strides
  Image probabilities;  // [N, K, H, W], float, double for double, any strides: takes weight * softmax in addition
  Number weight;
};

struct ConfusionMatrixArgs {
  int64_t pixels, K, ignore_index;
  IntType prediction_type, target_type;
  const void* prediction;  // [pixels]
  const void* target;      // [pixels]
  int64_t* counts;         // [K, K]: row target, column prediction
};

enum class Reduction : int { kNone, kMean, kSum };  // numbered as in torch

// Logits [N, K, h, w], upsampled to H x W; "acc" is float, for float64 double.
struct UpsampleCrossEntropyArgs {
  DType dtype;
  bool channels_last;
  bool align_corners;
  IntType target_type;
  Reduction reduction;
  int64_t N, K, h, w, H, W;
  int64_t ignore_index;
  Number label_smoothing;
  Image logits;
  const void* target;  // [N, H, W]
  const void* weight;  // [K] in acc; nullptr: all 1
  void* loss;          // acc: [N, H, W], or one number
  void* lse;           // [N, H, W] in acc: a log-sum-exp of a pixel's logits, as the device's backward takes it
  void* total_weight;  // acc, one number: the sum of the targets' weights
  int64_t* bad_pixel;  // the first pixel whose target is no class, else -1; the CPU's alone: CUDA makes its loss NaN
  void* workspace;
};

struct UpsampleCrossEntropyBackwardArgs {
  DType dtype;
  bool channels_last;  // of logits
  bool align_corners;
  IntType target_type;
  Reduction reduction;
  int64_t N, K, h, w, H, W;
  int64_t ignore_index;
  Number label_smoothing;
  Image logits;
  const void* target;
  const void* weight;
  const void* grad_loss;  // as loss
  const void* lse;
  const void* total_weight;
  Image grad_logits;  // in the layout of logits
};

namespace cpu {
void pyramid_pool(const PyramidPoolArgs&);
void pyramid_pool_backward(const PyramidPoolBackwardArgs&);
void pyramid_reduce(const PyramidReduceArgs&);
void pyramid_reduce_backward(const PyramidReduceBackwardArgs&);
void pyramid_batch_norm(const PyramidBatchNormArgs&);
void pyramid_batch_norm_backward(const PyramidBatchNormBackwardArgs&);
void pyramid_split_weight(const PyramidSplitWeightArgs&);
void pyramid_split_weight_backward(const PyramidSplitWeightArgs&);
void pyramid_upsample_concat(const PyramidUpsampleConcatArgs&);
void pyramid_upsample_concat_backward(const PyramidUpsampleConcatBackwardArgs&);
void pyramid_context(const PyramidContextArgs&);
void pyramid_context_backward(const PyramidContextBackwardArgs&);

void upsample_argmax(const UpsampleArgmaxArgs&);
void upsample_softmax_accumulate(const UpsampleSoftmaxAccumulateArgs&);
void confusion_matrix(const ConfusionMatrixArgs&);
void upsample_cross_entropy(const UpsampleCrossEntropyArgs&);
void upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardArgs&);
}  // namespace cpu

// Each returns a cudaError_t (0: launched) and queues its kernels on `stream`, a cudaStream_t of the current device.
// The workspace functions give the bytes that args.workspace must hold.
namespace cuda {
size_t pyramid_pool_workspace(const PyramidPoolArgs&);
int pyramid_pool(const PyramidPoolArgs&, void* stream);
int pyramid_pool_backward(const PyramidPoolBackwardArgs&, void* stream);
int pyramid_reduce(const PyramidReduceArgs&, void* stream);
int pyramid_reduce_backward(const PyramidReduceBackwardArgs&, void* stream);
int pyramid_batch_norm(const PyramidBatchNormArgs&, void* stream);
int pyramid_batch_norm_backward(const PyramidBatchNormBackwardArgs&, void* stream);
int pyramid_split_weight(const PyramidSplitWeightArgs&, void* stream);
int pyramid_split_weight_backward(const PyramidSplitWeightArgs&, void* stream);
int pyramid_upsample_concat(const PyramidUpsampleConcatArgs&, void* stream);
size_t pyramid_upsample_concat_backward_workspace(const PyramidUpsampleConcatBackwardArgs&);
int pyramid_upsample_concat_backward(const PyramidUpsampleConcatBackwardArgs&, void* stream);
int pyramid_context(const PyramidContextArgs&, void* stream);
size_t pyramid_context_backward_workspace(const PyramidContextBackwardArgs&);
int pyramid_context_backward(const PyramidContextBackwardArgs&, void* stream);

int upsample_argmax(const UpsampleArgmaxArgs&, void* stream);
int upsample_softmax_accumulate(const UpsampleSoftmaxAccumulateArgs&, void* stream);
int confusion_matrix(const ConfusionMatrixArgs&, void* stream);
size_t upsample_cross_entropy_workspace(const UpsampleCrossEntropyArgs&);
int upsample_cross_entropy(const UpsampleCrossEntropyArgs&, void* stream);
int upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardArgs&, void* stream);
}  // namespace cuda

}  // namespace pspnet_fast
