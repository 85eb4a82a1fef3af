// The backward of bilinear upsampling into the concatenation, which reads the gradient once: along one axis first, then
// along the other.
#include <algorithm>

#include "axis.cuh"
#include "cells.cuh"
#include "planes.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kLongest = 16;  // pixels of an axis that a block of the backward takes

// Channels-last backward, first part. Between two rows and two columns of cells lies an interval, whose pixels share
// their four cells; the first and the last hold the pixels outside too. Long intervals are cut into parts, of at most
// kLongest pixels each way, and one more where rounding moves a pixel.
struct Intervals {
  int parts_h[kMaxLevels], parts_w[kMaxLevels], first[kMaxLevels + 1];
};

PSP_HOST_DEVICE int count_intervals(int bins) { return bins > 1 ? bins - 1 : 1; }

int count_parts(int bins, int64_t size, bool align_corners) {
  const int64_t longest = bins <= 2       ? size
                          : align_corners ? divide_up(size - 1, bins - 1) + 1
                                          : divide_up(3 * size, 2 * int64_t{bins});
  return static_cast<int>(std::max<int64_t>(divide_up(longest, kLongest), 1));
}

Intervals make_intervals(const PyramidUpsampleConcatBackwardArgs& args) {
  Intervals intervals = {};
  for (int level = 0; level < args.levels.count; ++level) {
    const int bins_h = args.levels.bins_h[level], bins_w = args.levels.bins_w[level];
    intervals.parts_h[level] = count_parts(bins_h, args.H, args.align_corners);
    intervals.parts_w[level] = count_parts(bins_w, args.W, args.align_corners);
    intervals.first[level + 1] = intervals.first[level] + count_intervals(bins_h) * intervals.parts_h[level] *
                                                              count_intervals(bins_w) * intervals.parts_w[level];
  }
  return intervals;
}

// The pixels of an axis in one part of one interval: [begin, end).
template <class T>
struct Part {
  const Axis<T>& axis;
  int interval, begin, end;

  __device__ __forceinline__ Part(const Axis<T>& axis, int part, int parts) : axis(axis), interval(part / parts) {
    const int local = part - interval * parts, from = axis.start(interval);
    const int length = (interval + 1 == count_intervals(axis.bins) ? axis.size : axis.start(interval + 1)) - from;
    begin = from + static_cast<int>(int64_t{local} * length / parts);
    end = from + static_cast<int>((int64_t{local} + 1) * length / parts);
  }
  // The weight of the interval's second cell, which takes the pixels after its centre whole.
  __device__ __forceinline__ acc_t<T> weight_of_second(int pixel) const { return axis.weight_after(interval, pixel); }
};

// Sums of each part [N, parts, 4, R]: its gradient weighted for (low, low), (low, next), (next, low), (next, next).
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes one part and a chunk of channels: threads x over channels, y over the part's rows.
// Traffic: grad_context read once, four accumulators a part and channel written.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    upsample_backward_parts(const __grid_constant__ PyramidUpsampleConcatBackwardArgs args,
                            const __grid_constant__ Intervals intervals, int chunks) {
  const Levels& levels = args.levels;
  const Item item = item_of_block(intervals.first[levels.count], chunks);
  int level = 0;
  while (item.index >= intervals.first[level + 1]) ++level;
  const int parts_w = intervals.parts_w[level], row_parts = count_intervals(levels.bins_w[level]) * parts_w;
  const int local = item.index - intervals.first[level];
  const Axis<T> rows(levels.bins_h[level], args.H, args.align_corners);
  const Axis<T> columns(levels.bins_w[level], args.W, args.align_corners);
  const Part<T> part_h(rows, local / row_parts, intervals.parts_h[level]);
  const Part<T> part_w(columns, local % row_parts, parts_w);

  const int64_t r = first_channel<V>(item.chunk);
  acc_t<T> sums[4][V] = {};
  if (r < args.R) {
    for (int y = part_h.begin + static_cast<int>(threadIdx.y); y < part_h.end; y += static_cast<int>(blockDim.y)) {
      const T* const from = pixel<const T>(args.grad_context, item.n, level * args.R + r, y, 0);
      acc_t<T> left[V] = {}, right[V] = {};
#pragma unroll 4
      for (int x = part_w.begin; x < part_w.end; ++x) {
        const acc_t<T> next = part_w.weight_of_second(x);
        acc_t<T> grad[V];
        load_wide(from + x * args.grad_context.stride_w, grad);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          left[v] += (1 - next) * grad[v];
          right[v] += next * grad[v];
        }
      }
      const acc_t<T> next = part_h.weight_of_second(y);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[0][v] += (1 - next) * left[v];
        sums[1][v] += (1 - next) * right[v];
        sums[2][v] += next * left[v];
        sums[3][v] += next * right[v];
      }
    }
  }
  auto* const part = static_cast<acc_t<T>*>(args.workspace) + blockIdx.x / chunks * 4 * args.R;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    write_total(sums[i], item.chunk, args.R,
                [&](int64_t channel, acc_t<T> total) { part[i * args.R + channel] = total; });
  }
}

