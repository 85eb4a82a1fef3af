// Batch normalisation and ReLU of all levels on the CPU. Sums are taken in double, as torch takes them: a level may
// have any number of cells.
#include <cmath>

#include "vectors.h"

namespace pspnet_fast::cpu {
namespace {

constexpr int64_t kBlock = 16;  // channels of a unit, whose sums stay in registers
constexpr int64_t kAhead = 12;  // rows that are fetched ahead: a block has but a cache line of each

// A level's channels [first, first + count); calls row(offset of the first value) for each of its cells.
struct Block {
  int level;
  int64_t first, count, values;

  template <class Args>
  PSP_INLINE Block(const Args& a, int64_t unit)
      : level(static_cast<int>(unit % a.levels.count)),
        first(unit / a.levels.count * kBlock),
        count(std::min(kBlock, a.R - first)),
        values(a.N * (a.levels.first[level + 1] - a.levels.first[level])) {}

  template <class Args, class Row>
  PSP_INLINE void for_rows(const Args& a, const Row& row) const {
    const int64_t P = a.levels.first[a.levels.count];
    for (int64_t n = 0; n < a.N; ++n) {
      for (int64_t p = a.levels.first[level]; p < a.levels.first[level + 1]; ++p) row((n * P + p) * a.R + first);
    }
  }

  // Calls function with the number of channels: as a constant, if it is the usual one.
  template <class Function>
  PSP_INLINE void whole_or_not(const Function& function) const {
    if (count == kBlock) return function(std::integral_constant<int64_t, kBlock>{});
    function(count);
  }
};

// Calls function(vector, its first channel, its channels) for the vectors that make up a row of a block.
template <int kVectors, class Count, class Function>
PSP_INLINE void for_parts(Count count, const Function& function) {
  constexpr int64_t kStep = kBlock / kVectors;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    function(v, v * kStep, std::clamp<int64_t>(static_cast<int64_t>(count) - v * kStep, 0, kStep));
  }
}

// What is summed in double: as many values in the accumulation type as a vector has doubles.
template <class acc_t, int kBytes>
struct Sums {
  static constexpr int kSource = sizeof(acc_t) == 8 ? kBytes : kBytes / 2;
  static constexpr int kVectors = static_cast<int>(kBlock / kLanes<double, kBytes>);
  using Double = Vector<double, kBytes>;
  using Value = Vector<acc_t, kSource>;
  Double sums[kVectors] = {};

