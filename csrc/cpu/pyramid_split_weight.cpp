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

// to[c, r] = from[r, c]: squares of a vector's size in registers, the rest one by one. What is not converted passes as
// bits.
template <int kBytes, class To, class From>
PSP_INLINE void transposed(To* __restrict__ to, int64_t to_stride, const From* __restrict__ from, int64_t from_stride,
                           int64_t rows, int64_t columns) {
  constexpr bool kAsBits = std::is_same_v<To, From> && sizeof(To) == 2;
  constexpr int kWidth = kAsBits ? 16 : kBytes;
  using Element = std::conditional_t<kAsBits, uint16_t, acc_type<From>>;
  constexpr int64_t kSide = kLanes<Element, kWidth>;
  const auto square = [&](int64_t r, int64_t c) __attribute__((always_inline)) {
    Vector<Element, kWidth> v[kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      const From* const row = from + (r + i) * from_stride + c;
      if constexpr (kAsBits) {
        __builtin_memcpy(&v[i], row, kWidth);
      } else {
        v[i] = load_wide<kBytes>(row);
      }
    }
    if constexpr (kAsBits) {
      transpose(v);
    } else {
      transpose<Element, kWidth>(v);
    }
    for (int64_t i = 0; i < kSide; ++i) {
      To* const row = to + (c + i) * to_stride + r;
      if constexpr (kAsBits) {
        __builtin_memcpy(row, &v[i], kWidth);
      } else {
        store_narrow(row, v[i]);
      }
    }
  };
  int64_t c = 0;
  for (; c + kSide <= columns; c += kSide) {
    int64_t r = 0;
    for (; r + kSide <= rows; r += kSide) square(r, c);
    for (; r < rows; ++r) {
      for (int64_t i = c; i < c + kSide; ++i) to[i * to_stride + r] = converted<To>(from[r * from_stride + i]);
    }
  }
  for (; c < columns; ++c) gather(to + c * to_stride, from + c, rows, from_stride);
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
            transposed<kBytes>(row.data(), kChunk, weight + (a.first_level + l * a.R + r) * a.taps, a.taps, n, a.taps);
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
};

template <class T, class U>
struct Join {
  using Written = T;
  const PyramidSplitWeightArgs& a;
  bool stream;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t C = a.dense + a.L * a.R, run = C * a.taps;
    Scratch<T> whole(run);  // of an output channel: it is written once, as it lies
    for (int64_t o = begin; o < end; ++o) {
      const U* const dense = static_cast<const U*>(a.dense_weight) + o * a.dense * a.taps;
      const auto matrix = [&](int64_t l, int64_t t) __attribute__((always_inline)) {
        return static_cast<const U*>(a.matrices) + ((l * a.taps + t) * a.O + o) * a.R;
      };
      if (!a.channels_last) {
        gather(&whole[a.first_dense * a.taps], dense, a.dense * a.taps, 1);
        for (int64_t l = 0; l < a.L; ++l) {
          transposed<kBytes>(&whole[(a.first_level + l * a.R) * a.taps], a.taps, matrix(l, 0), a.O * a.R, a.taps, a.R);
        }
      } else {
        for (int64_t t = 0; t < a.taps; ++t) {
          gather(&whole[t * C + a.first_dense], dense + t * a.dense, a.dense, 1);
          for (int64_t l = 0; l < a.L; ++l) gather(&whole[t * C + a.first_level + l * a.R], matrix(l, t), a.R, 1);
        }
      }
      store<kBytes>(static_cast<T*>(a.weight) + o * run, whole.data(), run, stream);
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
