// The backward of pyramid pooling: the gradient of the copied channels and that of the bins, in one pass.
#include "cells.cuh"
#include "segments.cuh"
#include "teams.cuh"

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
// Instructions a vector: 51.
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

// The bins of a level that a segment of an axis lies in.
struct BinRange {
  int first, last;
};

// Shared memory of pool_backward_planes: a block's tables, then each team's.
template <class A>
struct PoolBackwardTables {
  int P, H, W, rows, columns, levels;

  PSP_HOST_DEVICE int pitch() const { return static_cast<int>(in_fours(W)); }
  PSP_HOST_DEVICE int64_t cells() const { return int64_t{rows} * columns; }
  PSP_HOST_DEVICE size_t ranges() const { return (int64_t{rows} + columns) * levels * sizeof(BinRange); }
  // [P] shares of a bin's pixels, [H + W] places, [levels, rows + columns] ranges of bins
  PSP_HOST_DEVICE size_t block_bytes() const {
    return in_fours(P) * sizeof(A) + in_fours(int64_t{H} + W) * sizeof(int) + (ranges() + 15) / 16 * 16;
  }
  // [P] gradients, [rows, columns] cells, [rows, pitch] the cells spread to columns
  PSP_HOST_DEVICE size_t team_bytes() const {
    return (in_fours(P) + in_fours(cells()) + int64_t{rows} * pitch()) * sizeof(A);
  }
};