// Channels-last backward, second part: each cell adds the sums of the parts around it.
// Layout: parts [N, parts, 4, R] to grad_reduced [N, P, R].
// A block takes one cell; threads over channels.
// Traffic: each sum is read once; they are few and lie in the L2 cache.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    upsample_backward_cells(const __grid_constant__ PyramidUpsampleConcatBackwardArgs args,
                            const __grid_constant__ Intervals intervals, int chunks) {
  const Levels& levels = args.levels;
  const Item item = item_of_block(levels.first[levels.count], chunks);
  const int64_t r = first_channel<1>(item.chunk);
  if (r >= args.R) return;
  const int level = level_of(levels, item.index), local = item.index - levels.first[level];
  const int bins_w = levels.bins_w[level], i = local / bins_w, j = local % bins_w;
  const int parts_h = intervals.parts_h[level], parts_w = intervals.parts_w[level];
  const int intervals_h = count_intervals(levels.bins_h[level]), intervals_w = count_intervals(bins_w);
  const int row_parts = intervals_w * parts_w;
  const int64_t parts = item.n * intervals.first[levels.count] + intervals.first[level];
  const auto* const sums = static_cast<const acc_t<T>*>(args.workspace) + parts * 4 * args.R + r;

  acc_t<T> total = 0;
  for (int row = max(i - 1, 0) * parts_h; row < min(i + 1, intervals_h) * parts_h; ++row) {
    const int below = row < i * parts_h ? 2 : 0;  // parts above the cell hold its share as `next`
    for (int column = max(j - 1, 0) * parts_w; column < min(j + 1, intervals_w) * parts_w; ++column) {
      const int beside = column < j * parts_w ? 1 : 0;
      total += sums[((static_cast<int64_t>(row) * row_parts + column) * 4 + below + beside) * args.R];
    }
  }
  static_cast<T*>(args.grad_reduced)[(item.n * levels.first[levels.count] + item.index) * args.R + r] =
      narrow<T>(total);
}

