// The context half of a convolution on the CPU, from the pyramid's cells seen through its weights (the taps):
//   context[h, w] = sum over levels, u, v, i, j of (S_u A_h)[h, i] (S_v A_w)[w, j] taps[i, j, u, v],
// A the interpolation matrices and S_u A the same with rows shifted by tap u; one axis after the other.
#include <cmath>

#include "seen_axis.h"

namespace pspnet_fast::cpu {
namespace {

template <class T, class Args>
struct ContextBase {
  using acc_t = acc_type<T>;
  static constexpr int64_t kPlanes = 16, kChannels = 64;  // channels of a unit: planar, channels-last
  static constexpr int64_t kVectors = kChannels / kLanes<acc_t>;
  const Args& a;
  SeenAxis<acc_t> vertical, horizontal;
  bool stream;

  explicit ContextBase(const Args& args)
      : a(args),
        vertical(a.levels, a.levels.bins_h, a.H, a.window.size_h, a.window.dilation_h, a.align_corners),
        horizontal(a.levels, a.levels.bins_w, a.W, a.window.size_w, a.window.dilation_w, a.align_corners),
        stream(a.N * a.O * a.H * a.W * static_cast<int64_t>(sizeof(T)) > kStreamBytes) {}

  int64_t planar_units() const { return a.N * ((a.O + kPlanes - 1) / kPlanes); }
  int64_t channel_units() const { return a.N * ((a.O + kChannels - 1) / kChannels); }
  PSP_INLINE int64_t seen_cells() const {
    return int64_t{a.levels.first[a.levels.count]} * a.window.size_h * a.window.size_w;
  }
  // Number of a cell seen through both taps in [P, size_h * size_w], from its columns on either axis.
  PSP_INLINE int64_t seen(int column_h, int column_w) const {
    const auto &h = vertical.columns[column_h], &w = horizontal.columns[column_w];
    const int64_t cell = a.levels.first[h.level] + h.cell * a.levels.bins_w[h.level] + w.cell;
    return (cell * a.window.size_h + h.tap) * a.window.size_w + w.tap;
  }
  // The horizontal columns of the level of a vertical one.
  PSP_INLINE int begin_w(int column_h) const { return horizontal.first[vertical.columns[column_h].level]; }
  PSP_INLINE int end_w(int column_h) const {
    const int level = vertical.columns[column_h].level;
    return horizontal.first[level] + a.window.size_w * a.levels.bins_w[level];
  }
};

// What follows the sum: evaluation-mode batch normalisation as one factor and one summand, and ReLU.
template <class T>
struct Epilogue {
  using acc_t = acc_type<T>;
  Scratch<acc_t> scale, shift;  // of every channel, and of as many zeros as a vector needs
  bool relu;

  explicit Epilogue(const PyramidContextArgs& a) : scale(a.O + 64, acc_t(1)), shift(a.O + 64, acc_t(0)), relu(a.relu) {
    if (!a.norm[0]) return;
    const auto value = [&](int i, int64_t o) -> acc_t {
      if (a.norm_dtype == a.dtype) return to_acc(static_cast<const T*>(a.norm[i])[o]);
      return static_cast<const float*>(a.norm[i])[o];
    };
    for (int64_t o = 0; o < a.O; ++o) {
      scale[o] = value(0, o) / std::sqrt(value(3, o) + static_cast<acc_t>(a.eps));
      shift[o] = value(1, o) - value(2, o) * scale[o];
    }
  }

  // For one value or a vector of them.
  template <class V, class S>
  PSP_INLINE V operator()(V value, S factor, S summand) const {
    value = value * factor + summand;
    if (relu) value = value < acc_t(0) ? V{} : value;
    return value;
  }
};

// Planar maps, a unit is 16 planes: taps become one row of W for each vertical column, of which a map's row is a sum.
template <class T>
struct PlanarContext : ContextBase<T, PyramidContextArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextArgs>;
  Epilogue<T> epilogue;

