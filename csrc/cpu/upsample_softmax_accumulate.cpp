// Adds the softmax of upsampled logits to a map of probabilities, on the CPU: the logits of a row of a tile are
// interpolated into scratch, exponentiated there, and added in the layout of the map.
#include "upsampled_rows.h"
#include "vector_exp.h"

namespace pspnet_fast::cpu {
namespace {

template <class T>
struct UpsampleSoftmaxAccumulate {
  using acc_t = acc_type<T>;
  static constexpr int64_t kColumns = Upsampling<T>::kColumns;

  const UpsampleSoftmaxAccumulateArgs& a;
  Upsampling<T> upsampling;

  explicit UpsampleSoftmaxAccumulate(const UpsampleSoftmaxAccumulateArgs& args) : a(args), upsampling(args) {
    if (a.mirrored) std::reverse(upsampling.columns.begin(), upsampling.columns.end());
  }

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    UpsampledRows<T> rows(upsampling);
    Scratch<acc_t> values(a.K * kColumns);
    for (int64_t number = begin; number < end; ++number) {
      const auto unit = upsampling.unit(number);
      rows.go_to(unit);
      for (int64_t x = 0; x < unit.columns; x += kLanes<acc_t, kBytes>) softmax<kBytes>(rows, x, &values[x]);
      add(unit, values.data());
    }
  }

 private:
  // values[k * kColumns + lane] = weight * softmax over k
  template <int kBytes>
  PSP_INLINE void softmax(const UpsampledRows<T>& rows, int64_t x, acc_t* values) const {
    using V = Vector<acc_t, kBytes>;
    const auto store = [&](int64_t k, V v)
                           __attribute__((always_inline)) { std::memcpy(values + k * kColumns, &v, sizeof v); };
    V greatest = rows.template load<kBytes>(0, x), sum = {};
    for (int64_t k = 0; k < a.K; ++k) {
      const V value = rows.template load<kBytes>(k, x);
      greatest = value > greatest ? value : greatest;
      store(k, value);
    }
    for (int64_t k = 0; k < a.K; ++k) {
      const V e = exp_vector<acc_t>(load<acc_t, kBytes>(values + k * kColumns) - greatest);
      sum += e;
      store(k, e);
    }
    const V scale = static_cast<acc_t>(a.weight) / sum;
    for (int64_t k = 0; k < a.K; ++k) store(k, load<acc_t, kBytes>(values + k * kColumns) * scale);
  }

  PSP_INLINE void add(const typename Upsampling<T>::Unit& unit, const acc_t* values) const {
    const Image& map = a.probabilities;
    acc_t* const to = mutable_at<acc_t>(map, unit.n, 0, unit.y) + unit.first * map.stride_w;
    if (map.stride_w == 1) {
      for (int64_t k = 0; k < a.K; ++k) {
        acc_t* __restrict__ row = to + k * map.stride_c;
        for (int64_t x = 0; x < unit.columns; ++x) row[x] += values[k * kColumns + x];
      }
      return;
    }
    for (int64_t x = 0; x < unit.columns; ++x) {
      acc_t* __restrict__ pixel = to + x * map.stride_w;
      for (int64_t k = 0; k < a.K; ++k) pixel[k * map.stride_c] += values[k * kColumns + x];
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
