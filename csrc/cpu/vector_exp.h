// The exponential of a vector of accumulators, without a call into libm for each lane.
#pragma once

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {

// exp(x) = 2^n exp(r), n = x / ln 2 rounded, |r| <= ln(2) / 2, and exp(r) by its Taylor polynomial, whose remainder is
// below a tenth of the last place. ln 2 is split so that n * kLn2High is exact, with and without fused multiply-adds.
template <class acc_t>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // x + kRound - kRound is x rounded to an integer
  static constexpr float kLn2High = 355.0f / 512.0f, kLn2Low = -2.12194440e-4f, kLowest = -87.3f;
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e43p-1, kLn2Low = -1.904654299957767e-9, kLowest = -708.3;
};

// Integers as wide as an accumulator, as many as a vector holds; comparisons of vectors give this type too.
template <class acc_t, int kBytes>
struct IntVectorType {
  typedef typename ExpConstants<acc_t>::Int type __attribute__((vector_size(kBytes)));
};
template <class acc_t, int kBytes>
using IntVector = typename IntVectorType<acc_t, kBytes>::type;

template <class acc_t, int kBytes>
PSP_INLINE IntVector<acc_t, kBytes> load_integers(const typename ExpConstants<acc_t>::Int* from) {
  IntVector<acc_t, kBytes> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

constexpr double kLn2 = 0.69314718055994530942, kLog2E = 1.44269504088896340736;

// 2^n exp(log_base * r), where the integer n stands in the low bits of `shifted`.
template <class acc_t, class V>
PSP_INLINE V power_times_exp(V shifted, V r, double log_base) {
  using C = ExpConstants<acc_t>;
  using Integers = IntVector<acc_t, sizeof(V)>;
  V result = {};
#pragma GCC unroll 16
  for (int k = C::kDegree; k >= 0; --k) {
    double numerator = 1, factorial = 1;
#pragma GCC unroll 16
    for (int i = 1; i <= k; ++i) numerator *= log_base, factorial *= i;
    result = result * r + static_cast<acc_t>(numerator / factorial);
  }
  const Integers power = (__builtin_bit_cast(Integers, shifted) + C::kBias) << C::kMantissa;
  return result * __builtin_bit_cast(V, power);
}

// exp(x) for x <= 88, as in a softmax, whose greatest exponent is 0. Subnormal results are 0; NaN stays NaN.
template <class acc_t, class V>
PSP_INLINE V exp_vector(V x) {
  using C = ExpConstants<acc_t>;
  const V shifted = x * acc_t(kLog2E) + C::kRound, n = shifted - C::kRound;
  const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
  return x < C::kLowest ? V{} : power_times_exp<acc_t>(shifted, r, 1);
}

// 2^x for x <= 127 likewise, whose r takes no multiplications.
template <class acc_t, class V>
PSP_INLINE V exp2_vector(V x) {
  using C = ExpConstants<acc_t>;
  const V shifted = x + C::kRound, r = x - (shifted - C::kRound);
  return x < acc_t(1 - C::kBias) ? V{} : power_times_exp<acc_t>(shifted, r, kLn2);
}

}  // namespace pspnet_fast::cpu
