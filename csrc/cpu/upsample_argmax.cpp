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
    UpsampledRows<T> rows(upsampling);
    acc_t best[kColumns];
    Int classes[kColumns];
    for (int64_t number = begin; number < end; ++number) {
      const auto unit = upsampling.unit(number);
      rows.go_to(unit);
      find(rows, best, classes);
      const int64_t to = (unit.n * a.H + unit.y) * a.W + unit.first;
      Class* const found = static_cast<Class*>(a.classes) + to;
      for (int64_t x = 0; x < unit.columns; ++x) found[x] = static_cast<Class>(classes[x]);
      if (a.confidence == nullptr) continue;
      confide<kBytes>(rows, best);
      std::memcpy(static_cast<acc_t*>(a.confidence) + to, best, static_cast<size_t>(unit.columns) * sizeof(acc_t));
    }
  }

 private:
  // As in torch.argmax, the first of equals wins, and NaN is the greatest.
  PSP_INLINE void find(const UpsampledRows<T>& rows, acc_t* __restrict__ best, Int* __restrict__ classes) const {
    for (int64_t x = 0; x < kColumns; ++x) best[x] = rows.at(0, x), classes[x] = 0;
    for (int64_t k = 1; k < a.K; ++k) {
      for (int64_t x = 0; x < kColumns; ++x) {
        const acc_t value = rows.at(k, x), before = best[x];
        const bool better = !(value <= before) & (before == before);
        best[x] = better ? value : before;
        classes[x] = better ? static_cast<Int>(k) : classes[x];
      }
    }
  }

  // The probability of the greatest logits, in their place.
  template <int kBytes>
  PSP_INLINE void confide(const UpsampledRows<T>& rows, acc_t* best) const {
    constexpr int64_t kVectors = 4;  // at once, in registers
    for (int64_t x = 0; x < kColumns; x += kVectors * kLanes<acc_t, kBytes>) {
      Vector<acc_t, kBytes> sums[kVectors] = {};
      for (int64_t k = 0; k < a.K; ++k) {
        for (int64_t v = 0; v < kVectors; ++v) {
          const int64_t at = x + v * kLanes<acc_t, kBytes>;
          sums[v] += exp_vector<acc_t>(rows.template load<kBytes>(k, at) - load<acc_t, kBytes>(best + at));
        }
      }
      for (auto& sum : sums) sum = acc_t(1) / sum;
      std::memcpy(best + x, sums, sizeof sums);
    }
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
