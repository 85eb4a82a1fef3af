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

constexpr int64_t kTileRows = 8;  // lines of pixels whose tables are in hand at once

// A unit is a block of rows of logits with the pixels between.
template <class T>
struct CrossEntropy : CrossEntropyBase<T, UpsampleCrossEntropyArgs> {
  using Base = CrossEntropyBase<T, UpsampleCrossEntropyArgs>;
  using Base::Base, Base::kStep, Base::a;
  using typename Base::acc_t, typename Base::V;
  static constexpr int64_t kColumns = Tile<acc_t>::kColumns;
  double* sums = nullptr;  // [units, 2]: losses and weights
  std::atomic<int64_t>* bad_pixel = nullptr;

  // A line of a tile: its place, the logits around it, and what is found.
  struct alignas(64) Line {
    int64_t n, y;
    acc_t mu;
    Row<acc_t> low, high;
    int targets[kColumns];
    acc_t shifts[kColumns], log_sums[kColumns];  // the binary logarithm of the sum of 2^(logit - shift)
    double loss, weight;
  };

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    Line line;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % this->blocks;
      line.n = unit / this->blocks, line.loss = line.weight = 0;
      for (int64_t first = 0; first < a.W; first += kColumns) {
        const Tile<acc_t> tile(this->columns, first);
        line.low.index = line.high.index = -1;
        for (int64_t i = this->first_row(block); i < this->first_row(block + 1); ++i) {
          if (this->rows.begin[i] == this->rows.begin[i + 1]) continue;
          std::swap(line.low, line.high);
          this->read(line.low, tile, line.n, i);
          this->read(line.high, tile, line.n, std::min(i + 1, a.h - 1));
          for (line.y = this->rows.begin[i]; line.y < this->rows.begin[i + 1]; ++line.y) {
            line.mu = this->rows.pixels[line.y].lambda;
            this->read_targets(line.targets, tile, line.n, line.y);
            sum_exponentials(line, tile);
            take_losses(line, tile);
          }
        }
      }
      sums[2 * unit] = line.loss, sums[2 * unit + 1] = line.weight;
    }
  }

  PSP_INLINE void sum_exponentials(Line& line, const Tile<acc_t>& tile) const {
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
          shifts[v] = logit(line, 0, x + v * kStep);
          for (int64_t k = 1; k < a.K; ++k) {
            const V value = logit(line, k, x + v * kStep);
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

  template <size_t vectors>
  PSP_INLINE void sum_exp(const Line& line, int64_t x, const V (&shifts)[vectors], V (&totals)[vectors]) const {
    for (V& total : totals) total = V{};
    for (int64_t k = 0; k < a.K; ++k) {
      for (size_t v = 0; v < vectors; ++v) {
        totals[v] += exp2_vector<acc_t>(logit(line, k, x + static_cast<int64_t>(v) * kStep) - shifts[v]);
      }
    }
  }

  PSP_INLINE V logit(const Line& line, int64_t k, int64_t x) const {
    const V low = load(&line.low.values[k * kColumns + x]);
    return low + line.mu * (load(&line.high.values[k * kColumns + x]) - low);
  }

  // Writes what is kept of each pixel and adds losses and weights.
  PSP_INLINE void take_losses(Line& line, const Tile<acc_t>& tile) const {
    acc_t *losses = static_cast<acc_t*>(a.loss), *lses = static_cast<acc_t*>(a.lse);
    for (int64_t x = 0; x < tile.columns; ++x) {
      const int64_t pixel = (line.n * a.H + line.y) * a.W + tile.first + x, target = line.targets[x];
      acc_t pixel_loss = 0, lse = 0;
      if (target >= 0) {
        const int64_t at = target * kColumns + x;
        lse = line.shifts[x] + line.log_sums[x];
        const acc_t picked = mix(line.low.values[at], line.high.values[at], line.mu);
        pixel_loss = this->focus[target] * (line.log_sums[x] - (picked - line.shifts[x]));
        if (this->smoothing) {
          pixel_loss += this->smooth_total * lse - mix(line.low.smooth[x], line.high.smooth[x], line.mu);
        }
        pixel_loss *= acc_t(kLn2);
        line.weight += static_cast<double>(this->weight(target));
        line.loss += static_cast<double>(pixel_loss);
      } else if (target == kBad) {
        note_bad(pixel);
      }
      lses[pixel] = lse;
      if (a.reduction == Reduction::kNone) losses[pixel] = pixel_loss;
    }
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
  using Base::Base, Base::kStep, Base::a;
  using typename Base::acc_t, typename Base::V;
  static constexpr int64_t kColumns = Tile<acc_t>::kColumns, kTogether = 4;  // classes folded at once
  acc_t* shared = nullptr;  // [N, blocks, 2, K, w]: of a block's first row, from this block and the one before

  // Some lines of a tile: what the classes of a pixel have in common.
  struct alignas(64) Tables {
    acc_t lse[kTileRows * kColumns], scale[kTileRows * kColumns];   // of the softmax
    acc_t focus[kTileRows * kColumns], grad[kTileRows * kColumns];  // subtracted at the target; and by smoothing
    typename ExpConstants<acc_t>::Int targets[kTileRows * kColumns];
  };

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    Row<acc_t> low, high;
    Tables tables;
    const int64_t line = a.K * a.w, tile_line = (a.K + kTogether - 1) / kTogether * kTogether * kColumns;
    std::vector<acc_t> above(tile_line), below(tile_line), rows;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / this->blocks, block = unit % this->blocks;
      const int64_t first = this->first_row(block), last = this->first_row(block + 1);
      rows.assign((last - first + 1) * line, acc_t(0));
      for (int64_t column = 0; column < a.W; column += kColumns) {
        const Tile<acc_t> tile(this->columns, column);
        low.index = high.index = -1;
        std::fill(above.begin(), above.end(), acc_t(0));
        for (int64_t i = first; i < last; ++i) {
          std::fill(below.begin(), below.end(), acc_t(0));
          const int64_t bottom = this->rows.begin[i + 1];
          if (this->rows.begin[i] < bottom) {
            std::swap(low, high);
            this->read(low, tile, n, i);
            this->read(high, tile, n, std::min(i + 1, a.h - 1));
          }
          acc_t* const under = i + 1 < a.h ? below.data() : above.data();
          for (int64_t y = this->rows.begin[i]; y < bottom; y += kTileRows) {
            const int64_t count = std::min(kTileRows, bottom - y);
            if (!fill(tables, tile, n, y, count)) continue;
            add(low, high, tile, tables, y, count, above.data(), under);
          }
          fold(tile, above.data(), &rows[(i - first) * line]);
          std::swap(above, below);
        }
        fold(tile, above.data(), &rows[(last - first) * line]);
      }
      for (int64_t i = first; i < last; ++i) {
        const acc_t* row = &rows[(i - first) * line];
        if (i == first && block > 0) {
          std::copy(row, row + line, shared + 2 * unit * line);
        } else {
          write(row, n, i);
        }
      }
      if (last < a.h) std::copy(rows.end() - line, rows.end(), shared + (2 * unit + 3) * line);
    }
  }

  // Whether any pixel has a gradient.
  PSP_INLINE bool fill(Tables& tables, const Tile<acc_t>& tile, int64_t n, int64_t y, int64_t count) const {
    const acc_t *grads = static_cast<const acc_t*>(a.grad_loss), *lses = static_cast<const acc_t*>(a.lse);
    acc_t factor = a.reduction == Reduction::kNone ? acc_t(1) : *grads;
    if (a.reduction == Reduction::kMean) {
      const acc_t total = *static_cast<const acc_t*>(a.total_weight);
      factor = total == 0 ? acc_t(0) : factor / total;
    }
    int any = 0, targets[kColumns];
    std::fill_n(targets, kColumns, kIgnored);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t pixel = (n * a.H + y + r) * a.W + tile.first, to = r * kColumns;
      this->read_targets(targets, tile, n, y + r);
      for (int64_t x = 0; x < kColumns; ++x) {
        const bool counts = targets[x] >= 0;
        any |= counts;
        tables.targets[to + x] = targets[x];
        tables.focus[to + x] = counts ? this->focus[counts ? targets[x] : 0] : acc_t(0);
        tables.grad[to + x] = counts ? factor : acc_t(0);
        // exp(z - this) is 0, not infinite, where the pixel is ignored
        tables.lse[to + x] = std::numeric_limits<acc_t>::max();
      }
      for (int64_t x = 0; x < tile.columns; ++x) {
        if (targets[x] < 0) continue;
        if (a.reduction == Reduction::kNone) tables.grad[to + x] = grads[pixel + x];
        tables.lse[to + x] = lses[pixel + x];
      }
      for (int64_t x = 0; x < kColumns; ++x) {
        tables.focus[to + x] *= tables.grad[to + x];
        tables.scale[to + x] = tables.focus[to + x] + tables.grad[to + x] * this->smooth_total;
      }
    }
    return any != 0;
  }

  // Adds the gradient of the lines [y, y + count) to the interpolated rows above and below.
  PSP_INLINE void add(const Row<acc_t>& low, const Row<acc_t>& high, const Tile<acc_t>& tile, const Tables& tables,
                      int64_t y, int64_t count, acc_t* above, acc_t* below) const {
    const SourceIndex<acc_t>* lines = &this->rows.pixels[y];
    for (int64_t k = 0; k < a.K; ++k) {
      for (int64_t x = 0; x < tile.columns; x += kStep) {
        const int64_t at = k * kColumns + x;
        const V top = load(&low.values[at]), down = load(&high.values[at]) - top;
        V whole = {}, lower = {};
        for (int64_t r = 0; r < count; ++r) {
          const int64_t pixel = r * kColumns + x;
          const acc_t mu = lines[r].lambda;
          V grad = exp2_vector<acc_t>(top + mu * down - load(&tables.lse[pixel])) * load(&tables.scale[pixel]);
          if (this->smoothing) grad -= this->smooth[k] * load(&tables.grad[pixel]);
          // here, not once all pixels are summed, where it would cost the digits of a softmax near 1
          grad -= load_integers<acc_t>(&tables.targets[pixel]) == static_cast<typename ExpConstants<acc_t>::Int>(k)
                      ? load(&tables.focus[pixel])
                      : V{};
          whole += grad;
          lower += mu * grad;
        }
        add_to<acc_t>(above + at, whole - lower);
        add_to<acc_t>(below + at, lower);
      }
    }
  }

  // Adds a tile's part of an interpolated row to the row of logits' gradients, [K, w].
  PSP_INLINE void fold(const Tile<acc_t>& tile, const acc_t* sums, acc_t* row) const {
    if (tile.stride == kStep) {
      fold_vectors(tile, sums, row);
      return;
    }
    for (int64_t k = 0; k < a.K; ++k) {
      acc_t* const to = row + k * a.w + tile.from;
      for (int64_t x = 0; x < tile.columns; ++x) {
        const acc_t sum = sums[k * kColumns + x], right = tile.lambda[x] * sum;
        to[tile.low[x]] += sum - right;
        to[tile.high[x]] += right;
      }
    }
  }

  // The same as a product with the matrix of interpolation, where its rows are vectors.
  PSP_INLINE void fold_vectors(const Tile<acc_t>& tile, const acc_t* sums, acc_t* row) const {
    V weights[kColumns] = {};
    for (int64_t x = 0; x < tile.columns; ++x) {
      weights[x][tile.low[x]] += 1 - tile.lambda[x];
      weights[x][tile.high[x]] += tile.lambda[x];
    }
    for (int64_t k = 0; k < a.K; k += kTogether) {
      V parts[kTogether] = {};
      for (int64_t x = 0; x < tile.columns; ++x) {
        for (int64_t c = 0; c < kTogether; ++c) parts[c] += sums[(k + c) * kColumns + x] * weights[x];
      }
      for (int64_t c = 0; c < std::min(kTogether, a.K - k); ++c) {
        acc_t* const to = row + (k + c) * a.w + tile.from;
        for (int64_t j = 0; j < tile.count; ++j) to[j] += parts[c][j];
      }
    }
  }

  PSP_INLINE void write(const acc_t* row, int64_t n, int64_t i) const {
    T* __restrict__ to = mutable_at<T>(a.grad_logits, n, 0, i);
    if (a.channels_last) {
      for (int64_t j = 0; j < a.w; ++j) {
        for (int64_t k = 0; k < a.K; ++k) to[j * a.grad_logits.stride_w + k] = from_acc<T>(row[k * a.w + j]);
      }
    } else {
      for (int64_t k = 0; k < a.K; ++k) {
        for (int64_t j = 0; j < a.w; ++j) to[k * a.grad_logits.stride_c + j] = from_acc<T>(row[k * a.w + j]);
      }
    }
  }
};

// Second pass: the rows between two blocks; a unit is a block.
template <class T>
struct AddShared {
  const CrossEntropyBackward<T>& first;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t line = first.a.K * first.a.w;
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
    const int64_t unit_elements = 2 * a.w * a.K;
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
