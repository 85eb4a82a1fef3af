// Cross entropy of bilinearly upsampled logits, on the CPU. Vectors run over classes, which lie padded and densely at
// each pixel of the rows of logits in hand: what is upsampled stays in registers.
//
// A cell is what lies between two columns and two rows of logits, with the pixels whose lower neighbours they are.
#include <atomic>
#include <cmath>
#include <limits>

#include "cross_entropy_rows.h"

namespace pspnet_fast::cpu {
namespace {

constexpr int64_t kTileRows = 8;  // pixel rows whose tables are in hand at once

template <class acc_t>
PSP_INLINE acc_t mix(acc_t low, acc_t high, acc_t lambda) {
  return low + lambda * (high - low);
}

template <class acc_t>
PSP_INLINE acc_t sum_of_lanes(Vector<acc_t> v) {
  IntVector<acc_t> lane;
  for (int64_t i = 0; i < kLanes<acc_t>; ++i) lane[i] = i;
  for (int half = kLanes<acc_t> / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane ^ half);
  return v[0];
}

// A unit is a block of rows of logits with the pixels between.
template <class T>
struct CrossEntropy : CrossEntropyBase<T, UpsampleCrossEntropyArgs> {
  using Base = CrossEntropyBase<T, UpsampleCrossEntropyArgs>;
  using Base::Base, Base::kStep, Base::a, Base::padded;
  using typename Base::acc_t, typename Base::V;
  double* sums = nullptr;  // [units, 2]: losses and weights
  std::atomic<int64_t>* bad_pixel = nullptr;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    Row<acc_t> low, high;
    std::vector<acc_t> left(padded), step(padded);  // a cell's left side and the way to its right side, on one line
    std::vector<int> targets(a.W);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / this->blocks, block = unit % this->blocks;
      double loss = 0, weight = 0;
      low.index = high.index = -1;
      for (int64_t i = this->first_row(block); i < this->first_row(block + 1); ++i) {
        if (this->rows.begin[i] == this->rows.begin[i + 1]) continue;
        std::swap(low, high);
        this->read(low, n, i);
        this->read(high, n, std::min(i + 1, a.h - 1));
        for (int64_t y = this->rows.begin[i]; y < this->rows.begin[i + 1]; ++y) {
          this->read_targets(targets.data(), n, y);
          for (int64_t j = 0; j < a.w; ++j) cell(low, high, n, y, j, targets.data(), left, step, loss, weight);
        }
      }
      sums[2 * unit] = loss, sums[2 * unit + 1] = weight;
    }
  }

  // Adds the losses and weights of the pixels of line y in cell j.
  PSP_INLINE void cell(const Row<acc_t>& low, const Row<acc_t>& high, int64_t n, int64_t y, int64_t j,
                       const int* targets, std::vector<acc_t>& left, std::vector<acc_t>& step, double& loss,
                       double& weight) const {
    const int64_t first = this->columns.begin[j], end = this->columns.begin[j + 1], next = std::min(j + 1, a.w - 1);
    if (first == end) return;
    const acc_t mu = this->rows.pixels[y].lambda;
    for (int64_t k = 0; k < padded; k += kStep) {
      const V top = load(&low.values[j * padded + k]), top_next = load(&low.values[next * padded + k]);
      const V side = top + mu * (load(&high.values[j * padded + k]) - top);
      const V difference = top_next + mu * (load(&high.values[next * padded + k]) - top_next) - side;
      __builtin_memcpy(&left[k], &side, sizeof side);
      __builtin_memcpy(&step[k], &difference, sizeof difference);
    }
    acc_t *losses = static_cast<acc_t*>(a.loss), *lses = static_cast<acc_t*>(a.lse);
    for (int64_t x = first; x < end; ++x) {
      const int64_t pixel = (n * a.H + y) * a.W + x, target = targets[x];
      acc_t pixel_loss = 0, lse = 0;
      if (target >= 0) {
        const acc_t lambda = this->columns.pixels[x].lambda;
        acc_t shift = 0, sum = sum_exp(left, step, lambda, shift);
        if (sum < acc_t(0x1p-60)) {  // all far below 0: the exponentials would vanish
          shift = greatest(left, step, lambda);
          sum = sum_exp(left, step, lambda, shift);
        }
        const acc_t log_sum = std::log(sum);
        lse = shift + log_sum;
        pixel_loss = this->focus[target] * (log_sum - (left[target] + lambda * step[target] - shift));
        if (this->smoothing) {
          const acc_t side = mix(low.smooth[j], high.smooth[j], mu),
                      other = mix(low.smooth[next], high.smooth[next], mu);
          pixel_loss += this->smooth_total * lse - mix(side, other, lambda);
        }
        weight += static_cast<double>(this->weight(target));
        loss += static_cast<double>(pixel_loss);
      } else if (target == kBad) {
        note_bad(pixel);
      }
      lses[pixel] = lse;
      if (a.reduction == Reduction::kNone) losses[pixel] = pixel_loss;
    }
  }

