// Bilinear upsampling of logits, one row of a tile of columns at a time: the upsampled maps never exist.
#pragma once

#include <limits>

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {

template <class acc_t>
Scratch<SourceIndex<acc_t>> source_indices(int64_t from, int64_t to, bool align_corners) {
  Scratch<SourceIndex<acc_t>> result(to);
  const acc_t scale = source_scale<acc_t>(static_cast<int>(from), to, align_corners);
  for (int64_t i = 0; i < to; ++i) {
    result[i] = source_index(i, scale, static_cast<int>(from), align_corners);
    if (from == to) result[i].high = result[i].low;  // a copy, as in torch: no NaN beside a NaN
  }
  return result;
}

// What the threads share: where each row and column of an H x W map lies between those of the logits.
template <class T>
struct Upsampling {
  static constexpr int64_t kColumns = 64;  // of a tile: two rows of 150 classes then fit into the second-level cache

  Image logits;
  int64_t K, H, W;
  Scratch<SourceIndex<acc_type<T>>> rows, columns;

  template <class Args>
  explicit Upsampling(const Args& a)
      : logits(a.logits),
        K(a.K),
        H(a.H),
        W(a.W),
        rows(source_indices<acc_type<T>>(a.h, a.H, a.align_corners)),
        columns(source_indices<acc_type<T>>(a.w, a.W, a.align_corners)) {}

  int64_t tiles() const { return (W + kColumns - 1) / kColumns; }

  // A unit is one row of one tile of one image, numbered so that units in turn share rows of the logits.
  struct Unit {
    int64_t n, first, columns, y;
  };
  PSP_INLINE Unit unit(int64_t number) const {
    const int64_t first = number / H % tiles() * kColumns;
    return {number / H / tiles(), first, std::min(kColumns, W - first), number % H};
  }
};

// The two rows of logits around the unit at hand, interpolated horizontally: [K, kColumns] each, behind the tile's last
// column repeating it. Units between the same two rows share them. A logit of -infinity does not count where its weight
// is 0; what else is not finite does, as in torch.
template <class T>
class UpsampledRows {
 public:
  using acc_t = acc_type<T>;
  static constexpr int64_t kColumns = Upsampling<T>::kColumns;

  PSP_INLINE explicit UpsampledRows(const Upsampling<T>& upsampling)
      : u_(upsampling), buffers_{Scratch<acc_t>(u_.K * kColumns), Scratch<acc_t>(u_.K * kColumns), {}} {}

  // Goes to a unit; units in turn are the fastest.
  PSP_INLINE void go_to(const typename Upsampling<T>::Unit& unit) {
    if (unit.n != n_ || unit.first != first_) held_[0] = held_[1] = -1;
    n_ = unit.n, first_ = unit.first;
    const SourceIndex<acc_t>& row = u_.rows[unit.y];
    if (held_[low_] != row.low) low_ = held_[1 - low_] == row.low ? 1 - low_ : low_;
    expand(low_, row.low);
    high_ = row.high == row.low ? low_ : 1 - low_;
    expand(high_, row.high);
    lambda_ = row.lambda;
    if (lambda_ != 0 || !infinite_[high_]) return;
    Scratch<acc_t>& copy = buffers_[2];
    copy = buffers_[high_];
    for (acc_t& logit : copy) logit = logit == -kInfinity ? acc_t(0) : logit;
    high_ = 2;
  }

  // The logit of class k at column x of the tile.
  PSP_INLINE acc_t at(int64_t k, int64_t x) const {
    const int64_t offset = k * kColumns + x;
    return (acc_t(1) - lambda_) * buffers_[low_][offset] + lambda_ * buffers_[high_][offset];
  }

  // Those at as many columns from `at` on as a vector of kBytes holds.
  template <int kBytes>
  PSP_INLINE Vector<acc_t, kBytes> load(int64_t k, int64_t at) const {
    const acc_t *low = &buffers_[low_][k * kColumns + at], *high = &buffers_[high_][k * kColumns + at];
    return (acc_t(1) - lambda_) * cpu::load<acc_t, kBytes>(low) + lambda_ * cpu::load<acc_t, kBytes>(high);
  }

 private:
  PSP_INLINE void expand(int buffer, int row) {
    if (held_[buffer] == row) return;
    held_[buffer] = row;
    int64_t low[kColumns], high[kColumns];
    acc_t lambda[kColumns];
    for (int64_t x = 0; x < kColumns; ++x) {
      const SourceIndex<acc_t>& column = u_.columns[std::min(first_ + x, u_.W - 1)];
      low[x] = column.low * u_.logits.stride_w, high[x] = column.high * u_.logits.stride_w, lambda[x] = column.lambda;
    }
    int infinite = 0;  // or NaN: any
    for (int64_t k = 0; k < u_.K; ++k) {
      const T* __restrict__ from = cpu::at<T>(u_.logits, n_, k, row);
      acc_t* __restrict__ to = &buffers_[buffer][k * kColumns];
      for (int64_t x = 0; x < kColumns; ++x) {
        to[x] = (acc_t(1) - lambda[x]) * to_acc(from[low[x]]) + lambda[x] * to_acc(from[high[x]]);
        infinite |= !(to[x] > -kInfinity);
      }
    }
    infinite_[buffer] = infinite != 0;
    for (int64_t k = 0; k < u_.K && infinite; ++k) {
      const T* from = cpu::at<T>(u_.logits, n_, k, row);
      for (int64_t x = 0; x < kColumns; ++x) {
        const bool only_low = lambda[x] == 0 && to_acc(from[high[x]]) == -kInfinity;
        if (only_low) buffers_[buffer][k * kColumns + x] = to_acc(from[low[x]]);
      }
    }
  }

  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  const Upsampling<T>& u_;
  Scratch<acc_t> buffers_[3];  // the last for a row whose weight is 0
  int64_t n_ = -1, first_ = -1;
  int held_[2] = {-1, -1};  // rows of the logits in the buffers
  bool infinite_[2] = {};   // whether a logit there may be -infinity
  int low_ = 0, high_ = 0;  // buffers of the rows above and below
  acc_t lambda_ = 0;
};

}  // namespace pspnet_fast::cpu
