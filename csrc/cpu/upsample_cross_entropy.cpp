// Cross entropy of bilinearly upsampled logits, on the CPU, in vectors of pixels: a tile of columns at a time, whose
// two rows of logits are interpolated horizontally first. What is upsampled stays in registers.
//
// A cell is what lies between two rows of logits, or two columns, with the pixels whose lower neighbours they are.
#include <atomic>
#include <limits>

#include "cross_entropy_rows.h"
#include "vector_log.h"

namespace pspnet_fast::cpu {
namespace {

// A unit is a block of rows of logits with the pixels between.
template <class T>
struct CrossEntropy : CrossEntropyBase<T, UpsampleCrossEntropyArgs> {
  using Base = CrossEntropyBase<T, UpsampleCrossEntropyArgs>;
  using Base::Base, Base::a;
  using typename Base::acc_t;
  static constexpr int64_t kColumns = Tile<acc_t>::kColumns;
  double* sums = nullptr;  // [units, 2]: losses and weights
  std::atomic<int64_t>* bad_pixel = nullptr;

  // A line of a tile: its place, the logits around it, and what is found.
  struct alignas(64) Line {
    int64_t n, y;
    acc_t mu;
    RowPair<acc_t> logits;
    int targets[kColumns];
    acc_t shifts[kColumns], log_sums[kColumns];  // the binary logarithm of the sum of 2^(logit - shift)
    double loss, weight;
  };

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    Line line{};
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % this->blocks;
      line.n = unit / this->blocks, line.loss = line.weight = 0;
      for (int64_t first = 0; first < a.W; first += kColumns) {
        const Tile<acc_t> tile(this->columns, first);
        std::fill_n(line.targets, kColumns, kIgnored);  // behind the map's last column
        for (Row<acc_t>& row : line.logits.rows) row.index = -1;
        for (int64_t i = this->first_row(block); i < this->first_row(block + 1); ++i) {
          if (this->rows.begin[i] == this->rows.begin[i + 1]) continue;
          this->template read<kBytes>(line.logits, tile, line.n, i);
          for (line.y = this->rows.begin[i]; line.y < this->rows.begin[i + 1]; ++line.y) {
            line.mu = this->rows.pixels[line.y].lambda;
            if (this->read_targets(line.targets, tile, line.n, line.y)) note_bad(line, tile);
            sum_exponentials<kBytes>(line, tile);
            take_losses(line, tile);
          }
        }
      }
      sums[2 * unit] = line.loss, sums[2 * unit + 1] = line.weight;
    }
  }

  template <int kBytes>
  PSP_INLINE void sum_exponentials(Line& line, const Tile<acc_t>& tile) const {
    using V = Vector<acc_t, kBytes>;
    constexpr int64_t kStep = kLanes<acc_t, kBytes>;
    constexpr int64_t kVectors = 4;  // at once, in registers
    for (int64_t x = 0; x < tile.columns; x += kVectors * kStep) {
      V shifts[kVectors] = {}, totals[kVectors];
      sum_exp(line, x, shifts, totals);
      bool vanished = false;  // all far below 0
      for (const V& total : totals) {
        for (int64_t lane = 0; lane < kStep; ++lane) vanished |= total[lane] < acc_t(0x1p-60);
      }
      if (vanished) {
        for (int64_t v = 0; v < kVectors; ++v) {
          shifts[v] = logit<V>(line, 0, x + v * kStep);
          for (int64_t k = 1; k < a.K; ++k) {
            const V value = logit<V>(line, k, x + v * kStep);
            shifts[v] = value > shifts[v] ? value : shifts[v];
          }
        }
        sum_exp(line, x, shifts, totals);
      }
      for (V& total : totals) total = log_vector<acc_t>(total) * acc_t(kLog2E);
      std::memcpy(line.shifts + x, shifts, sizeof shifts);
      std::memcpy(line.log_sums + x, totals, sizeof totals);
    }
  }

  template <class V, size_t vectors>
  PSP_INLINE void sum_exp(const Line& line, int64_t x, const V (&shifts)[vectors], V (&totals)[vectors]) const {
    for (V& total : totals) total = V{};
    for (int64_t k = 0; k < a.K; ++k) {
      for (size_t v = 0; v < vectors; ++v) {
        const int64_t at = x + static_cast<int64_t>(v * sizeof(V) / sizeof(acc_t));
        totals[v] += exp2_vector<acc_t>(logit<V>(line, k, at) - shifts[v]);
      }
    }
  }

  template <class V>
  PSP_INLINE V logit(const Line& line, int64_t k, int64_t x) const {
    const V low = load<acc_t, sizeof(V)>(&line.logits.low->values[k * kColumns + x]);
    return low + line.mu * (load<acc_t, sizeof(V)>(&line.logits.high->values[k * kColumns + x]) - low);
  }

