// Pyramid pooling: the mean of every bin of every level from one read of the input, which is copied into the
// concatenation on the way.
#include "cells.cuh"
#include "planes.cuh"
#include "segments.cuh"

namespace pspnet_fast::cuda {
namespace {

// Sums a height x width rectangle of a map whose next pixel is from_w and next row from_h elements on: each thread
// adds V channels of every `threads`-th pixel from number `thread` on and, where `copies`, stores them to `to` as well.
template <bool copies, class T, int V>
__device__ __forceinline__ void add_rectangle(const T* from, int64_t from_h, int64_t from_w, T* to, int64_t to_h,
                                              int64_t to_w, int height, int width, int thread, int threads,
                                              acc_t<T> (&sum)[V]) {
  const RectangleStep step(threads, width);
  const int y = thread / width;
  int x = thread - y * width;
  from += y * from_h + x * from_w;
  if (copies) to += y * to_h + x * to_w;
  const int64_t from_next = step.y * from_h + step.x * from_w, from_row = from_h - width * from_w;
  const int64_t to_next = step.y * to_h + step.x * to_w, to_row = to_h - width * to_w;
  for (int left = step.count(height * width, thread); left > 0; left -= kLoads) {
    T values[kLoads][V];
    T* targets[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i < left) load(from, values[i]);
      targets[i] = to;
      const bool wraps = step.advance(x);
      from += from_next + (wraps ? from_row : 0);
      if (copies) to += to_next + (wraps ? to_row : 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i >= left) break;
      if (copies) store(targets[i], values[i]);
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
  const int row = item.index / columns.count, column = item.index % columns.count;
  const int y = rows.start(row), x = columns.start(column);
  const int64_t c = first_channel<V>(item.chunk);
  acc_t<T> sum[V] = {};
  if (c < args.C) {
    const T* const from = pixel<const T>(args.input, item.n, c, y, x);
    const int height = rows.start(row + 1) - y, width = columns.start(column + 1) - x;
    const int thread = static_cast<int>(threadIdx.y), threads = static_cast<int>(blockDim.y);
    if (args.concat.data != nullptr) {
      add_rectangle<true>(from, args.input.stride_h, args.input.stride_w, pixel<T>(args.concat, item.n, c, y, x),
                          args.concat.stride_h, args.concat.stride_w, height, width, thread, threads, sum);
    } else {
      add_rectangle<false>(from, args.input.stride_h, args.input.stride_w, static_cast<T*>(nullptr), 0, 0, height,
                           width, thread, threads, sum);
    }
  }
  auto* const cell_sums = static_cast<acc_t<T>*>(args.workspace) + blockIdx.x / chunks * args.C;
  write_total(sum, item.chunk, args.C, [&](int64_t channel, acc_t<T> total) { cell_sums[channel] = total; });
}

// Channels-last pooling, second part: the mean of each bin from the cells' sums.
// Layout: cells [N, rows, columns, C] to pooled [N, P, C], V channels a thread.
// A block takes blockDim.y bins, one a thread y (`alone`), or one bin; and a chunk of channels, threads x over these.
// Traffic: each cell is read once a level and bin that holds it; they are few and lie in the L2 cache.
template <class T, int V, bool alone>
__global__ void __launch_bounds__(kThreads, 3)
    pool_bins(const __grid_constant__ PyramidPoolArgs args, const __grid_constant__ Segments rows,
              const __grid_constant__ Segments columns, int chunks) {
  const Levels& levels = args.levels;
  const int P = levels.first[levels.count], thread = static_cast<int>(threadIdx.y);
  const int block = static_cast<int>(blockIdx.x / chunks), chunk = static_cast<int>(blockIdx.x) - block * chunks;
  const int64_t number = alone ? static_cast<int64_t>(block) * blockDim.y + thread : block;  // of a bin
  if (number >= args.N * P) return;                                                          // only where `alone`
  const int64_t n = number / P;
  const int bin = static_cast<int>(number - n * P), level = level_of(levels, bin), local = bin - levels.first[level];
  const int i = local / levels.bins_w[level], j = local - i * levels.bins_w[level];
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const int top = start_index<int>(i, levels.bins_h[level], H), bottom = end_index<int>(i, levels.bins_h[level], H);
  const int left = start_index<int>(j, levels.bins_w[level], W), right = end_index<int>(j, levels.bins_w[level], W);
  const int row = rows.containing(top), column = columns.containing(left);

  const int64_t c = first_channel<V>(chunk);
  acc_t<T> sum[V] = {};
  if (c < args.C) {
    const int64_t cell = (n * rows.count + row) * columns.count + column;
    add_rectangle<false>(static_cast<const acc_t<T>*>(args.workspace) + cell * args.C + c, columns.count * args.C,
                         args.C, static_cast<acc_t<T>*>(nullptr), 0, 0, rows.containing(bottom) - row,
                         columns.containing(right) - column, alone ? 0 : thread,
                         alone ? 1 : static_cast<int>(blockDim.y), sum);
  }
  T* const pooled = static_cast<T*>(args.pooled) + number * args.C;
  const auto area = static_cast<acc_t<T>>(bottom - top) * static_cast<acc_t<T>>(right - left);
  if constexpr (alone) {
    if (c >= args.C) return;
#pragma unroll
    for (int v = 0; v < V; ++v) pooled[c + v] = narrow<T>(sum[v] / area);
  } else {
    write_total(sum, chunk, args.C,
                [&](int64_t channel, acc_t<T> total) { pooled[channel] = narrow<T>(total / area); });
  }
}

constexpr int kPlaneThreads = 128;
constexpr int64_t kPlaneBlocks = 1024;  // at least, before a block takes several planes

// A bin in the sums of row segments: those from `row` to `end` of its column, over its area.
template <class A>
struct PlaneBin {
  int row, end, column;
  A area;
};

// Adds the rows of a tile that lie in a row segment, column by column in pairs (or alone), to sums of `W` columns that
// begin where `fresh`: the lanes of a warp over the columns.
template <int together, class T>
__device__ __forceinline__ void add_columns(const T* rows, int height, int W, bool fresh, acc_t<T>* sums) {
  for (int x = static_cast<int>(threadIdx.x) % kWarp * together; x < W; x += kWarp * together) {
    acc_t<T> sum[together];
#pragma unroll
    for (int i = 0; i < together; ++i) sum[i] = fresh ? acc_t<T>(0) : sums[x + i];
    const T* from = rows + x;
#pragma unroll 4
    for (int y = 0; y < height; ++y, from += W) {
      const auto values = *reinterpret_cast<const Together<T, together>*>(from);
#pragma unroll
      for (int i = 0; i < together; ++i) sum[i] += widen(values.values[i]);
    }
#pragma unroll
    for (int i = 0; i < together; ++i) sums[x + i] = sum[i];
  }
}

// Planar pooling, in one launch: a plane is staged in shared memory, copied, and summed there.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes `planes` planes, one after the other, after a table of the bins; threads over a plane's vectors, warps
// over row segments and their lanes over columns, then threads over segment cells, over row segments x column bins, and
// over bins.
// Traffic: input read once, concat written once, pooled written; 93 instructions a vector, 60 x 60 in bfloat16.
template <class T>
__global__ void __launch_bounds__(kPlaneThreads)
    pool_planes(const __grid_constant__ PyramidPoolArgs args, const __grid_constant__ Segments rows,
                const __grid_constant__ Segments columns, Staging staging, int bins_w, int planes) {
  using A = acc_t<T>;
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  const Levels& levels = args.levels;
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), P = levels.first[levels.count];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  auto* const column_sums = reinterpret_cast<A*>(shared + staging.tile_bytes);  // [rows, W]
  A* const cells = column_sums + rows.count * W;                                // [rows, columns]
  A* const bin_sums = cells + rows.count * columns.count;                       // [bins_w, rows]: column bins
  auto* const bins = reinterpret_cast<PlaneBin<A>*>(bin_sums + bins_w * rows.count);
  auto* const ends = reinterpret_cast<int*>(bins + P);  // [bins_w, 2]: the segments of each
  for (int bin = thread; bin < P; bin += kPlaneThreads) {
    int level = 0, column = 0;
    for (; bin >= levels.first[level + 1]; ++level) column += levels.bins_w[level];
    const int local = bin - levels.first[level], level_h = levels.bins_h[level], level_w = levels.bins_w[level];
    const int i = local / level_w, j = local - i * level_w;
    const int top = start_index<int>(i, level_h, H), bottom = end_index<int>(i, level_h, H);
    const int left = start_index<int>(j, level_w, W), right = end_index<int>(j, level_w, W);
    bins[bin] = {rows.containing(top), rows.containing(bottom), column + j,
                 static_cast<A>(bottom - top) * static_cast<A>(right - left)};
    if (i > 0) continue;
    ends[2 * (column + j)] = columns.containing(left), ends[2 * (column + j) + 1] = columns.containing(right);
  }

  const int64_t first = blockIdx.x * static_cast<int64_t>(planes), last = min(first + planes, args.N * args.C);
  const bool copies = args.concat.data != nullptr;
  const bool is_dense = dense(args.input, H, W) && (!copies || dense(args.concat, H, W));
  int64_t n = first / args.C, c = first - n * args.C;
  for (int64_t plane = first; plane < last; ++plane) {
    for (int top = 0; top < H; top += staging.rows) {
      const int bottom = min(top + staging.rows, H);
      const T* const tile = stage_rows(pixel<const T>(args.input, n, c, top, 0), args.input.stride_h,
                                       copies ? pixel<T>(args.concat, n, c, top, 0) : nullptr, args.concat.stride_h,
                                       bottom - top, W, is_dense, reinterpret_cast<T*>(shared));
      __syncthreads();
      const bool pairs = W % 2 == 0 && misalignment(tile) % 2 == 0;
      for (int row = warp; row < rows.count; row += kPlaneThreads / kWarp) {
        const int start = rows.start(row), begin = max(start, top), end = min(rows.start(row + 1), bottom);
        if (begin >= end) continue;
        const T* const from = tile + (begin - top) * W;
        if (pairs) {
          add_columns<2>(from, end - begin, W, begin == start, column_sums + row * W);
        } else {
          add_columns<1>(from, end - begin, W, begin == start, column_sums + row * W);
        }
      }
      __syncthreads();
    }
    for (int at = thread; at < rows.count * columns.count; at += kPlaneThreads) {
      const int row = at / columns.count, column = at - row * columns.count, end = columns.start(column + 1);
      const A* const sums = column_sums + row * W;
      A sum = 0;
      for (int x = columns.start(column); x < end; ++x) sum += sums[x];
      cells[at] = sum;
    }
    __syncthreads();
    for (int at = thread; at < rows.count * bins_w; at += kPlaneThreads) {
      const int bin = at / rows.count, end = ends[2 * bin + 1];
      const A* const sums = cells + (at - bin * rows.count) * columns.count;
      A sum = 0;
      for (int column = ends[2 * bin]; column < end; ++column) sum += sums[column];
      bin_sums[at] = sum;
    }
    __syncthreads();
    T* const pooled = static_cast<T*>(args.pooled) + n * P * args.C + c;
    for (int number = thread; number < P; number += kPlaneThreads) {
      const PlaneBin<A> bin = bins[number];
      const A* const sums = bin_sums + bin.column * rows.count;
      A sum = 0;
      for (int row = bin.row; row < bin.end; ++row) sum += sums[row];
      pooled[number * args.C] = narrow<T>(sum / bin.area);
    }
    if (++c == args.C) c = 0, ++n;
  }
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
      using A = acc_t<T>;
      staging =
          plan_staging<T>(args.H, args.W,
                          static_cast<size_t>(rows.count) * (args.W + columns.count + bins_w) * sizeof(A) +
                              args.levels.first[args.levels.count] * sizeof(PlaneBin<A>) + bins_w * 2 * sizeof(int));
    }
  }
  bool planes() const { return staging.rows > 0; }
  int64_t cells() const { return static_cast<int64_t>(rows.count) * columns.count; }
};

