// A convolution's weight taken apart by its input channels, and put together, on the CPU. A unit is an output channel.
#include "vectors.h"

namespace pspnet_fast::cpu {
namespace {

template <class To, class From>
PSP_INLINE To converted(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return from_acc<To>(to_acc(value));
  }
}

// n elements; `step` apart in `from`.
template <class To, class From>
PSP_INLINE void gather(To* __restrict__ to, const From* __restrict__ from, int64_t n, int64_t step) {
  for (int64_t k = 0; k < n; ++k) to[k] = converted<To>(from[k * step]);
}

template <class T, class U>
struct Split {
  using Written = U;
  const PyramidSplitWeightArgs& a;
  bool stream;

  static constexpr int64_t kChunk = 128;  // channels whose taps are taken apart at once

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t C = a.dense + a.L * a.R;
    Scratch<U> row(std::max({a.dense * (a.channels_last ? 1 : a.taps), a.R, a.channels_last ? 0 : kChunk * a.taps}));
    const auto write = [&](U* to, const T* from, int64_t n) __attribute__((always_inline)) {
      gather(row.data(), from, n, 1);
      store(to, row.data(), n, stream);
    };
    for (int64_t o = begin; o < end; ++o) {
      const T* const weight = static_cast<const T*>(a.weight) + o * C * a.taps;
      U* const dense = static_cast<U*>(a.dense_weight) + o * a.dense * a.taps;
      const auto matrix = [&](int64_t l, int64_t t) __attribute__((always_inline)) {
        return static_cast<U*>(a.matrices) + ((l * a.taps + t) * a.O + o) * a.R;
      };
      if (!a.channels_last) {
        write(dense, weight + a.first_dense * a.taps, a.dense * a.taps);
        for (int64_t l = 0; l < a.L; ++l) {
          for (int64_t r = 0; r < a.R; r += kChunk) {
            const int64_t n = std::min(kChunk, a.R - r);
            deinterleave<kBytes>(row.data(), weight + (a.first_level + l * a.R + r) * a.taps, n);
            for (int64_t t = 0; t < a.taps; ++t) store(matrix(l, t) + r, &row[t * kChunk], n, stream);
          }
        }
        continue;
      }
      for (int64_t t = 0; t < a.taps; ++t) {
        write(dense + t * a.dense, weight + t * C + a.first_dense, a.dense);
        for (int64_t l = 0; l < a.L; ++l) write(matrix(l, t), weight + t * C + a.first_level + l * a.R, a.R);
      }
    }
    if (stream) store_fence();
  }

  // A vector of elements on their way: what is not converted passes as it is, two bytes as the low ones of four.
  static constexpr bool kAsBits = std::is_same_v<T, U> && sizeof(T) == 2;

  template <int kBytes>
  static PSP_INLINE Vector<acc_type<T>, kBytes> read(const T* from) {
    if constexpr (kAsBits) {
      typename Integers<kBytes>::Narrow narrow;
      __builtin_memcpy(&narrow, from, sizeof narrow);
      return std::bit_cast<Vector<float, kBytes>>(__builtin_convertvector(narrow, typename Integers<kBytes>::Wide));
    } else {
      return load_wide<kBytes>(from);
    }
  }
  template <class V>
  static PSP_INLINE void put(U* to, V v) {
    if constexpr (kAsBits) {
      const auto bits = std::bit_cast<typename Integers<sizeof(V)>::Wide>(v);
      const auto narrow = __builtin_convertvector(bits, typename Integers<sizeof(V)>::Narrow);
      __builtin_memcpy(to, &narrow, sizeof narrow);
    } else {
      store_narrow(to, v);
    }
  }

  // to[t, r] = from[r, t] for n channels r: squares of a vector's size are transposed in registers.
  template <int kBytes>
  PSP_INLINE void deinterleave(U* __restrict__ to, const T* __restrict__ from, int64_t n) const {
    constexpr int64_t kL = kLanes<acc_type<T>, kBytes>;
    int64_t t = 0;
    for (; t + kL <= a.taps; t += kL) {
      int64_t r = 0;
      for (; r + kL <= n; r += kL) {
        Vector<acc_type<T>, kBytes> square[kL];
        for (int64_t i = 0; i < kL; ++i) square[i] = read<kBytes>(from + (r + i) * a.taps + t);
        transpose<acc_type<T>, kBytes>(square);
        for (int64_t i = 0; i < kL; ++i) put(to + (t + i) * kChunk + r, square[i]);
      }
      for (int64_t i = t; i < t + kL; ++i) gather(to + i * kChunk + r, from + r * a.taps + i, n - r, a.taps);
    }
    for (; t < a.taps; ++t) gather(to + t * kChunk, from + t, n, a.taps);
  }
};

template <class T, class U>
struct Join {
  using Written = T;
  const PyramidSplitWeightArgs& a;
  bool stream;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t C = a.dense + a.L * a.R, run = C * a.taps;
    Scratch<T> whole(run);  // of an output channel: it is written once, as it lies
    for (int64_t o = begin; o < end; ++o) {
      const U* const dense = static_cast<const U*>(a.dense_weight) + o * a.dense * a.taps;
      if (!a.channels_last) gather(&whole[a.first_dense * a.taps], dense, a.dense * a.taps, 1);
      for (int64_t t = 0; t < a.taps; ++t) {
        if (a.channels_last) gather(&whole[t * C + a.first_dense], dense + t * a.dense, a.dense, 1);
        for (int64_t l = 0; l < a.L; ++l) {
          const U* const from = static_cast<const U*>(a.matrices) + ((l * a.taps + t) * a.O + o) * a.R;
          const int64_t first = a.first_level + l * a.R;
          T* const to = a.channels_last ? &whole[t * C + first] : &whole[first * a.taps + t];
          const int64_t step = a.channels_last ? 1 : a.taps;
          for (int64_t r = 0; r < a.R; ++r) to[r * step] = converted<T>(from[r]);
        }
      }
      store(static_cast<T*>(a.weight) + o * run, whole.data(), run, stream);
    }
    if (stream) store_fence();
  }
};

// Calls f with zeros of the weight's type and of the parts'.
template <class Function>
void dispatch_pair(const PyramidSplitWeightArgs& a, const Function& f) {
  if (a.weight_dtype == a.dtype) return dispatch(a.dtype, [&](auto zero) { f(zero, zero); });
  if (a.dtype == DType::kBFloat16) return f(float{}, BFloat16{});
  f(float{}, Half{});
}

template <template <class, class> class Kernel>
void run(const PyramidSplitWeightArgs& a) {
  dispatch_pair(a, [&](auto weight, auto part) {
    using Unit = Kernel<decltype(weight), decltype(part)>;
    const int64_t elements = a.O * (a.dense + a.L * a.R) * a.taps;
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(typename Unit::Written));
    parallel(a.O, Unit{a, bytes > kStreamBytes});
  });
}

}  // namespace

void pyramid_split_weight(const PyramidSplitWeightArgs& a) { run<Split>(a); }

void pyramid_split_weight_backward(const PyramidSplitWeightArgs& a) { run<Join>(a); }

}  // namespace pspnet_fast::cpu
