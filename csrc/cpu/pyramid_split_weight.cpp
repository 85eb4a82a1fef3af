// A convolution's weight taken apart by its input channels, and put together, on the CPU. A unit is an output channel.
#include "cpu_kernel.h"

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

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t C = a.dense + a.L * a.R;
    Scratch<U> row(std::max(a.dense * (a.channels_last ? 1 : a.taps), a.R));
    const auto write = [&](U* to, const T* from, int64_t n, int64_t step) __attribute__((always_inline)) {
      gather(row.data(), from, n, step);
      store(to, row.data(), n, stream);
    };
    for (int64_t o = begin; o < end; ++o) {
      const T* const weight = static_cast<const T*>(a.weight) + o * C * a.taps;
      U* const dense = static_cast<U*>(a.dense_weight) + o * a.dense * a.taps;
      if (!a.channels_last) write(dense, weight + a.first_dense * a.taps, a.dense * a.taps, 1);
      for (int64_t t = 0; t < a.taps; ++t) {
        if (a.channels_last) write(dense + t * a.dense, weight + t * C + a.first_dense, a.dense, 1);
        for (int64_t l = 0; l < a.L; ++l) {
          const int64_t first = a.first_level + l * a.R;
          const T* const from = a.channels_last ? weight + t * C + first : weight + first * a.taps + t;
          U* const to = static_cast<U*>(a.matrices) + ((l * a.taps + t) * a.O + o) * a.R;
          write(to, from, a.R, a.channels_last ? 1 : a.taps);
        }
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