  explicit PlanarContext(const PyramidContextArgs& args) : Base(args), epilogue(args) {}

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t blocks = (a.O + Base::kPlanes - 1) / Base::kPlanes, cells = this->seen_cells();
    Scratch<acc_t> taps(cells * Base::kPlanes), rows(this->vertical.count() * a.W), wide, plane(a.H * a.W);
    Scratch<T> narrow;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, first = unit % blocks * Base::kPlanes;
      const int64_t planes = std::min(Base::kPlanes, a.O - first);
      const T* from = static_cast<const T*>(a.taps) + n * cells * a.O + first;
      for (int64_t cell = 0; cell < cells; ++cell) {
        for (int64_t k = 0; k < planes; ++k) taps[cell * Base::kPlanes + k] = to_acc(from[cell * a.O + k]);
      }
      for (int64_t k = 0; k < planes; ++k) {
        fill_rows(&taps[k], rows.data());
        const WidePlane<T> conv(a.conv, n, first + k, a.H, a.W, wide);
        const acc_t scale = epilogue.scale[first + k], shift = epilogue.shift[first + k];
        for (int64_t h = 0; h < a.H; ++h) {
          const acc_t* before = conv.data + h * a.W;
          const auto& terms = this->vertical.rows[h];
          fill_by_vectors(
              &plane[h * a.W], a.W,
              [&](int64_t w) __attribute__((always_inline)) {
                Vector<acc_t> sum = load(before + w);
                for (const auto& term : terms) sum += term.weight * load(&rows[term.column * a.W + w]);
                return epilogue(sum, scale, shift);
              },
              [&](int64_t w) __attribute__((always_inline)) {
                acc_t sum = before[w];
                for (const auto& term : terms) sum += term.weight * rows[term.column * a.W + w];
                return epilogue(sum, scale, shift);
              });
        }
        store_wide_plane(a.conv, n, first + k, a.H, a.W, plane, narrow, this->stream);
      }
    }
    if (this->stream) store_fence();
  }

  PSP_INLINE void fill_rows(const acc_t* taps, acc_t* rows) const {
    const int64_t W = this->a.W;
    std::fill_n(rows, this->vertical.count() * W, acc_t(0));
    for (int i = 0; i < this->vertical.count(); ++i) {
      for (int j = this->begin_w(i); j < this->end_w(i); ++j) {
        const auto& column = this->horizontal.columns[j];
        const acc_t value = taps[this->seen(i, j) * Base::kPlanes];
        const acc_t* __restrict__ weights = column.weights.data();
        acc_t* __restrict__ row = rows + i * W + column.begin;
        for (int64_t w = 0; w < column.end - column.begin; ++w) row[w] += value * weights[w];
      }
    }
  }
};

// Channels-last maps, a unit is one row of a chunk of channels: what the taps give to the row is summed over the
// vertical columns first, then for each pixel over the horizontal ones.
template <class T>
struct ChannelsLastContext : ContextBase<T, PyramidContextArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextArgs>;
  static constexpr int64_t kChannels = Base::kChannels, kVectors = Base::kVectors;
  Epilogue<T> epilogue;

  explicit ChannelsLastContext(const PyramidContextArgs& args) : Base(args), epilogue(args) {}

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t chunks = (a.O + kChannels - 1) / kChannels, cells = this->seen_cells();
    Scratch<acc_t> columns(this->horizontal.count() * kChannels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (chunks * a.H), first = unit / a.H % chunks * kChannels, h = unit % a.H;
      const int64_t channels = std::min(kChannels, a.O - first);
      const T* taps = static_cast<const T*>(a.taps) + n * cells * a.O + first;
      std::fill(columns.begin(), columns.end(), acc_t(0));
      for (const auto& term : this->vertical.rows[h]) {
        for (int j = this->begin_w(term.column); j < this->end_w(term.column); ++j) {
          const T* __restrict__ from = taps + this->seen(term.column, j) * a.O;
          acc_t* __restrict__ to = &columns[j * kChannels];
          for (int64_t k = 0; k < channels; ++k) to[k] += term.weight * to_acc(from[k]);
        }
      }
      T* row = mutable_at<T>(a.conv, n, first, h);
      for (int64_t w = 0; w < a.W; ++w) {
        Vector<acc_t> sums[kVectors] = {};
        for (const auto& term : this->horizontal.rows[w]) {
          for (int64_t q = 0; q < kVectors; ++q) {
            sums[q] += term.weight * load(&columns[term.column * kChannels + q * kLanes<acc_t>]);
          }
        }
        finish(row + w * a.conv.stride_w, first, channels, sums);
      }
    }
  }

  PSP_INLINE void finish(T* pixel, int64_t first, int64_t channels, const Vector<acc_t> (&sums)[kVectors]) const {
    acc_t values[kChannels];
    __builtin_memcpy(values, sums, sizeof values);
    const acc_t *scale = &epilogue.scale[first], *shift = &epilogue.shift[first];
    for (int64_t k = 0; k < channels; ++k) {
      pixel[k] = from_acc<T>(epilogue(to_acc(pixel[k]) + values[k], scale[k], shift[k]));
    }
  }
};

