// What follows the sums of a convolution on the CPU.
#pragma once

#include <cmath>

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {

// Evaluation-mode batch normalisation of a channel as one factor and one summand, and ReLU. `norm` as in kernels.h.
template <class T>
struct FoldedNorm {
  using acc_t = acc_type<T>;
  acc_t scale = 1, shift = 0;

  PSP_INLINE FoldedNorm(const void* const (&norm)[4], bool of_type, Number eps, int64_t channel) {
    if (!norm[0]) return;
    const auto value = [&](const void* values) -> acc_t {  // of T, or else of float
      if (of_type) return to_acc(static_cast<const T*>(values)[channel]);
      return static_cast<const float*>(values)[channel];
    };
    scale = value(norm[0]) / std::sqrt(value(norm[3]) + static_cast<acc_t>(eps));
    shift = value(norm[1]) - value(norm[2]) * scale;
  }

  // For one value or a vector of them.
  template <class V, class S>
  static PSP_INLINE V apply(V value, S factor, S summand, bool relu) {
    value = value * factor + summand;
    if (relu) value = value < acc_t(0) ? V{} : value;  // NaN stays
    return value;
  }
};

}  // namespace pspnet_fast::cpu
