// The context half of a convolution from the pyramid's cells seen through its weights, added to the other half in one
// read and write, or written alone; along one axis first, then the other.
#include "cells.cuh"
#include "folded_norm.cuh"
#include "planes.cuh"
#include "pyramid_context_products.cuh"

namespace pspnet_fast::cuda {
namespace {

// What a pixel takes along an axis of a level through a tap: two cells by where they lie, with their weights; outside
// the map both are 0.
template <class A>
struct alignas(16) Mix {
  int low, high;
  A low_weight, high_weight;
};

// Of a pixel that sees `column` of an axis through a tap; the level's cells lie `pitch` apart from number `first` on.
template <class T>
__device__ __forceinline__ Mix<acc_t<T>> mix_of(const Axis<T>& axis, int column, int first, int pitch) {
  const bool inside = column >= 0 && column < axis.size;
  const auto source = axis.at(inside ? column : 0);
  return {(first + source.low) * pitch, (first + source.high) * pitch, inside ? 1 - source.lambda : acc_t<T>(0),
          inside ? source.lambda : acc_t<T>(0)};
}

template <class T>
constexpr int kFour = kVector<T> < 4 ? kVector<T> : 4;  // columns that are read at once

PSP_HOST_DEVICE int pitch_of_fours(int W) { return (padded_by_four(W) + 3) / 4 * 4; }

// Planar maps: taps become one row of W for each cell seen vertically, of which a row of the map is a sum.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes one plane; threads over seen cells x columns, then over vectors of the plane.
// Traffic: conv read and written once; taps are small and lie in the caches.
// Instructions a vector of 8, for 4 levels and 3 x 3 taps where four columns are read at once: 26 a level and tap, 90
// besides.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3)
    context_planes(const __grid_constant__ PyramidContextArgs args) {
  PSP_DYNAMIC_SHARED(acc_t<T>, rows);  // [seen_h, pitch], then the mixes and the taps
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), pitch = pitch_of_fours(W);
  const int thread = static_cast<int>(threadIdx.x);
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const int seen_h = first_seen(levels.bins_h, levels.count, window.size_h);
  const int64_t n = blockIdx.x / args.O, channel = blockIdx.x % args.O, count = count_taps(levels, window);
  auto* const mixes = reinterpret_cast<Mix<acc_t<T>>*>(rows + seen_h * pitch);  // [views, H]
  const int views = levels.count * window.size_h;
  auto* const taps = reinterpret_cast<acc_t<T>*>(mixes + views * H);
  int first = 0;
  for (int level = 0; level < levels.count; ++level) {
    const Axis<T> axis(levels.bins_h[level], H, args.interpolation);
    for (int u = 0; u < window.size_h; ++u, first += axis.bins) {
      for (int y = thread; y < H; y += kThreads) {
        mixes[(level * window.size_h + u) * H + y] =
            mix_of<T>(axis, tap_pixel<int>(y, u, window.size_h, window.dilation_h), first, pitch);
      }
    }
  }
  const T* const from = static_cast<const T*>(args.taps) + n * count * args.O + channel;
  for (int at = thread; at < count; at += kThreads) taps[at] = widen(from[at * args.O]);
  __syncthreads();

  for (int at = thread; at < seen_h * W; at += kThreads) {
    const int row = at / W, x = at - row * W;
    const Seen seen = seen_of(levels.bins_h, window.size_h, row);
    const Axis<T> columns(levels.bins_w[seen.level], W, args.interpolation);
    acc_t<T> sum = 0;
    for (int v = 0; v < window.size_w; ++v) {
      const int column = tap_pixel<int>(x, v, window.size_w, window.dilation_w);
      if (column < 0 || column >= W) continue;
      const auto source = columns.at(column);
      const auto tap = [&](int j) { return taps[tap_of(levels, window, seen.level, seen.cell, j, seen.tap, v)]; };
      sum += (1 - source.lambda) * tap(source.low) + source.lambda * tap(source.high);
    }
    rows[row * pitch + padded_by_four(x)] = sum;
  }
  __syncthreads();