// Planar maps, a unit is 16 planes, so that grad_taps is written in whole cache lines.
template <class T>
struct PlanarContextBackward : ContextBase<T, PyramidContextBackwardArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextBackwardArgs>;
  using Base::Base;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t blocks = (a.O + Base::kPlanes - 1) / Base::kPlanes, cells = this->seen_cells();
    Scratch<acc_t> row(a.W), wide;
    Scratch<T> grads(cells * Base::kPlanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, first = unit % blocks * Base::kPlanes;
      const int64_t planes = std::min(Base::kPlanes, a.O - first);
      for (int64_t k = 0; k < planes; ++k) {
        const WidePlane<T> grad(a.grad_conv, n, first + k, a.H, a.W, wide);
        for (int i = 0; i < this->vertical.count(); ++i) {
          sum_column(this->vertical.columns[i], grad.data, row.data());
          for (int j = this->begin_w(i); j < this->end_w(i); ++j) {
            const auto& column = this->horizontal.columns[j];
            acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t w = 0; w < column.end - column.begin; ++w) sum += row[column.begin + w] * column.weights[w];
            grads[this->seen(i, j) * Base::kPlanes + k] = from_acc<T>(sum);
          }
        }
      }
      T* out = static_cast<T*>(a.grad_taps) + n * cells * a.O + first;
      for (int64_t cell = 0; cell < cells; ++cell) std::copy_n(&grads[cell * Base::kPlanes], planes, out + cell * a.O);
    }
  }

  // row[w] = the sum over the column's positions h of weight * grad[h, w]
  PSP_INLINE void sum_column(const typename SeenAxis<acc_t>::Column& column, const acc_t* grad, acc_t* row) const {
    const int64_t W = this->a.W, count = column.end - column.begin;
    const acc_t *weights = column.weights.data(), *from = grad + column.begin * W;
    fill_by_vectors(
        row, W,
        [&](int64_t w) __attribute__((always_inline)) {
          Vector<acc_t> sums[2] = {};
          int64_t h = 0;
          for (; h + 2 <= count; h += 2) {
            sums[0] += weights[h] * load(from + h * W + w);
            sums[1] += weights[h + 1] * load(from + (h + 1) * W + w);
          }
          if (h < count) sums[0] += weights[h] * load(from + h * W + w);
          return sums[0] + sums[1];
        },
        [&](int64_t w) __attribute__((always_inline)) {
          acc_t sum = 0;
          for (int64_t h = 0; h < count; ++h) sum += weights[h] * from[h * W + w];
          return sum;
        });
  }
};

// Channels-last maps, a unit is one chunk of channels.
template <class T>
struct ChannelsLastContextBackward : ContextBase<T, PyramidContextBackwardArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextBackwardArgs>;
  using Base::Base;
  static constexpr int64_t kChannels = Base::kChannels, kVectors = Base::kVectors;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t chunks = (a.O + kChannels - 1) / kChannels, cells = this->seen_cells();
    Scratch<acc_t> grad(a.W * kChannels), columns(this->horizontal.count() * kChannels), sums(cells * kChannels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / chunks, first = unit % chunks * kChannels, channels = std::min(kChannels, a.O - first);
      std::fill(sums.begin(), sums.end(), acc_t(0));
      for (int64_t h = 0; h < a.H; ++h) {
        const T* row = at<T>(a.grad_conv, n, first, h);
        for (int64_t w = 0; w < a.W; ++w) {
          for (int64_t k = 0; k < channels; ++k) grad[w * kChannels + k] = to_acc(row[w * a.grad_conv.stride_w + k]);
        }
        for (int j = 0; j < this->horizontal.count(); ++j) sum_column(j, grad.data(), &columns[j * kChannels]);
        for (const auto& term : this->vertical.rows[h]) {
          for (int j = this->begin_w(term.column); j < this->end_w(term.column); ++j) {
            const acc_t* __restrict__ from = &columns[j * kChannels];
            acc_t* __restrict__ to = &sums[this->seen(term.column, j) * kChannels];
            for (int64_t k = 0; k < kChannels; ++k) to[k] += term.weight * from[k];
          }
        }
      }
      T* out = static_cast<T*>(a.grad_taps) + n * cells * a.O + first;
      for (int64_t cell = 0; cell < cells; ++cell) {
        for (int64_t k = 0; k < channels; ++k) out[cell * a.O + k] = from_acc<T>(sums[cell * kChannels + k]);
      }
    }
  }

  PSP_INLINE void sum_column(int j, const acc_t* grad, acc_t* to) const {
    const auto& column = this->horizontal.columns[j];
    Vector<acc_t> sums[kVectors] = {};
    for (int64_t w = column.begin; w < column.end; ++w) {
      const acc_t weight = column.weights[w - column.begin];
      for (int64_t q = 0; q < kVectors; ++q) sums[q] += weight * load(grad + w * kChannels + q * kLanes<acc_t>);
    }
    __builtin_memcpy(to, sums, sizeof sums);
  }
};

}  // namespace

void pyramid_context(const PyramidContextArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) {
      const ChannelsLastContext<T> task(a);
      return parallel(task.channel_units() * a.H, task);
    }
    const PlanarContext<T> task(a);
    parallel(task.planar_units(), task);
  });
}

void pyramid_context_backward(const PyramidContextBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) {
      const ChannelsLastContextBackward<T> task(a);
      return parallel(task.channel_units(), task);
    }
    const PlanarContextBackward<T> task(a);
    parallel(task.planar_units(), task);
  });
}

}  // namespace pspnet_fast::cpu