  PSP_INLINE void write(double* to) const { __builtin_memcpy(to, sums, sizeof sums); }
};

// Element r of a tensor of a norm, in its own dtype or in float32.
template <class T>
PSP_INLINE acc_type<T> norm_value(const void* values, bool narrow, int64_t r) {
  return narrow ? to_acc(static_cast<const T*>(values)[r]) : static_cast<const float*>(values)[r];
}
template <class T>
PSP_INLINE void set_norm_value(void* values, bool narrow, int64_t r, double value) {
  if (narrow) {
    static_cast<T*>(values)[r] = from_acc<T>(static_cast<acc_type<T>>(value));
  } else {
    static_cast<float*>(values)[r] = static_cast<float>(value);
  }
}

template <class T>
struct BatchNorm {
  using acc_t = acc_type<T>;
  const PyramidBatchNormArgs& a;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Block block(a, unit);
      block.whole_or_not([&](auto count) __attribute__((always_inline)) { normalize<kBytes>(block, count); });
    }
  }

  template <int kBytes, class Count>
  PSP_INLINE void normalize(const Block& block, Count count) const {
    const T* const x = static_cast<const T*>(a.reduced);
    T* const y = static_cast<T*>(a.output);
    const int l = block.level;
    const int64_t C = block.count;
    acc_t mean[kBlock] = {}, scale[kBlock] = {}, shift[kBlock] = {};
    statistics<kBytes>(block, count, mean, scale);
    for (int64_t k = 0; k < C; ++k) {
      if (a.weight[l]) scale[k] *= norm_value<T>(a.weight[l], a.norm_dtype == a.dtype, block.first + k);
      shift[k] = a.bias[l] ? norm_value<T>(a.bias[l], a.norm_dtype == a.dtype, block.first + k) : acc_t(0);
    }
    using V = Vector<acc_t, kBytes>;
    constexpr int kVectors = static_cast<int>(kBlock / kLanes<acc_t, kBytes>);
    V means[kVectors], scales[kVectors], shifts[kVectors];
    __builtin_memcpy(means, mean, sizeof mean);
    __builtin_memcpy(scales, scale, sizeof scale);
    __builtin_memcpy(shifts, shift, sizeof shift);
    const bool relu = a.relu;
    block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
      for_parts<kVectors>(count, [&](int v, int64_t k, int64_t lanes) __attribute__((always_inline)) {
        V value = (load_wide<kBytes>(x + at + k, lanes) - means[v]) * scales[v] + shifts[v];
        if (relu) value = value < acc_t(0) ? V{} : value;  // NaN stays
        store_narrow(y + at + k, value, lanes);
      });
    });
  }

  // What the block is normalised by, kept for the backward; the running statistics take their share.
  template <int kBytes, class Count>
  PSP_INLINE void statistics(const Block& block, Count count, acc_t* mean, acc_t* scale) const {
    const T* const x = static_cast<const T*>(a.reduced);
    const bool narrow = a.norm_dtype == a.dtype;
    const int l = block.level;
    const int64_t C = block.count;
    double sums[kBlock] = {}, squares[kBlock] = {};
    if (a.batch[l]) {
      const double values = static_cast<double>(block.values);
      using S = Sums<acc_t, kBytes>;
      S total, squared;
      block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
        for_parts<S::kVectors>(count, [&](int v, int64_t k, int64_t lanes) __attribute__((always_inline)) {
          if (v == 0) __builtin_prefetch(x + at + kAhead * a.R);
          total.sums[v] += __builtin_convertvector(load_wide<S::kSource>(x + at + k, lanes), typename S::Double);
        });
      });
      for (auto& sum : total.sums) sum /= values;
      block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
        for_parts<S::kVectors>(count, [&](int v, int64_t k, int64_t lanes) __attribute__((always_inline)) {
          const auto value = __builtin_convertvector(load_wide<S::kSource>(x + at + k, lanes), typename S::Double);
          squared.sums[v] += (value - total.sums[v]) * (value - total.sums[v]);
        });
      });
      total.write(sums), squared.write(squares);
      const double m = static_cast<double>(a.momentum[l]);
      for (int64_t k = 0; k < C; ++k) {
        const int64_t r = block.first + k;
        if (a.running_mean[l]) {
          const double mean_before = norm_value<T>(a.running_mean[l], narrow, r);
          const double var_before = norm_value<T>(a.running_var[l], narrow, r);
          set_norm_value<T>(a.running_mean[l], narrow, r, m * sums[k] + (1 - m) * mean_before);
          set_norm_value<T>(a.running_var[l], narrow, r, m * (squares[k] / (values - 1)) + (1 - m) * var_before);
        }
        squares[k] /= values;
      }
    } else {
      for (int64_t k = 0; k < C; ++k) {
        sums[k] = norm_value<T>(a.running_mean[l], narrow, block.first + k);
        squares[k] = norm_value<T>(a.running_var[l], narrow, block.first + k);
      }
    }
    acc_t* const kept = static_cast<acc_t*>(a.statistics) + l * a.R + block.first;
    for (int64_t k = 0; k < C; ++k) {
      kept[k] = mean[k] = static_cast<acc_t>(sums[k]);
      kept[a.levels.count * a.R + k] = scale[k] =
          static_cast<acc_t>(1 / std::sqrt(squares[k] + static_cast<double>(a.eps[l])));
    }
  }
};

