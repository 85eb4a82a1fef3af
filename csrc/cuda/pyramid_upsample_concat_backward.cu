// The backward of bilinear upsampling into the concatenation, which reads the gradient once: along one axis first, then
// along the other.
#include <algorithm>

#include "cells.cuh"
#include "level_planes.cuh"

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
// Layout: channels-last in units of V channels, at most 16 bytes, or any strides (V == 1).
// A block takes one part and a chunk of channels: threads x over channels, y over the part's rows.
// Traffic: grad_context read once, four accumulators a part and channel written. Instructions a vector: 126.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
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

  using A = acc_t<T>;
  PSP_SHARED(A, partial, 4 * kThreads * V);              // [4, threads y, channels]
  constexpr int kColumns = V * sizeof(T) == 16 ? 4 : 5;  // of a row that a thread has in flight
  const int64_t r = first_channel<V>(item.chunk);
  const int steps = static_cast<int>(blockDim.y), step = static_cast<int>(threadIdx.y);
  A sums[4][V] = {};
  if (r < args.R) {
    const int64_t stride = args.grad_context.stride_w;
    for (int y = part_h.begin + step; y < part_h.end; y += steps) {
      const T* from = pixel<const T>(args.grad_context, item.n, level * args.R + r, y, part_w.begin);
      A left[V] = {}, right[V] = {};
      for (int x = part_w.begin; x < part_w.end; x += kColumns) {
        Unit<T, V> grads[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i, from += stride) {
          if (x + i < part_w.end) grads[i] = load_unit<T, V>(from);
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          if (x + i >= part_w.end) break;
          const A next = part_w.weight_of_second(x + i);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A grad = widen(grads[i].values[v]);
            left[v] += (1 - next) * grad;
            right[v] += next * grad;
          }
        }
      }
      const A next = part_h.weight_of_second(y);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[0][v] += (1 - next) * left[v];
        sums[1][v] += (1 - next) * right[v];
        sums[2][v] += next * left[v];
        sums[3][v] += next * right[v];
      }
    }
  }
  const int channels = static_cast<int>(blockDim.x) * V;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_shared(partial + (i * steps + step) * channels + static_cast<int>(threadIdx.x) * V, sums[i]);
  }
  __syncthreads();
  auto* const part = static_cast<A*>(args.workspace) + blockIdx.x / chunks * 4 * args.R;
  for (int at = step * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); at < 4 * channels;
       at += kThreads) {
    const int i = at / channels, local = at - i * channels;
    const int64_t channel = static_cast<int64_t>(item.chunk) * channels + local;
    if (channel >= args.R) continue;
    A total = 0;
    for (int other = 0; other < steps; ++other) total += partial[(i * steps + other) * channels + local];
    part[i * args.R + channel] = total;
  }
}

// Channels-last backward, second part: each cell adds the sums of the parts around it.
// Layout: parts [N, parts, 4, R] to grad_reduced [N, P, R].
// A block takes one cell; threads over channels.
// Traffic: each sum is read once; they are few and lie in the L2 cache. Instructions for a vector of the gradient: 9.
template <class T>
__global__ void __launch_bounds__(kThreads, 5)
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

// Of a pixel on an axis: the cell before it, and the weight of the next one.
template <class A>
struct alignas(2 * sizeof(A)) CellShare {
  int cell;
  A next;
};

template <class A>
__device__ __forceinline__ CellShare<A> share_of(const SourceIndex<A>& source) {
  return {source.low, source.high > source.low ? source.lambda : A(0)};
}

// Shared memory of upsample_backward_planes.
template <class A>
struct UpsampleBackwardTables {
  int H, W, bins_h, bins_w;  // the most bins of a level
  int strips;

  PSP_HOST_DEVICE int pitch() const { return static_cast<int>(in_fours(W)); }
  // Of each level [H] and [W] shares, [bins_w + 1] the first pixel of each cell.
  PSP_HOST_DEVICE size_t level_bytes() const {
    return (int64_t{H} + W) * sizeof(CellShare<A>) + in_fours(bins_w + 1) * sizeof(int);
  }
  PSP_HOST_DEVICE size_t block_bytes(int count) const { return (count * level_bytes() + 15) / 16 * 16; }
  // [strips, bins_h, pitch] sums of columns
  PSP_HOST_DEVICE size_t team_bytes() const { return int64_t{strips} * bins_h * pitch() * sizeof(A); }
};

