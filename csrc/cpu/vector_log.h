// The natural logarithm of a vector of accumulators, without a call into libm for each lane.
#pragma once

#include "vector_exp.h"

namespace pspnet_fast::cpu {

// log(x) = n ln 2 + log(m), m in [sqrt(1/2), sqrt(2)), and log(m) = 2 atanh(s) = 2 (s + s^3 / 3 + s^5 / 5 ...) with
// s = (m - 1) / (m + 1), |s| < 0.172. For normal x > 0; NaN stays NaN.
template <class acc_t, class V>
PSP_INLINE V log_vector(V x) {
  using C = ExpConstants<acc_t>;
  using Integers = IntVector<acc_t, sizeof(V)>;
  using Int = typename C::Int;
  constexpr int kTerms = sizeof(acc_t) == 4 ? 5 : 11;
  constexpr Int kOne = Int(C::kBias) << C::kMantissa, kHalf = __builtin_bit_cast(Int, acc_t(0.70710678118654752));
  const Integers bits = __builtin_bit_cast(Integers, x) + (kOne - kHalf);
  const Integers power = (bits >> C::kMantissa) - C::kBias;
  const Integers mantissa = (bits & ((Int(1) << C::kMantissa) - 1)) + kHalf;
  const V m = __builtin_bit_cast(V, mantissa), n = __builtin_convertvector(power, V);
  const V s = (m - 1) / (m + 1), square = s * s;
  V series = {};
#pragma GCC unroll 16
  for (int k = kTerms - 1; k > 0; --k) series = (series + acc_t(1) / acc_t(2 * k + 1)) * square;
  const V result = n * C::kLn2High + (2 * (s * series + s) + n * C::kLn2Low);
  return x == x ? result : x;
}

}  // namespace pspnet_fast::cpu
