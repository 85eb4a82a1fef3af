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

// ---- pairs -------------------------------------------------------------------------------------------------------
// Two vectors of neighbouring elements, in the order that costs least: of bfloat16 the even ones and the odd ones,
// which a shift and a mask take out of one load without a permutation; of other types the first half and the second. A
// table of n values for them has a pair each 2 kL values; the last pair of a row in memory overlaps its neighbour.

template <class V>
struct Pair {
  V first{}, second{};
};
template <class T>
constexpr bool kEvenAndOdd = std::is_same_v<T, BFloat16> && std::endian::native == std::endian::little;
template <class T, int kBytes>
constexpr int64_t kPair = 2 * kLanes<acc_type<T>, kBytes>;

template <class T, int kBytes>
PSP_INLINE int64_t pairs_size(int64_t n) {
  return (n + kPair<T, kBytes> - 1) / kPair<T, kBytes> * kPair<T, kBytes>;
}

// Calls function(at, k, lanes) for each pair of a row of n elements: in a table it begins at `at`, in memory at element
// k, and has `lanes` elements: all, or n where that is less.
template <class T, int kBytes, class Function>
PSP_INLINE void for_pairs(int64_t n, const Function& function) {
  constexpr int64_t kSize = kPair<T, kBytes>;
  if (n < kSize) return function(0, 0, n);
  for (int64_t at = 0; at < n; at += kSize) {
    function(at, std::min(at, n - kSize), std::integral_constant<int64_t, kSize>{});
  }
}

template <int kBytes, class T>
PSP_INLINE Pair<Vector<acc_type<T>, kBytes>> load_pair(const T* from, int64_t lanes) {
  constexpr int64_t kL = kLanes<acc_type<T>, kBytes>;
  T padded[2 * kL] = {};
  if (lanes < 2 * kL) {
    std::copy_n(from, lanes, padded);
    from = padded;
  }
  if constexpr (kEvenAndOdd<T>) {
    typename Integers<kBytes>::Wide bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return {std::bit_cast<Vector<float, kBytes>>(bits << 16), std::bit_cast<Vector<float, kBytes>>(bits & 0xffff0000u)};
  } else {
    return {load_wide<kBytes>(from), load_wide<kBytes>(from + kL)};
  }
}

template <class T, class V>
PSP_INLINE void store_pair(T* to, const Pair<V>& pair, int64_t lanes) {
  constexpr int64_t kL = sizeof(V) / sizeof(acc_type<T>);
  T padded[2 * kL];
  T* const whole = lanes < 2 * kL ? padded : to;
  if constexpr (kEvenAndOdd<T>) {
    using Wide = typename Integers<sizeof(V)>::Wide;
    const Wide bits = (round_bfloat16<Wide>(pair.first) >> 16) | (round_bfloat16<Wide>(pair.second) & 0xffff0000u);
    __builtin_memcpy(whole, &bits, sizeof bits);
  } else {
    store_narrow(whole, pair.first);
    store_narrow(whole + kL, pair.second);
  }
  if (lanes < 2 * kL) std::copy_n(padded, lanes, to);
}

template <int kBytes, class acc_t>
PSP_INLINE Pair<Vector<acc_t, kBytes>> pair_at(const acc_t* table) {
  return {load<acc_t, kBytes>(table), load<acc_t, kBytes>(table + kLanes<acc_t, kBytes>)};
}
template <class acc_t, class V>
PSP_INLINE void set_pair(acc_t* table, V first, V second) {
  store(table, first);
  store(table + sizeof(V) / sizeof(acc_t), second);
}
template <class acc_t, class V>
PSP_INLINE void add_pair(acc_t* table, V first, V second) {
  const auto old = pair_at<sizeof(V)>(table);
  set_pair(table, old.first + first, old.second + second);
}

// n values from their order in memory to that of a table of pairs, and back.
template <class T, int kBytes, class acc_t = acc_type<T>>
PSP_INLINE void to_pairs(acc_t* __restrict__ table, const acc_t* __restrict__ values, int64_t n) {
  constexpr int64_t kL = kLanes<acc_t, kBytes>;
  for_pairs<T, kBytes>(n, [&](int64_t at, int64_t k, auto lanes) __attribute__((always_inline)) {
    for (int64_t i = 0; i < lanes; ++i) table[at + (kEvenAndOdd<T> ? i % 2 * kL + i / 2 : i)] = values[k + i];
  });
}
template <class T, int kBytes, class acc_t = acc_type<T>>
PSP_INLINE void from_pairs(acc_t* __restrict__ values, const acc_t* __restrict__ table, int64_t n) {
  constexpr int64_t kL = kLanes<acc_t, kBytes>;
  for_pairs<T, kBytes>(n, [&](int64_t at, int64_t k, auto lanes) __attribute__((always_inline)) {
    for (int64_t i = 0; i < lanes; ++i) values[k + i] = table[at + (kEvenAndOdd<T> ? i % 2 * kL + i / 2 : i)];
  });
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

// Transposes a square of two-byte elements, by interleaving: each shuffle is one instruction of SSE2.
PSP_INLINE void transpose(Vector<uint16_t, 16> (&rows)[8]) {
  typedef int16_t Indices __attribute__((vector_size(16)));
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    Vector<uint16_t, 16> next[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + 4], Indices{0, 8, 1, 9, 2, 10, 3, 11});
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 4], Indices{4, 12, 5, 13, 6, 14, 7, 15});
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = next[i];
  }
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