// Planar backward, in one launch: rows are summed to rows of cells in registers, then those along their columns.
// Layout: planar, any row stride, in units of 4, 2 or 1.
// A team takes a plane; its threads over strips of rows x units of a row, then cells.
// Traffic: grad_context read once, grad_reduced written. Instructions a vector: 201.
template <class T, int unit>
__global__ void __launch_bounds__(kThreads, kNewer && sizeof(T) == 8 ? 3 : 4)
    upsample_backward_planes(const __grid_constant__ PyramidUpsampleConcatBackwardArgs args,
                             const __grid_constant__ UpsampleBackwardTables<acc_t<T>> tables, int planes) {
  using A = acc_t<T>;
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  const int H = tables.H, W = tables.W, pitch = tables.pitch(), strips = tables.strips, units = W / unit;
  const Member member;
  const BlockLevels own(member.first_plane(planes), planes * member.teams, args.R, args.levels.count);
  for_each_level<T>(own, args, [&](int number, const Axis<T>& rows, const Axis<T>& columns) {
    auto* const shares = reinterpret_cast<CellShare<A>*>(shared + number * tables.level_bytes());
    auto* const starts = reinterpret_cast<int*>(shares + H + W);
    for (int y = member.block_rank(); y < H; y += member.block_threads()) {
      shares[y] = share_of(rows.at(y));
    }
    for (int x = member.block_rank(); x < W; x += member.block_threads()) {
      shares[H + x] = share_of(columns.at(x));
    }
    for (int j = member.block_rank(); j <= columns.bins; j += member.block_threads()) starts[j] = columns.start(j);
  });
  __syncthreads();

  A* const sums = reinterpret_cast<A*>(shared + tables.block_bytes(own.count) + member.team * tables.team_bytes());
  const int stride = static_cast<int>(args.grad_context.stride_h);
  for (int turn = 0; turn < planes; ++turn) {
    const int64_t number = member.plane(turn, planes);
    if (number >= args.N * args.levels.count * args.R) return;
    const LevelPlane plane(args.levels, args.R, number);
    const int bins_h = plane.bins_h, bins_w = plane.bins_w;
    const auto* const rows =
        reinterpret_cast<const CellShare<A>*>(shared + own.number(plane.level) * tables.level_bytes());  // [H]
    const CellShare<A>* const columns = rows + H;                                                        // [W]
    const int* const starts = reinterpret_cast<const int*>(columns + W);                                 // [bins_w + 1]
    const T* const map = pixel<const T>(args.grad_context, plane.n, plane.channel, 0, 0);

    for (int at = member.rank; at < strips * units; at += member.threads) {
      const int strip = at / units, x = (at - strip * units) * unit;
      int from = strip * stride + x;
      A* to = sums + strip * bins_h * pitch + x;
      Unit<A, unit> own_sum = {}, next_sum = {};  // of the cell that the row lies after, and of the next
      int cell = 0;
      const auto move_to = [&](int target) {
#pragma unroll 1
        for (; cell < target; ++cell, to += pitch) {
          store_unit<Memory::kShared>(to, own_sum);
          own_sum = next_sum;
          next_sum = {};
        }
      };
      for (int y = strip; y < H; y += kUnits * strips) {
        Unit<T, unit> values[kUnits];
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          if (y + i * strips < H) values[i] = load_unit<T, unit>(map + from);
          from += strips * stride;
        }
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          if (y + i * strips >= H) break;
          const CellShare<A> share = rows[y + i * strips];
          move_to(share.cell);
#pragma unroll
          for (int v = 0; v < unit; ++v) {
            const A grad = widen(values[i].values[v]);
            own_sum.values[v] += (1 - share.next) * grad;
            next_sum.values[v] += share.next * grad;
          }
        }
      }
      move_to(bins_h);
    }
    member.sync();

    T* const to = static_cast<T*>(args.grad_reduced) + plane.first_cell;
    const int cells = bins_h * bins_w;
    int lanes = 1;  // of a warp that share a cell
    while (lanes < kWarp && 2 * lanes * cells <= kWarp) lanes *= 2;
    const int part = member.rank % lanes;
    for (int cell = member.rank / lanes, base = 0; base < cells;
         cell += member.threads / lanes, base += member.threads / lanes) {
      A sum = 0;
      if (cell < cells) {
        const int i = cell / bins_w, j = cell - i * bins_w, start = starts[j], end = starts[j + 1];
        for (int x = (j > 0 ? starts[j - 1] : 0) + part; x < end; x += lanes) {
          A column = 0;
          for (int strip = 0; strip < strips; ++strip) column += sums[(strip * bins_h + i) * pitch + x];
          const A next = columns[x].next;
          sum += (x < start ? next : 1 - next) * column;
        }
      }
      for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
      if (cell < cells && part == 0) to[cell * args.R] = narrow<T>(sum);
    }
    member.sync();
  }
}

