// Columns of pixels of an upsampled map: a thread owns up to kColumnPixels pixels, one below the other, between the
// same four logits. What these four give a class is computed once for them, and a pixel takes two instructions more.
//
// Pixels come out bit by bit as from Corners: rows are interpolated between columns, then between rows. A logit of
// -infinity is taken as the lowest number, which makes no NaN where its weight is 0.
#pragma once

#include "axis.cuh"
#include "logits.cuh"

namespace pspnet_fast::cuda {

constexpr int kColumnPixels = 8;
constexpr int kColumnThreads = 128;                 // of a block: columns side by side, between the same rows of logits
constexpr int kClassVector = 4;                     // classes that a thread takes at once
constexpr int kLoads = 8;                           // of logits that a thread has in flight
constexpr int kColumnShared = 24 * 1024;            // bytes: 8 blocks a multiprocessor
constexpr int64_t kColumnBlocks = 2 * 132;          // that keep a GPU busy
constexpr int64_t kLongestAxis = int64_t{1} << 20;  // on which positions in float are right to a fraction of a pixel
// Logits above it, or NaN, send a block the slow way: sums of them may be infinite. A pixel whose greatest logit is
// below its negative goes that way too: there the lowest number could not be told from a logit.
constexpr float kMostUsual = 1e20f;

// What a block takes. The rows of the map between two rows of logits, or outside the first or last, are cut into
// `parts` strips: a block takes kColumnThreads pixels of the width of one. `across`: columns of logits around them.
// `classes`, a multiple of kClassVector, are in shared memory at once. across == 0: there is no fast way.
struct ColumnShare {
  int parts, across, classes;

  PSP_HOST_DEVICE int pitch() const { return (classes / 4 | 1) * 4; }  // neighbours in different banks
  size_t bytes() const { return sizeof(float) * 2 * across * pitch(); }
};

template <class Args>
ColumnShare make_columns(const Args& args) {
  const int64_t h = args.h, w = args.w, H = args.H, W = args.W;
  if (args.dtype == DType::kFloat64 || h > H || w > W || std::max(H, W) > kLongestAxis) return {1, 0, 0};
  const int64_t longest = longest_interval(h, H, args.align_corners);
  int64_t parts = divide_up(longest, kColumnPixels);
  if (args.N * (h + 1) * parts * divide_up(W, kColumnThreads) < kColumnBlocks && longest > parts) parts *= 2;
  const double scale = source_scale<double>(static_cast<int>(w), W, args.align_corners);
  const int across = static_cast<int>((kColumnThreads - 1) * scale) + 4;
  const int room = kColumnShared / static_cast<int>(sizeof(float)) / (2 * across) / 4 - 1;  // one for the pitch
  return {static_cast<int>(parts), across, 4 * static_cast<int>(std::min<int64_t>(room, divide_up(args.K, 4)))};
}

template <class Args>
int64_t count_column_blocks(const Args& args, const ColumnShare& share) {
  return args.N * (args.h + 1) * share.parts * divide_up(args.W, kColumnThreads);
}

// The column of a thread. `x` is W or more, and nothing is computed, where there is none; `count` is the same in all
// threads of a block, and may be 0, or by a rounding more than kColumnPixels.
template <class T>
struct PixelColumn {
  int n, x, top, count;
  float upper[kColumnPixels], lower[kColumnPixels];  // weights of the rows of logits above and below each pixel

  // `mirrored`: column x of the map is at W - 1 - x among the logits.
  template <class Args>
  __device__ __forceinline__ PixelColumn(const Args& args, const ColumnShare& share, bool mirrored) : share_(share) {
    PSP_SHARED(int, unusual, 1);
    PSP_DYNAMIC_SHARED(float, shared);
    unusual_ = unusual, shared_ = shared;
    const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
    const int h = static_cast<int>(args.h), w = static_cast<int>(args.w);
    const int number = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    const int blocks_across = (W + kColumnThreads - 1) / kColumnThreads, strips = (h + 1) * share.parts;
    const int line = number / blocks_across, strip = line % strips, interval = strip / share.parts;
    const int first_x = (number - line * blocks_across) * kColumnThreads;
    n = line / strips, x = first_x + thread;

    const Axis<T> rows(h, H, args.align_corners), columns(w, W, args.align_corners);
    const int begin = interval == 0 ? 0 : rows.first_at(interval - 1), part = strip - interval * share.parts;
    const int length = (interval == h ? H : rows.first_at(interval)) - begin;
    top = begin + static_cast<int>(int64_t{length} * part / share.parts);
    count = begin + static_cast<int>(int64_t{length} * (part + 1) / share.parts) - top;
#pragma unroll
    for (int i = 0; i < kColumnPixels; ++i) {
      lower[i] = rows.at(top + max(min(i, count - 1), 0)).lambda;  // beyond the last, as of that
      upper[i] = 1 - lower[i];
    }

    const int last_x = min(first_x + kColumnThreads, W) - 1;
    first_column_ = columns.at(mirrored ? W - 1 - last_x : first_x).low;
    const auto column = columns.at(mirrored ? W - 1 - min(x, last_x) : min(x, last_x));
    left_ = (column.low - first_column_) * share.pitch();
    right_ = (column.high - first_column_) * share.pitch();
    beside_ = column.lambda;
    rows_[0] = max(interval - 1, 0), rows_[1] = min(max(interval, 1), h - 1);
    if (thread == 0) *unusual = 0;
  }

