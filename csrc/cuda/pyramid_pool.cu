// Pyramid pooling: the mean of every bin of every level from one read of the input, which is copied into the
// concatenation on the way; and its backward.
#include "cells.cuh"
#include "planes.cuh"
#include "segments.cuh"

namespace pspnet_fast::cuda {
namespace {

// Sums a height x width rectangle of a map whose next pixel is from_w and next row from_h elements on: each thread
// adds V channels of every blockDim.y-th pixel and stores them to `to` as well, if given.
template <class T, int V>
__device__ __forceinline__ void add_rectangle(const T* from, int64_t from_h, int64_t from_w, T* to, int64_t to_h,
                                              int64_t to_w, int height, int width, acc_t<T> (&sum)[V]) {
  const int area = height * width, step = static_cast<int>(blockDim.y);
  for (int first = static_cast<int>(threadIdx.y); first < area; first += kBatch * step) {
    T values[kBatch][V];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * step, y = at / width, x = at - y * width;
      if (at < area) load(from + y * from_h + x * from_w, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * step, y = at / width, x = at - y * width;
      if (at >= area) break;
      if (to != nullptr) store(to + y * to_h + x * to_w, values[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(values[i][v]);
    }
  }
}

// Channels-last pooling, first part: sums of segment cells [N, rows, columns, C], and the copy.
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes one cell and a chunk of channels: threads x over channels, y over the cell's pixels.
// Traffic: input read once, concat written once, one accumulator a cell and channel written.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    pool_cells(const __grid_constant__ PyramidPoolArgs args, const __grid_constant__ Segments rows,
               const __grid_constant__ Segments columns, int chunks) {
  const Item item = item_of_block(rows.count * columns.count, chunks);
  const int row = item.cell / columns.count, column = item.cell % columns.count;
  const int y = rows.start(row), x = columns.start(column);
  const int64_t c = first_channel<V>(item.chunk);
  acc_t<T> sum[V] = {};
  if (c < args.C) {
    add_rectangle(pixel<const T>(args.input, item.n, c, y, x), args.input.stride_h, args.input.stride_w,
                  args.concat.data != nullptr ? pixel<T>(args.concat, item.n, c, y, x) : nullptr, args.concat.stride_h,
                  args.concat.stride_w, rows.start(row + 1) - y, columns.start(column + 1) - x, sum);
  }
  auto* const cell_sums = static_cast<acc_t<T>*>(args.workspace) + blockIdx.x / chunks * args.C;
  write_total(sum, item.chunk, args.C, [&](int64_t channel, acc_t<T> total) { cell_sums[channel] = total; });
}

// Channels-last pooling, second part: the mean of each bin from the cells' sums.
// Layout: cells [N, rows, columns, C] to pooled [N, P, C], V channels a thread.
// A block takes one bin and a chunk of channels: threads x over channels, y over the bin's cells.
// Traffic: each cell is read once a level and bin that holds it; they are few and lie in the L2 cache.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    pool_bins(const __grid_constant__ PyramidPoolArgs args, const __grid_constant__ Segments rows,
              const __grid_constant__ Segments columns, int chunks) {
  const Levels& levels = args.levels;
  const Item item = item_of_block(levels.first[levels.count], chunks);
  const int level = level_of(levels, item.cell), local = item.cell - levels.first[level];
  const int i = local / levels.bins_w[level], j = local % levels.bins_w[level];
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const int top = start_index<int>(i, levels.bins_h[level], H), bottom = end_index<int>(i, levels.bins_h[level], H);
  const int left = start_index<int>(j, levels.bins_w[level], W), right = end_index<int>(j, levels.bins_w[level], W);
  const int row = rows.containing(top), column = columns.containing(left);

  const int64_t c = first_channel<V>(item.chunk);
  acc_t<T> sum[V] = {};
  if (c < args.C) {
    const int64_t cell = (item.n * rows.count + row) * columns.count + column;
    add_rectangle(static_cast<const acc_t<T>*>(args.workspace) + cell * args.C + c, columns.count * args.C, args.C,
                  static_cast<acc_t<T>*>(nullptr), 0, 0, rows.containing(bottom) - row,
                  columns.containing(right) - column, sum);
  }
  T* const pooled = static_cast<T*>(args.pooled) + blockIdx.x / chunks * args.C;
  const auto area = static_cast<acc_t<T>>(bottom - top) * static_cast<acc_t<T>>(right - left);
  write_total(sum, item.chunk, args.C,
              [&](int64_t channel, acc_t<T> total) { pooled[channel] = narrow<T>(total / area); });
}

// Planar pooling, in one launch: a plane is staged in shared memory, copied, and summed there.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes one plane; threads over its vectors, then columns x row segments, then bins.
// Traffic: input read once, concat written once, pooled written.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    pool_planes(const __grid_constant__ PyramidPoolArgs args, const __grid_constant__ Segments rows, Staging staging,
                int bins_w) {
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  auto* const column_sums = reinterpret_cast<acc_t<T>*>(shared + staging.tile_bytes);  // [rows, W]
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), thread = static_cast<int>(threadIdx.x);
  acc_t<T>* const bin_sums = column_sums + rows.count * W;  // [rows, bins_w]: the column bins of all levels
  const int64_t n = blockIdx.x / args.C, c = blockIdx.x % args.C;
  const bool copies = args.concat.data != nullptr;
  const bool is_dense = dense(args.input, H, W) && (!copies || dense(args.concat, H, W));