// How upsample_backward_planes takes a call; no bytes: it cannot.
template <class T>
struct UpsampleBackwardPlan {
  int unit = 0;
  UpsampleBackwardTables<acc_t<T>> tables = {};
  Teams teams = {};

  explicit UpsampleBackwardPlan(const PyramidUpsampleConcatBackwardArgs& args) {
    const Levels& levels = args.levels;
    if (!args.channels_last) unit = unit_of<T>(args.H, args.W, {args.grad_context});
    if (unit == 0) return;
    const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
    tables = {H, W, most_bins(levels.bins_h, levels.count), most_bins(levels.bins_w, levels.count), strips_of(H, W)};
    teams = make_teams(args.N * levels.count * args.R, tables.team_bytes(),
                       [&](int planes) { return tables.block_bytes(BlockLevels::most(planes, args.R, levels.count)); });
  }
};

}  // namespace

size_t pyramid_upsample_concat_backward_workspace(const PyramidUpsampleConcatBackwardArgs& args) {
  const int64_t sums = 4 * args.N * args.R * make_intervals(args).first[args.levels.count];
  size_t bytes = 0;
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (UpsampleBackwardPlan<T>(args).teams.bytes == 0) bytes = sums * sizeof(acc_t<T>);
    return cudaSuccess;
  });
  return bytes;
}

int pyramid_upsample_concat_backward(const PyramidUpsampleConcatBackwardArgs& args, void* stream) {
  if (!fits_int(args.levels, args.levels.count * args.R, args.H, args.W)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const UpsampleBackwardPlan<T> plan(args);
    if (plan.teams.bytes > 0) {
      return dispatch_unit<T>(plan.unit, [&](auto unit) {
        return launch(upsample_backward_planes<T, decltype(unit)::value>,
                      plan.teams.blocks(args.N * args.levels.count * args.R), plan.teams.block(), plan.teams.bytes,
                      stream, args, plan.tables, plan.teams.planes);
      });
    }
    const Intervals intervals = make_intervals(args);
    const bool vectors = args.channels_last && args.R % kVector<T> == 0 &&
                         vectors_of_channels<T>(args.grad_context, args.levels.count * args.R);
    constexpr int kChannels = std::min(kVector<T>, 4);
    const Chunks chunks = make_chunks(args.R, vectors ? kChannels : 1);
    const cudaError_t error = launch(vectors ? upsample_backward_parts<T, kChannels> : upsample_backward_parts<T, 1>,
                                     args.N * intervals.first[args.levels.count] * chunks.count, chunks.threads(), 0,
                                     stream, args, intervals, chunks.count);
    if (error != cudaSuccess) return error;
    const int cell_chunks = static_cast<int>(divide_up(args.R, kThreads));
    return launch(upsample_backward_cells<T>, args.N * args.levels.first[args.levels.count] * cell_chunks, kThreads, 0,
                  stream, args, intervals, cell_chunks);
  });
}

}  // namespace pspnet_fast::cuda
