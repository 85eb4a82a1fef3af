// Bilinear upsampling of every level into its channels of the concatenation, each written once: along one axis first,
// then along the other.
#include <algorithm>

#include "cells.cuh"
#include "level_planes.cuh"

namespace pspnet_fast::cuda {
namespace {

// Channels-last upsampling: the pixels between two columns of cells share their vertical interpolation.
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes one row and a chunk of channels: threads x over channels, y over strips of columns.
// Traffic: context written once, reduced read from the caches: 1.1 times what must move. Instructions a vector: 108.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    upsample_rows(const __grid_constant__ PyramidUpsampleConcatArgs args, int chunks) {
  const Item item = item_of_block(static_cast<int>(args.H), chunks);
  const int64_t channel = first_channel<V>(item.chunk), y = item.index;
  const Levels& levels = args.levels;
  if (channel >= levels.count * args.R) return;
  const int level = static_cast<int>(channel / args.R), bins_w = levels.bins_w[level];
  const auto vertical = Axis<T>(levels.bins_h[level], args.H, args.align_corners).at(item.index);
  const Axis<T> axis(bins_w, args.W, args.align_corners);
  const int64_t cell = item.n * levels.first[levels.count] + levels.first[level];
  const T* const cells = static_cast<const T*>(args.reduced) + cell * args.R + channel % args.R;
  const T* const low = cells + static_cast<int64_t>(vertical.low) * bins_w * args.R;
  const T* const high = cells + static_cast<int64_t>(vertical.high) * bins_w * args.R;

  const auto interpolate = [&](int column, acc_t<T>(&values)[V]) {
    acc_t<T> other[V];
    load_wide(low + column * args.R, values);
    load_wide(high + column * args.R, other);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = (1 - vertical.lambda) * values[v] + vertical.lambda * other[v];
  };
  const int strips = static_cast<int>(blockDim.y), strip = static_cast<int>(threadIdx.y);
  const int end = static_cast<int>((strip + 1) * args.W / strips);
  for (int x = static_cast<int>(strip * args.W / strips); x < end;) {
    const int column = axis.at(x).low, stop = min(axis.start(column + 1), end);
    acc_t<T> left[V], right[V];
    interpolate(column, left);
    interpolate(min(column + 1, bins_w - 1), right);
    for (; x < stop; ++x) {
      const acc_t<T> next = axis.weight_after(column, x);
      acc_t<T> values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = (1 - next) * left[v] + next * right[v];
      store_narrow(pixel<T>(args.context, item.n, channel, y, x), values);
    }
  }
}

// The cells of an axis that a pixel lies between.
template <class A>
struct alignas(16) Between {
  int low, high;
  A lambda;
};

// Shared memory of upsample_planes.
template <class A>
struct UpsampleTables {
  int H, W, bins_h, bins_w;  // the most bins of a level

