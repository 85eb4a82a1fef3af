// The pixels of an upsampled map between the logits along an axis, and a tile of columns whose rows of logits are
// interpolated horizontally: what all operators on upsampled logits have in common.
#pragma once

#include "vector_exp.h"

namespace pspnet_fast::cpu {

// One axis: `size` pixels between `count` logits; the pixels of cell i are [begin[i], begin[i + 1]).
template <class acc_t>
struct Axis {
  Scratch<SourceIndex<acc_t>> pixels;
  Scratch<int64_t> begin;

  Axis(int64_t count, int64_t size, bool align_corners) : begin(count + 1, size) {
    const acc_t scale = source_scale<acc_t>(static_cast<int>(count), size, align_corners);
    for (int64_t at = size - 1; at >= 0; --at) {
      pixels.push_back(source_index(at, scale, static_cast<int>(count), align_corners));
      begin[pixels.back().low] = at;
    }
    std::reverse(pixels.begin(), pixels.end());
    for (int64_t i = count - 1; i >= 0; --i) begin[i] = std::min(begin[i], begin[i + 1]);  // cells without pixels
    if (count != size) return;
    for (SourceIndex<acc_t>& pixel : pixels) pixel.high = pixel.low;  // a copy, as in torch: no NaN beside a NaN
  }
};

// The pixels [first, first + columns) of a line, and the columns of logits [from, from + count) around them.
template <class acc_t>
struct Tile {
  static constexpr int64_t kColumns = 64;  // at most: two rows of 150 classes then fit into the second-level cache
  int64_t first = 0, columns = 0, from = 0, count = 0, stride = 0;  // stride: count in whole cache lines
  // of each pixel, those to its left and right, counted from `from`; behind the last pixel, its own again
  typename ExpConstants<acc_t>::Int low[kColumns], high[kColumns];
  acc_t lambda[kColumns];

  PSP_INLINE Tile(const Axis<acc_t>& axis, int64_t first)
      : first(first), columns(std::min<int64_t>(kColumns, static_cast<int64_t>(axis.pixels.size()) - first)) {
    const SourceIndex<acc_t>&one = axis.pixels[first], &other = axis.pixels[first + columns - 1];
    from = std::min(one.low, other.low);  // of a mirrored axis, the last's
    count = std::max(one.high, other.high) - from + 1;
    stride = (count + kLanes<acc_t> - 1) / kLanes<acc_t> * kLanes<acc_t>;
    for (int64_t x = 0; x < kColumns; ++x) {
      const SourceIndex<acc_t>& pixel = axis.pixels[first + std::min(x, columns - 1)];
      low[x] = static_cast<int>(pixel.low - from), high[x] = static_cast<int>(pixel.high - from),
      lambda[x] = pixel.lambda;
    }
  }

  // Row i of the logits of all K classes at these columns: [K, stride], zeros behind each line.
  template <class T>
  PSP_INLINE void read(Scratch<acc_t>& lines, int64_t K, const Image& logits, int64_t n, int64_t i, T) const {
    lines.resize(K * stride);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = count; j < stride; ++j) lines[k * stride + j] = 0;
    }
    if (logits.stride_w == 1) {
      for (int64_t k = 0; k < K; ++k) {
        const T* __restrict__ values = at<T>(logits, n, k, i) + from;
        acc_t* __restrict__ to = &lines[k * stride];
        for (int64_t j = 0; j < count; ++j) to[j] = to_acc(values[j]);
      }
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      const T* __restrict__ values = at<T>(logits, n, 0, i) + (from + j) * logits.stride_w;
      acc_t* __restrict__ to = &lines[j];
      for (int64_t k = 0; k < K; ++k) to[k * stride] = to_acc(values[k * logits.stride_c]);
    }
  }

  // to[k, x] = mix(the logit to the left of pixel x, that to its right, lambda[x]) of lines [K, stride]. Where a vector
  // of pixels lies between logits that fit into one, as in any upsampling but the least, both are permutations of it.
  template <int kBytes, class Mix>
  PSP_INLINE void interpolate(acc_t* to, const acc_t* lines, int64_t K, const Mix& mix) const {
    using V = Vector<acc_t, kBytes>;
    using Indices = IntVector<acc_t, kBytes>;
    constexpr int64_t kStep = kLanes<acc_t, kBytes>, kVectors = kLanes<acc_t> / kStep;  // a cache line at once
    for (int64_t x = 0; x < kColumns; x += kLanes<acc_t>) {
      int64_t base[kVectors];
      bool permutable = kBytes >= 32;  // SSE2 has no such instruction
      for (int64_t v = 0; v < kVectors && permutable; ++v) {
        const int64_t one = x + v * kStep, other = one + kStep - 1;
        base[v] = std::min<int64_t>(std::min(low[one], low[other]), stride - kStep);
        permutable = std::max(high[one], high[other]) - base[v] < kStep;
      }
      if (!permutable) {
        for (int64_t k = 0; k < K; ++k) {
          const acc_t* line = lines + k * stride;
          for (int64_t i = x; i < x + kLanes<acc_t>; ++i) {
            to[k * kColumns + i] = mix(line[low[i]], line[high[i]], lambda[i]);
          }
        }
        continue;
      }
      Indices left[kVectors], right[kVectors];
      V lambdas[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        const auto first_logit = static_cast<typename ExpConstants<acc_t>::Int>(base[v]);
        left[v] = load_integers<acc_t, kBytes>(low + x + v * kStep) - first_logit;
        right[v] = load_integers<acc_t, kBytes>(high + x + v * kStep) - first_logit;
        lambdas[v] = load<acc_t, kBytes>(lambda + x + v * kStep);
      }
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t v = 0; v < kVectors; ++v) {
          const V logits = load<acc_t, kBytes>(lines + k * stride + base[v]);
          const V value = mix(__builtin_shuffle(logits, left[v]), __builtin_shuffle(logits, right[v]), lambdas[v]);
          __builtin_memcpy(to + k * kColumns + x + v * kStep, &value, sizeof value);
        }
      }
    }
  }
};

}  // namespace pspnet_fast::cpu