  for (int top = 0; top < H; top += staging.rows) {
    const int bottom = min(top + staging.rows, H);
    const T* tile = stage_rows(pixel<const T>(args.input, n, c, top, 0), args.input.stride_h,
                               copies ? pixel<T>(args.concat, n, c, top, 0) : nullptr, args.concat.stride_h,
                               bottom - top, W, is_dense, reinterpret_cast<T*>(shared));
    __syncthreads();
    for (int at = thread; at < rows.count * W; at += kThreads) {
      const int row = at / W, x = at - row * W, start = rows.start(row);
      const int begin = max(start, top), end = min(rows.start(row + 1), bottom);
      if (begin >= end) continue;
      acc_t<T> sum = begin == start ? acc_t<T>(0) : column_sums[at];
      for (int y = begin; y < end; ++y) sum += widen(tile[(y - top) * W + x]);
      column_sums[at] = sum;
    }
    __syncthreads();
  }

  const Levels& levels = args.levels;
  for (int at = thread; at < rows.count * bins_w; at += kThreads) {
    const int row = at / bins_w;
    int level = 0, j = at - row * bins_w;
    while (j >= levels.bins_w[level]) j -= levels.bins_w[level++];
    const int end = end_index<int>(j, levels.bins_w[level], W);
    acc_t<T> sum = 0;
    for (int x = start_index<int>(j, levels.bins_w[level], W); x < end; ++x) {
      sum += column_sums[row * W + x];
    }
    bin_sums[at] = sum;
  }
  __syncthreads();

