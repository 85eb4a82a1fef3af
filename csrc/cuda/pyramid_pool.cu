// Pyramid pooling: the mean of every bin of every level from one read of the input, which is copied into the
// concatenation on the way.
#include "cells.cuh"
#include "segments.cuh"
#include "teams.cuh"

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
// Traffic: input read once, concat written once, one accumulator a cell and channel written. Instructions a
// vector: 38.
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
// Traffic: each cell is read once a level and bin that holds it; they are few and lie in the L2 cache. Instructions
// for a vector of the input: 8.
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

// A bin in the sums of row segments: those from `row` to `end` of its column, over its area.
template <class A>
struct PlaneBin {
  int row, end, column;
  A area;
};

// Shared memory of pool_planes: `rows` x `columns` segments.
template <class A>
struct PoolTables {
  int P, H, W, rows, columns;
  int bins_w;  // of all levels
  int strips;

  PSP_HOST_DEVICE int pitch() const { return static_cast<int>(in_fours(W)); }
  // [P] bins, [bins_w, 2] the segments of each column of bins, [H] the segment of each row
  PSP_HOST_DEVICE size_t block_bytes() const {
    return (P * sizeof(PlaneBin<A>) + (2 * int64_t{bins_w} + H) * sizeof(int) + 15) / 16 * 16;
  }
  // [strips, rows, pitch] sums of columns, [rows, columns] cells, [bins_w, rows] columns of bins
  PSP_HOST_DEVICE size_t team_bytes() const {
    return in_fours(int64_t{rows} * (int64_t{strips} * pitch() + columns + bins_w)) * sizeof(A);
  }
};

