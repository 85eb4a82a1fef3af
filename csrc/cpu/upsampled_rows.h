// Bilinear upsampling of logits, one row of a tile of columns at a time: the upsampled maps never exist.
#pragma once

#include <limits>

#include "upsampled_tile.h"

namespace pspnet_fast::cpu {

// What the threads share: where each row and column of an H x W map lies between those of the logits.
template <class T>
struct Upsampling {
  using acc_t = acc_type<T>;
  static constexpr int64_t kColumns = Tile<acc_t>::kColumns;

  Image logits;
  int64_t K, H, W;
  Axis<acc_t> rows, columns;

  template <class Args>
  explicit Upsampling(const Args& a)
      : logits(a.logits), K(a.K), H(a.H), W(a.W), rows(a.h, a.H, a.align_corners), columns(a.w, a.W, a.align_corners) {}

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
template <class T, int kBytes>
class UpsampledRows {
 public:
  using acc_t = acc_type<T>;
  using V = Vector<acc_t, kBytes>;
  static constexpr int64_t kColumns = Upsampling<T>::kColumns;

  PSP_INLINE explicit UpsampledRows(const Upsampling<T>& upsampling)
      : u_(upsampling),
        tile_(u_.columns, 0),
        buffers_{Scratch<acc_t>(u_.K * kColumns), Scratch<acc_t>(u_.K * kColumns), {}} {}

  // Goes to a unit; units in turn are the fastest.
  PSP_INLINE void go_to(const typename Upsampling<T>::Unit& unit) {
    if (unit.n != n_ || unit.first != tile_.first) held_[0] = held_[1] = -1;
    if (unit.first != tile_.first) tile_ = Tile<acc_t>(u_.columns, unit.first);
    n_ = unit.n;
    const SourceIndex<acc_t>& row = u_.rows.pixels[unit.y];
    if (held_[low_] != row.low) low_ = held_[1 - low_] == row.low ? 1 - low_ : low_;
    expand(low_, row.low);
    high_ = row.high == row.low ? low_ : 1 - low_;
    expand(high_, row.high);
    finite_ = all_finite_[low_] && all_finite_[high_];
    lambda_ = row.lambda;
    if (lambda_ != 0 || all_finite_[high_]) return;
    Scratch<acc_t>& copy = buffers_[2];
    copy = buffers_[high_];
    for (acc_t& logit : copy) logit = logit == -kInfinity ? acc_t(0) : logit;
    high_ = 2;
  }

  // Whether all logits around the unit are.
  PSP_INLINE bool finite() const { return finite_; }

  // Those of class k at as many columns of the tile from `at` on as a vector holds.
  PSP_INLINE V load(int64_t k, int64_t at) const {
    return mix(cpu::load<acc_t, kBytes>(&buffers_[low_][k * kColumns + at]),
               cpu::load<acc_t, kBytes>(&buffers_[high_][k * kColumns + at]), lambda_);
  }

 private:
  template <class Value, class Weight>
  static PSP_INLINE Value mix(Value low, Value high, Weight lambda) {
    return (acc_t(1) - lambda) * low + lambda * high;
  }

  PSP_INLINE void expand(int buffer, int row) {
    if (held_[buffer] == row) return;
    held_[buffer] = row;
    tile_.read(lines_, u_.K, u_.logits, n_, row, T{});
    acc_t* const to = buffers_[buffer].data();
    tile_.template interpolate<kBytes>(to, lines_.data(), u_.K,
                                       [](auto left, auto right, auto lambda)
                                           __attribute__((always_inline)) { return mix(left, right, lambda); });
    int infinite = 0;  // or NaN: any
    for (const acc_t logit : lines_) infinite |= !(std::abs(logit) < kInfinity);
    all_finite_[buffer] = infinite == 0;
    for (int64_t k = 0; k < u_.K && infinite; ++k) {
      const acc_t* line = &lines_[k * tile_.stride];
      for (int64_t x = 0; x < kColumns; ++x) {
        const bool only_low = tile_.lambda[x] == 0 && line[tile_.high[x]] == -kInfinity;
        if (only_low) to[k * kColumns + x] = line[tile_.low[x]];
      }
    }
  }

  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  const Upsampling<T>& u_;
  Tile<acc_t> tile_;
  Scratch<acc_t> lines_, buffers_[3];  // a row before the interpolation; the last buffer for a row whose weight is 0
  int64_t n_ = -1;
  int held_[2] = {-1, -1};  // rows of the logits in the buffers
  bool all_finite_[2] = {}, finite_ = false;
  int low_ = 0, high_ = 0;  // buffers of the rows above and below
  acc_t lambda_ = 0;
};

}  // namespace pspnet_fast::cpu
