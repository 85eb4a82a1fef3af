// Vectors of the instruction set's own size, kBytes: from and to memory in a storage type, and squares of them
// transposed.
#pragma once

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {

template <int kBytes>
struct Integers {
  typedef uint32_t Wide __attribute__((vector_size(kBytes)));
  typedef uint16_t Narrow __attribute__((vector_size(kBytes / 2)));
};

// `lanes` elements from memory, zeros behind them.
template <int kBytes, class T>
PSP_INLINE Vector<acc_type<T>, kBytes> load_wide(const T* from, int64_t lanes = kLanes<acc_type<T>, kBytes>) {
  using acc_t = acc_type<T>;
  constexpr int64_t kL = kLanes<acc_t, kBytes>;
  if (lanes < kL) {
    acc_t values[kL] = {};
    for (int64_t k = 0; k < lanes; ++k) values[k] = to_acc(from[k]);
    return load<acc_t, kBytes>(values);
  }
  if constexpr (std::is_same_v<T, acc_t>) {
    return load<acc_t, kBytes>(from);
  } else {
    typename Integers<kBytes>::Narrow narrow;
    __builtin_memcpy(&narrow, from, sizeof narrow);
    const auto bits = __builtin_convertvector(narrow, typename Integers<kBytes>::Wide);
    if constexpr (std::is_same_v<T, BFloat16>) return widen_bfloat16<Vector<float, kBytes>>(bits);
    if constexpr (std::is_same_v<T, Half>) return widen_half<Vector<float, kBytes>>(bits);
  }
}

template <class acc_t, class V>
PSP_INLINE void store(acc_t* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Keeps a loaded value in a register: the compiler would load it anew in each of the instructions that use it.
template <class V>
PSP_INLINE void in_register(V& v) {
#if PSP_X86_64
  asm("" : "+v"(v));
#endif
}

// The first `lanes` elements to memory.
template <class T, class V>
PSP_INLINE void store_narrow(T* to, V v, int64_t lanes = sizeof(V) / sizeof(acc_type<T>)) {
  constexpr int64_t kL = sizeof(V) / sizeof(acc_type<T>);
  if (lanes < kL) {
    for (int64_t k = 0; k < lanes; ++k) to[k] = from_acc<T>(v[k]);
    return;
  }
  if constexpr (std::is_same_v<T, acc_type<T>>) {
    store(to, v);
  } else {
    using Wide = typename Integers<sizeof(V)>::Wide;
    Wide bits;
    if constexpr (std::is_same_v<T, BFloat16>) bits = narrow_bfloat16<Wide>(v);
    if constexpr (std::is_same_v<T, Half>) bits = narrow_half<Wide>(v);
    const auto narrow = __builtin_convertvector(bits, typename Integers<sizeof(V)>::Narrow);
    __builtin_memcpy(to, &narrow, sizeof narrow);
  }
}

// to[k] = the sum of `count` rows that lie `stride` apart, in four chains of additions. The last vector overlaps its
// neighbour, so there is no scalar rest.
template <int kBytes, class T>
PSP_INLINE void sum_rows(acc_type<T>* to, const T* from, int64_t stride, int64_t count, int64_t n) {
  using acc_t = acc_type<T>;
  constexpr int64_t kL = kLanes<acc_t, kBytes>;
  for (int64_t k = 0; k < n && n < kL; ++k) {
    acc_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += to_acc(from[i * stride + k]);
    to[k] = sum;
  }
  for (int64_t k = 0; k < n && n >= kL; k += kL) {
    const int64_t at = std::min(k, n - kL);
    Vector<acc_t, kBytes> sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      for (int64_t j = 0; j < 4; ++j) sums[j] += load_wide<kBytes>(from + (i + j) * stride + at);
    }
    for (; i < count; ++i) sums[0] += load_wide<kBytes>(from + i * stride + at);
    store(to + at, (sums[0] + sums[1]) + (sums[2] + sums[3]));
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
