// The context half of a convolution on the CPU, added to the other half in one read and write, or written alone.
#include "pyramid_context.h"

#include "folded_norm.h"

namespace pspnet_fast::cpu {
namespace {

// FoldedNorm of every channel, and of as many zeros as a vector needs.
template <class T>
struct Epilogue {
  using acc_t = acc_type<T>;
  Scratch<acc_t> scale, shift;
  bool relu;

  explicit Epilogue(const PyramidContextArgs& a) : scale(a.O + 64, acc_t(1)), shift(a.O + 64, acc_t(0)), relu(a.relu) {
    for (int64_t o = 0; o < a.O; ++o) {
      const FoldedNorm<T> norm(a.norm, a.norm_dtype == a.dtype, a.eps, o);
      scale[o] = norm.scale, shift[o] = norm.shift;
    }
  }

  // For one value or a vector of them.
  template <class V, class S>
  PSP_INLINE V operator()(V value, S factor, S summand) const {
    return FoldedNorm<T>::apply(value, factor, summand, relu);
  }
};

// A unit is one row of a chunk of channels: what the taps give to the row is summed over the vertical columns first,
// then for each pixel over the horizontal ones. Vectors lie along channels; planar maps are transposed on their way.
template <class T>
struct RowsContext : ContextBase<T, PyramidContextArgs> {
  using acc_t = acc_type<T>;
  using Base = ContextBase<T, PyramidContextArgs>;
  Epilogue<T> epilogue;
  int64_t chunk;   // channels of a unit
  int64_t pixels;  // summed before they are added to the map: few, or a row of each plane

  explicit RowsContext(const PyramidContextArgs& args)
      : Base(args),
        epilogue(args),
        chunk(chunk_channels<acc_t>(args, this->horizontal.count())),
        pixels(args.channels_last ? std::min<int64_t>(args.W, 8) : args.W) {}

  int64_t chunks() const { return divide_up(this->a.O, chunk); }
  int64_t units() const { return this->a.N * chunks() * this->a.H; }

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    Scratch<acc_t> columns(this->horizontal.count() * chunk), context(divide_up(pixels, 16) * 16 * chunk);
    Scratch<Source> sources(2 * a.window.size_h);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (chunks() * a.H), first = unit / a.H % chunks() * chunk, h = unit % a.H;
      const int64_t channels = std::min(chunk, a.O - first);
      fill_columns<kBytes>(n, first, channels, h, sources, columns.data());
      for (int64_t w = 0; w < a.W; w += pixels) {
        const int64_t count = std::min(pixels, a.W - w);
        for (int64_t p = 0; p < count; ++p) {
          sum_pixel<kBytes>(columns.data(), channels, this->horizontal.rows[w + p], &context[p * chunk]);
        }
        if (a.channels_last) {
          add_pixels<kBytes>(n, first, channels, h, w, count, context.data());
        } else {
          add_planar<kBytes>(n, first, channels, h, w, count, context.data());
        }
      }
    }
  }

 private:
  struct Source {  // taps of the first cell of a row of cells
    const T* taps;
    acc_t weight;
  };