template <class T>
struct BatchNormBackward {
  using acc_t = acc_type<T>;
  const PyramidBatchNormBackwardArgs& a;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Block block(a, unit);
      block.whole_or_not([&](auto count) __attribute__((always_inline)) { backward<kBytes>(block, count); });
    }
  }

  // The gradient before the ReLU.
  template <int kBytes>
  PSP_INLINE Vector<acc_t, kBytes> grad(int64_t at, int64_t lanes) const {
    using V = Vector<acc_t, kBytes>;
    const V grads = load_wide<kBytes>(static_cast<const T*>(a.grad_output) + at, lanes);
    if (!a.output) return grads;
    return load_wide<kBytes>(static_cast<const T*>(a.output) + at, lanes) <= acc_t(0) ? V{} : grads;
  }

  template <int kBytes, class Count>
  PSP_INLINE void backward(const Block& block, Count count) const {
    const T* const x = static_cast<const T*>(a.reduced);
    T* const out = static_cast<T*>(a.grad_reduced);
    const bool narrow = a.norm_dtype == a.dtype;
    const int l = block.level;
    const int64_t C = block.count, levels = a.levels.count, at_level = l * a.R + block.first;
    const acc_t* const mean = static_cast<const acc_t*>(a.statistics) + at_level;
    const acc_t* const inverse = mean + levels * a.R;
    double sums[kBlock], products[kBlock];
    acc_t means[kBlock] = {}, inverses[kBlock] = {};
    std::copy_n(mean, C, means), std::copy_n(inverse, C, inverses);
    using S = Sums<acc_t, kBytes>;
    S grad_sums, product_sums;
    block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
      for_parts<S::kVectors>(count, [&](int v, int64_t k, int64_t lanes) __attribute__((always_inline)) {
        if (v == 0) {
          __builtin_prefetch(x + at + kAhead * a.R);
          __builtin_prefetch(static_cast<const T*>(a.grad_output) + at + kAhead * a.R);
          if (a.output) __builtin_prefetch(static_cast<const T*>(a.output) + at + kAhead * a.R);
        }
        const typename S::Value g = grad<S::kSource>(at + k, lanes);
        const auto normalized = (load_wide<S::kSource>(x + at + k, lanes) - load<acc_t, S::kSource>(means + k)) *
                                load<acc_t, S::kSource>(inverses + k);
        grad_sums.sums[v] += __builtin_convertvector(g, typename S::Double);
        product_sums.sums[v] += __builtin_convertvector(g * normalized, typename S::Double);
      });
    });
    grad_sums.write(sums), product_sums.write(products);
    acc_t scale[kBlock] = {}, constant[kBlock] = {}, slope[kBlock] = {};
    for (int64_t k = 0; k < C; ++k) {
      set_norm_value<T>(a.grad_affine, narrow, at_level + k, products[k]);
      set_norm_value<T>(a.grad_affine, narrow, levels * a.R + at_level + k, sums[k]);
      scale[k] = a.weight[l] ? inverse[k] * norm_value<T>(a.weight[l], narrow, block.first + k) : inverse[k];
      const double share = a.batch[l] ? 1 / static_cast<double>(block.values) : 0;  // else the statistics are constants
      constant[k] = static_cast<acc_t>(sums[k] * share);
      slope[k] = static_cast<acc_t>(products[k] * share * inverse[k]);
    }
    constexpr int kVectors = static_cast<int>(kBlock / kLanes<acc_t, kBytes>);
    constexpr auto of = load<acc_t, kBytes>;
    block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
      for_parts<kVectors>(count, [&](int, int64_t k, int64_t lanes) __attribute__((always_inline)) {
        const auto deviation = load_wide<kBytes>(x + at + k, lanes) - of(means + k);
        const auto grads = grad<kBytes>(at + k, lanes) - of(constant + k) - deviation * of(slope + k);
        store_narrow(out + at + k, of(scale + k) * grads, lanes);
      });
    });
  }
};

}  // namespace

void pyramid_batch_norm(const PyramidBatchNormArgs& a) {
  dispatch(a.dtype,
           [&](auto zero) { parallel(a.levels.count * ((a.R + kBlock - 1) / kBlock), BatchNorm<decltype(zero)>{a}); });
}

void pyramid_batch_norm_backward(const PyramidBatchNormBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    parallel(a.levels.count * ((a.R + kBlock - 1) / kBlock), BatchNormBackward<decltype(zero)>{a});
  });
}

}  // namespace pspnet_fast::cpu
