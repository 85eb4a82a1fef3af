// Context in half precision, on tensor cores.
#pragma once

#include "context_products.cuh"
#include "folded_norm.cuh"
#include "planes.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kChannels = 32, kStep = 16;  // of a block at once; of k a product
constexpr int kSeenSteps = 3;              // of cells seen horizontally

// How a block works: `rows` rows of `tiles` x 16 pixels, `chunks` x 32 channels.
struct ProductPlan {
  int rows, stretch, tiles, steps, chunks;
  int together;  // planar: neighbours that are read at once
  size_t bytes;
};

// Four neighbours of a row from or to memory, of which `count` are the map's, `together` at a time.
template <class T>
__device__ __forceinline__ void load_four(const T* from, int count, int together, T* values) {
  if (together == 4) {
    if (count > 0) memcpy(static_cast<void*>(values), reinterpret_cast<const Together<T, 4>*>(from), 4 * sizeof(T));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) values[i] = from[i];
    }
  }
}
template <class T>
__device__ __forceinline__ void store_four(T* to, int count, int together, const Together<T, 4>& values) {
  if (together == 4) {
    if (count > 0) *reinterpret_cast<Together<T, 4>*>(to) = values;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = values.values[i];
    }
  }
}

// A column of cells seen through a tap: its first tap's number, and which steps go through its cells and vertical taps.
struct alignas(16) ColumnOfTaps {
  int first, begin, end, unused;
};

// First the cells' columns for every row: what a column's taps add up to, product of taps [channels, cells and vertical
// taps] and weights [.., rows]. Then for each row a product of weights [pixels, cells seen] and columns [.., channels].
// Layout: channels-last in 16-byte vectors, or planar, by fours where these are aligned. A block takes a rectangle of
// pixels, a chunk of channels after the other; warps share out the columns, then tiles of 16 pixels and rows. Traffic:
// conv read and written once, taps once a rectangle from the L2 cache: 1.5 times what must move. Instructions a vector:
// 182, planar 249. A tap that is infinite or NaN makes NaN of its channel in all
// pixels of the rectangle.
template <class T, bool planar>
__global__ void __launch_bounds__(kThreads, 2)
    context_products(const __grid_constant__ PyramidContextArgs args, ProductPlan plan) {
  using Half = __nv_bfloat16;             // of columns: sums of float16 may be beyond its range
  PSP_DYNAMIC_SHARED(unsigned, columns);  // [rows, high and low, seen_w, 16 pairs of channels], then tables
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4;
  const Levels& levels = args.levels;
  const Window& window = args.window;
  const int seen_w = first_seen(levels.bins_w, levels.count, window.size_w);
  const int all_chunks = static_cast<int>((args.O + kChannels - 1) / kChannels);
  const int across = (W + plan.stretch - 1) / plan.stretch, down = (H + plan.rows - 1) / plan.rows;
  const Item item = item_of_block(across * down, (all_chunks + plan.chunks - 1) / plan.chunks);
  const int top = item.index / across * plan.rows, begin = item.index % across * plan.stretch;
  auto* const weights = reinterpret_cast<uint4*>(columns + max(plan.rows * seen_w * kChannels, kSeenSteps * kStep * 4));
  auto* const starts = reinterpret_cast<ColumnOfTaps*>(weights + plan.steps * kWarp);
  auto* const offsets = reinterpret_cast<int*>(starts + seen_w);  // [steps, 16]: from the column's first tap
  auto* const factors = reinterpret_cast<float*>(offsets + plan.steps * kStep);  // [2, 32]: the norm's

  auto* const cells = reinterpret_cast<SeenCell*>(columns);
  for (int k = thread; k < kSeenSteps * kStep; k += kThreads) {
    cells[k] = seen_cell(levels.bins_w, seen_w, k, window.size_w, window.dilation_w, W, args.interpolation);
  }
  const auto steps_of = [&](int level) { return (levels.bins_h[level] * window.size_h + kStep - 1) / kStep; };
  for (int k = thread; k < seen_w; k += kThreads) {
    const Seen seen = seen_of(levels.bins_w, window.size_w, k);
    int step = 0;
    for (int level = 0; level < seen.level; ++level) step += steps_of(level);
    const int first = static_cast<int>(tap_of(levels, window, seen.level, 0, seen.cell, 0, seen.tap));
    starts[k] = {first, step, step + steps_of(seen.level), 0};
  }
  for (int step = warp; step < plan.steps; step += kThreads / kWarp) {
    int level = 0, own = step;
    for (; own >= steps_of(level); ++level) own -= steps_of(level);
    const int bins = levels.bins_h[level];
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = t * 2 + i % 2 + i / 2 * 8, number = own * kStep + k;
      const int tap = number / bins, cell = number % bins;
      const bool real = tap < window.size_h;
      const SeenCell seen =
          real ? seen_cell(cell, bins, tap, window.size_h, window.dilation_h, H, args.interpolation) : no_cell();
      values[i] = seen.weight(top + g, H, args.interpolation);
      if (g == 0) {  // the products' plan has seen that it fits int
        const int number_of_tap = real ? (cell * levels.bins_w[level] * window.size_h + tap) * window.size_w : 0;
        offsets[step * kStep + k] = number_of_tap * static_cast<int>(args.O);
      }
    }
    const Split near = split<T>(values[0], values[1]), far = split<T>(values[2], values[3]);
    weights[step * kWarp + lane] = {near.high, far.high, near.low, far.low};
  }
  __syncthreads();

  const int tile = warp % plan.tiles, groups = kThreads / kWarp / plan.tiles;
  const int x = begin + tile * kStep + (planar ? t * 4 : g);  // the lane's first pixel
  unsigned high[kSeenSteps][4], low[kSeenSteps][4];
