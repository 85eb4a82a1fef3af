// Rows of logits for the cross entropy on the CPU, interpolated along a tile of columns; targets, and what both
// directions know of the axes and the classes.
//
// A pixel's loss is focus[t] * (lse - z_t) + sum over k of smooth[k] * (lse - z_k), t the target,
// focus[t] = (1 - label_smoothing) * weight[t], smooth[k] = label_smoothing / K * weight[k].
#pragma once

#include <cmath>
#include <limits>

#include "upsampled_tile.h"

namespace pspnet_fast::cpu {

constexpr int kIgnored = -1, kBad = -2;  // in place of a class

// Logits are clamped at kNever below the greatest of their pixel, which keeps differences finite. An upsampled logit
// may hold a part of a clamped one only if it is below kDoubtful: the least weight of a neighbour is far above their
// ratio.
template <class acc_t>
constexpr acc_t kNever = sizeof(acc_t) == 4 ? acc_t(-0x1p126) : acc_t(-0x1p1022);
template <class acc_t>
constexpr acc_t kDoubtful = sizeof(acc_t) == 4 ? acc_t(-0x1p40) : acc_t(-0x1p900);

template <class acc_t>
PSP_INLINE acc_t mix(acc_t low, acc_t high, acc_t lambda) {
  return low + lambda * (high - low);
}

template <class acc_t, class V>
PSP_INLINE void add_to(acc_t* to, V v) {
  v += load<acc_t, sizeof(V)>(to);
  __builtin_memcpy(to, &v, sizeof v);
}

// A row of logits interpolated at the columns of a tile, [K, kColumns]. Each logit is less the greatest of its pixel,
// which leaves loss and softmax as they are: no upsampled logit is above 0 then. And it is in units of ln 2, as is all
// that is computed from it, lse included, until a loss is: exponentials are powers of two.
template <class acc_t>
struct Row {
  int64_t index = -1;
  bool clamped = false;                          // any logit; then smooth is of no use
  Scratch<acc_t> values, smooth;                 // smooth[x]: the weighted sum over the classes
  Scratch<acc_t> logits, greatest, least, sums;  // before the interpolation: [K, stride], [stride] each
};

// Two rows that follow each other, and pixels between them.
template <class acc_t>
struct RowPair {
  Row<acc_t> rows[2];
  const Row<acc_t>*low = nullptr, *high = nullptr;

  PSP_INLINE bool clamped() const { return low->clamped || high->clamped; }
};

template <class T, class Args>
struct CrossEntropyBase {
  using acc_t = acc_type<T>;
  const Args& a;
  Axis<acc_t> rows, columns;
  int64_t blocks;
  bool smoothing;
  acc_t smooth_total = 0;
  Scratch<acc_t> smooth, focus;

  CrossEntropyBase(const Args& args, int64_t blocks)
      : a(args),
        rows(a.h, a.H, a.align_corners),
        columns(a.w, a.W, a.align_corners),
        blocks(blocks),
        smoothing(static_cast<double>(a.label_smoothing) > 0),
        smooth(a.K),
        focus(a.K) {
    double total = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      const auto smoothing = static_cast<double>(a.label_smoothing), own = static_cast<double>(weight(k));
      const double share = smoothing / static_cast<double>(a.K) * own;
      focus[k] = static_cast<acc_t>((1 - smoothing) * own);
      smooth[k] = static_cast<acc_t>(share);
      total += share;
    }
    smooth_total = static_cast<acc_t>(total);
  }
  PSP_INLINE acc_t weight(int64_t k) const { return a.weight ? static_cast<const acc_t*>(a.weight)[k] : acc_t(1); }
  // The first row of logits of a block: blocks are the units of work, whatever the number of threads.
  PSP_INLINE int64_t first_row(int64_t block) const { return block * a.h / blocks; }

  // Row i and the one below. Where no row is interpolated, that is row i again: no NaN from below a pixel, as in torch.
  template <int kBytes>
  PSP_INLINE void read(RowPair<acc_t>& pair, const Tile<acc_t>& tile, int64_t n, int64_t i) const {
    const int64_t below = a.h == a.H ? i : std::min(i + 1, a.h - 1);
    const int first = pair.rows[1].index == i;
    read<kBytes>(pair.rows[first], tile, n, i);
    pair.low = pair.high = &pair.rows[first];
    if (below == i) return;
    read<kBytes>(pair.rows[1 - first], tile, n, below);
    pair.high = &pair.rows[1 - first];
  }

  template <int kBytes>
  PSP_INLINE void read(Row<acc_t>& row, const Tile<acc_t>& tile, int64_t n, int64_t i) const {
    if (row.index == i) return;
    row.index = i;
    tile.read(row.logits, a.K, a.logits, n, i, T{});
    subtract_greatest(row, tile.count, tile.stride);
    interpolate<kBytes>(row, tile);
  }

