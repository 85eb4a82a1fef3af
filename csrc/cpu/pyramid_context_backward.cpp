// The backward of the context half of a convolution on the CPU, which reads the gradient once.
#include "pyramid_context.h"

namespace pspnet_fast::cpu {
namespace {

// Planar maps, a unit is 16 planes, so that grad_taps is written in whole cache lines.
template <class T>
struct PlanesContextBackward : ContextBase<T, PyramidContextBackwardArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextBackwardArgs>;
  using Base::Base;

  int64_t units() const { return this->a.N * divide_up(this->a.O, kPlanes); }

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t blocks = divide_up(a.O, kPlanes), cells = this->seen_cells();
    Scratch<acc_t> row(a.W), wide;
    Scratch<T> grads(cells * kPlanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, first = unit % blocks * kPlanes;
      const int64_t planes = std::min(kPlanes, a.O - first);
      for (int64_t k = 0; k < planes; ++k) {
        const WidePlane<T> grad(a.grad_conv, n, first + k, a.H, a.W, wide);
        for (int i = 0; i < this->vertical.count(); ++i) {
          sum_column(this->vertical.columns[i], grad.data, row.data());
          for (int j = this->begin_w(i); j < this->end_w(i); ++j) {
            const auto& column = this->horizontal.columns[j];
            acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t w = 0; w < column.end - column.begin; ++w) sum += row[column.begin + w] * column.weights[w];
            grads[this->seen(i, j) * kPlanes + k] = from_acc<T>(sum);
          }
        }
      }
      T* out = static_cast<T*>(a.grad_taps) + n * cells * a.O + first;
      for (int64_t cell = 0; cell < cells; ++cell) std::copy_n(&grads[cell * kPlanes], planes, out + cell * a.O);
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

// A unit is a band of rows of a chunk of channels: each row is summed into the horizontal columns, and these into the
// vertical columns that begin in the band, as long as they go on. Vectors lie along channels; planar maps are
// transposed on their way. Each tap is summed in the order of the rows, whatever the bands.
template <class T>
struct RowsContextBackward : ContextBase<T, PyramidContextBackwardArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextBackwardArgs>;
  static constexpr int64_t kL = kLanes<acc_t>, kC = kChannels<acc_t>;
  int64_t bands;
  Scratch<Scratch<int>> beginning;  // the vertical columns that begin at each row; those of no row at the first

  explicit RowsContextBackward(const PyramidContextBackwardArgs& args) : Base(args), beginning(args.H) {
    for (int i = 0; i < this->vertical.count(); ++i) beginning[this->vertical.columns[i].begin].push_back(i);
    const int64_t wanted = divide_up(4 * static_cast<int64_t>(torch::stable::get_num_threads()), chunks() * args.N);
    bands = std::clamp<int64_t>(wanted, 1, divide_up(args.H, 16));
  }

  int64_t chunks() const { return divide_up(this->a.O, kC); }
  int64_t units() const { return this->a.N * chunks() * bands; }

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    Scratch<acc_t> grad(divide_up(a.W, kL) * kL * kC), columns(this->horizontal.count() * kC);
    Scratch<Scratch<acc_t>> sums(this->vertical.count());  // of the vertical columns at hand
    Scratch<Scratch<acc_t>> spare;
    Scratch<int> going_on;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (chunks() * bands), first = unit / bands % chunks() * kC, band = unit % bands;
      const int64_t channels = std::min(kC, a.O - first);
      const int64_t first_row = band * a.H / bands, last_row = (band + 1) * a.H / bands;
      for (int64_t h = first_row; h < a.H && (h < last_row || !going_on.empty()); ++h) {
        if (h < last_row) {
          for (const int i : beginning[h]) {
            if (!spare.empty()) {
              sums[i].swap(spare.back());
              spare.pop_back();
            }
            sums[i].assign((this->end_w(i) - this->begin_w(i)) * kC, acc_t(0));
            going_on.push_back(i);
          }
        }
        if (going_on.empty()) continue;
        with_vectors<acc_t>(channels, [&](auto vectors) __attribute__((always_inline)) {
          load_row<vectors>(n, first, channels, h, grad.data());
          for (int j = 0; j < this->horizontal.count(); ++j) sum_column<vectors>(j, grad.data(), &columns[j * kC]);
        });
        for (size_t at = 0; at < going_on.size();) {
          const int i = going_on[at];
          const auto& column = this->vertical.columns[i];
          if (h < column.end) {
            add(sums[i].size(), column.weights[h - column.begin], &columns[this->begin_w(i) * kC], sums[i].data());
          }
          if (h + 1 < column.end) {
            ++at;
            continue;
          }
          write(n, first, channels, i, sums[i].data());
          spare.emplace_back().swap(sums[i]);
          going_on[at] = going_on.back();
          going_on.pop_back();
        }
      }
    }
  }

 private:
  // A row of the gradient, a chunk of channels for each pixel.
  template <int kCount>
  PSP_INLINE void load_row(int64_t n, int64_t first, int64_t channels, int64_t h, acc_t* to) const {
    const auto& a = this->a;
    const T* const row = at<T>(a.grad_conv, n, first, h);
    for (int q = 0; q < kCount; ++q) {
      const int64_t lanes = std::min(kL, channels - q * kL);
      if (a.channels_last) {
        for (int64_t w = 0; w < a.W; ++w) {
          store(to + w * kC + q * kL, load_wide(row + w * a.grad_conv.stride_w + q * kL, lanes));
        }
        continue;
      }
      for (int64_t w = 0; w < a.W; w += kL) {
        Vector<acc_t> square[kL] = {};
        const int64_t pixels = std::min(kL, a.W - w);
        for (int64_t k = 0; k < lanes; ++k) {
          square[k] = load_wide(row + (q * kL + k) * a.grad_conv.stride_c + w, pixels);
        }
        transpose<acc_t>(square);
        for (int64_t p = 0; p < kL; ++p) store(to + (w + p) * kC + q * kL, square[p]);
      }
    }
  }

  template <int kCount>
  PSP_INLINE void sum_column(int j, const acc_t* grad, acc_t* to) const {
    const auto& column = this->horizontal.columns[j];
    Vector<acc_t> sums[kCount] = {};
    for (int64_t w = column.begin; w < column.end; ++w) {
      const acc_t weight = column.weights[w - column.begin];
      for (int q = 0; q < kCount; ++q) sums[q] += weight * load(grad + w * kC + q * kL);
    }
    for (int q = 0; q < kCount; ++q) store(to + q * kL, sums[q]);
  }

  static PSP_INLINE void add(size_t count, acc_t weight, const acc_t* __restrict__ from, acc_t* __restrict__ to) {
    for (size_t k = 0; k < count; ++k) to[k] += weight * from[k];
  }

  // The taps of a vertical column's cells.
  PSP_INLINE void write(int64_t n, int64_t first, int64_t channels, int i, const acc_t* sums) const {
    T* const out = static_cast<T*>(this->a.grad_taps) + n * this->seen_cells() * this->a.O + first;
    for (int j = this->begin_w(i); j < this->end_w(i); ++j, sums += kC) {
      T* const to = out + this->seen(i, j) * this->a.O;
      for (int64_t k = 0; k < channels; k += kL) store_narrow(to + k, load(sums + k), std::min(kL, channels - k));
    }
  }
};

}  // namespace

void pyramid_context_backward(const PyramidContextBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (by_planes(a)) {
      const PlanesContextBackward<T> task(a);
      return parallel(task.units(), task);
    }
    const RowsContextBackward<T> task(a);
    parallel(task.units(), task);
  });
}

}  // namespace pspnet_fast::cpu
