// Counts pixels by target and prediction, on the CPU. Values are checked before anything is counted.
#include <atomic>

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {
namespace {

constexpr int64_t kBlock = 1 << 14;             // pixels of a unit
constexpr int64_t kMostPrivateCells = 1 << 16;  // half a megabyte of counts

template <class Prediction, class Target>
struct ConfusionMatrix {
  const ConfusionMatrixArgs& a;
  const Prediction* prediction = static_cast<const Prediction*>(a.prediction);
  const Target* target = static_cast<const Target*>(a.target);

  int64_t units() const { return (a.pixels + kBlock - 1) / kBlock; }

  PSP_INLINE bool counts(int64_t i) const { return static_cast<int64_t>(target[i]) != a.ignore_index; }
  // Negative values are large ones, unsigned.
  PSP_INLINE bool is_class(int64_t value) const { return static_cast<uint64_t>(value) < static_cast<uint64_t>(a.K); }

  void check() const {
    std::atomic<bool> valid = true;
    parallel(units(), Check{*this, valid});
    for (int64_t i = 0; !valid && i < a.pixels; ++i) {
      if (!counts(i)) continue;
      PSP_CHECK_INDEX(is_class(target[i]), "target must be in [0, ", a.K, ") or ignore_index = ", a.ignore_index,
                      ", but holds ", static_cast<int64_t>(target[i]));
      PSP_CHECK_INDEX(is_class(prediction[i]), "prediction must be in [0, ", a.K, "), but holds ",
                      static_cast<int64_t>(prediction[i]));
    }
  }

  struct Check {
    const ConfusionMatrix& m;
    std::atomic<bool>& valid;

    PSP_INLINE void operator()(int64_t begin, int64_t end) const {
      bool all = true;
      for (int64_t i = begin * kBlock; i < std::min(end * kBlock, m.a.pixels); ++i) {
        all &= (!m.counts(i)) | (m.is_class(m.target[i]) & m.is_class(m.prediction[i]));
      }
      if (!all) valid = false;
    }
  };

  // Sums of integers are the same in every order, so threads add up as they come.
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t cells = a.K * a.K, first = begin * kBlock, last = std::min(end * kBlock, a.pixels);
    const auto add = [&](int64_t cell, int64_t count) {
      std::atomic_ref<int64_t>(a.counts[cell]).fetch_add(count, std::memory_order_relaxed);
    };
    Scratch<int64_t> own(cells <= kMostPrivateCells ? cells : 0);
    for (int64_t i = first; i < last; ++i) {
      if (!counts(i)) continue;
      const int64_t cell = static_cast<int64_t>(target[i]) * a.K + static_cast<int64_t>(prediction[i]);
      if (own.empty()) {
        add(cell, 1);
      } else {
        ++own[cell];
      }
    }
    for (int64_t cell = 0; cell < static_cast<int64_t>(own.size()); ++cell) {
      if (own[cell] != 0) add(cell, own[cell]);
    }
  }
};

}  // namespace

void confusion_matrix(const ConfusionMatrixArgs& args) {
  dispatch_int(args.prediction_type, [&](auto prediction) {
    dispatch_int(args.target_type, [&](auto target) {
      const ConfusionMatrix<decltype(prediction), decltype(target)> task{args};
      task.check();
      parallel(task.units(), task);
    });
  });
}

}  // namespace pspnet_fast::cpu
