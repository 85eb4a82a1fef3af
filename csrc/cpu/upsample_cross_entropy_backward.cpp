// Gradient of the cross entropy of bilinearly upsampled logits, on the CPU, in vectors of pixels: the softmax is
// computed again from the kept log-sum-exp, and what is upsampled stays in registers, as forward.
#include "cross_entropy_rows.h"

namespace pspnet_fast::cpu {
namespace {

constexpr int64_t kTileRows = 8;  // lines of pixels whose tables are in hand at once

// A unit is one or more neighbouring blocks of rows of logits with the pixels between. A block's first row gets a part
// from the block before, too, and these two parts are added whether one unit has both or not: the bits depend on the
// blocks, which a map's size decides, not on how many images share out the threads. What two units have of a row goes
// to `shared` and is added in a second pass.
template <class T>
struct CrossEntropyBackward : CrossEntropyBase<T, UpsampleCrossEntropyBackwardArgs> {
  using Base = CrossEntropyBase<T, UpsampleCrossEntropyBackwardArgs>;
  using Base::Base, Base::a;
  using typename Base::acc_t;
  static constexpr int64_t kColumns = Tile<acc_t>::kColumns, kTogether = 4;  // classes folded at once
  int64_t spans = 1;                                                         // units of an image
  acc_t* shared = nullptr;  // [N, spans, 2, K, w]: of a unit's first row, from this unit and the one before

  PSP_INLINE int64_t first_block(int64_t span) const { return span * this->blocks / spans; }

