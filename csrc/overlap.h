// Whether strided regions of memory overlap: exact, from addresses and strides alone. Includes no torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pspnet_fast {

// Elements of `element` bytes at data + sum of index * stride, strides in bytes and never negative.
struct Region {
  struct Axis {
    int64_t size, stride;
  };
  uintptr_t data = 0;
  int64_t element = 1;
  std::vector<Axis> axes;

  // The part [first, first + size) of an axis.
  Region narrow(size_t axis, int64_t first, int64_t size) const {
    Region part = *this;
    part.data += static_cast<uintptr_t>(first * axes[axis].stride);
    part.axes[axis].size = size;
    return part;
  }
  bool empty() const {
    return std::any_of(axes.begin(), axes.end(), [](const Axis& axis) { return axis.size == 0; });
  }
  // Bytes from the first to behind the last; of no empty region.
  int64_t extent() const {
    int64_t bytes = element;
    for (const Axis& axis : axes) bytes += axis.size > 1 ? (axis.size - 1) * axis.stride : 0;
    return bytes;
  }
};

// Searches integers x[i] in [low[i], high[i]] with sum of step[i] * x[i] = target: exhaustively, from the largest step
// down, leaving out what the smaller steps cannot make up for. Where strides nest, as they do in slices, permutations
// and expansions of dense tensors, each step leaves a choice of three at most.
class OverlapSearch {
 public:
  // Terms of one step are one term.
  void add(int64_t step, int64_t low, int64_t high) {
    if (step == 0 || low == high) return;  // a term that is always 0
    for (Term& term : terms_) {
      if (term.step != step) continue;
      term.low += low, term.high += high;
      return;
    }
    terms_.push_back({step, low, high});
  }

  // Whether there is a solution; with `other_than_zero` one whose x are not all 0. Searches that go on for too long,
  // which strides made by hand can bring about, count as having one.
  bool solvable(int64_t target, bool other_than_zero = false) {
    std::sort(terms_.begin(), terms_.end(), [](const Term& a, const Term& b) { return a.step > b.step; });
    int64_t low = 0, high = 0;
    for (size_t i = terms_.size(); i-- > 0;) {
      terms_[i].rest_low = low, terms_[i].rest_high = high;
      low += terms_[i].step * terms_[i].low, high += terms_[i].step * terms_[i].high;
    }
    steps_left_ = 1 << 16;
    return search(0, target, !other_than_zero);
  }

 private:
  struct Term {
    int64_t step, low, high;
    int64_t rest_low = 0, rest_high = 0;  // what the smaller steps can add
  };

  static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  bool search(size_t i, int64_t target, bool found) {
    if (i == terms_.size()) return target == 0 && found;
    const Term& term = terms_[i];
    const int64_t first = std::max(term.low, -floor_divide(term.rest_high - target, term.step));
    const int64_t last = std::min(term.high, floor_divide(target - term.rest_low, term.step));
    for (int64_t x = first; x <= last; ++x) {
      if (--steps_left_ < 0) return true;
      if (search(i + 1, target - term.step * x, found || x != 0)) return true;
    }
    return false;
  }

  std::vector<Term> terms_;
  int steps_left_ = 0;
};

// Whether two indices of the region refer to one place.
inline bool overlaps_itself(const Region& region) {
  if (region.empty()) return false;
  std::vector<Region::Axis> axes;
  for (const Region::Axis& axis : region.axes) {
    if (axis.size > 1) axes.push_back(axis);
  }
  std::sort(axes.begin(), axes.end(), [](const auto& a, const auto& b) { return a.stride < b.stride; });
  int64_t reach = region.element;  // of the smaller strides
  bool nests = true;
  for (const Region::Axis& axis : axes) {
    nests = nests && axis.stride >= reach;
    reach += (axis.size - 1) * axis.stride;
  }
  if (nests) return false;
  OverlapSearch search;
  for (size_t i = 0; i < axes.size(); ++i) {
    if (axes[i].stride == 0 || (i > 0 && axes[i].stride == axes[i - 1].stride)) return true;
    search.add(axes[i].stride, 1 - axes[i].size, axes[i].size - 1);
  }
  return search.solvable(0, true);
}

inline bool overlap(const Region& a, const Region& b) {
  if (a.empty() || b.empty()) return false;
  const auto end = [](const Region& region) { return region.data + static_cast<uintptr_t>(region.extent()); };
  if (end(a) <= b.data || end(b) <= a.data) return false;
  OverlapSearch search;
  for (const Region::Axis& axis : a.axes) search.add(axis.stride, 0, axis.size - 1);
  for (const Region::Axis& axis : b.axes) search.add(axis.stride, 1 - axis.size, 0);
  search.add(1, 1 - b.element, a.element - 1);
  return search.solvable(static_cast<int64_t>(b.data - a.data));
}

// Whether every index refers to the same place in both.
inline bool same_places(const Region& a, const Region& b) {
  return a.data == b.data && a.element == b.element &&
         std::equal(a.axes.begin(), a.axes.end(), b.axes.begin(), b.axes.end(), [](const auto& x, const auto& y) {
           return x.size == y.size && (x.size <= 1 || x.stride == y.stride);
         });
}

}  // namespace pspnet_fast