  // columns[j] = the sum over the vertical columns of the level of j, in chunks of channels
  template <int kBytes>
  PSP_INLINE void fill_columns(int64_t n, int64_t first, int64_t channels, int64_t h, Scratch<Source>& sources,
                               acc_t* columns) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    const auto& a = this->a;
    const T* const taps = static_cast<const T*>(a.taps) + n * this->seen_cells() * a.O + first;
    const auto& terms = this->vertical.rows[h];
    size_t next = 0;
    for (int level = 0; level < a.levels.count; ++level) {
      const int first_w = this->horizontal.first[level], bins_w = a.levels.bins_w[level];
      int64_t rows = 0;
      for (; next < terms.size() && this->vertical.columns[terms[next].column].level == level; ++next) {
        sources[rows++] = {taps + this->seen(terms[next].column, first_w) * a.O, terms[next].weight};
      }
      for (int j = 0; j < bins_w; ++j) {
        for (int v = 0; v < a.window.size_w; ++v) {
          const int64_t offset = (int64_t{j} * a.window.size_h * a.window.size_w + v) * a.O;
          acc_t* const to = columns + (first_w + v * bins_w + j) * chunk;
          for_vectors<acc_t, kBytes>(channels, [&](int64_t k, auto count, auto lanes) __attribute__((always_inline)) {
            Vector<acc_t, kBytes> sums[count] = {};
            for (int64_t i = 0; i < rows; ++i) {
              const T* const from = sources[i].taps + offset + k;
              for (int q = 0; q < count; ++q) sums[q] += sources[i].weight * load_wide<kBytes>(from + q * kL, lanes);
            }
            for (int q = 0; q < count; ++q) store(to + k + q * kL, sums[q]);
          });
        }
      }
    }
  }

  template <int kBytes>
  PSP_INLINE void sum_pixel(const acc_t* columns, int64_t channels,
                            const Scratch<typename SeenAxis<acc_t>::Term>& terms, acc_t* to) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    for_vectors<acc_t, kBytes>(channels, [&](int64_t k, auto count, auto) __attribute__((always_inline)) {
      Vector<acc_t, kBytes> sums[count] = {};
      for (const auto& term : terms) {
        const acc_t* const from = columns + term.column * chunk + k;
        for (int q = 0; q < count; ++q) sums[q] += term.weight * load<acc_t, kBytes>(from + q * kL);
      }
      for (int q = 0; q < count; ++q) store(to + k + q * kL, sums[q]);
    });
  }

  template <int kBytes>
  PSP_INLINE void add_pixels(int64_t n, int64_t first, int64_t channels, int64_t h, int64_t w, int64_t count,
                             const acc_t* context) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    T* to = mutable_at<T>(this->a.conv, n, first, h) + w * this->a.conv.stride_w;
    for (int64_t p = 0; p < count; ++p, to += this->a.conv.stride_w, context += chunk) {
      for_vectors<acc_t, kBytes>(channels, [&](int64_t k, auto count, auto lanes) __attribute__((always_inline)) {
        for (int q = 0; q < count; ++q) {
          const int64_t at = k + q * kL;
          auto sum = load<acc_t, kBytes>(context + at);
          if (this->a.accumulate) sum = load_wide<kBytes>(to + at, lanes) + sum;
          store_narrow(to + at,
                       epilogue(sum, load<acc_t, kBytes>(&epilogue.scale[first + at]),
                                load<acc_t, kBytes>(&epilogue.shift[first + at])),
                       lanes);
        }
      });
    }
  }

  template <int kBytes>
  PSP_INLINE void add_planar(int64_t n, int64_t first, int64_t channels, int64_t h, int64_t w, int64_t count,
                             const acc_t* context) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    T* const row = mutable_at<T>(this->a.conv, n, first, h) + w;
    for (int64_t k = 0; k < channels; k += kL) {
      for (int64_t p = 0; p < count; p += kL) {
        Vector<acc_t, kBytes> square[kL];
        for (int64_t i = 0; i < kL; ++i) square[i] = load<acc_t, kBytes>(context + (p + i) * chunk + k);
        transpose<acc_t, kBytes>(square);
        const auto add = [&](int64_t planes, auto lanes) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < kL; ++i) {
            if (i >= planes) break;
            T* const to = row + (k + i) * this->a.conv.stride_c + p;
            const acc_t scale = epilogue.scale[first + k + i], shift = epilogue.shift[first + k + i];
            const auto sum = this->a.accumulate ? load_wide<kBytes>(to, lanes) + square[i] : square[i];
            store_narrow(to, epilogue(sum, scale, shift), lanes);
          }
        };
        const int64_t planes = std::min(kL, channels - k);
        if (count - p >= kL) {
          add(planes, std::integral_constant<int64_t, kL>{});
        } else {
          add(planes, count - p);
        }
      }
    }
  }
};

}  // namespace

void pyramid_context(const PyramidContextArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const RowsContext<T> task(a);
    parallel(task.units(), task);
  });
}

}  // namespace pspnet_fast::cpu
