// The backward of the context half of a convolution on the CPU, which reads the gradient once.
#include "pyramid_context.h"

namespace pspnet_fast::cpu {
namespace {

// A unit is a band of rows of a chunk of channels: each row is summed into the horizontal columns, and these into the
// vertical columns that begin in the band, as long as they go on. Vectors lie along channels; planar maps are
// transposed on their way. Each tap is summed in the order of the rows, whatever the bands.
template <class T>
struct RowsContextBackward : ContextBase<T, PyramidContextBackwardArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextBackwardArgs>;
  int64_t chunk, bands;
  Scratch<Scratch<int>> beginning;  // the vertical columns that begin at each row; those of no row at the first

  explicit RowsContextBackward(const PyramidContextBackwardArgs& args) : Base(args), beginning(args.H) {
    for (int i = 0; i < this->vertical.count(); ++i) beginning[this->vertical.columns[i].begin].push_back(i);
    // some two vertical columns of each level and tap go on at a time
    chunk = chunk_channels<acc_t>(args, 2 * args.window.size_h * this->horizontal.count());
    // A band repeats rows of the next one's, up to all: only where there are few chunks for the threads.
    const int64_t threads = torch::stable::get_num_threads(), whole = chunks() * args.N;
    const int64_t wanted = whole % threads == 0 || whole >= 4 * threads ? 1 : divide_up(4 * threads, whole);
    bands = std::clamp<int64_t>(wanted, 1, divide_up(args.H, 16));
  }

  int64_t chunks() const { return divide_up(this->a.O, chunk); }
  int64_t units() const { return this->a.N * chunks() * bands; }

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    Scratch<acc_t> grad(divide_up(a.W, 16) * 16 * chunk), columns(this->horizontal.count() * chunk);
    Scratch<Scratch<acc_t>> sums(this->vertical.count());  // of the vertical columns at hand
    Scratch<Scratch<acc_t>> spare;
    Scratch<int> going_on;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (chunks() * bands), first = unit / bands % chunks() * chunk, band = unit % bands;
      const int64_t channels = std::min(chunk, a.O - first);
      const int64_t first_row = band * a.H / bands, last_row = (band + 1) * a.H / bands;
      for (int64_t h = first_row; h < a.H && (h < last_row || !going_on.empty()); ++h) {
        if (h < last_row) {
          for (const int i : beginning[h]) {
            if (!spare.empty()) {
              sums[i].swap(spare.back());
              spare.pop_back();
            }
            sums[i].assign((this->end_w(i) - this->begin_w(i)) * chunk, acc_t(0));
            going_on.push_back(i);
          }
        }
        if (going_on.empty()) continue;
        load_row<kBytes>(n, first, channels, h, grad.data());
        for (int j = 0; j < this->horizontal.count(); ++j) {
          sum_column<kBytes>(j, channels, grad.data(), &columns[j * chunk]);
        }
        for (size_t at = 0; at < going_on.size();) {
          const int i = going_on[at];
          const auto& column = this->vertical.columns[i];
          if (h < column.end) {
            add(sums[i].size(), column.weights[h - column.begin], &columns[this->begin_w(i) * chunk], sums[i].data());
          }
          if (h + 1 < column.end) {
            ++at;
            continue;
          }
          write<kBytes>(n, first, channels, i, sums[i].data());
          spare.emplace_back().swap(sums[i]);
          going_on[at] = going_on.back();
          going_on.pop_back();
        }
      }
    }
  }

 private:
  // A row of the gradient, a chunk of channels for each pixel.
  template <int kBytes>
  PSP_INLINE void load_row(int64_t n, int64_t first, int64_t channels, int64_t h, acc_t* to) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    const auto& a = this->a;
    const T* const row = at<T>(a.grad_conv, n, first, h);
    if (a.channels_last) {
      for (int64_t w = 0; w < a.W; ++w) {
        for_vectors<acc_t, kBytes>(channels, [&](int64_t k, auto count, auto lanes) __attribute__((always_inline)) {
          for (int q = 0; q < count; ++q) {
            const int64_t at = k + q * kL;
            store(to + w * chunk + at, load_wide<kBytes>(row + w * a.grad_conv.stride_w + at, lanes));
          }
        });
      }
      return;
    }
    for (int64_t k = 0; k < channels; k += kL) {
      const int64_t planes = std::min(kL, channels - k);
      for (int64_t w = 0; w < a.W; w += kL) {
        Vector<acc_t, kBytes> square[kL] = {};
        const auto fill = [&](auto lanes) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < kL; ++i) {
            if (i >= planes) break;
            square[i] = load_wide<kBytes>(row + (k + i) * a.grad_conv.stride_c + w, lanes);
          }
        };
        if (a.W - w >= kL) {
          fill(std::integral_constant<int64_t, kL>{});
        } else {
          fill(a.W - w);
        }
        transpose<acc_t, kBytes>(square);
        for (int64_t p = 0; p < kL; ++p) store(to + (w + p) * chunk + k, square[p]);
      }
    }
  }

  template <int kBytes>
  PSP_INLINE void sum_column(int j, int64_t channels, const acc_t* grad, acc_t* to) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    const auto& column = this->horizontal.columns[j];
    for_vectors<acc_t, kBytes>(channels, [&](int64_t k, auto count, auto) __attribute__((always_inline)) {
      Vector<acc_t, kBytes> sums[count] = {};
      for (int64_t w = column.begin; w < column.end; ++w) {
        const acc_t weight = column.weights[w - column.begin];
        const acc_t* const from = grad + w * chunk + k;
        for (int q = 0; q < count; ++q) sums[q] += weight * load<acc_t, kBytes>(from + q * kL);
      }
      for (int q = 0; q < count; ++q) store(to + k + q * kL, sums[q]);
    });
  }

  static PSP_INLINE void add(size_t count, acc_t weight, const acc_t* __restrict__ from, acc_t* __restrict__ to) {
    for (size_t k = 0; k < count; ++k) to[k] += weight * from[k];
  }

  // The taps of a vertical column's cells.
  template <int kBytes>
  PSP_INLINE void write(int64_t n, int64_t first, int64_t channels, int i, const acc_t* sums) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    T* const out = static_cast<T*>(this->a.grad_taps) + n * this->seen_cells() * this->a.O + first;
    for (int j = this->begin_w(i); j < this->end_w(i); ++j, sums += chunk) {
      T* const to = out + this->seen(i, j) * this->a.O;
      for_vectors<acc_t, kBytes>(channels, [&](int64_t k, auto count, auto lanes) __attribute__((always_inline)) {
        for (int q = 0; q < count; ++q) {
          store_narrow(to + k + q * kL, load<acc_t, kBytes>(sums + k + q * kL), lanes);
        }
      });
    }
  }
};

}  // namespace

void pyramid_context_backward(const PyramidContextBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const RowsContextBackward<T> task(a);
    parallel(task.units(), task);
  });
}

}  // namespace pspnet_fast::cpu
