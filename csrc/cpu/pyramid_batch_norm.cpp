// Batch normalisation and ReLU of all levels on the CPU. Sums are taken in double, as torch takes them: a level may
// have any number of cells.
#include <cmath>

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {
namespace {

constexpr int64_t kBlock = 64;  // channels of a unit, whose sums stay in the first-level cache

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

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) normalize(Block(a, unit));
  }

  PSP_INLINE void normalize(const Block& block) const {
    const T* const x = static_cast<const T*>(a.reduced);
    T* const y = static_cast<T*>(a.output);
    const int l = block.level;
    const int64_t C = block.count;
    acc_t mean[kBlock], scale[kBlock], shift[kBlock];
    statistics(block, mean, scale);
    for (int64_t k = 0; k < C; ++k) {
      if (a.weight[l]) scale[k] *= norm_value<T>(a.weight[l], a.norm_dtype == a.dtype, block.first + k);
      shift[k] = a.bias[l] ? norm_value<T>(a.bias[l], a.norm_dtype == a.dtype, block.first + k) : acc_t(0);
    }
    block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
      for (int64_t k = 0; k < C; ++k) {
        const acc_t value = (to_acc(x[at + k]) - mean[k]) * scale[k] + shift[k];
        y[at + k] = from_acc<T>(a.relu && value < acc_t(0) ? acc_t(0) : value);
      }
    });
  }

  // What the block is normalised by, kept for the backward; the running statistics take their share.
  PSP_INLINE void statistics(const Block& block, acc_t* mean, acc_t* scale) const {
    const T* const x = static_cast<const T*>(a.reduced);
    const bool narrow = a.norm_dtype == a.dtype;
    const int l = block.level;
    const int64_t C = block.count;
    double sums[kBlock] = {}, squares[kBlock] = {};
    if (a.batch[l]) {
      const double values = static_cast<double>(block.values);
      block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
        for (int64_t k = 0; k < C; ++k) sums[k] += to_acc(x[at + k]);
      });
      for (int64_t k = 0; k < C; ++k) sums[k] /= values;
      block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
        for (int64_t k = 0; k < C; ++k) {
          const double deviation = to_acc(x[at + k]) - sums[k];
          squares[k] += deviation * deviation;
        }
      });
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

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) backward(Block(a, unit));
  }

  // The gradient before the ReLU.
  PSP_INLINE acc_t grad(int64_t at) const {
    const bool clamped = a.output && to_acc(static_cast<const T*>(a.output)[at]) <= acc_t(0);
    return clamped ? acc_t(0) : to_acc(static_cast<const T*>(a.grad_output)[at]);
  }

  PSP_INLINE void backward(const Block& block) const {
    const T* const x = static_cast<const T*>(a.reduced);
    T* const out = static_cast<T*>(a.grad_reduced);
    const bool narrow = a.norm_dtype == a.dtype;
    const int l = block.level;
    const int64_t C = block.count, levels = a.levels.count, at_level = l * a.R + block.first;
    const acc_t* const mean = static_cast<const acc_t*>(a.statistics) + at_level;
    const acc_t* const inverse = mean + levels * a.R;
    double sums[kBlock] = {}, products[kBlock] = {};
    block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
      for (int64_t k = 0; k < C; ++k) {
        const acc_t g = grad(at + k);
        sums[k] += g;
        products[k] += g * ((to_acc(x[at + k]) - mean[k]) * inverse[k]);
      }
    });
    acc_t scale[kBlock], constant[kBlock], slope[kBlock];
    for (int64_t k = 0; k < C; ++k) {
      set_norm_value<T>(a.grad_affine, narrow, at_level + k, products[k]);
      set_norm_value<T>(a.grad_affine, narrow, levels * a.R + at_level + k, sums[k]);
      scale[k] = a.weight[l] ? inverse[k] * norm_value<T>(a.weight[l], narrow, block.first + k) : inverse[k];
      const double share = a.batch[l] ? 1 / static_cast<double>(block.values) : 0;  // else the statistics are constants
      constant[k] = static_cast<acc_t>(sums[k] * share);
      slope[k] = static_cast<acc_t>(products[k] * share * inverse[k]);
    }
    block.for_rows(a, [&](int64_t at) __attribute__((always_inline)) {
      for (int64_t k = 0; k < C; ++k) {
        out[at + k] = from_acc<T>(scale[k] * (grad(at + k) - constant[k] - (to_acc(x[at + k]) - mean[k]) * slope[k]));
      }
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
