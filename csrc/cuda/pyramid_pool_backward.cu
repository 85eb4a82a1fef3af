// The backward of pyramid pooling: the gradient of the copied channels and that of the bins, in one pass.
#include "cells.cuh"
#include "planes.cuh"
#include "segments.cuh"

namespace pspnet_fast::cuda {
namespace {

// Adds a level's share of the gradient of pixel (y, x), V channels from c on: grad_pooled / area of each bin over it.
template <class T, int V>
__device__ __forceinline__ void add_level(const PyramidPoolBackwardArgs& args, int level, int64_t n, int y, int x,
                                          int64_t c, acc_t<T> (&sum)[V]) {
  const Levels& levels = args.levels;
  const int bins_h = levels.bins_h[level], bins_w = levels.bins_w[level];
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const T* const grads =
      static_cast<const T*>(args.grad_pooled) + (n * levels.first[levels.count] + levels.first[level]) * args.C + c;
  const int last_i = last_bin<int>(y, bins_h, H), last_j = last_bin<int>(x, bins_w, W);
  for (int i = first_bin<int>(y, bins_h, H); i <= last_i; ++i) {
    const auto height = static_cast<acc_t<T>>(end_index<int>(i, bins_h, H) - start_index<int>(i, bins_h, H));
    for (int j = first_bin<int>(x, bins_w, W); j <= last_j; ++j) {
      const auto width = static_cast<acc_t<T>>(end_index<int>(j, bins_w, W) - start_index<int>(j, bins_w, W));
      const acc_t<T> share = 1 / (height * width);
      acc_t<T> grad[V];
      load_wide(grads + (static_cast<int64_t>(i) * bins_w + j) * args.C, grad);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += grad[v] * share;
    }
  }
}

// Channels-last backward: all pixels of a segment cell take the same gradient from the bins, found once a block.
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes one cell and a chunk of channels: threads x over channels, y over levels, then the cell's pixels.
// Traffic: grad_concat read once, grad_input written once; grad_pooled is small and lies in the L2 cache.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    pool_backward_cells(const __grid_constant__ PyramidPoolBackwardArgs args, const __grid_constant__ Segments rows,
                        const __grid_constant__ Segments columns, int chunks) {
  PSP_SHARED(acc_t<T>, shares, kThreads * V);
  const Item item = item_of_block(rows.count * columns.count, chunks);
  const int row = item.index / columns.count, column = item.index % columns.count;
  const int top = rows.start(row), left = columns.start(column), width = columns.start(column + 1) - left;
  const int lanes = static_cast<int>(blockDim.x), step = static_cast<int>(blockDim.y);
  const int lane = static_cast<int>(threadIdx.x), group = static_cast<int>(threadIdx.y);
  const int64_t n = item.n, c = first_channel<V>(item.chunk);
  acc_t<T> sum[V] = {};
  for (int level = group; c < args.C && level < args.levels.count; level += step) {
    add_level<T>(args, level, n, top, left, c, sum);
  }
  store_shared(shares + (group * lanes + lane) * V, sum);
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = 0;
  for (int other = 0; other < min(step, args.levels.count); ++other) {
    acc_t<T> share[V];
    load(shares + (other * lanes + lane) * V, share);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += share[v];
  }

  if (c >= args.C) return;
  const bool adds = args.grad_concat.data != nullptr;
  const RectangleStep walk(step, width);
  int x = group % width;
  const int y = group / width;
  const Image &source = args.grad_concat, &target = args.grad_input;
  const T* from = adds ? pixel<const T>(source, n, c, top + y, left + x) : nullptr;
  T* to = pixel<T>(target, n, c, top + y, left + x);
  const int64_t from_next = walk.y * source.stride_h + walk.x * source.stride_w;
  const int64_t from_row = source.stride_h - width * source.stride_w;
  const int64_t to_next = walk.y * target.stride_h + walk.x * target.stride_w;
  const int64_t to_row = target.stride_h - width * target.stride_w;
  for (int rest = walk.count((rows.start(row + 1) - top) * width, group); rest > 0; rest -= kLoads) {
    T values[kLoads][V];
    T* targets[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (adds && i < rest) load(from, values[i]);
      targets[i] = to;
      const bool wraps = walk.advance(x);
      if (adds) from += from_next + (wraps ? from_row : 0);
      to += to_next + (wraps ? to_row : 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i >= rest) break;
      acc_t<T> grad[V];
#pragma unroll
      for (int v = 0; v < V; ++v) grad[v] = adds ? sum[v] + widen(values[i][v]) : sum[v];
      store_narrow(targets[i], grad);
    }
  }
}

// Planar backward: the bins' gradient of each segment cell, spread to columns in shared memory, then one pass.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes one plane; threads over cells, then row segments x columns, then vectors of the plane.
// Traffic: grad_concat read once, grad_input written once, grad_pooled a few times from the L2 cache.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    pool_backward_planes(const __grid_constant__ PyramidPoolBackwardArgs args, const __grid_constant__ Segments rows,
                         const __grid_constant__ Segments columns) {
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), pitch = row_pitch(W);
  PSP_DYNAMIC_SHARED(acc_t<T>, table);                                             // [rows, pitch]
  acc_t<T>* const cells = table + rows.count * pitch;                              // [rows, columns]
  int* const row_of = reinterpret_cast<int*>(cells + rows.count * columns.count);  // [H]: where a row's begins in table
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t n = blockIdx.x / args.C, c = blockIdx.x % args.C;

  for (int cell = thread; cell < rows.count * columns.count; cell += kThreads) {
    const int row = cell / columns.count, column = cell - row * columns.count;
    acc_t<T> sum[1] = {};
    for (int level = 0; level < args.levels.count; ++level) {
      add_level<T>(args, level, n, rows.start(row), columns.start(column), c, sum);
    }
    cells[cell] = sum[0];
  }
  __syncthreads();
  for (int at = thread; at < rows.count * W; at += kThreads) {
    const int row = at / W, x = at - row * W;
    table[row * pitch + padded_by_two(x)] = cells[row * columns.count + columns.containing(x)];
  }
  for (int y = thread; y < H; y += kThreads) row_of[y] = rows.containing(y) * pitch;
  __syncthreads();

  const bool adds = args.grad_concat.data != nullptr;
  const bool is_dense = dense(args.grad_input, H, W) && (!adds || dense(args.grad_concat, H, W));
  T* const to = pixel<T>(args.grad_input, n, c, 0, 0);
  const T* const from = adds ? pixel<const T>(args.grad_concat, n, c, 0, 0) : nullptr;
  for_each_vector(to, args.grad_input.stride_h, H, W, is_dense, [&](int first, int count) {
    int y = first / W, x = first - y * W;
    T* const target = to + y * args.grad_input.stride_h + x;
    T values[kVector<T>];
    if (adds) load_some(from + y * args.grad_concat.stride_h + x, count, values);
    const auto add = [&](int i, acc_t<T> share) { values[i] = narrow<T>(adds ? widen(values[i]) + share : share); };
    if (count == kVector<T> && W % 2 == 0 && first % 2 == 0) {
      for_each_pair<T>(first, W, [&](int i, int row, int column) {
        const acc_t<T>* const shares = table + row_of[row] + padded_by_two(column);
        const auto pair = *reinterpret_cast<const Together<acc_t<T>, 2>*>(shares);
        add(i, pair.values[0]);
        add(i + 1, pair.values[1]);
      });
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        if (i >= count) break;
        add(i, table[row_of[y] + padded_by_two(x)]);
        if (++x == W) x = 0, ++y;
      }
    }
    store_some(target, count, values);
  });
}

}  // namespace

