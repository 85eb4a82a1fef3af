// The class of the greatest logit at every pixel of an upsampled map, on the CPU: a running maximum over the classes,
// in vectors of pixels; and its probability, 1 / sum over k of exp(logit_k - greatest).
#include "upsampled_rows.h"
#include "vector_exp.h"

namespace pspnet_fast::cpu {
namespace {

template <class T, class Class>
struct UpsampleArgmax {
  using acc_t = acc_type<T>;
  using Int = typename ExpConstants<acc_t>::Int;
  static constexpr int64_t kColumns = Upsampling<T>::kColumns;

  const UpsampleArgmaxArgs& a;
  Upsampling<T> upsampling{a};

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    UpsampledRows<T, kBytes> rows(upsampling);
    acc_t best[kColumns];
    Int classes[kColumns];
    for (int64_t number = begin; number < end; ++number) {
      const auto unit = upsampling.unit(number);
      rows.go_to(unit);
      for (int64_t x = 0; x < unit.columns; x += kTogether<kBytes>) {
        if (rows.finite()) {
          find<true>(rows, x, best + x, classes + x);
        } else {
          find<false>(rows, x, best + x, classes + x);
        }
      }
      const int64_t to = (unit.n * a.H + unit.y) * a.W + unit.first;
      Class* const found = static_cast<Class*>(a.classes) + to;
      for (int64_t x = 0; x < unit.columns; ++x) found[x] = static_cast<Class>(classes[x]);
      if (a.confidence == nullptr) continue;
      for (int64_t x = 0; x < unit.columns; x += kTogether<kBytes>) confide(rows, x, best + x);
      std::memcpy(static_cast<acc_t*>(a.confidence) + to, best, static_cast<size_t>(unit.columns) * sizeof(acc_t));
    }
  }

 private:
  static constexpr int64_t kVectors = 4;  // at once, in registers
  template <int kBytes>
  static constexpr int64_t kTogether = kVectors * kLanes<acc_t, kBytes>;

  // As in torch.argmax, the first of equals wins, and NaN is the greatest.
  template <bool kFinite, int kBytes>
  PSP_INLINE void find(const UpsampledRows<T, kBytes>& rows, int64_t x, acc_t* best, Int* classes) const {
    Vector<acc_t, kBytes> greatest[kVectors];
    IntVector<acc_t, kBytes> numbers[kVectors] = {};
    for (int64_t v = 0; v < kVectors; ++v) greatest[v] = rows.load(0, x + v * kLanes<acc_t, kBytes>);
    for (int64_t k = 1; k < a.K; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const auto value = rows.load(k, x + v * kLanes<acc_t, kBytes>), before = greatest[v];
        IntVector<acc_t, kBytes> better = value > before;
        if constexpr (!kFinite) better = ~(value <= before) & (before == before);
        greatest[v] = better ? value : before;
        numbers[v] = better ? static_cast<Int>(k) - IntVector<acc_t, kBytes>{} : numbers[v];
      }
    }
    std::memcpy(best, greatest, sizeof greatest);
    std::memcpy(classes, numbers, sizeof numbers);
  }

  // The probability of the greatest logits, in their place.
  template <int kBytes>
  PSP_INLINE void confide(const UpsampledRows<T, kBytes>& rows, int64_t x, acc_t* best) const {
    constexpr int64_t kStep = kLanes<acc_t, kBytes>;
    Vector<acc_t, kBytes> sums[kVectors] = {};
    for (int64_t k = 0; k < a.K; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[v] += exp_vector<acc_t>(rows.load(k, x + v * kStep) - load<acc_t, kBytes>(best + v * kStep));
      }
    }
    for (auto& sum : sums) sum = acc_t(1) / sum;
    std::memcpy(best, sums, sizeof sums);
  }
};

}  // namespace

void upsample_argmax(const UpsampleArgmaxArgs& args) {
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](const auto& task) { parallel(args.N * task.upsampling.tiles() * args.H, task); };
    if (args.int_type == IntType::kUInt8) {
      run(UpsampleArgmax<T, uint8_t>{args});
    } else {
      run(UpsampleArgmax<T, int32_t>{args});
    }
  });
}

}  // namespace pspnet_fast::cpu
