// Rows of logits for the cross entropy on the CPU: classes padded to whole vectors, targets, and what both directions
// know of the axes and the classes.
//
// A pixel's loss is focus[t] * (lse - z_t) + sum over k of smooth[k] * (lse - z_k), t the target,
// focus[t] = (1 - label_smoothing) * weight[t], smooth[k] = label_smoothing / K * weight[k].
#pragma once

#include "vector_exp.h"

namespace pspnet_fast::cpu {

constexpr int kIgnored = -1, kBad = -2;  // in place of a class
constexpr float kNever = -1e30f;         // in place of -infinity, whose differences are no numbers

// One axis: `size` pixels between `count` logits; the pixels of cell i are [begin[i], begin[i + 1]).
template <class acc_t>
struct Axis {
  std::vector<SourceIndex<acc_t>> pixels;
  std::vector<int64_t> begin;

  Axis(int64_t count, int64_t size, bool align_corners) : begin(count + 1, size) {
    const acc_t scale = source_scale<acc_t>(static_cast<int>(count), size, align_corners);
    for (int64_t at = size - 1; at >= 0; --at) {
      pixels.push_back(source_index(at, scale, static_cast<int>(count), align_corners));
      begin[pixels.back().low] = at;
    }
    std::reverse(pixels.begin(), pixels.end());
    for (int64_t i = count - 1; i >= 0; --i) begin[i] = std::min(begin[i], begin[i + 1]);  // cells without pixels
  }
};

// A row of logits, each less the greatest of its pixel, which leaves loss and softmax as they are: no upsampled logit
// is above 0 then. Classes of pixel j stand at values[j * padded], then lanes that no exponential notices.
template <class acc_t>
struct Row {
  int64_t index = -1;
  std::vector<acc_t> values, smooth;  // smooth[j]: the weighted sum over the classes of pixel j
};

template <class T, class Args>
struct CrossEntropyBase {
  using acc_t = acc_type<T>;
  using V = Vector<acc_t>;
  static constexpr int64_t kStep = kLanes<acc_t>;
  const Args& a;
  Axis<acc_t> rows, columns;
  int64_t padded, blocks;
  bool smoothing;
  acc_t smooth_total = 0;
  std::vector<acc_t> smooth, focus;

  CrossEntropyBase(const Args& args, int64_t blocks)
      : a(args),
        rows(a.h, a.H, a.align_corners),
        columns(a.w, a.W, a.align_corners),
        padded((a.K + kStep - 1) / kStep * kStep),
        blocks(blocks),
        smoothing(a.label_smoothing > 0),
        smooth(padded),
        focus(a.K) {
    double total = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      const double share = a.label_smoothing / static_cast<double>(a.K) * static_cast<double>(weight(k));
      focus[k] = static_cast<acc_t>((1 - a.label_smoothing) * static_cast<double>(weight(k)));
      smooth[k] = static_cast<acc_t>(share);
      total += share;
    }
    smooth_total = static_cast<acc_t>(total);
  }
  PSP_INLINE acc_t weight(int64_t k) const { return a.weight ? static_cast<const acc_t*>(a.weight)[k] : acc_t(1); }
  // The first row of logits of a block: blocks are the units of work, whatever the number of threads.
  PSP_INLINE int64_t first_row(int64_t block) const { return block * a.h / blocks; }

  PSP_INLINE void read(Row<acc_t>& row, int64_t n, int64_t i) const {
    if (row.index == i) return;
    row.index = i;
    row.values.resize(a.w * padded);
    row.smooth.resize(a.w);
    if (a.channels_last) {
      for (int64_t j = 0; j < a.w; ++j) {
        const T* __restrict__ from = at<T>(a.logits, n, 0, i) + j * a.logits.stride_w;
        acc_t* __restrict__ to = &row.values[j * padded];
        for (int64_t k = 0; k < a.K; ++k) to[k] = to_acc(from[k]);
      }
    } else {
      for (int64_t k = 0; k < a.K; ++k) {
        const T* from = at<T>(a.logits, n, k, i);
        for (int64_t j = 0; j < a.w; ++j) row.values[j * padded + k] = to_acc(from[j]);
      }
    }
    for (int64_t j = 0; j < a.w; ++j) {
      acc_t* __restrict__ classes = &row.values[j * padded];
      acc_t greatest = classes[0], sum = 0;
      for (int64_t k = 1; k < a.K; ++k) greatest = std::max(greatest, classes[k]);
      for (int64_t k = 0; k < a.K; ++k) {
        const acc_t value = classes[k] - greatest;
        classes[k] = value < kNever ? acc_t(kNever) : value;
      }
      for (int64_t k = 0; smoothing && k < a.K; ++k) sum += smooth[k] * classes[k];
      std::fill(classes + a.K, classes + padded, acc_t(kNever));
      row.smooth[j] = sum;
    }
  }

  // The targets of a row of pixels as classes, kIgnored or kBad.
  PSP_INLINE void read_targets(int* __restrict__ to, int64_t n, int64_t y) const {
    dispatch_int(a.target_type, [&](auto zero) __attribute__((always_inline)) {
      const auto* from = static_cast<const decltype(zero)*>(a.target) + (n * a.H + y) * a.W;
      for (int64_t x = 0; x < a.W; ++x) {
        const int64_t target = from[x];
        to[x] = target == a.ignore_index ? kIgnored : target < 0 || target >= a.K ? kBad : static_cast<int>(target);
      }
    });
  }
};

}  // namespace pspnet_fast::cpu