  PSP_HOST_DEVICE int pitch() const { return static_cast<int>(in_fours(W)); }
  // Of each level [H] and [W] the cells between.
  PSP_HOST_DEVICE size_t level_bytes() const { return (int64_t{H} + W) * sizeof(Between<A>); }
  // [bins_h, bins_w] cells, [bins_h, pitch] their rows spread to columns
  PSP_HOST_DEVICE size_t team_bytes() const {
    return (in_fours(int64_t{bins_h} * bins_w) + int64_t{bins_h} * pitch()) * sizeof(A);
  }
};

// Planar upsampling: each row of cells is interpolated to W columns in shared memory, then between rows.
// Layout: planar, any row stride, in units of 4, 2 or 1.
// A team takes a plane; its threads over cells, columns, then units of the plane.
// Traffic: context written once; reduced is small and lies in the caches. Instructions a vector: 106.
template <class T, int unit>
__global__ void __launch_bounds__(kThreads, 4)
    upsample_planes(const __grid_constant__ PyramidUpsampleConcatArgs args,
                    const __grid_constant__ UpsampleTables<acc_t<T>> tables, int planes) {
  using A = acc_t<T>;
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  const int H = tables.H, W = tables.W, pitch = tables.pitch(), stride = static_cast<int>(args.context.stride_h);
  const Member member;
  const BlockLevels own(member.first_plane(planes), planes * member.teams, args.R, args.levels.count);
  for_each_level<T>(own, args, [&](int number, const Axis<T>& axis_h, const Axis<T>& axis_w) {
    auto* const places = reinterpret_cast<Between<A>*>(shared + number * tables.level_bytes());
    for (int y = member.block_rank(); y < H; y += member.block_threads()) {
      const auto source = axis_h.at(y);
      places[y] = {source.low * pitch, source.high * pitch, source.lambda};
    }
    for (int x = member.block_rank(); x < W; x += member.block_threads()) {
      const auto source = axis_w.at(x);
      places[H + x] = {source.low, source.high, source.lambda};
    }
  });
  __syncthreads();

  A* const cells = reinterpret_cast<A*>(shared + own.count * tables.level_bytes() + member.team * tables.team_bytes());
  A* const table = cells + in_fours(int64_t{tables.bins_h} * tables.bins_w);
  for (int turn = 0; turn < planes; ++turn) {
    const int64_t number = member.plane(turn, planes);
    if (number >= args.N * args.levels.count * args.R) return;
    const LevelPlane plane(args.levels, args.R, number);
    const int bins_h = plane.bins_h, bins_w = plane.bins_w;
    const auto* const rows =
        reinterpret_cast<const Between<A>*>(shared + own.number(plane.level) * tables.level_bytes());  // [H]
    const Between<A>* const columns = rows + H;                                                        // [W]

    const T* const reduced = static_cast<const T*>(args.reduced) + plane.first_cell;
    for (int cell = member.rank; cell < bins_h * bins_w; cell += member.threads) {
      cells[cell] = widen(reduced[cell * args.R]);
    }
    member.sync();
    for (int x = member.rank; x < W; x += member.threads) {
      const Between<A> column = columns[x];
      const A *low = cells + column.low, *high = cells + column.high;
      for (A* to = table + x; to < table + bins_h * pitch; to += pitch, low += bins_w, high += bins_w) {
        *to = (1 - column.lambda) * *low + column.lambda * *high;
      }
    }
    member.sync();

    T* const map = pixel<T>(args.context, plane.n, plane.channel, 0, 0);
    for (UnitWalk walk(member, W / unit); walk.y < H; walk.advance()) {
      const int x = walk.x * unit;
      const Between<A> row = rows[walk.y];
      const auto low = load_unit<A, unit>(table + row.low + x), high = load_unit<A, unit>(table + row.high + x);
      Unit<T, unit> values;
#pragma unroll
      for (int v = 0; v < unit; ++v) {
        values.values[v] = narrow<T>((1 - row.lambda) * low.values[v] + row.lambda * high.values[v]);
      }
      store_unit(map + (walk.y * stride + x), values);
    }
  }
}

}  // namespace

int pyramid_upsample_concat(const PyramidUpsampleConcatArgs& args, void* stream) {
  if (!fits_int(args.levels, args.levels.count * args.R, args.H, args.W)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t channels = args.levels.count * args.R;
    const int unit = args.channels_last ? 0 : unit_of<T>(args.H, args.W, {args.context});
    const UpsampleTables<acc_t<T>> tables = {static_cast<int>(args.H), static_cast<int>(args.W),
                                             most_bins(args.levels.bins_h, args.levels.count),
                                             most_bins(args.levels.bins_w, args.levels.count)};
    const Teams teams = make_teams(args.N * channels, tables.team_bytes(), [&](int planes) {
      return BlockLevels::most(planes, args.R, args.levels.count) * tables.level_bytes();
    });
    if (unit > 0 && teams.bytes > 0) {
      return dispatch_unit<T>(unit, [&](auto count) {
        return launch(upsample_planes<T, decltype(count)::value>, teams.blocks(args.N * channels), teams.block(),
                      teams.bytes, stream, args, tables, teams.planes);
      });
    }
    const bool vectors = args.channels_last && aligned(args.reduced) && args.R % kVector<T> == 0 &&
                         vectors_of_channels<T>(args.context, channels);
    const Chunks chunks = make_chunks(channels, vectors ? kVector<T> : 1);
    return launch(vectors ? upsample_rows<T, kVector<T>> : upsample_rows<T, 1>, args.N * args.H * chunks.count,
                  chunks.threads(), 0, stream, args, chunks.count);
  });
}

}  // namespace pspnet_fast::cuda