  const int P = levels.first[levels.count];
  for (int bin = thread; bin < P; bin += kThreads) {
    int level = 0, column = 0;
    for (; bin >= levels.first[level + 1]; ++level) column += levels.bins_w[level];
    const int local = bin - levels.first[level], level_h = levels.bins_h[level], level_w = levels.bins_w[level];
    const int i = local / level_w, j = local - i * level_w;
    const int top = start_index<int>(i, level_h, H), bottom = end_index<int>(i, level_h, H);
    const int width = end_index<int>(j, level_w, W) - start_index<int>(j, level_w, W);
    const int end = rows.containing(bottom);
    acc_t<T> sum = 0;
    for (int row = rows.containing(top); row < end; ++row) sum += bin_sums[row * bins_w + column + j];
    static_cast<T*>(args.pooled)[(n * P + bin) * args.C + c] =
        narrow<T>(sum / (static_cast<acc_t<T>>(bottom - top) * static_cast<acc_t<T>>(width)));
  }
}

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
  const int row = item.cell / columns.count, column = item.cell % columns.count;
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

  const T* const from = args.grad_concat.data != nullptr ? pixel<const T>(args.grad_concat, n, c, top, left) : nullptr;
  T* const to = pixel<T>(args.grad_input, n, c, top, left);
  const int area = c < args.C ? (rows.start(row + 1) - top) * width : 0;
  for (int first = group; first < area; first += kBatch * step) {
    T values[kBatch][V];
    if (from != nullptr) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * step, y = at / width, x = at - y * width;
        if (at < area) load(from + y * args.grad_concat.stride_h + x * args.grad_concat.stride_w, values[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * step, y = at / width, x = at - y * width;
      if (at >= area) break;
      acc_t<T> grad[V];
#pragma unroll
      for (int v = 0; v < V; ++v) grad[v] = from != nullptr ? sum[v] + widen(values[i][v]) : sum[v];
      store_narrow(to + y * args.grad_input.stride_h + x * args.grad_input.stride_w, grad);
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
        const auto pair = *reinterpret_cast<const Pair<acc_t<T>>*>(shares);
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

// Which kernels take a call: planes staged in shared memory where the map is planar and its tables fit, else cells.
template <class T>
struct PoolPlan {
  Segments rows, columns;
  int bins_w = 0;  // of all levels
  Staging staging = {0, 0, 0};

  explicit PoolPlan(const PyramidPoolArgs& args)
      : rows(make_segments(args.levels.count, args.levels.bins_h, static_cast<int>(args.H))),
        columns(make_segments(args.levels.count, args.levels.bins_w, static_cast<int>(args.W))) {
    for (int level = 0; level < args.levels.count; ++level) bins_w += args.levels.bins_w[level];
    if (!args.channels_last) {
      staging = plan_staging<T>(args.H, args.W, static_cast<size_t>(rows.count) * (args.W + bins_w) * sizeof(acc_t<T>));
    }
  }
  bool planes() const { return staging.rows > 0; }
  int64_t cells() const { return static_cast<int64_t>(rows.count) * columns.count; }
};

template <class T, int V>
cudaError_t launch_cells(const PyramidPoolArgs& args, const PoolPlan<T>& plan, void* stream) {
  const Chunks chunks = make_chunks(args.C, V);
  const cudaError_t error = launch(pool_cells<T, V>, args.N * plan.cells() * chunks.count, chunks.threads(), 0, stream,
                                   args, plan.rows, plan.columns, chunks.count);
  if (error != cudaSuccess) return error;
  constexpr int kWide = kVector<acc_t<T>>;
  const int64_t bins = args.N * args.levels.first[args.levels.count];
  const bool wide = args.C % kWide == 0 && aligned(args.workspace);
  const Chunks bin_chunks = make_chunks(args.C, wide ? kWide : 1);
  return launch(wide ? pool_bins<T, kWide> : pool_bins<T, 1>, bins * bin_chunks.count, bin_chunks.threads(), 0, stream,
                args, plan.rows, plan.columns, bin_chunks.count);
}

}  // namespace

size_t pyramid_pool_workspace(const PyramidPoolArgs& args) {
  size_t bytes = 0;
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const PoolPlan<T> plan(args);
    if (!plan.planes()) bytes = args.N * plan.cells() * args.C * sizeof(acc_t<T>);
    return cudaSuccess;
  });
  return bytes;
}

int pyramid_pool(const PyramidPoolArgs& args, void* stream) {
  if (!fits_int(args.levels, args.C, args.H, args.W)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const PoolPlan<T> plan(args);
    if (plan.planes()) {
      return launch(pool_planes<T>, args.N * args.C, kThreads, plan.staging.bytes, stream, args, plan.rows,
                    plan.staging, plan.bins_w);
    }
    const bool vectors = args.channels_last && aligned(args.workspace) && vectors_of_channels<T>(args.input, args.C) &&
                         vectors_of_channels<T>(args.concat, args.C);
    return vectors ? launch_cells<T, kVector<T>>(args, plan, stream) : launch_cells<T, 1>(args, plan, stream);
  });
}

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