#pragma unroll
  for (int step = 0; step < kSeenSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SeenCell* const pair = cells + step * kStep + i / 2 * 8 + t * 2;
      const int at = begin + tile * kStep + (planar ? g / 2 * 4 + g % 2 + i % 2 * 2 : g + i % 2 * 8);
      const Split two =
          split<Half>(pair[0].weight(at, W, args.interpolation), pair[1].weight(at, W, args.interpolation));
      high[step][i] = two.high, low[step][i] = two.low;
    }
  }
  __syncthreads();

  int rows_of_lane[kSeenSteps];  // where the lane's row of columns lies, in bytes
#pragma unroll
  for (int step = 0; step < kSeenSteps; ++step) {
    const int k = min(step * kStep + lane % 16, seen_w - 1);
    rows_of_lane[step] = k * 64 + ((lane / 16) ^ (k / 2 % 4)) * 16;
  }
  const SharedAddress address = shared_address(columns);
  const int last_chunk = min((item.chunk + 1) * plan.chunks, all_chunks);
  const int end = min(begin + plan.stretch, W), bottom = min(top + plan.rows, H);
  const int64_t count = count_taps(levels, window);
  for (int chunk = item.chunk * plan.chunks; chunk < last_chunk; ++chunk) {
    const int64_t channel = static_cast<int64_t>(chunk) * kChannels + (planar ? g / 2 * 8 + g % 2 : t * 8);
    const bool active = channel < args.O;
    T values[16], next[16] = {};
    T* target = pixel<T>(args.conv, item.n, channel, top + warp / plan.tiles, x);
    const int64_t far = planar ? 2 * args.conv.stride_c : 8 * args.conv.stride_w;  // to the lane's next vector
    const auto read = [&](int y, const T* from) {
      if (!args.accumulate || !active || y >= bottom) return;
      if constexpr (planar) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (channel + i * 2 < args.O) load_four(from + i * far, end - x, plan.together, next + i * 4);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (x + i * 8 < end) load(from + i * far, *reinterpret_cast<T(*)[8]>(next + i * 8));
        }
      }
    };
    read(top + warp / plan.tiles, target);
    if (thread < kChannels && int64_t{chunk} * kChannels + thread < args.O) {
      const FoldedNorm<T> norm(args.norm, args.norm_dtype, args.eps, int64_t{chunk} * kChannels + thread);
      factors[thread] = norm.scale, factors[kChannels + thread] = norm.shift;
    }

    const int64_t own = static_cast<int64_t>(chunk) * kChannels + g * 4;
    const T* const taps = static_cast<const T*>(args.taps) + item.n * count * args.O + own;
    for (int k = warp; k < seen_w; k += kThreads / kWarp) {
      const ColumnOfTaps column = starts[k];
      const T* const from = taps + column.first * args.O;
      float sums[2][4] = {};
      __syncwarp();  // lanes whose rows are beyond the block's have left the last column early
      for (int step = column.begin; step < column.end; ++step) {
        uint2 four[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int offset = offsets[step * kStep + t * 2 + i % 2 + i / 2 * 8];
          if (own < args.O) four[i] = *reinterpret_cast<const uint2*>(from + offset);
        }
        const uint4 weight = weights[step * kWarp + lane];
        const unsigned factor_high[2] = {weight.x, weight.y}, factor_low[2] = {weight.z, weight.w};
        const unsigned left[2][4] = {{first_of(four[0].x, four[1].x), second_of(four[0].x, four[1].x),
                                      first_of(four[2].x, four[3].x), second_of(four[2].x, four[3].x)},
                                     {first_of(four[0].y, four[1].y), second_of(four[0].y, four[1].y),
                                      first_of(four[2].y, four[3].y), second_of(four[2].y, four[3].y)}};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_matrices<T>(left[m], factor_high, sums[m]);
          multiply_matrices<T>(left[m], factor_low, sums[m]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = t * 2 + i;
        if (row >= plan.rows) break;
        unsigned* const to = columns + (row * 2 * seen_w + k) * 16 + g / 2;
#pragma unroll
        for (int m = 0; m < 2; ++m) {  // channels 4 g + 2 m and the next, pairs exchanged so that a lane's lie apart
          const Split two = split<Half>(sums[m][i], sums[m][2 + i]);
          const int at = ((g % 2 * 2 + m) ^ (k / 2 % 4)) * 4;
          to[at] = two.high, to[seen_w * 16 + at] = two.low;
        }
      }
    }
    __syncthreads();

    for (int y = top + warp / plan.tiles; y < bottom; y += groups) {
      memcpy(static_cast<void*>(values), next, sizeof(values));
      T* const to = target;
      target += groups * args.conv.stride_h;
      read(y + groups, target);
      float sums[4][4] = {};
      __syncwarp();  // inactive lanes have left the last row early
      const SharedAddress of_row = address + (y - top) * 2 * seen_w * 64;
#pragma unroll
      for (int step = 0; step < kSeenSteps; ++step) {
        if (step * kStep >= seen_w) break;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          unsigned right[4], rest[4];
          const SharedAddress from = of_row + (rows_of_lane[step] ^ (j * 16));
          load_matrices<true>(from, right);
          load_matrices<true>(from + seen_w * 64, rest);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if constexpr (planar) {  // [channels, pixels]
              const unsigned left[4] = {right[0], right[2], right[1], right[3]};
              const unsigned left_rest[4] = {rest[0], rest[2], rest[1], rest[3]};
              const unsigned factor[2] = {high[step][i], high[step][2 + i]};
              const unsigned factor_rest[2] = {low[step][i], low[step][2 + i]};
              multiply_matrices<Half>(left, factor, sums[j + i]);
              multiply_matrices<Half>(left, factor_rest, sums[j + i]);
              multiply_matrices<Half>(left_rest, factor, sums[j + i]);
            } else {  // [pixels, channels]
              multiply_matrices<Half>(high[step], right + i * 2, sums[j + i]);
              multiply_matrices<Half>(low[step], right + i * 2, sums[j + i]);
              multiply_matrices<Half>(high[step], rest + i * 2, sums[j + i]);
            }
          }
        }
      }
      const auto finish = [&](float sum, int i, float scale, float shift) {  // the value of number i
        const float value = (sum + (args.accumulate ? widen(values[i]) : 0.0f)) * scale + shift;
        return args.relu && value < 0 ? 0.0f : value;
      };
      if constexpr (planar) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (channel + i * 2 >= args.O) continue;
          const int number = g / 2 * 8 + g % 2 + i * 2;
          const float scale = factors[number], shift = factors[kChannels + number];
          Together<T, 4> results;
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const float sum = sums[i / 2 * 2 + v / 2][i % 2 * 2 + v % 2];
            results.values[v] = narrow<T>(finish(sum, i * 4 + v, scale, shift));
          }
          store_four(to + i * far, end - x, plan.together, results);
        }
      } else {
        float scale[8], shift[8];
        load(factors + t * 8, scale);
        load(factors + kChannels + t * 8, shift);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!active || x + i * 8 >= end) continue;
          float results[8];