// Planar backward, in one launch: a plane is staged in shared memory and reduced there, down columns, then along rows.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes one plane; threads over its vectors, then rows of cells x columns, then cells.
// Traffic: grad_context read once, grad_reduced written.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    upsample_backward_planes(const __grid_constant__ PyramidUpsampleConcatBackwardArgs args, Staging staging) {
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), thread = static_cast<int>(threadIdx.x);
  const Levels& levels = args.levels;
  const int64_t channels = levels.count * args.R, n = blockIdx.x / channels, channel = blockIdx.x % channels;
  const int level = static_cast<int>(channel / args.R), bins_h = levels.bins_h[level], bins_w = levels.bins_w[level];
  const Axis<T> rows(bins_h, H, args.align_corners), columns(bins_w, W, args.align_corners);

  auto* const row_weights = reinterpret_cast<acc_t<T>*>(shared + staging.tile_bytes);  // [H]: of the next cell
  acc_t<T>* const column_weights = row_weights + H;                                    // [W]
  acc_t<T>* const column_sums = column_weights + W;                                    // [bins_h, W]
  int* const row_starts = reinterpret_cast<int*>(column_sums + bins_h * W);            // [bins_h + 1]
  int* const column_starts = row_starts + bins_h + 1;                                  // [bins_w + 1]
  for (int y = thread; y < H; y += kThreads) row_weights[y] = rows.weight_of_next(y);
  for (int x = thread; x < W; x += kThreads) column_weights[x] = columns.weight_of_next(x);
  for (int i = thread; i <= bins_h; i += kThreads) row_starts[i] = rows.start(i);
  for (int j = thread; j <= bins_w; j += kThreads) column_starts[j] = columns.start(j);

  for (int top = 0; top < H; top += staging.rows) {
    const int bottom = min(top + staging.rows, H);
    const T* const tile = stage_rows(pixel<const T>(args.grad_context, n, channel, top, 0), args.grad_context.stride_h,
                                     static_cast<T*>(nullptr), 0, bottom - top, W, dense(args.grad_context, H, W),
                                     reinterpret_cast<T*>(shared));
    __syncthreads();
    for (int at = thread; at < bins_h * W; at += kThreads) {
      const int i = at / W;
      const T* const column = tile + (at - i * W);
      acc_t<T> sum = top == 0 ? acc_t<T>(0) : column_sums[at];
      for (int y = i > 0 ? max(row_starts[i - 1], top) : top, end = min(row_starts[i], bottom); y < end; ++y) {
        sum += row_weights[y] * widen(column[(y - top) * W]);
      }
      for (int y = max(row_starts[i], top), end = min(row_starts[i + 1], bottom); y < end; ++y) {
        sum += (1 - row_weights[y]) * widen(column[(y - top) * W]);
      }
      column_sums[at] = sum;
    }
    __syncthreads();
  }

  const int64_t cell = n * levels.first[levels.count] + levels.first[level];
  T* const to = static_cast<T*>(args.grad_reduced) + cell * args.R + channel % args.R;
  for (int at = thread; at < bins_h * bins_w; at += kThreads) {
    const int i = at / bins_w, j = at - i * bins_w;
    const acc_t<T>* const row = column_sums + i * W;
    acc_t<T> sum = 0;
    for (int x = j > 0 ? column_starts[j - 1] : 0; x < column_starts[j]; ++x) sum += column_weights[x] * row[x];
    for (int x = column_starts[j]; x < column_starts[j + 1]; ++x) sum += (1 - column_weights[x]) * row[x];
    to[at * args.R] = narrow<T>(sum);
  }
}

// Tables and tile of upsample_backward_planes.
template <class T>
Staging plan_backward(const PyramidUpsampleConcatBackwardArgs& args) {
  if (args.channels_last) return {0, 0, 0};
  const size_t bins_h = most_bins(args.levels.bins_h, args.levels.count);
  const size_t bins_w = most_bins(args.levels.bins_w, args.levels.count);
  return plan_staging<T>(args.H, args.W,
                         (args.H + args.W + bins_h * args.W) * sizeof(acc_t<T>) + (bins_h + bins_w + 2) * sizeof(int));
}

}  // namespace

size_t pyramid_upsample_concat_backward_workspace(const PyramidUpsampleConcatBackwardArgs& args) {
  const int64_t sums = 4 * args.N * args.R * make_intervals(args).first[args.levels.count];
  size_t bytes = 0;
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (plan_backward<T>(args).rows == 0) bytes = sums * sizeof(acc_t<T>);
    return cudaSuccess;
  });
  return bytes;
}

int pyramid_upsample_concat_backward(const PyramidUpsampleConcatBackwardArgs& args, void* stream) {
  if (!fits_int(args.levels, args.levels.count * args.R, args.H, args.W)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Staging staging = plan_backward<T>(args);
    if (staging.rows > 0) {
      return launch(upsample_backward_planes<T>, args.N * args.levels.count * args.R, kThreads, staging.bytes, stream,
                    args, staging);
    }
    const Intervals intervals = make_intervals(args);
    const bool vectors = args.channels_last && args.R % kVector<T> == 0 &&
                         vectors_of_channels<T>(args.grad_context, args.levels.count * args.R);
    const Chunks chunks = make_chunks(args.R, vectors ? kVector<T> : 1);
    const cudaError_t error = launch(vectors ? upsample_backward_parts<T, kVector<T>> : upsample_backward_parts<T, 1>,
                                     args.N * intervals.first[args.levels.count] * chunks.count, chunks.threads(), 0,
                                     stream, args, intervals, chunks.count);
    if (error != cudaSuccess) return error;
    const int cell_chunks = static_cast<int>(divide_up(args.R, kThreads));
    return launch(upsample_backward_cells<T>, args.N * args.levels.first[args.levels.count] * cell_chunks, kThreads, 0,
                  stream, args, intervals, cell_chunks);
  });
}

}  // namespace pspnet_fast::cuda