// Planar backward: the bins' gradient of each segment cell, spread to columns in shared memory, then one pass.
// Layout: planar, any row stride, in units of 4, 2 or 1.
// A team takes a plane; its threads over bins, cells, columns, then units of the plane.
// Traffic: grad_concat read once, grad_input written once, grad_pooled from the caches. Instructions a vector: 80.
template <class T, int unit>
__global__ void __launch_bounds__(kThreads, 4)
    pool_backward_planes(const __grid_constant__ PyramidPoolBackwardArgs args, const __grid_constant__ Segments rows,
                         const __grid_constant__ Segments columns, int planes) {
  using A = acc_t<T>;
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  const Levels& levels = args.levels;
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), P = levels.first[levels.count];
  const int bands = rows.count, strips = columns.count;
  const PoolBackwardTables<A> tables = {P, H, W, bands, strips, levels.count};
  const int pitch = tables.pitch();
  const Member member;

  A* const bin_shares = reinterpret_cast<A*>(shared);
  int* const row_of = reinterpret_cast<int*>(bin_shares + in_fours(P));  // [H]: where a row's begins in the table
  int* const column_of = row_of + H;                                     // [W]: its segment
  BinRange* const row_bins = reinterpret_cast<BinRange*>(row_of + in_fours(int64_t{H} + W));
  BinRange* const column_bins = row_bins + levels.count * bands;
  for (int bin = member.block_rank(); bin < P; bin += member.block_threads()) {
    const int level = level_of(levels, bin), bins_h = levels.bins_h[level], bins_w = levels.bins_w[level];
    const int i = (bin - levels.first[level]) / bins_w, j = bin - levels.first[level] - i * bins_w;
    const auto height = static_cast<A>(end_index<int>(i, bins_h, H) - start_index<int>(i, bins_h, H));
    const auto width = static_cast<A>(end_index<int>(j, bins_w, W) - start_index<int>(j, bins_w, W));
    bin_shares[bin] = 1 / (height * width);
  }
  for (int y = member.block_rank(); y < H; y += member.block_threads()) row_of[y] = rows.containing(y) * pitch;
  for (int x = member.block_rank(); x < W; x += member.block_threads()) column_of[x] = columns.containing(x);
  for (int at = member.block_rank(); at < levels.count * (bands + strips); at += member.block_threads()) {
    const bool of_row = at < levels.count * bands;
    const int number = of_row ? at : at - levels.count * bands, count = of_row ? bands : strips;
    const int level = number / count, segment = number - level * count;
    const int bins = of_row ? levels.bins_h[level] : levels.bins_w[level], size = of_row ? H : W;
    const int start = of_row ? rows.start(segment) : columns.start(segment);
    row_bins[at] = {first_bin<int>(start, bins, size), last_bin<int>(start, bins, size)};
  }
  __syncthreads();

  A* const grads = reinterpret_cast<A*>(shared + tables.block_bytes() + member.team * tables.team_bytes());
  A* const cells = grads + in_fours(P);
  A* const table = cells + in_fours(tables.cells());
  const bool adds = args.grad_concat.data != nullptr;
  const int from_stride = static_cast<int>(args.grad_concat.stride_h);
  const int to_stride = static_cast<int>(args.grad_input.stride_h);
  for (int turn = 0; turn < planes; ++turn) {
    const int64_t plane = member.plane(turn, planes);
    if (plane >= args.N * args.C) return;
    const int64_t n = plane / args.C, c = plane - n * args.C;
    const T* const grad_pooled = static_cast<const T*>(args.grad_pooled) + n * P * args.C + c;
    for (int bin = member.rank; bin < P; bin += member.threads) {
      grads[bin] = widen(grad_pooled[bin * args.C]) * bin_shares[bin];
    }
    member.sync();
    for (int cell = member.rank; cell < bands * strips; cell += member.threads) {
      const int row = cell / strips, column = cell - row * strips;
      A sum = 0;
      for (int level = 0; level < levels.count; ++level) {
        const BinRange in_rows = row_bins[level * bands + row], in_columns = column_bins[level * strips + column];
        for (int i = in_rows.first; i <= in_rows.last; ++i) {
          const A* const bins = grads + levels.first[level] + i * levels.bins_w[level];
          for (int j = in_columns.first; j <= in_columns.last; ++j) sum += bins[j];
        }
      }
      cells[cell] = sum;
    }
    member.sync();
    for (int x = member.rank; x < W; x += member.threads) {
      const A* const column = cells + column_of[x];
#pragma unroll 4
      for (int row = 0; row < bands; ++row) table[row * pitch + x] = column[row * strips];
    }
    member.sync();

    const T* const from = adds ? pixel<const T>(args.grad_concat, n, c, 0, 0) : nullptr;
    T* const to = pixel<T>(args.grad_input, n, c, 0, 0);
    UnitWalk walk(member, W / unit);
    while (walk.y < H) {
      Unit<T, unit> values[kUnits];
      int targets[kUnits], shares[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        targets[i] = -1;
        if (walk.y < H) {
          const int x = walk.x * unit;
          if (adds) values[i] = load_unit<T, unit>(from + (walk.y * from_stride + x));
          targets[i] = walk.y * to_stride + x;
          shares[i] = row_of[walk.y] + x;
        }
        walk.advance();
      }
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        if (targets[i] < 0) break;
        const auto share = load_unit<A, unit>(table + shares[i]);
#pragma unroll
        for (int v = 0; v < unit; ++v) {
          values[i].values[v] = narrow<T>(adds ? widen(values[i].values[v]) + share.values[v] : share.values[v]);
        }
        store_unit(to + targets[i], values[i]);
      }
    }
  }
}

}  // namespace

int pyramid_pool_backward(const PyramidPoolBackwardArgs& args, void* stream) {
  if (!fits_int(args.levels, args.C, args.H, args.W)) return cudaErrorInvalidValue;
  const Segments rows = make_segments(args.levels.count, args.levels.bins_h, static_cast<int>(args.H));
  const Segments columns = make_segments(args.levels.count, args.levels.bins_w, static_cast<int>(args.W));
  const int64_t cells = static_cast<int64_t>(rows.count) * columns.count;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int unit = args.channels_last ? 0 : unit_of<T>(args.H, args.W, {args.grad_concat, args.grad_input});
    const PoolBackwardTables<acc_t<T>> tables = {args.levels.first[args.levels.count],
                                                 static_cast<int>(args.H),
                                                 static_cast<int>(args.W),
                                                 rows.count,
                                                 columns.count,
                                                 args.levels.count};
    const Teams teams = make_teams(args.N * args.C, tables.team_bytes(), [&](int64_t) { return tables.block_bytes(); });
    if (unit > 0 && teams.bytes > 0) {
      return dispatch_unit<T>(unit, [&](auto count) {
        return launch(pool_backward_planes<T, decltype(count)::value>, teams.blocks(args.N * args.C), teams.block(),
                      teams.bytes, stream, args, rows, columns, teams.planes);
      });
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