  // Writes what is kept of each pixel and adds losses and weights.
  PSP_INLINE void take_losses(Line& line, const Tile<acc_t>& tile) const {
    const Row<acc_t>&low = *line.logits.low, &high = *line.logits.high;
    acc_t losses[kColumns], lses[kColumns], picked[kColumns];
    double loss = 0, weight = 0;
    const acc_t *above = low.values.data(), *under = high.values.data(), *focus = this->focus.data();
    for (int x = 0; x < static_cast<int>(kColumns); ++x) {
      const int target = std::max(line.targets[x], 0), at = target * static_cast<int>(kColumns) + x;
      picked[x] = mix(above[at], under[at], line.mu);
      losses[x] = focus[target];
    }
    if (a.weight) {
      for (const int target : line.targets) weight += target < 0 ? 0 : static_cast<double>(this->weight(target));
    } else {
      int count = 0;
      for (const int target : line.targets) count += target >= 0;
      weight = count;
    }
    for (int64_t x = 0; x < kColumns; ++x) {
      const bool counts = line.targets[x] >= 0;
      const acc_t lse = line.shifts[x] + line.log_sums[x];
      acc_t pixel_loss = losses[x] * (line.log_sums[x] - (picked[x] - line.shifts[x]));
      if (this->smoothing) pixel_loss += this->smooth_total * lse - mix(low.smooth[x], high.smooth[x], line.mu);
      losses[x] = counts ? pixel_loss * acc_t(kLn2) : acc_t(0);
      lses[x] = counts ? lse : acc_t(0);
    }
    if (line.logits.clamped()) correct(line, tile, picked, losses, lses);
#pragma omp simd reduction(+ : loss)
    for (int64_t x = 0; x < kColumns; ++x) loss += static_cast<double>(losses[x]);
    line.loss += loss, line.weight += weight;
    const int64_t pixel = (line.n * a.H + line.y) * a.W + tile.first;
    std::copy_n(lses, tile.columns, static_cast<acc_t*>(a.lse) + pixel);
    if (a.reduction == Reduction::kNone) std::copy_n(losses, tile.columns, static_cast<acc_t*>(a.loss) + pixel);
  }

  // The losses that clamped logits may have part in.
  __attribute__((noinline, cold)) void correct(const Line& line, const Tile<acc_t>& tile, const acc_t* picked,
                                               acc_t* losses, acc_t* lses) const {
    for (int64_t x = 0; x < tile.columns; ++x) {
      if (line.targets[x] < 0) continue;
      if (!this->smoothing && std::min(picked[x], line.shifts[x]) >= kDoubtful<acc_t>) continue;
      losses[x] = exact_loss(line, tile.first + x, line.targets[x], lses[x]);
    }
  }

  // Also makes lse NaN where the softmax is: all logits -infinity.
  acc_t exact_loss(const Line& line, int64_t x, int64_t target, acc_t& lse) const {
    const Scratch<double> logs = this->log_softmax(line.n, line.y, x);
    double loss = -static_cast<double>(this->focus[target]) * logs[target];
    for (int64_t k = 0; k < a.K && this->smoothing; ++k) loss -= static_cast<double>(this->smooth[k]) * logs[k];
    if (std::isnan(logs[0])) lse = std::numeric_limits<acc_t>::quiet_NaN();
    return static_cast<acc_t>(loss);
  }

  __attribute__((noinline, cold)) void note_bad(const Line& line, const Tile<acc_t>& tile) const {
    const int64_t x = std::find(line.targets, line.targets + tile.columns, kBad) - line.targets;
    const int64_t pixel = (line.n * a.H + line.y) * a.W + tile.first + x;
    int64_t before = bad_pixel->load();
    while (pixel < before && !bad_pixel->compare_exchange_weak(before, pixel)) {
    }
  }
};

}  // namespace

void upsample_cross_entropy(const UpsampleCrossEntropyArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kRows = 4;  // of a block
    CrossEntropy<T> task(a, (a.h + kRows - 1) / kRows);
    const int64_t units = a.N * task.blocks;
    Scratch<double> sums(2 * units);
    std::atomic<int64_t> bad_pixel = a.N * a.H * a.W;
    task.sums = sums.data(), task.bad_pixel = &bad_pixel;
    parallel(units, task);
    *a.bad_pixel = bad_pixel < a.N * a.H * a.W ? bad_pixel.load() : -1;
    double loss = 0, weight = 0;
    for (int64_t unit = 0; unit < units; ++unit) loss += sums[2 * unit], weight += sums[2 * unit + 1];
    *static_cast<acc_type<T>*>(a.total_weight) = static_cast<acc_type<T>>(weight);
    if (a.reduction == Reduction::kNone) return;
    if (a.reduction == Reduction::kMean) loss = weight == 0 ? 0 * loss : loss / weight;  // a NaN stays
    *static_cast<acc_type<T>*>(a.loss) = static_cast<acc_type<T>>(loss);
  });
}

}  // namespace pspnet_fast::cpu