// Planar pooling, in one launch: a plane is copied, and its row segments summed in registers on the way.
// Layout: planar, any row stride, in units of 4, 2 or 1.
// A team takes a plane; its threads over strips of rows x units of a row, then over segment cells, over row segments x
// columns of bins, and over bins.
// Traffic: input read once, concat written once, pooled written. Instructions a vector: 93.
template <class T, int unit>
__global__ void __launch_bounds__(kThreads, 4)
    pool_planes(const __grid_constant__ PyramidPoolArgs args, const __grid_constant__ Segments rows,
                const __grid_constant__ Segments columns, const __grid_constant__ PoolTables<acc_t<T>> tables,
                int planes) {
  using A = acc_t<T>;
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  const Levels& levels = args.levels;
  const int H = tables.H, W = tables.W, P = tables.P, pitch = tables.pitch(), strips = tables.strips;
  const int bands = rows.count, units = W / unit;
  const Member member;
  auto* const bins = reinterpret_cast<PlaneBin<A>*>(shared);
  auto* const ends = reinterpret_cast<int*>(bins + P);
  int* const band_of = ends + 2 * tables.bins_w;
  for (int bin = member.block_rank(); bin < P; bin += member.block_threads()) {
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
  for (int y = member.block_rank(); y < H; y += member.block_threads()) band_of[y] = rows.containing(y);
  __syncthreads();

  A* const sums = reinterpret_cast<A*>(shared + tables.block_bytes() + member.team * tables.team_bytes());
  A* const cells = sums + strips * bands * pitch;
  A* const bin_sums = cells + bands * columns.count;
  const bool copies = args.concat.data != nullptr;
  const int from_step = strips * static_cast<int>(args.input.stride_h);
  const int to_step = strips * static_cast<int>(args.concat.stride_h);
  for (int turn = 0; turn < planes; ++turn) {
    const int64_t plane = member.plane(turn, planes);
    if (plane >= args.N * args.C) return;
    const int64_t n = plane / args.C, c = plane - n * args.C;
    const T* const input = pixel<const T>(args.input, n, c, 0, 0);
    T* const concat = copies ? pixel<T>(args.concat, n, c, 0, 0) : nullptr;

    for (int at = member.rank; at < strips * units; at += member.threads) {
      const int strip = at / units, x = (at - strip * units) * unit;
      int from = strip * static_cast<int>(args.input.stride_h) + x;
      int to = strip * static_cast<int>(args.concat.stride_h) + x;
      A* target = sums + strip * bands * pitch + x;
      Unit<A, unit> sum = {};
      int band = 0;
      const auto move_to = [&](int next) {
        for (; band < next; ++band, target += pitch) {
          store_unit<Memory::kShared>(target, sum);
          sum = {};
        }
      };
      for (int y = strip; y < H; y += kUnits * strips) {
        Unit<T, unit> values[kUnits];
#pragma unroll
        for (int i = 0; i < kUnits; ++i, from += from_step) {
          if (y + i * strips < H) values[i] = load_unit<T, unit>(input + from);
        }
#pragma unroll
        for (int i = 0; i < kUnits; ++i, to += to_step) {
          if (y + i * strips >= H) break;
          if (copies) store_unit(concat + to, values[i]);
          move_to(band_of[y + i * strips]);
#pragma unroll
          for (int v = 0; v < unit; ++v) sum.values[v] += widen(values[i].values[v]);
        }
      }
      move_to(bands);
    }
    member.sync();
    for (int at = member.rank; at < bands * columns.count; at += member.threads) {
      const int row = at / columns.count, column = at - row * columns.count, end = columns.start(column + 1);
      A sum = 0;
      for (int strip = 0; strip < strips; ++strip) {
        const A* const of_row = sums + (strip * bands + row) * pitch;
        for (int x = columns.start(column); x < end; ++x) sum += of_row[x];
      }
      cells[at] = sum;
    }
    member.sync();
    for (int at = member.rank; at < bands * tables.bins_w; at += member.threads) {
      const int bin = at / bands, end = ends[2 * bin + 1];
      const A* const of_row = cells + (at - bin * bands) * columns.count;
      A sum = 0;
      for (int column = ends[2 * bin]; column < end; ++column) sum += of_row[column];
      bin_sums[at] = sum;
    }
    member.sync();
    T* const pooled = static_cast<T*>(args.pooled) + n * P * args.C + c;
    for (int number = member.rank; number < P; number += member.threads) {
      const PlaneBin<A> bin = bins[number];
      const A* const of_column = bin_sums + bin.column * bands;
      A sum = 0;
      for (int row = bin.row; row < bin.end; ++row) sum += of_column[row];
      pooled[number * args.C] = narrow<T>(sum / bin.area);
    }
  }
}

// Which kernels take a call: planes where the map is planar and their tables fit, else cells.
template <class T>
struct PoolPlan {
  Segments rows, columns;
  int unit = 0;
  PoolTables<acc_t<T>> tables = {};
  Teams teams = {};

  explicit PoolPlan(const PyramidPoolArgs& args)
      : rows(make_segments(args.levels.count, args.levels.bins_h, static_cast<int>(args.H))),
        columns(make_segments(args.levels.count, args.levels.bins_w, static_cast<int>(args.W))) {
    if (!args.channels_last) unit = unit_of<T>(args.H, args.W, {args.input, args.concat});
    if (unit == 0) return;
    int bins_w = 0;
    for (int level = 0; level < args.levels.count; ++level) bins_w += args.levels.bins_w[level];
    tables = {args.levels.first[args.levels.count],
              static_cast<int>(args.H),
              static_cast<int>(args.W),
              rows.count,
              columns.count,
              bins_w,
              strips_of(args.H, args.W)};
    teams = make_teams(args.N * args.C, tables.team_bytes(), [&](int64_t) { return tables.block_bytes(); });
  }
  bool planes() const { return teams.bytes > 0; }
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
      return dispatch_unit<T>(plan.unit, [&](auto unit) {
        return launch(pool_planes<T, decltype(unit)::value>, plan.teams.blocks(args.N * args.C), plan.teams.block(),
                      plan.teams.bytes, stream, args, plan.rows, plan.columns, plan.tables, plan.teams.planes);
      });
    }
    const bool vectors = args.channels_last && aligned(args.workspace) && vectors_of_channels<T>(args.input, args.C) &&
                         vectors_of_channels<T>(args.concat, args.C);
    return vectors ? launch_cells<T, kVector<T>>(args, plan, stream) : launch_cells<T, 1>(args, plan, stream);
  });
}

}  // namespace pspnet_fast::cuda
