// Adds the softmax of upsampled logits to a map of probabilities, on the CPU: a cache line of pixels at a time, whose
// exponentials stay in the first-level cache while the map is fetched, and are added in the layout of the map.
#include "upsampled_rows.h"
#include "vectors.h"

namespace pspnet_fast::cpu {
namespace {

template <class T>
struct UpsampleSoftmaxAccumulate {
  using acc_t = acc_type<T>;
  static constexpr int64_t kColumns = Upsampling<T>::kColumns;

  const UpsampleSoftmaxAccumulateArgs& a;
  Upsampling<T> upsampling;

  explicit UpsampleSoftmaxAccumulate(const UpsampleSoftmaxAccumulateArgs& args) : a(args), upsampling(args) {
    if (a.mirrored) std::reverse(upsampling.columns.pixels.begin(), upsampling.columns.pixels.end());
  }

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    UpsampledRows<T, kBytes> rows(upsampling);
    Scratch<acc_t> values(a.K * kPixels);
    acc_t scales[kPixels];
    for (int64_t number = begin; number < end; ++number) {
      const auto unit = upsampling.unit(number);
      rows.go_to(unit);
      for (int64_t x = 0; x < unit.columns; x += kPixels) {
        acc_t* const to =
            mutable_at<acc_t>(a.probabilities, unit.n, 0, unit.y) + (unit.first + x) * a.probabilities.stride_w;
        const int64_t pixels = std::min(kPixels, unit.columns - x);
        softmax(rows, x, values.data(), scales, to, pixels);
        add<kBytes>(to, values.data(), scales, pixels);
      }
    }
  }

 private:
  static constexpr int64_t kPixels = kLanes<acc_t>;  // a cache line

  // values[k, lane] * scales[lane] = weight * softmax over k
  template <int kBytes>
  PSP_INLINE void softmax(const UpsampledRows<T, kBytes>& rows, int64_t x, acc_t* values, acc_t* scales,
                          const acc_t* to, int64_t pixels) const {
    using V = Vector<acc_t, kBytes>;
    constexpr int64_t kStep = kLanes<acc_t, kBytes>, kVectors = kPixels / kStep;
    V greatest[kVectors], sums[kVectors] = {};
    for (int64_t v = 0; v < kVectors; ++v) greatest[v] = rows.load(0, x + v * kStep);
    for (int64_t k = 1; k < a.K; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const V value = rows.load(k, x + v * kStep);
        greatest[v] = value > greatest[v] ? value : greatest[v];
      }
    }
    const Image& map = a.probabilities;
    for (int64_t k = 0; k < a.K; ++k) {
      // planes lie far apart: the hardware does not foresee them
      const acc_t* const next = map.stride_c == 1 ? to + k * pixels : to + k * map.stride_c;
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + pixels - 1, 1);
      for (int64_t v = 0; v < kVectors; ++v) {
        const V e = exp_vector<acc_t>(rows.load(k, x + v * kStep) - greatest[v]);
        sums[v] += e;
        store(values + k * kPixels + v * kStep, e);
      }
    }
    for (V& sum : sums) sum = static_cast<acc_t>(a.weight) / sum;
    std::memcpy(scales, sums, sizeof sums);
  }

  template <int kBytes>
  PSP_INLINE void add(acc_t* to, const acc_t* values, const acc_t* scales, int64_t pixels) const {
    using V = Vector<acc_t, kBytes>;
    constexpr int64_t kStep = kLanes<acc_t, kBytes>;
    const Image& map = a.probabilities;
    if (map.stride_w == 1 && pixels == kPixels) {
      for (int64_t k = 0; k < a.K; ++k) {
        acc_t* const row = to + k * map.stride_c;
        for (int64_t x = 0; x < kPixels; x += kStep) {
          store(row + x, load<acc_t, kBytes>(row + x) +
                             load<acc_t, kBytes>(values + k * kPixels + x) * load<acc_t, kBytes>(scales + x));
        }
      }
    } else if (map.stride_c == 1 && pixels == kPixels) {
      for (int64_t x = 0; x < kPixels; x += kStep) {
        int64_t k = 0;
        for (; k + kStep <= a.K; k += kStep) {
          V square[kStep];
          for (int64_t i = 0; i < kStep; ++i) square[i] = load<acc_t, kBytes>(values + (k + i) * kPixels + x);
          transpose<acc_t, kBytes>(square);
          for (int64_t i = 0; i < kStep; ++i) {
            acc_t* const pixel = to + (x + i) * map.stride_w + k;
            store(pixel, load<acc_t, kBytes>(pixel) + square[i] * scales[x + i]);
          }
        }
        for (int64_t i = x; i < x + kStep; ++i) {
          for (int64_t rest = k; rest < a.K; ++rest) {
            to[i * map.stride_w + rest] += values[rest * kPixels + i] * scales[i];
          }
        }
      }
    } else {
      for (int64_t k = 0; k < a.K; ++k) {
        for (int64_t x = 0; x < pixels; ++x) {
          to[k * map.stride_c + x * map.stride_w] += values[k * kPixels + x] * scales[x];
        }
      }
    }
  }
};

}  // namespace

void upsample_softmax_accumulate(const UpsampleSoftmaxAccumulateArgs& args) {
  dispatch(args.dtype, [&](auto zero) {
    const UpsampleSoftmaxAccumulate<decltype(zero)> task(args);
    parallel(args.N * task.upsampling.tiles() * args.H, task);
  });
}

}  // namespace pspnet_fast::cpu
