// The context half of a convolution from the pyramid's cells seen through its weights, added to the other half in one
// read and write; and its backward, which reads the gradient once. Both go along one axis first, then the other.
#include "cells.cuh"
#include "planes.cuh"
#include "seen.cuh"

namespace pspnet_fast::cuda {
namespace {

// Evaluation-mode batch normalisation of a channel as one factor and one summand, and ReLU.
template <class T>
struct Epilogue {
  acc_t<T> scale = 1, shift = 0;

  __device__ __forceinline__ Epilogue(const PyramidContextArgs& args, int64_t channel) {
    if (args.norm[0] == nullptr) return;
    const auto value = [&](int i) {
      return args.norm_dtype == DType::kFloat32
                 ? static_cast<acc_t<T>>(static_cast<const float*>(args.norm[i])[channel])
                 : widen(static_cast<const T*>(args.norm[i])[channel]);
    };
    scale = value(0) / sqrt(value(3) + static_cast<acc_t<T>>(args.eps));
    shift = value(1) - value(2) * scale;
  }
  __device__ __forceinline__ acc_t<T> operator()(acc_t<T> value, bool relu) const {
    value = value * scale + shift;
    return relu && value < 0 ? acc_t<T>(0) : value;
  }
};

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

  const Epilogue<T> epilogue(args, channel);
  T* const map = pixel<T>(args.conv, n, channel, 0, 0);
  for_each_vector_of_rows(map, args.conv.stride_h, H, W, [&](int y, int x, int length) {
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
      if (i < length)
        values[i] = narrow<T>(epilogue(args.accumulate ? widen(values[i]) + sums[i] : sums[i], args.relu));
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
  const int y = item.cell / across, begin = (item.cell - y * across) * stretch, size = min(stretch, W - begin);
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
    const Epilogue<T> epilogue(args, channel + i);
    scale[i] = epilogue.scale, shift[i] = epilogue.shift;
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

// Planar backward, in one launch: a plane is staged in shared memory and reduced there, down columns, then along rows.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes one plane; threads over its vectors, then seen cells x columns, then taps.
// Traffic: grad_conv read once, grad_taps written.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    context_backward_planes(const __grid_constant__ PyramidContextBackwardArgs args, Staging staging) {
  PSP_DYNAMIC_SHARED(unsigned char, shared);
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), thread = static_cast<int>(threadIdx.x);
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const int64_t n = blockIdx.x / args.O, channel = blockIdx.x % args.O, count = count_taps(levels, window);
  const int seen_h = first_seen(levels.bins_h, levels.count, window.size_h), L = levels.count;
  auto* const next_h = reinterpret_cast<acc_t<T>*>(shared + staging.tile_bytes);  // [L, H]: weight of the next cell
  acc_t<T>* const next_w = next_h + L * H;                                        // [L, W]
  acc_t<T>* const sums = next_w + L * W;                                          // [seen_h, W]
  int* const starts_h = reinterpret_cast<int*>(sums + seen_h * W);                // [bins_h + 1] of each level
  int* const starts_w = starts_h + first_seen(levels.bins_h, L, 1) + L;
  for (int level = 0; level < L; ++level) {
    const Axis<T> rows(levels.bins_h[level], H, args.interpolation),
        columns(levels.bins_w[level], W, args.interpolation);
    for (int y = thread; y < H; y += kThreads) next_h[level * H + y] = rows.weight_of_next(y);
    for (int x = thread; x < W; x += kThreads) next_w[level * W + x] = columns.weight_of_next(x);
    int* const first_h = starts_h + first_seen(levels.bins_h, level, 1) + level;
    int* const first_w = starts_w + first_seen(levels.bins_w, level, 1) + level;
    for (int i = thread; i <= rows.bins; i += kThreads) first_h[i] = rows.start(i);
    for (int j = thread; j <= columns.bins; j += kThreads) first_w[j] = columns.start(j);
  }

  for (int top = 0; top < H; top += staging.rows) {
    const int bottom = min(top + staging.rows, H);
    const T* const tile = stage_rows(pixel<const T>(args.grad_conv, n, channel, top, 0), args.grad_conv.stride_h,
                                     static_cast<T*>(nullptr), 0, bottom - top, W, dense(args.grad_conv, H, W),
                                     reinterpret_cast<T*>(shared));
    __syncthreads();
    for (int at = thread; at < seen_h * W; at += kThreads) {
      const Seen seen = seen_of(levels.bins_h, window.size_h, at / W);
      const T* const column = tile + at % W;
      const int* const starts = starts_h + first_seen(levels.bins_h, seen.level, 1) + seen.level;
      acc_t<T> sum = top == 0 ? acc_t<T>(0) : sums[at];
      for_part_of<acc_t<T>>(
          seen.cell, args.interpolation.blends(), tap_shift(seen.tap, window.size_h, window.dilation_h), top, bottom,
          [&](int i) { return starts[i]; }, [&](int p, int) { return next_h[seen.level * H + p]; },
          [&](int y, acc_t<T> weight) { sum += weight * widen(column[(y - top) * W]); });
      sums[at] = sum;
    }
    __syncthreads();
  }

  T* const to = static_cast<T*>(args.grad_taps) + n * count * args.O + channel;
  for (int at = thread; at < count; at += kThreads) {
    const Tap tap(levels, window, at);
    const int* const starts = starts_w + first_seen(levels.bins_w, tap.level, 1) + tap.level;
    const int row = first_seen(levels.bins_h, tap.level, window.size_h) + tap.u * levels.bins_h[tap.level] + tap.i;
    acc_t<T> sum = 0;
    for_part_of<acc_t<T>>(
        tap.j, args.interpolation.blends(), tap_shift(tap.v, window.size_w, window.dilation_w), 0, W,
        [&](int j) { return starts[j]; }, [&](int p, int) { return next_w[tap.level * W + p]; },
        [&](int x, acc_t<T> weight) { sum += weight * sums[row * W + x]; });
    to[at * args.O] = narrow<T>(sum);
  }
}

// Channels-last backward, first part: rows of the gradient summed into the cells seen horizontally: [N, H, seen_w, O].
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes one row and a chunk of channels: threads x over channels, y over seen cells.
// Traffic: grad_conv read once from device memory, then from the L1 cache; seen_w accumulators a row written.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    context_backward_rows(const __grid_constant__ PyramidContextBackwardArgs args, int chunks) {
  const Item item = item_of_block(static_cast<int>(args.H), chunks);
  const int64_t channel = first_channel<V>(item.chunk);
  if (channel >= args.O) return;
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const int W = static_cast<int>(args.W), seen_w = first_seen(levels.bins_w, levels.count, window.size_w);
  const T* const row = pixel<const T>(args.grad_conv, item.n, channel, item.cell, 0);
  auto* const to = static_cast<acc_t<T>*>(args.workspace) + (item.n * args.H + item.cell) * seen_w * args.O + channel;
  for (int at = static_cast<int>(threadIdx.y); at < seen_w; at += static_cast<int>(blockDim.y)) {
    const Seen seen = seen_of(levels.bins_w, window.size_w, at);
    const Axis<T> axis(levels.bins_w[seen.level], W, args.interpolation);
    acc_t<T> sums[V] = {};
    for_part_of<acc_t<T>>(
        seen.cell, args.interpolation.blends(), tap_shift(seen.tap, window.size_w, window.dilation_w), 0, W,
        [&](int j) { return axis.start(j); }, [&](int p, int low) { return axis.weight_after(low, p); },
        [&](int x, acc_t<T> weight) {
          acc_t<T> grad[V];
          load_wide(row + x * args.grad_conv.stride_w, grad);
#pragma unroll
          for (int i = 0; i < V; ++i) sums[i] += weight * grad[i];
        });
    store(to + at * args.O, sums);
  }
}

// Channels-last backward, second part: each tap sums its cell's rows.
// Layout: [N, H, seen_w, O] to grad_taps [N, P, size_h * size_w, O].
// A block takes one tap of one cell; threads over channels.
// Traffic: each sum is read by the taps of its column, mostly from the L2 cache.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    context_backward_taps(const __grid_constant__ PyramidContextBackwardArgs args, int chunks) {
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const Item item = item_of_block(static_cast<int>(count_taps(levels, window)), chunks);
  const int64_t channel = first_channel<1>(item.chunk);
  if (channel >= args.O) return;
  const Tap tap(levels, window, item.cell);
  const int H = static_cast<int>(args.H), seen_w = first_seen(levels.bins_w, levels.count, window.size_w);
  const int column = first_seen(levels.bins_w, tap.level, window.size_w) + tap.v * levels.bins_w[tap.level] + tap.j;
  const Axis<T> axis(levels.bins_h[tap.level], H, args.interpolation);
  const auto* const from = static_cast<const acc_t<T>*>(args.workspace) + channel;
  acc_t<T> sum = 0;
  for_part_of<acc_t<T>>(
      tap.i, args.interpolation.blends(), tap_shift(tap.u, window.size_h, window.dilation_h), 0, H,
      [&](int i) { return axis.start(i); }, [&](int p, int low) { return axis.weight_after(low, p); },
      [&](int y, acc_t<T> weight) { sum += weight * from[((item.n * H + y) * seen_w + column) * args.O]; });
  const int64_t number = item.n * count_taps(levels, window) + item.cell;
  static_cast<T*>(args.grad_taps)[number * args.O + channel] = narrow<T>(sum);
}