  // Calls visit(k, above, below) for every fourth class k, with four classes' logits in the rows of logits above and
  // below the column; those beyond K are very low. All threads of the block must call it.
  template <class Args, class F>
  __device__ __forceinline__ void for_each_class(const Args& args, F visit) {
    constexpr int V = kClassVector;
    const int K = static_cast<int>(args.K);
    for (int first = 0; first < K; first += share_.classes) {
      const int size = min(K - first, share_.classes);
      if (first != first_staged_) stage(args, first, size);
      const float* const from = shared_;
      const int next_row = share_.across * share_.pitch();
#pragma unroll 1
      for (int k = 0; k < (x < args.W ? size : 0); k += V) {
        float above[V], below[V], right_above[V], right_below[V];
        load(from + left_ + k, above);
        load(from + right_ + k, right_above);
        load(from + next_row + left_ + k, below);
        load(from + next_row + right_ + k, right_below);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          above[v] = mix(above[v], right_above[v], 1 - beside_, beside_);
          below[v] = mix(below[v], right_below[v], 1 - beside_, beside_);
        }
        visit(first + k, above, below);
      }
    }
  }

  // The logit of pixel i of the column.
  __device__ __forceinline__ float at(int i, float above, float below) const {
    return mix(above, below, upper[i], lower[i]);
  }

  // Whether the fast way is right, and for a pixel with such a greatest logit. To be asked after all classes.
  __device__ __forceinline__ bool is_usual() const { return *unusual_ == 0; }
  __device__ __forceinline__ bool is_usual(float greatest) const { return is_usual() && greatest >= -kMostUsual; }

 private:
  // Rounded as nvcc rounds `bilinear`.
  static __device__ __forceinline__ float mix(float low, float high, float weight_of_low, float weight_of_high) {
    return fmaf(weight_of_high, high, weight_of_low * low);
  }

  // Copies the classes [first, first + size) to shared memory, position by position. Neighbouring threads take what
  // lies together: classes or columns.
  template <class Args>
  __device__ __forceinline__ void stage(const Args& args, int first, int size) {
    const int thread = static_cast<int>(threadIdx.x), positions = 2 * share_.across;
    const bool by_class = args.logits.stride_c == 1;
    const int side = by_class ? kWarp : positions, fast = thread % side, slow = thread / side;
    const int slow_step = max(kColumnThreads / side, 1);
    const int position_step = by_class ? slow_step : kColumnThreads, class_step = by_class ? kWarp : slow_step;
    const int first_class = by_class ? fast : slow;
    const int padded = (size + kClassVector - 1) / kClassVector * kClassVector;
    const int64_t stride = class_step * args.logits.stride_c;
    __syncthreads();
    bool unusual = false;
    for (int p = by_class ? slow : slow < slow_step ? fast : positions; p < positions; p += position_step) {
      const bool is_below = p >= share_.across;
      const int column = min(first_column_ + p - (is_below ? share_.across : 0), static_cast<int>(args.w) - 1);
      const T* from = pixel<const T>(args.logits, n, first + first_class, is_below ? rows_[1] : rows_[0], column);
      float* const to = shared_ + p * share_.pitch();
      for (int k = first_class; k < padded; k += kLoads * class_step) {
        T logits[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          logits[i] = k + i * class_step < size ? from[i * stride] : narrow<T>(kLowest<float>);
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const float logit = widen(logits[i]);
          unusual |= !(logit <= kMostUsual);
          if (k + i * class_step < padded) to[k + i * class_step] = max(logit, kLowest<float>);
        }
        from += kLoads * stride;
      }
    }
    if (unusual) atomicAdd(unusual_, 1);
    __syncthreads();
    first_staged_ = first;
  }

  ColumnShare share_;
  float* shared_;  // [2 rows, across, pitch]
  int* unusual_;   // whether a logit around the block is not for the fast way
  int first_staged_ = -1, first_column_, rows_[2];
  int left_, right_;  // of the upper row, in shared memory
  float beside_;      // the weight of the right logits
};

}  // namespace pspnet_fast::cuda
