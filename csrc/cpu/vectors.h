// Vectors of the instruction set's own size, kBytes: from and to memory in a storage type, and squares of them
// transposed.
#pragma once

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {

// `lanes` elements from memory, zeros behind them.
template <int kBytes, class T>
PSP_INLINE Vector<acc_type<T>, kBytes> load_wide(const T* from, int64_t lanes = kLanes<acc_type<T>, kBytes>) {
  using acc_t = acc_type<T>;
  constexpr int64_t kL = kLanes<acc_t, kBytes>;
  acc_t values[kL] = {};
  if (lanes == kL) {
    if constexpr (std::is_same_v<T, acc_t>) return load<acc_t, kBytes>(from);
    for (int64_t k = 0; k < kL; ++k) values[k] = to_acc(from[k]);
  } else {
    for (int64_t k = 0; k < lanes; ++k) values[k] = to_acc(from[k]);
  }
  return load<acc_t, kBytes>(values);
}

template <class acc_t, class V>
PSP_INLINE void store(acc_t* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// The first `lanes` elements to memory.
template <class T, class V>
PSP_INLINE void store_narrow(T* to, V v, int64_t lanes = sizeof(V) / sizeof(acc_type<T>)) {
  constexpr int64_t kL = sizeof(V) / sizeof(acc_type<T>);
  if (lanes == kL) {
    if constexpr (std::is_same_v<T, acc_type<T>>) {
      store(to, v);
    } else {
      for (int64_t k = 0; k < kL; ++k) to[k] = from_acc<T>(v[k]);
    }
  } else {
    for (int64_t k = 0; k < lanes; ++k) to[k] = from_acc<T>(v[k]);
  }
}

// Calls function(k, count, lanes) for n elements: `count`, a constant, vectors from element k on, of which the last has
// `lanes` elements. As many at once as have registers, then one by one.
template <class acc_t, int kBytes, class Function>
PSP_INLINE void for_vectors(int64_t n, const Function& function) {
  constexpr int64_t kL = kLanes<acc_t, kBytes>;
  constexpr int kCount = kBytes == 64 ? 4 : 8;
  int64_t k = 0;
  for (; k + kCount * kL <= n; k += kCount * kL) {
    function(k, std::integral_constant<int, kCount>{}, std::integral_constant<int64_t, kL>{});
  }
  for (; k < n; k += kL) function(k, std::integral_constant<int, 1>{}, std::min(kL, n - k));
}

// Transposes a square of as many vectors as one has elements, by halves of ever larger squares.
template <class acc_t, int kBytes>
PSP_INLINE void transpose(Vector<acc_t, kBytes> (&rows)[kLanes<acc_t, kBytes>]) {
  constexpr int kSide = static_cast<int>(kLanes<acc_t, kBytes>);
  typedef std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t> Index;
  typedef Index Indices __attribute__((vector_size(kBytes)));
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
      const Vector<acc_t, kBytes> a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + half] = __builtin_shuffle(a, b, lower);
    }
  }
}

}  // namespace pspnet_fast::cpu