  PSP_INLINE void subtract_greatest(Row<acc_t>& row, int64_t count, int64_t stride) const {
    row.greatest.assign(row.logits.begin(), row.logits.begin() + stride);
    row.least.assign(stride, acc_t(0));
    row.sums.assign(stride, acc_t(0));
    acc_t *__restrict__ greatest = row.greatest.data(), *__restrict__ least = row.least.data(),
                        *__restrict__ sums = row.sums.data();
    for (int64_t k = 1; k < a.K; ++k) {
      const acc_t* __restrict__ logits = &row.logits[k * stride];
      for (int64_t j = 0; j < stride; ++j) greatest[j] = greatest[j] < logits[j] ? logits[j] : greatest[j];
    }
    // where all are -infinity, they still are after the subtraction, not NaN
    constexpr acc_t kLowest = std::numeric_limits<acc_t>::lowest();
    for (int64_t j = 0; j < stride; ++j) greatest[j] = greatest[j] < kLowest ? kLowest : greatest[j];
    for (int64_t k = 0; k < a.K; ++k) {
      acc_t* __restrict__ logits = &row.logits[k * stride];
      for (int64_t j = 0; j < stride; ++j) {
        logits[j] = (logits[j] - greatest[j]) * acc_t(kLog2E);
        least[j] = logits[j] < least[j] ? logits[j] : least[j];
        sums[j] += smooth[k] * logits[j];
      }
    }
    row.clamped = false;
    for (int64_t j = 0; j < count; ++j) row.clamped |= least[j] < kNever<acc_t>;
    if (!row.clamped) return;
    for (acc_t& logit : row.logits) logit = logit < kNever<acc_t> ? kNever<acc_t> : logit;
  }

  template <int kBytes>
  PSP_INLINE void interpolate(Row<acc_t>& row, const Tile<acc_t>& tile) const {
    const auto mixed = [](auto left, auto right, auto lambda)
                           __attribute__((always_inline)) { return left + lambda * (right - left); };
    row.values.resize(a.K * Tile<acc_t>::kColumns);
    row.smooth.resize(Tile<acc_t>::kColumns);
    tile.template interpolate<kBytes>(row.values.data(), row.logits.data(), a.K, mixed);
    tile.template interpolate<kBytes>(row.smooth.data(), row.sums.data(), 1, mixed);
  }

  // The logarithms of a pixel's softmax from the logits themselves, for pixels that clamped ones may have part in.
  __attribute__((noinline, cold)) Scratch<double> log_softmax(int64_t n, int64_t y, int64_t x) const {
    const SourceIndex<acc_t>&row = rows.pixels[y], &column = columns.pixels[x];
    Scratch<double> values(a.K);
    double greatest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      const auto mixed = [&](int64_t i) {
        const T* line = at<T>(a.logits, n, k, i);
        return mix_infinite(to_acc(line[column.low * a.logits.stride_w]), to_acc(line[column.high * a.logits.stride_w]),
                            column.lambda);
      };
      values[k] = mix_infinite(mixed(row.low), mixed(row.high), row.lambda);
      greatest = std::max(greatest, values[k]);
    }
    for (const double value : values) sum += std::exp(value - greatest);
    for (double& value : values) value -= greatest, value -= std::log(sum);
    return values;
  }
  // A logit of -infinity does not count where its weight is 0.
  static double mix_infinite(double low, double high, double lambda) {
    if (low == high || (lambda == 0 && high == -std::numeric_limits<double>::infinity())) return low;
    return (1 - lambda) * low + lambda * high;
  }

  // The targets of a tile's pixels in a line as classes, kIgnored or kBad. Returns whether any is bad.
  PSP_INLINE bool read_targets(int* __restrict__ to, const Tile<acc_t>& tile, int64_t n, int64_t y) const {
    int bad = 0;
    const int64_t columns = tile.columns, K = a.K, ignore = a.ignore_index;
    dispatch_int(a.target_type, [&](auto zero) __attribute__((always_inline)) {
      const auto* __restrict__ from = static_cast<const decltype(zero)*>(a.target) + (n * a.H + y) * a.W + tile.first;
      for (int64_t x = 0; x < columns; ++x) {  // without branches: what is ignored may lie anywhere
        const int64_t target = from[x], known = (target >= 0) & (target < K) ? target : kBad;
        to[x] = static_cast<int>(target == ignore ? kIgnored : known);
      }
    });
    for (int64_t x = 0; x < columns; ++x) bad |= to[x] == kBad;
    return bad != 0;
  }
};

}  // namespace pspnet_fast::cpu