  const FoldedNorm<T> norm(args.norm, args.norm_dtype, args.eps, channel);
  T* const map = pixel<T>(args.conv, n, channel, 0, 0);
  for_each_vector(map, args.conv.stride_h, H, W, [&](int y, int x, int length) {
    T* const target = map + y * args.conv.stride_h + x;
    T values[kVector<T>];
    if (args.accumulate) load_some(target, length, values);
    acc_t<T> sums[kVector<T>] = {};
    const Mix<acc_t<T>>* const mix_of_row = mixes + y;
    if (length == kVector<T> && x % 4 == 0) {
      for (int view = 0; view < views; ++view) {
        const Mix<acc_t<T>> mix = mix_of_row[view * H];
#pragma unroll
        for (int i = 0; i < kVector<T>; i += kFour<T>) {
          const int at = padded_by_four(x + i);
          acc_t<T> low[kFour<T>], high[kFour<T>];
          load(rows + mix.low + at, low);
          load(rows + mix.high + at, high);
#pragma unroll
          for (int j = 0; j < kFour<T>; ++j) {
            sums[i + j] += mix.low_weight * low[j];
            sums[i + j] += mix.high_weight * high[j];
          }
        }
      }
    } else {
      for (int view = 0; view < views; ++view) {
        const Mix<acc_t<T>> mix = mix_of_row[view * H];
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          if (i >= length) break;
          const int at = padded_by_four(x + i);
          sums[i] += mix.low_weight * rows[mix.low + at];
          sums[i] += mix.high_weight * rows[mix.high + at];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i >= length) break;
      values[i] = narrow<T>(norm(args.accumulate ? widen(values[i]) + sums[i] : sums[i], args.relu));
    }
    store_some(target, length, values);
  });
}

// Channels-last maps: the taps' part of a stretch of one row is summed over the cells seen vertically, then for each
// pixel over those seen horizontally.
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes `stretch` pixels of a row and a chunk of channels: threads x over channels, y over seen cells, then
// over pixels. Traffic: conv read and written once; taps are small and lie in the caches. Instructions a vector, for 4
// levels and 3 x 3 taps at 60 columns in bfloat16: 25 a level and tap, 60 besides.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    context_rows(const __grid_constant__ PyramidContextArgs args, int chunks, int stretch) {
  using A = acc_t<T>;
  PSP_DYNAMIC_SHARED(A, columns);  // [seen_w, channels of the chunk]
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const int across = (W + stretch - 1) / stretch;
  const Item item = item_of_block(H * across, chunks);
  const int y = item.index / across, begin = (item.index - y * across) * stretch, size = min(stretch, W - begin);
  const int64_t channel = first_channel<V>(item.chunk);
  const int pitch = static_cast<int>(blockDim.x) * V, lane = static_cast<int>(threadIdx.x) * V;
  const int step = static_cast<int>(blockDim.y);
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const bool active = channel < args.O;
  const int seen_w = first_seen(levels.bins_w, levels.count, window.size_w), views = levels.count * window.size_w;
  auto* const mixes = reinterpret_cast<Mix<A>*>(columns + in_fours(seen_w * pitch));  // [views, stretch]

