// What follows a convolution's sum, in the same pass.
#pragma once

#include "common.cuh"

namespace pspnet_fast::cuda {

// Evaluation-mode batch normalisation of a channel as one factor and one summand, and ReLU.
template <class T>
struct Epilogue {
  acc_t<T> scale = 1, shift = 0;

  __device__ __forceinline__ Epilogue(const PyramidContextArgs& args, int64_t channel) {
    if (args.norm[0] == nullptr) return;
    const auto value = [&](int i) {
      return args.norm_dtype == DType::kFloat32
                 ? static_cast<acc_t<T>>(static_cast<const float*>(args.norm[i])[channel])
                 : widen(static_cast<const T*>(args.norm[i])[channel]);
    };
    scale = value(0) / sqrt(value(3) + static_cast<acc_t<T>>(args.eps));
    shift = value(1) - value(2) * scale;
  }
  __device__ __forceinline__ acc_t<T> operator()(acc_t<T> value, bool relu) const {
    value = value * scale + shift;
    return relu && value < 0 ? acc_t<T>(0) : value;
  }
};

}  // namespace pspnet_fast::cuda
