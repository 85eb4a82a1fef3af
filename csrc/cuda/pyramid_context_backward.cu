// The backward of the context half of a convolution, which reads the gradient once, along one axis first, then the
// other.
#include "cells.cuh"
#include "planes.cuh"
#include "pyramid_context_backward_products.cuh"

namespace pspnet_fast::cuda {
namespace {

// Planar backward, in one launch: a plane is staged in shared memory and reduced there, down columns, then along rows.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes one plane; threads over its vectors, then seen cells x columns, then taps.
// Traffic: grad_conv read once, grad_taps written by elements: twice what must move. Instructions a vector of float:
// 1680.
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
                                     bottom - top, W, dense(args.grad_conv, H, W), reinterpret_cast<T*>(shared));
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

// Two-part backward, the first: rows of the gradient summed into the cells seen horizontally: [N, H, seen_w, O].
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes one row and a chunk of channels: threads x over channels, y over seen cells.
// Traffic: grad_conv read once from device memory, then from the L1 cache; seen_w accumulators a row written.
// Instructions a vector of float: 640.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    context_backward_rows(const __grid_constant__ PyramidContextBackwardArgs args, int chunks) {
  const Item item = item_of_block(static_cast<int>(args.H), chunks);
  const int64_t channel = first_channel<V>(item.chunk);
  if (channel >= args.O) return;
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const int W = static_cast<int>(args.W), seen_w = first_seen(levels.bins_w, levels.count, window.size_w);
  const T* const row = pixel<const T>(args.grad_conv, item.n, channel, item.index, 0);
  auto* const to = static_cast<acc_t<T>*>(args.workspace) + (item.n * args.H + item.index) * seen_w * args.O + channel;
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

// Second part: rows summed into the cells seen vertically.
// Layout: [N, H, seen_w, O] to grad_taps [N, P, size_h * size_w, O], both in vectors of V channels.
// A thread takes a column of cells through one tap and goes down its rows, with the sums of two neighbouring cells.
// Traffic: each sum is read once a vertical tap, mostly from the caches; a block takes the taps of a column together.
// Instructions for a vector of the gradient: 262 in half precision, 130 in float.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kNewer ? 2 : 3)
    context_backward_taps(const __grid_constant__ PyramidContextBackwardArgs args, int chunks, int parts) {
  using A = acc_t<T>;
  constexpr int kRows = 32 / static_cast<int>(sizeof(A));  // read at once
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const int H = static_cast<int>(args.H), seen_w = first_seen(levels.bins_w, levels.count, window.size_w);
  const Item item = item_of_block(parts, chunks);
  const int64_t channel = first_channel<V>(item.chunk);
  const int number = item.index * static_cast<int>(blockDim.y) + static_cast<int>(threadIdx.y);
  if (channel >= args.O || number >= seen_w * window.size_h) return;
  const int column = number / window.size_h, u = number - column * window.size_h;
  const Seen seen = seen_of(levels.bins_w, window.size_w, column);
  const Axis<T> axis(levels.bins_h[seen.level], H, args.interpolation);
  const int shift = tap_shift(u, window.size_h, window.dilation_h), bottom = min(H, H + shift);
  const int64_t step = seen_w * args.O, cells = count_taps(levels, window);
  const A* const from = static_cast<const A*>(args.workspace) + (item.n * H * seen_w + column) * args.O + channel;
  T* to = static_cast<T*>(args.grad_taps) +
          (item.n * cells + tap_of(levels, window, seen.level, 0, seen.cell, u, seen.tap)) * args.O + channel;
  const int64_t to_step = int64_t{levels.bins_w[seen.level]} * window.size_h * window.size_w * args.O;

  A own[V] = {}, next[V] = {};
  int cell = 0;
  const auto finish = [&] {  // the cell's sum
    Together<T, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) result.values[i] = narrow<T>(own[i]), own[i] = next[i], next[i] = 0;
    *reinterpret_cast<Together<T, V>*>(to) = result;
    to += to_step;
    ++cell;
  };
  for (int first = max(0, shift); first < bottom; first += kRows) {
    A rows[kRows][V];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i < bottom) load(from + (first + i - shift) * step, rows[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= bottom) break;
      const auto source = axis.at(first + i);
      const A weight = source.high > source.low ? source.lambda : A(0);
      while (cell < source.low) finish();
#pragma unroll
      for (int v = 0; v < V; ++v) own[v] += (1 - weight) * rows[i][v], next[v] += weight * rows[i][v];
    }
  }
  while (cell < axis.bins) finish();
}

template <class T, int V>
cudaError_t launch_taps(const PyramidContextBackwardArgs& args, void* stream) {
  const Chunks chunks = make_chunks(args.O, V);
  const int64_t columns = seen_cells(args.levels, args.levels.bins_w, args.window.size_w);
  const int parts = static_cast<int>(divide_up(columns * args.window.size_h, chunks.threads().y));
  return launch(context_backward_taps<T, V>, args.N * parts * chunks.count, chunks.threads(), 0, stream, args,
                chunks.count, parts);
}

// Tables and tile of context_backward_planes.
template <class T>
Staging plan_backward(const PyramidContextBackwardArgs& args) {
  if (args.channels_last || plan_row_products<T>(args).jobs > 0) return {0, 0, 0};
  const Levels& levels = args.levels;
  const size_t seen_h = seen_cells(levels, levels.bins_h, args.window.size_h);
  const size_t starts = seen_cells(levels, levels.bins_h, 1) + seen_cells(levels, levels.bins_w, 1) + 2 * levels.count;
  return plan_staging<T>(
      args.H, args.W, (levels.count * (args.H + args.W) + seen_h * args.W) * sizeof(acc_t<T>) + starts * sizeof(int));
}

}  // namespace

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
    cudaError_t error = cudaSuccess;
    bool done = false;
    if constexpr (sizeof(T) == 2) {
      const RowProducts plan = plan_row_products<T>(args);
      done = plan.jobs > 0;
      if (done) error = launch_row_products<T>(args, plan, stream);
    }
    if (!done) {
      error = launch(vectors ? context_backward_rows<T, kVector<T>> : context_backward_rows<T, 1>,
                     args.N * args.H * chunks.count, chunks.threads(), 0, stream, args, chunks.count);
    }
    if (error != cudaSuccess) return error;
    constexpr int V = kVector<acc_t<T>>;
    return args.O % V == 0 && aligned(args.workspace) && aligned(args.grad_taps) ? launch_taps<T, V>(args, stream)
                                                                                 : launch_taps<T, 1>(args, stream);
  });
}

}  // namespace pspnet_fast::cuda