  int first = 0;
  for (int level = 0; level < levels.count; ++level) {
    const Axis<T> axis(levels.bins_w[level], W, args.interpolation);
    for (int v = 0; v < window.size_w; ++v, first += axis.bins) {
      for (int x = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); x < size; x += kThreads) {
        mixes[(level * window.size_w + v) * stretch + x] =
            mix_of<T>(axis, tap_pixel<int>(begin + x, v, window.size_w, window.dilation_w), first, pitch);
      }
    }
  }

  const T* const taps = static_cast<const T*>(args.taps) + item.n * count_taps(levels, window) * args.O + channel;
  for (int at = active ? static_cast<int>(threadIdx.y) : seen_w; at < seen_w; at += step) {
    const Seen seen = seen_of(levels.bins_w, window.size_w, at);
    const Axis<T> axis(levels.bins_h[seen.level], H, args.interpolation);
    const T* const from = taps + tap_of(levels, window, seen.level, 0, seen.cell, 0, seen.tap) * args.O;
    const int64_t tap = window.size_w * args.O, row_of_cells = levels.bins_w[seen.level] * window.size_h * tap;
    A sums[V] = {};
    for (int u = 0; u < window.size_h; ++u) {
      const int row = tap_pixel<int>(y, u, window.size_h, window.dilation_h);
      if (row < 0 || row >= H) continue;
      const auto source = axis.at(row);
      A low[V], high[V];
      load_wide(from + source.low * row_of_cells + u * tap, low);
      load_wide(from + source.high * row_of_cells + u * tap, high);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[i] += (1 - source.lambda) * low[i];
        sums[i] += source.lambda * high[i];
      }
    }
    store_shared(columns + at * pitch + lane, sums);
  }
  __syncthreads();
  if (!active) return;

  A scale[V], shift[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const FoldedNorm<T> norm(args.norm, args.norm_dtype, args.eps, channel + i);
    scale[i] = norm.scale, shift[i] = norm.shift;
  }
  for (int x = static_cast<int>(threadIdx.y); x < size; x += step) {
    T* const target = pixel<T>(args.conv, item.n, channel, y, begin + x);
    A values[V] = {};
    if (args.accumulate) load_wide(target, values);
#pragma unroll 2
    for (int view = 0; view < views; ++view) {
      const Mix<A> mix = mixes[view * stretch + x];
      A low[V], high[V];
      load(columns + mix.low + lane, low);
      load(columns + mix.high + lane, high);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        values[i] += mix.low_weight * low[i];
        values[i] += mix.high_weight * high[i];
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = values[i] * scale[i] + shift[i];
      if (args.relu && values[i] < 0) values[i] = 0;
    }
    store_narrow(target, values);
  }
}

// Chunks of channels whose columns fit into shared memory, beside the mixes of a stretch of the row.
template <class T, int V>
cudaError_t launch_rows(const PyramidContextArgs& args, void* stream) {
  using A = acc_t<T>;
  constexpr size_t kMixes = 18 * 1024;  // bytes of them
  const int64_t cells = seen_cells(args.levels, args.levels.bins_w, args.window.size_w);
  const int64_t views = int64_t{args.levels.count} * args.window.size_w;
  const int64_t fitting = static_cast<int64_t>(kMixes / sizeof(Mix<A>)) / views, parts = divide_up(args.W, fitting);
  if (fitting == 0) return cudaErrorInvalidValue;
  const int stretch = static_cast<int>(divide_up(args.W, parts));
  const size_t mixes = views * stretch * sizeof(Mix<A>);
  Chunks chunks = make_chunks(args.O, V);
  const auto bytes = [&](int lanes) { return in_fours(cells * V * lanes) * sizeof(A) + mixes; };
  while (chunks.lanes > 1 && bytes(chunks.lanes) > kSharedBytes) {
    chunks.lanes /= 2;
    chunks.count = static_cast<int>(divide_up(divide_up(args.O, V), chunks.lanes));
  }
  if constexpr (V > 1) {
    if (bytes(chunks.lanes) > kSharedBytes) return launch_rows<T, 1>(args, stream);
  }
  return launch(context_rows<T, V>, args.N * args.H * divide_up(args.W, stretch) * chunks.count, chunks.threads(),
                bytes(chunks.lanes), stream, args, chunks.count, stretch);
}

}  // namespace

int pyramid_context(const PyramidContextArgs& args, void* stream) {
  if (!fits(args.levels, args.window, args.O, args.H, args.W)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = args.channels_last && aligned(args.taps) && vectors_of_channels<T>(args.conv, args.O);
    if constexpr (sizeof(T) == 2) {
      const bool planes = !args.channels_last && aligned(args.taps) && args.O % 4 == 0;
      const ProductPlan plan = vectors || planes ? plan_products<T>(args) : ProductPlan{};
      if (plan.rows > 0) return launch_products<T>(args, plan, stream);
    }
    const size_t seen_h = seen_cells(args.levels, args.levels.bins_h, args.window.size_h);
    const size_t table =
        (seen_h * pitch_of_fours(static_cast<int>(args.W)) + count_taps(args.levels, args.window)) * sizeof(acc_t<T>) +
        args.levels.count * args.window.size_h * args.H * sizeof(Mix<acc_t<T>>);
    if (!args.channels_last && table <= kSharedBytes) {
      return launch(context_planes<T>, args.N * args.O, kThreads, table, stream, args);
    }
    return vectors ? launch_rows<T, kVector<T>>(args, stream) : launch_rows<T, 1>(args, stream);
  });
}

}  // namespace pspnet_fast::cuda
