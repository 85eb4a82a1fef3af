// The class of the greatest logit at every pixel of an upsampled map, on the CPU: a running maximum over the classes,
// in vectors of pixels; and its probability, 1 / sum over k of exp(logit_k - greatest).
#include "upsampled_rows.h"
#include "vector_exp.h"

namespace pspnet_fast::cpu {
namespace {

template <class T, class Class>
struct UpsampleArgmax {
  using acc_t = acc_type<T>;
  static constexpr int64_t kVectors = 4, kPixels = kVectors * kLanes<acc_t>;  // at once, in registers

  const UpsampleArgmaxArgs& a;
  Upsampling<T> upsampling{a};

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    UpsampledRows<T> rows(upsampling);
    for (int64_t number = begin; number < end; ++number) {
      const auto unit = upsampling.unit(number);
      rows.go_to(unit);
      const int64_t to = (unit.n * a.H + unit.y) * a.W + unit.first;
      for (int64_t x = 0; x < unit.columns; x += kPixels) {
        const int64_t count = std::min(kPixels, unit.columns - x);
        Vector<acc_t> best[kVectors];
        find(rows, x, best, static_cast<Class*>(a.classes) + to + x, count);
        if (a.confidence != nullptr) confide(rows, x, best, static_cast<acc_t*>(a.confidence) + to + x, count);
      }
    }
  }

 private:
  // As in torch.argmax, the first of equals wins, and NaN is the greatest.
  PSP_INLINE void find(const UpsampledRows<T>& rows, int64_t x, Vector<acc_t> (&best)[kVectors], Class* to,
                       int64_t count) const {
    IntVector<acc_t> classes[kVectors] = {};
    for (int64_t v = 0; v < kVectors; ++v) best[v] = rows.load(0, x + v * kLanes<acc_t>);
    for (int64_t k = 1; k < a.K; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const Vector<acc_t> value = rows.load(k, x + v * kLanes<acc_t>);
        // Each condition is one comparison: GCC takes vectors of combined conditions apart.
        const IntVector<acc_t> it = IntVector<acc_t>{} + static_cast<typename ExpConstants<acc_t>::Int>(k);
        classes[v] = value <= best[v] ? classes[v] : best[v] == best[v] ? it : classes[v];
        best[v] = value <= best[v] ? best[v] : best[v] == best[v] ? value : best[v];
      }
    }
    typename ExpConstants<acc_t>::Int found[kPixels];
    std::memcpy(found, classes, sizeof found);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Class>(found[i]);
  }

  PSP_INLINE void confide(const UpsampledRows<T>& rows, int64_t x, const Vector<acc_t> (&best)[kVectors], acc_t* to,
                          int64_t count) const {
    Vector<acc_t> sums[kVectors] = {};
    for (int64_t k = 0; k < a.K; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[v] += exp_vector<acc_t>(rows.load(k, x + v * kLanes<acc_t>) - best[v]);
      }
    }
    for (auto& sum : sums) sum = acc_t(1) / sum;
    std::memcpy(to, sums, static_cast<size_t>(count) * sizeof(acc_t));
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