  // Some lines of a tile: what the classes of a pixel have in common.
  struct alignas(64) Tables {
    acc_t lse[kTileRows * kColumns], scale[kTileRows * kColumns];   // of the softmax
    acc_t focus[kTileRows * kColumns], grad[kTileRows * kColumns];  // subtracted at the target; and by smoothing
    typename ExpConstants<acc_t>::Int targets[kTileRows * kColumns];
  };

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    RowPair<acc_t> logits;
    Tables tables;
    const int64_t line = a.K * a.w, tile_line = (a.K + kTogether - 1) / kTogether * kTogether * kColumns;
    Scratch<acc_t> above(tile_line), below(tile_line), rows;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / spans, block = first_block(unit % spans), end_block = first_block(unit % spans + 1);
      const int64_t first = this->first_row(block), last = this->first_row(end_block);
      rows.assign((last - first + end_block - block) * line, acc_t(0));  // a line more than a block's own, of the next
      for (int64_t column = 0; column < a.W; column += kColumns) {
        const Tile<acc_t> tile(this->columns, column);
        for (Row<acc_t>& row : logits.rows) row.index = -1;
        acc_t* to = rows.data();
        for (int64_t b = block; b < end_block; ++b) {
          std::fill(above.begin(), above.end(), acc_t(0));
          for (int64_t i = this->first_row(b); i < this->first_row(b + 1); ++i, to += line) {
            std::fill(below.begin(), below.end(), acc_t(0));
            const int64_t bottom = this->rows.begin[i + 1];
            if (this->rows.begin[i] < bottom) this->template read<kBytes>(logits, tile, n, i);
            acc_t* const under = logits.low == logits.high ? above.data() : below.data();
            for (int64_t y = this->rows.begin[i]; y < bottom; y += kTileRows) {
              const int64_t count = std::min(kTileRows, bottom - y);
              if (!fill(tables, tile, n, y, count)) continue;
              if (logits.clamped()) add_exactly(tables, tile, n, y, count, above.data(), under);
              add<kBytes>(*logits.low, *logits.high, tile, tables, y, count, above.data(), under);
            }
            fold<kBytes>(tile, above.data(), to);
            std::swap(above, below);
          }
          fold<kBytes>(tile, above.data(), to);
          to += line;
        }
      }
      acc_t* row = rows.data();
      for (int64_t b = block; b < end_block; ++b, row += line) {
        for (int64_t i = this->first_row(b); i < this->first_row(b + 1); ++i, row += line) {
          if (i == first && b > 0) {
            std::copy(row, row + line, shared + 2 * unit * line);
            continue;
          }
          if (b > block && i == this->first_row(b)) {
            for (int64_t k = 0; k < line; ++k) row[k] += row[k - line];
          }
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
  template <int kBytes>
  PSP_INLINE void add(const Row<acc_t>& low, const Row<acc_t>& high, const Tile<acc_t>& tile, const Tables& tables,
                      int64_t y, int64_t count, acc_t* above, acc_t* below) const {
    using V = Vector<acc_t, kBytes>;
    constexpr int64_t kStep = kLanes<acc_t, kBytes>;
    constexpr auto load = cpu::load<acc_t, kBytes>;
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
          grad -=
              load_integers<acc_t, kBytes>(&tables.targets[pixel]) == static_cast<typename ExpConstants<acc_t>::Int>(k)
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

  // Adds the gradient of the pixels that clamped logits may have part in, and takes them out of the tables.
  __attribute__((noinline, cold)) void add_exactly(Tables& tables, const Tile<acc_t>& tile, int64_t n, int64_t y,
                                                   int64_t count, acc_t* above, acc_t* below) const {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t x = 0; x < tile.columns; ++x) {
        const int64_t at = r * kColumns + x;
        if (!(tables.lse[at] < kDoubtful<acc_t>)) continue;
        const Scratch<double> logs = this->log_softmax(n, y + r, tile.first + x);
        for (int64_t k = 0; k < a.K; ++k) {
          acc_t grad = static_cast<acc_t>(std::exp(logs[k])) * tables.scale[at] - this->smooth[k] * tables.grad[at];
          if (k == tables.targets[at]) grad -= tables.focus[at];
          const acc_t lower = this->rows.pixels[y + r].lambda * grad;
          above[k * kColumns + x] += grad - lower;
          below[k * kColumns + x] += lower;
        }
        tables.targets[at] = kIgnored;
        tables.scale[at] = tables.focus[at] = tables.grad[at] = 0;
        tables.lse[at] = std::numeric_limits<acc_t>::max();
      }
    }
  }

  // Adds a tile's part of an interpolated row to the row of logits' gradients, [K, w].
  template <int kBytes>
  PSP_INLINE void fold(const Tile<acc_t>& tile, const acc_t* sums, acc_t* row) const {
    if (tile.stride == kLanes<acc_t> && is_finite<kBytes>(sums)) {
      fold_vectors<kBytes>(tile, sums, row);
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

  template <int kBytes>
  PSP_INLINE bool is_finite(const acc_t* sums) const {
    constexpr int64_t kStep = kLanes<acc_t, kBytes>;
    Vector<acc_t, kBytes> zeros = {};
    for (int64_t i = 0; i < a.K * kColumns; i += kStep) zeros += load<acc_t, kBytes>(sums + i) * acc_t(0);
    acc_t total = 0;
    for (int64_t lane = 0; lane < kStep; ++lane) total += zeros[lane];
    return total == 0;
  }

  // The same, of what is finite, as a product with the matrix of interpolation, where its rows are of one cache line.
  template <int kBytes>
  PSP_INLINE void fold_vectors(const Tile<acc_t>& tile, const acc_t* sums, acc_t* row) const {
    constexpr int64_t kRow = kLanes<acc_t>, kStep = kLanes<acc_t, kBytes>, kParts = kRow / kStep;
    acc_t weights[kColumns * kRow] = {};
    for (int64_t x = 0; x < tile.columns; ++x) {
      weights[x * kRow + tile.low[x]] += 1 - tile.lambda[x];
      weights[x * kRow + tile.high[x]] += tile.lambda[x];
    }
    for (int64_t k = 0; k < a.K; k += kTogether) {
      Vector<acc_t, kBytes> parts[kTogether][kParts] = {};
      for (int64_t x = 0; x < tile.columns; ++x) {
        Vector<acc_t, kBytes> line[kParts];
        for (int64_t q = 0; q < kParts; ++q) line[q] = load<acc_t, kBytes>(weights + x * kRow + q * kStep);
        for (int64_t c = 0; c < kTogether; ++c) {
          for (int64_t q = 0; q < kParts; ++q) parts[c][q] += sums[(k + c) * kColumns + x] * line[q];
        }
      }
      for (int64_t c = 0; c < std::min(kTogether, a.K - k); ++c) {
        acc_t values[kRow];
        std::memcpy(values, parts[c], sizeof values);
        acc_t* const to = row + (k + c) * a.w + tile.from;
        for (int64_t j = 0; j < tile.count; ++j) to[j] += values[j];
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

// Second pass: the rows between two units.
template <class T>
struct AddShared {
  const CrossEntropyBackward<T>& first;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t line = first.a.K * first.a.w;
    Scratch<acc_type<T>> row(line);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / first.spans, span = unit % first.spans;
      if (span == 0) continue;
      const acc_type<T>* parts = first.shared + 2 * unit * line;
      for (int64_t k = 0; k < line; ++k) row[k] = parts[k] + parts[line + k];
      first.write(row.data(), n, first.first_row(first.first_block(span)));
    }
  }
};

}  // namespace

void upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    // Blocks enough for many threads, as long as what they share stays small.
    constexpr int64_t kBlocks = 16, kSharedBytes = int64_t{4} << 20;
    CrossEntropyBackward<T> task(a, 1);
    const int64_t unit_elements = 2 * a.w * a.K;
    const int64_t most =
        std::max<int64_t>(4, kSharedBytes / (unit_elements * static_cast<int64_t>(sizeof(acc_type<T>))));
    task.blocks = std::min({kBlocks, most, a.h});
    task.spans = std::max<int64_t>(task.blocks / a.N, 1);
    const int64_t units = a.N * task.spans;
    Scratch<acc_type<T>> shared(task.spans > 1 ? units * unit_elements : 0);
    task.shared = shared.data();
    parallel(units, task);
    if (task.spans > 1) parallel(units, AddShared<T>{task});
  });
}

}  // namespace pspnet_fast::cpu