constexpr int64_t kCellsOfThread = 256;  // that a thread may add for the largest bin

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
  const bool alone = plan.cells() <= kCellsOfThread;
  const int64_t blocks = alone ? divide_up(bins, bin_chunks.threads().y) : bins;
  const auto kernel = alone  ? (wide ? pool_bins<T, kWide, true> : pool_bins<T, 1, true>)
                      : wide ? pool_bins<T, kWide, false>
                             : pool_bins<T, 1, false>;
  return launch(kernel, blocks * bin_chunks.count, bin_chunks.threads(), 0, stream, args, plan.rows, plan.columns,
                bin_chunks.count);
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
      const int64_t count = args.N * args.C, planes = min(max(count / kPlaneBlocks, int64_t{1}), int64_t{16});
      return launch(pool_planes<T>, divide_up(count, planes), kPlaneThreads, plan.staging.bytes, stream, args,
                    plan.rows, plan.columns, plan.staging, plan.bins_w, static_cast<int>(planes));
    }
    const bool vectors = args.channels_last && aligned(args.workspace) && vectors_of_channels<T>(args.input, args.C) &&
                         vectors_of_channels<T>(args.concat, args.C);
    return vectors ? launch_cells<T, kVector<T>>(args, plan, stream) : launch_cells<T, 1>(args, plan, stream);
  });
}

}  // namespace pspnet_fast::cuda