  PSP_INLINE acc_t sum_exp(const std::vector<acc_t>& left, const std::vector<acc_t>& step, acc_t lambda,
                           acc_t shift) const {
    V sum = {};
    for (int64_t k = 0; k < padded; k += kStep) {
      sum += exp_vector<acc_t>(load(&left[k]) + lambda * load(&step[k]) - shift);
    }
    return sum_of_lanes<acc_t>(sum);
  }

  PSP_INLINE acc_t greatest(const std::vector<acc_t>& left, const std::vector<acc_t>& step, acc_t lambda) const {
    acc_t result = left[0] + lambda * step[0];
    for (int64_t k = 1; k < a.K; ++k) result = std::max(result, left[k] + lambda * step[k]);
    return result;
  }

  PSP_INLINE void note_bad(int64_t pixel) const {
    int64_t before = bad_pixel->load();
    while (pixel < before && !bad_pixel->compare_exchange_weak(before, pixel)) {
    }
  }
};

// A unit is a block of rows of logits with the pixels between. Its first row gets a part from the block before, too:
// these two parts go to `shared` and are added in a second pass.
template <class T>
struct CrossEntropyBackward : CrossEntropyBase<T, UpsampleCrossEntropyBackwardArgs> {
  using Base = CrossEntropyBase<T, UpsampleCrossEntropyBackwardArgs>;
  using Base::Base, Base::kStep, Base::a, Base::padded;
  using typename Base::acc_t, typename Base::V;
  using Classes = IntVector<acc_t>;
  acc_t* shared = nullptr;  // [N, blocks, 2, w, padded]: of a block's first row, from this block and the one before

