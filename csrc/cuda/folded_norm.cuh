// What follows the sums of a convolution, in the same pass.
#pragma once

#include "common.cuh"

namespace pspnet_fast::cuda {

// Evaluation-mode batch normalisation of a channel as one factor and one summand, and ReLU. `norm` as in kernels.h.
template <class T>
struct FoldedNorm {
  acc_t<T> scale = 1, shift = 0;

  __device__ __forceinline__ FoldedNorm(const void* const (&norm)[4], DType dtype, Number eps, int64_t channel) {
    if (norm[0] == nullptr) return;
    const auto value = [&](const void* values) {
      return dtype == DType::kFloat32 ? static_cast<acc_t<T>>(static_cast<const float*>(values)[channel])
                                      : widen(static_cast<const T*>(values)[channel]);
    };
    scale = value(norm[0]) / sqrt(value(norm[3]) + static_cast<acc_t<T>>(eps));
    shift = value(norm[1]) - value(norm[2]) * scale;
  }
  __device__ __forceinline__ acc_t<T> operator()(acc_t<T> value, bool relu) const {
    value = value * scale + shift;
    return relu && value < 0 ? acc_t<T>(0) : value;  // NaN stays
  }
};

}  // namespace pspnet_fast::cuda