// Tables and tile of context_backward_planes.
template <class T>
Staging plan_backward(const PyramidContextBackwardArgs& args) {
  if (args.channels_last) return {0, 0, 0};
  const Levels& levels = args.levels;
  const size_t seen_h = seen_cells(levels, levels.bins_h, args.window.size_h);
  const size_t starts = seen_cells(levels, levels.bins_h, 1) + seen_cells(levels, levels.bins_w, 1) + 2 * levels.count;
  return plan_staging<T>(
      args.H, args.W, (levels.count * (args.H + args.W) + seen_h * args.W) * sizeof(acc_t<T>) + starts * sizeof(int));
}

bool fits(const Levels& levels, const Window& window, int64_t O, int64_t H, int64_t W) {
  return fits_int(levels, O, H, W) && H * (W + 32) <= INT_MAX - kThreads && count_taps(levels, window) <= INT_MAX;
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
    const size_t seen_h = seen_cells(args.levels, args.levels.bins_h, args.window.size_h);
    const size_t table =
        (seen_h * pitch_of_fours(static_cast<int>(args.W)) + count_taps(args.levels, args.window)) * sizeof(acc_t<T>) +
        args.levels.count * args.window.size_h * args.H * sizeof(Mix<acc_t<T>>);
    if (!args.channels_last && table <= kSharedBytes) {
      return launch(context_planes<T>, args.N * args.O, kThreads, table, stream, args);
    }
    const bool vectors = args.channels_last && aligned(args.taps) && vectors_of_channels<T>(args.conv, args.O);
    return vectors ? launch_rows<T, kVector<T>>(args, stream) : launch_rows<T, 1>(args, stream);
  });
}