  // A tile of lines: what the classes of a pixel have in common.
  struct Tables {
    std::vector<acc_t> lse, scale, focus;  // scale: of the softmax; focus: subtracted at the target
    std::vector<int> targets;
    acc_t smooth_left[kTileRows], smooth_right[kTileRows];  // of one cell: smoothing's part, at its two sides
  };

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    Row<acc_t> low, high;
    const int64_t line = a.w * padded;
    std::vector<acc_t> above(line), below(line);
    Tables tables;
    for (auto* table : {&tables.lse, &tables.scale, &tables.focus}) table->resize(kTileRows * a.W);
    tables.targets.resize(kTileRows * a.W);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / this->blocks, block = unit % this->blocks;
      const int64_t first = this->first_row(block), last = this->first_row(block + 1);
      low.index = high.index = -1;
      std::fill(above.begin(), above.end(), acc_t(0));
      for (int64_t i = first; i < last; ++i) {
        std::fill(below.begin(), below.end(), acc_t(0));
        const int64_t bottom = this->rows.begin[i + 1];
        if (this->rows.begin[i] < bottom) {
          std::swap(low, high);
          this->read(low, n, i);
          this->read(high, n, std::min(i + 1, a.h - 1));
        }
        for (int64_t y = this->rows.begin[i]; y < bottom; y += kTileRows) {
          const int64_t count = std::min(kTileRows, bottom - y);
          fill(tables, n, y, count);
          for (int64_t j = 0; j < a.w; ++j) {
            cell(low, high, y, count, j, tables, above.data(), i + 1 < a.h ? below.data() : above.data());
          }
        }
        if (i == first && block > 0) {
          std::copy(above.begin(), above.end(), shared + 2 * unit * line);
        } else {
          write(above.data(), n, i);
        }
        std::swap(above, below);
      }
      if (last < a.h) std::copy(above.begin(), above.end(), shared + (2 * unit + 3) * line);
    }
  }

  PSP_INLINE void fill(Tables& tables, int64_t n, int64_t y, int64_t count) const {
    const acc_t* grads = static_cast<const acc_t*>(a.grad_loss);
    acc_t factor = a.reduction == Reduction::kNone ? acc_t(1) : *grads;
    if (a.reduction == Reduction::kMean) {
      const acc_t total = *static_cast<const acc_t*>(a.total_weight);
      factor = total == 0 ? acc_t(0) : factor / total;
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t pixel = (n * a.H + y + r) * a.W;
      int* targets = &tables.targets[r * a.W];
      this->read_targets(targets, n, y + r);
      for (int64_t x = 0; x < a.W; ++x) {
        const int target = targets[x];
        const acc_t grad = a.reduction == Reduction::kNone ? grads[pixel + x] : factor;
        const acc_t focus = target < 0 ? acc_t(0) : grad * this->focus[target];
        tables.focus[r * a.W + x] = focus;
        tables.scale[r * a.W + x] = target < 0 ? acc_t(0) : focus + grad * this->smooth_total;
        // exp(z - this) is 0, not infinite, where the pixel is ignored
        tables.lse[r * a.W + x] =
            target < 0 ? std::numeric_limits<acc_t>::max() : static_cast<const acc_t*>(a.lse)[pixel + x];
      }
    }
  }

  // Adds the gradient of the pixels of cell j in the lines [y, y + count) to the rows of logits above and below.
  PSP_INLINE void cell(const Row<acc_t>& low, const Row<acc_t>& high, int64_t y, int64_t count, int64_t j,
                       Tables& tables, acc_t* above, acc_t* below) const {
    const int64_t first = this->columns.begin[j], end = this->columns.begin[j + 1];
    if (!sum_smoothing(tables, count, first, end)) return;
    const int64_t here = j * padded, next = std::min(j + 1, a.w - 1) * padded;
    const SourceIndex<acc_t>*lines = &this->rows.pixels[y], *columns = this->columns.pixels.data();
    Classes classes;
    for (int64_t lane = 0; lane < kStep; ++lane) classes[lane] = lane;
    for (int64_t k = 0; k < padded; k += kStep, classes += static_cast<int>(kStep)) {
      const V top = load(&low.values[here + k]), top_next = load(&low.values[next + k]);
      const V down = load(&high.values[here + k]) - top, down_next = load(&high.values[next + k]) - top_next;
      const V smooth = load(&this->smooth[k]);
      V sums[4] = {};  // above left, above right, below left, below right
      for (int64_t r = 0; r < count; ++r) {
        const acc_t mu = lines[r].lambda;
        const V left = top + mu * down, step = top_next + mu * down_next - left;
        V whole = {}, right = {};
        for (int64_t x = first; x < end; ++x) {
          const int64_t pixel = r * a.W + x;
          const acc_t lambda = columns[x].lambda;
          const V focus = classes == tables.targets[pixel] ? V{} + tables.focus[pixel] : V{};
          const V grad = exp_vector<acc_t>(left + lambda * step - tables.lse[pixel]) * tables.scale[pixel] - focus;
          whole += grad;
          right += lambda * grad;
        }
        if (this->smoothing) {
          whole -= smooth * (tables.smooth_left[r] + tables.smooth_right[r]);
          right -= smooth * tables.smooth_right[r];
        }
        sums[0] += (1 - mu) * (whole - right);
        sums[1] += (1 - mu) * right;
        sums[2] += mu * (whole - right);
        sums[3] += mu * right;
      }
      acc_t* const targets[4] = {above + here + k, above + next + k, below + here + k, below + next + k};
      for (int corner = 0; corner < 4; ++corner) {
        const V total = load(targets[corner]) + sums[corner];
        __builtin_memcpy(targets[corner], &total, sizeof total);
      }
    }
  }

  // Fills the cell's tables of smoothing; whether any pixel has a gradient.
  PSP_INLINE bool sum_smoothing(Tables& tables, int64_t count, int64_t first, int64_t end) const {
    bool any = false;
    for (int64_t r = 0; r < count; ++r) {
      acc_t whole = 0, right = 0;
      for (int64_t x = first; x < end; ++x) {
        const int64_t pixel = r * a.W + x;
        any = any || tables.targets[pixel] >= 0;
        if (!this->smoothing) continue;
        const acc_t grad = (tables.scale[pixel] - tables.focus[pixel]) / this->smooth_total;
        whole += grad;
        right += this->columns.pixels[x].lambda * grad;
      }
      tables.smooth_left[r] = whole - right, tables.smooth_right[r] = right;
    }
    return any;
  }

  PSP_INLINE void write(const acc_t* row, int64_t n, int64_t i) const {
    T* to = mutable_at<T>(a.grad_logits, n, 0, i);
    if (a.channels_last) {
      for (int64_t j = 0; j < a.w; ++j) {
        for (int64_t k = 0; k < a.K; ++k) to[j * a.grad_logits.stride_w + k] = from_acc<T>(row[j * padded + k]);
      }
    } else {
      for (int64_t k = 0; k < a.K; ++k) {
        for (int64_t j = 0; j < a.w; ++j) to[k * a.grad_logits.stride_c + j] = from_acc<T>(row[j * padded + k]);
      }
    }
  }
};