int pyramid_pool_backward(const PyramidPoolBackwardArgs& args, void* stream) {
  if (!fits_int(args.levels, args.C, args.H, args.W)) return cudaErrorInvalidValue;
  const Segments rows = make_segments(args.levels.count, args.levels.bins_h, static_cast<int>(args.H));
  const Segments columns = make_segments(args.levels.count, args.levels.bins_w, static_cast<int>(args.W));
  const int64_t cells = static_cast<int64_t>(rows.count) * columns.count;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t table = cells + static_cast<int64_t>(rows.count) * row_pitch(static_cast<int>(args.W));
    const size_t bytes = table * sizeof(acc_t<T>) + args.H * sizeof(int);
    if (!args.channels_last && bytes <= kSharedBytes && countable(args.H, args.W)) {
      return launch(pool_backward_planes<T>, args.N * args.C, kThreads, bytes, stream, args, rows, columns);
    }
    const bool vectors = args.channels_last && aligned(args.grad_pooled) &&
                         vectors_of_channels<T>(args.grad_concat, args.C) &&
                         vectors_of_channels<T>(args.grad_input, args.C);
    const Chunks chunks = make_chunks(args.C, vectors ? kVector<T> : 1);
    return launch(vectors ? pool_backward_cells<T, kVector<T>> : pool_backward_cells<T, 1>,
                  args.N * cells * chunks.count, chunks.threads(), 0, stream, args, rows, columns, chunks.count);
  });
}

}  // namespace pspnet_fast::cuda