size_t pyramid_context_backward_workspace(const PyramidContextBackwardArgs& args) {
  const size_t sums = args.N * args.H * args.O * seen_cells(args.levels, args.levels.bins_w, args.window.size_w);
  size_t bytes = 0;
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (plan_backward<T>(args).rows == 0) bytes = sums * sizeof(acc_t<T>);
    return cudaSuccess;
  });
  return bytes;
}

int pyramid_context_backward(const PyramidContextBackwardArgs& args, void* stream) {
  if (!fits(args.levels, args.window, args.O, args.H, args.W)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Staging staging = plan_backward<T>(args);
    if (staging.rows > 0) {
      return launch(context_backward_planes<T>, args.N * args.O, kThreads, staging.bytes, stream, args, staging);
    }
    const bool vectors = args.channels_last && vectors_of_channels<T>(args.grad_conv, args.O);
    const Chunks chunks = make_chunks(args.O, vectors ? kVector<T> : 1);
    const cudaError_t error = launch(vectors ? context_backward_rows<T, kVector<T>> : context_backward_rows<T, 1>,
                                     args.N * args.H * chunks.count, chunks.threads(), 0, stream, args, chunks.count);
    if (error != cudaSuccess) return error;
    const int tap_chunks = static_cast<int>(divide_up(args.O, kThreads));
    return launch(context_backward_taps<T>, args.N * count_taps(args.levels, args.window) * tap_chunks, kThreads, 0,
                  stream, args, tap_chunks);
  });
}

}  // namespace pspnet_fast::cuda
