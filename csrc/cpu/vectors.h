// Vectors of accumulators, from and to memory in a storage type, and squares of them transposed.
#pragma once

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {

// `lanes` elements from memory, zeros behind them.
template <class T>
PSP_INLINE Vector<acc_type<T>> load_wide(const T* from, int64_t lanes = kLanes<acc_type<T>>) {
  using acc_t = acc_type<T>;
  acc_t values[kLanes<acc_t>] = {};
  if (lanes == kLanes<acc_t>) {
    if constexpr (std::is_same_v<T, acc_t>) return load(from);
    for (int64_t k = 0; k < kLanes<acc_t>; ++k) values[k] = to_acc(from[k]);
  } else {
    for (int64_t k = 0; k < lanes; ++k) values[k] = to_acc(from[k]);
  }
  return load(values);
}

// The first `lanes` elements to memory.
template <class T>
PSP_INLINE void store_narrow(T* to, Vector<acc_type<T>> v, int64_t lanes = kLanes<acc_type<T>>) {
  using acc_t = acc_type<T>;
  if (lanes == kLanes<acc_t>) {
    if constexpr (std::is_same_v<T, acc_t>) {
      __builtin_memcpy(to, &v, sizeof v);
    } else {
      for (int64_t k = 0; k < kLanes<acc_t>; ++k) to[k] = from_acc<T>(v[k]);
    }
  } else {
    for (int64_t k = 0; k < lanes; ++k) to[k] = from_acc<T>(v[k]);
  }
}

template <class acc_t>
PSP_INLINE void store(acc_t* to, Vector<acc_t> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Transposes a square of kLanes vectors, by halves of ever larger squares.
template <class acc_t>
PSP_INLINE void transpose(Vector<acc_t> (&rows)[kLanes<acc_t>]) {
  constexpr int kSide = static_cast<int>(kLanes<acc_t>);
  typedef std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t> Index;
  typedef Index Indices __attribute__((vector_size(64)));
#pragma GCC unroll 4
  for (int half = 1; half < kSide; half *= 2) {
    Indices upper, lower;
#pragma GCC unroll 16
    for (int k = 0; k < kSide; ++k) {
      upper[k] = k & half ? kSide + k - half : k;
      lower[k] = k & half ? kSide + k : k + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) {
      if (i & half) continue;
      const Vector<acc_t> a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + half] = __builtin_shuffle(a, b, lower);
    }
  }
}

}  // namespace pspnet_fast::cpu
