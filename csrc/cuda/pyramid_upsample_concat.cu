// Bilinear upsampling of every level into its channels of the concatenation, each written once: along one axis first,
// then along the other.
#include <algorithm>

#include "axis.cuh"
#include "cells.cuh"
#include "planes.cuh"

namespace pspnet_fast::cuda {
namespace {

// Channels-last upsampling: the pixels between two columns of cells share their vertical interpolation.
// Layout: channels-last in 16-byte vectors (V > 1), or any strides (V == 1).
// A block takes one row and a chunk of channels: threads x over channels, y over strips of columns.
// Traffic: context written once; reduced is small and lies in the caches.
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

// The rows of a table that a row of pixels lies between, by where they begin, with their weights.
template <class A>
struct alignas(16) RowMix {
  int low, high;
  A low_weight, high_weight;
};

// Planar upsampling: each row of cells is interpolated to W columns in shared memory, then between rows.
// Layout: planar, any alignment and row stride, in 16-byte vectors where these allow it.
// A block takes one plane; threads over rows of cells x columns, then over vectors of the plane.
// Traffic: context written once; reduced is small and lies in the caches.
// Instructions a vector of 8 elements, where W is even: 20 a pair.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) upsample_planes(const __grid_constant__ PyramidUpsampleConcatArgs args) {
  PSP_DYNAMIC_SHARED(acc_t<T>, table);  // [bins_h, pitch], then the rows
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), pitch = row_pitch(W);
  const Levels& levels = args.levels;
  const int64_t channels = levels.count * args.R, n = blockIdx.x / channels, channel = blockIdx.x % channels;
  const int level = static_cast<int>(channel / args.R), bins_h = levels.bins_h[level], bins_w = levels.bins_w[level];
  const int64_t cell = n * levels.first[levels.count] + levels.first[level];
  const T* const cells = static_cast<const T*>(args.reduced) + cell * args.R + channel % args.R;

  const Axis<T> columns(bins_w, W, args.align_corners), rows(bins_h, H, args.align_corners);
  for (int at = static_cast<int>(threadIdx.x); at < bins_h * W; at += kThreads) {
    const int i = at / W, x = at - i * W;
    const auto source = columns.at(x);
    const T* const row = cells + static_cast<int64_t>(i) * bins_w * args.R;
    table[i * pitch + padded_by_two(x)] =
        (1 - source.lambda) * widen(row[source.low * args.R]) + source.lambda * widen(row[source.high * args.R]);
  }
  auto* const mixes = reinterpret_cast<RowMix<acc_t<T>>*>(table + in_fours(bins_h * pitch));  // [H]
  for (int y = static_cast<int>(threadIdx.x); y < H; y += kThreads) {
    const auto source = rows.at(y);
    mixes[y] = {source.low * pitch, source.high * pitch, 1 - source.lambda, source.lambda};
  }
  __syncthreads();

  T* const to = pixel<T>(args.context, n, channel, 0, 0);
  for_each_vector(to, args.context.stride_h, H, W, dense(args.context, H, W), [&](int first, int count) {
    int y = first / W, x = first - y * W;
    T* const target = to + y * args.context.stride_h + x;
    T values[kVector<T>];
    if (count == kVector<T> && W % 2 == 0 && first % 2 == 0) {
      for_each_pair<T>(first, W, [&](int i, int row, int column) {
        const RowMix<acc_t<T>> mix = mixes[row];
        const int at = padded_by_two(column);
        const auto low = *reinterpret_cast<const Together<acc_t<T>, 2>*>(table + mix.low + at);
        const auto high = *reinterpret_cast<const Together<acc_t<T>, 2>*>(table + mix.high + at);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          values[i + j] = narrow<T>(mix.low_weight * low.values[j] + mix.high_weight * high.values[j]);
        }
      });
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        if (i >= count) break;
        const RowMix<acc_t<T>> mix = mixes[y];
        const int at = padded_by_two(x);
        values[i] = narrow<T>(mix.low_weight * table[mix.low + at] + mix.high_weight * table[mix.high + at]);
        if (++x == W) x = 0, ++y;
      }
    }
    store_some(target, count, values);
  });
}

}  // namespace

int pyramid_upsample_concat(const PyramidUpsampleConcatArgs& args, void* stream) {
  if (!fits_int(args.levels, args.levels.count * args.R, args.H, args.W)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t channels = args.levels.count * args.R;
    const int64_t rows = most_bins(args.levels.bins_h, args.levels.count);
    const size_t table =
        sizeof(acc_t<T>) * in_fours(rows * row_pitch(static_cast<int>(args.W))) + args.H * sizeof(RowMix<acc_t<T>>);
    if (!args.channels_last && table <= kSharedBytes && countable(args.H, args.W)) {
      return launch(upsample_planes<T>, args.N * channels, kThreads, table, stream, args);
    }
    const bool vectors = args.channels_last && aligned(args.reduced) && args.R % kVector<T> == 0 &&
                         vectors_of_channels<T>(args.context, channels);
    const Chunks chunks = make_chunks(channels, vectors ? kVector<T> : 1);
    return launch(vectors ? upsample_rows<T, kVector<T>> : upsample_rows<T, 1>, args.N * args.H * chunks.count,
                  chunks.threads(), 0, stream, args, chunks.count);
  });
}

}  // namespace pspnet_fast::cuda