// Second pass: the rows between two blocks; a unit is a block.
template <class T>
struct AddShared {
  const CrossEntropyBackward<T>& first;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t line = first.a.w * first.padded;
    std::vector<acc_type<T>> row(line);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / first.blocks, block = unit % first.blocks;
      if (block == 0) continue;
      const acc_type<T>* parts = first.shared + 2 * unit * line;
      for (int64_t k = 0; k < line; ++k) row[k] = parts[k] + parts[line + k];
      first.write(row.data(), n, first.first_row(block));
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
    std::vector<double> sums(2 * units);
    std::atomic<int64_t> bad_pixel = a.N * a.H * a.W;
    task.sums = sums.data(), task.bad_pixel = &bad_pixel;
    parallel(units, task);
    *a.bad_pixel = bad_pixel < a.N * a.H * a.W ? bad_pixel.load() : -1;
    double loss = 0, weight = 0;
    for (int64_t unit = 0; unit < units; ++unit) loss += sums[2 * unit], weight += sums[2 * unit + 1];
    *static_cast<acc_type<T>*>(a.total_weight) = static_cast<acc_type<T>>(weight);
    if (a.reduction == Reduction::kNone) return;
    if (a.reduction == Reduction::kMean) loss = weight == 0 ? 0 : loss / weight;
    *static_cast<acc_type<T>*>(a.loss) = static_cast<acc_type<T>>(loss);
  });
}

void upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    // Blocks enough for many threads, as long as what they share stays small.
    constexpr int64_t kBlocks = 32, kSharedBytes = int64_t{4} << 20;
    CrossEntropyBackward<T> task(a, 1);
    const int64_t unit_elements = 2 * a.w * task.padded;
    const int64_t most =
        std::max<int64_t>(4, kSharedBytes / (unit_elements * static_cast<int64_t>(sizeof(acc_type<T>))));
    task.blocks = std::clamp<int64_t>(std::min(kBlocks, most) / a.N, 1, a.h);
    const int64_t units = a.N * task.blocks;
    std::vector<acc_type<T>> shared(task.blocks > 1 ? units * unit_elements : 0);
    task.shared = shared.data();
    parallel(units, task);
    if (task.blocks > 1) parallel(units, AddShared<T>{task});
  });
}

}  // namespace pspnet_fast::cpu