#pragma unroll
          for (int v = 0; v < 8; ++v) results[v] = finish(sums[v / 2][i * 2 + v % 2], i * 8 + v, scale[v], shift[v]);
          store_narrow(to + i * far, results);
        }
      }
    }
    __syncthreads();
  }
}

// rows == 0: there are too many cells.
template <class T>
ProductPlan plan_products(const PyramidContextArgs& args) {
  const Levels& levels = args.levels;
  const int seen_w = seen_cells(levels, levels.bins_w, args.window.size_w);
  if (!kProducts || seen_w > kSeenSteps * kStep || count_taps(levels, args.window) * args.O > INT_MAX) return {};
  const int64_t parts = divide_up(args.W, kThreads / kWarp * kStep);
  ProductPlan plan = {0, static_cast<int>(divide_up(divide_up(args.W, parts), kStep)) * kStep, 1, 0, 1, 1, 0};
  while (plan.tiles * kStep < plan.stretch) plan.tiles *= 2;
  for (int level = 0; level < levels.count; ++level) {
    plan.steps += static_cast<int>(divide_up(levels.bins_h[level] * args.window.size_h, kStep));
  }
  for (const int rows : {8, 4}) {
    plan.bytes = std::max(rows * seen_w * kChannels * 4, kSeenSteps * kStep * 16) + plan.steps * (kWarp * 16 + 64) +
                 seen_w * sizeof(ColumnOfTaps) + 2 * kChannels * sizeof(float);
    if (plan.bytes > kSharedBytes) continue;
    plan.rows = rows;
    break;
  }
  if (plan.rows == 0) return {};
  const int64_t strides = args.conv.stride_n | args.conv.stride_c | args.conv.stride_h | args.W;
  if (strides % 4 == 0 && reinterpret_cast<uintptr_t>(args.conv.data) % (4 * sizeof(T)) == 0) plan.together = 4;
  const int64_t blocks =
      args.N * divide_up(args.H, plan.rows) * divide_up(args.W, plan.stretch) * divide_up(args.O, kChannels);
  plan.chunks = static_cast<int>(std::clamp<int64_t>(blocks / 1024, 1, 8));
  return plan;
}

template <class T>
cudaError_t launch_products(const PyramidContextArgs& args, const ProductPlan& plan, void* stream) {
  const int64_t blocks = args.N * divide_up(args.H, plan.rows) * divide_up(args.W, plan.stretch) *
                         divide_up(divide_up(args.O, kChannels), plan.chunks);
  return launch(args.channels_last ? context_products<T, false> : context_products<T, true>, blocks, kThreads,
                plan.bytes, stream, args, plan);
}

}  // namespace
}  // namespace pspnet_fast::cuda
