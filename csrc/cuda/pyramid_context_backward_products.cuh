// The first part of context's backward in half precision, on tensor cores: rows of the gradient summed into the cells
// seen horizontally, [N, H, seen_w, O], by products of the gradient [channels, pixels of a row] and weights [.., cells
// seen].
#pragma once

#include "context_products.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kChannels = 32, kStep = 16, kTiles = 6;  // of a warp at once; of pixels, and of 8 cells seen

struct RowProducts {
  int steps, tiles, jobs;  // of pixels, of cells seen; how many pairs of row and chunk of channels a warp takes
  bool pairs;              // planar: two neighbours are read at once
  size_t bytes;
};

// Two neighbours of a row of W.
template <class T>
__device__ __forceinline__ unsigned load_pair(const T* row, int x, int W, bool together) {
  if (together) return *reinterpret_cast<const unsigned*>(row + x);
  const T two[2] = {row[x], x + 1 < W ? row[x + 1] : narrow<T>(0)};
  unsigned bits;
  memcpy(&bits, two, 4);
  return bits;
}

// Layout: channels-last in 16-byte vectors, or planar. A warp takes chunks of channels of rows, one after the other;
// planar, the warps of a block take neighbouring rows.
// Traffic: grad_conv read once; seen_w accumulators a row written: 2.2 times the gradient. Instructions a vector: 148,
// planar 139. What is infinite or NaN makes NaN of its channel's
// sums of the row.
template <class T, bool planar>
__global__ void __launch_bounds__(kThreads, 2)
    context_backward_row_products(const __grid_constant__ PyramidContextBackwardArgs args, RowProducts plan) {
  PSP_DYNAMIC_SHARED(uint4, weights);  // [steps, tiles, lanes]
  const int W = static_cast<int>(args.W), lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, g = lane / 4, t = lane % 4;
  const int seen_w = first_seen(args.levels.bins_w, args.levels.count, args.window.size_w);
  for (int at = warp; at < plan.steps * plan.tiles; at += kThreads / kWarp) {
    const int step = at / plan.tiles, tile = at - step * plan.tiles;
    const SeenCell cell = seen_cell(args.levels.bins_w, seen_w, tile * 8 + g, args.window.size_w,
                                    args.window.dilation_w, W, args.interpolation);
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = cell.weight(step * kStep + t * 2 + i % 2 + i / 2 * 8, W, args.interpolation);
    }
    const Split near = split<T>(values[0], values[1]), far = split<T>(values[2], values[3]);
    weights[at * kWarp + lane] = {near.high, far.high, near.low, far.low};
  }
  __syncthreads();

  const int chunks = static_cast<int>((args.O + kChannels - 1) / kChannels), H = static_cast<int>(args.H);
  const int64_t all = args.N * args.H * chunks;
  int64_t job = (static_cast<int64_t>(blockIdx.x) * plan.jobs * (kThreads / kWarp)) + warp;
  for (int number = 0; number < plan.jobs && job < all; ++number, job += kThreads / kWarp) {
    const int64_t row = planar ? job % (args.N * H) : job / chunks, n = row / H;
    const int64_t channel = (planar ? job / (args.N * H) : job - row * chunks) * kChannels + g * 4;
    const bool active = channel < args.O;
    const T* const from = pixel<const T>(args.grad_conv, n, channel, row - n * H, 0);
    uint2 next[4];  // channels-last: a pixel's four channels; planar: pairs of pixels of the first two, of the others
    const auto read = [&](int step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int x = step * kStep + t * 2 + (planar ? i / 2 * 8 : i % 2 + i / 2 * 8);
        next[i] = uint2{};
        if (!active || x >= W) continue;
        if constexpr (planar) {
          const T* const first = from + i % 2 * 2 * args.grad_conv.stride_c;
          next[i].x = load_pair(first, x, W, plan.pairs);
          next[i].y = load_pair(first + args.grad_conv.stride_c, x, W, plan.pairs);
        } else {
          next[i] = *reinterpret_cast<const uint2*>(from + x * args.grad_conv.stride_w);
        }
      }
    };
    float sums[kTiles][2][4] = {};
    read(0);
    __syncwarp();  // inactive lanes have left the last job early
    for (int step = 0; step < plan.steps; ++step) {
      unsigned left[2][4];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint2 &one = next[i], &two = next[i + 1];
        left[0][i] = planar ? one.x : first_of(one.x, two.x);
        left[0][i + 1] = planar ? one.y : second_of(one.x, two.x);
        left[1][i] = planar ? two.x : first_of(one.y, two.y);
        left[1][i + 1] = planar ? two.y : second_of(one.y, two.y);
      }
      if (step + 1 < plan.steps) read(step + 1);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile >= plan.tiles) break;
        const uint4 weight = weights[(step * plan.tiles + tile) * kWarp + lane];
        const unsigned high[2] = {weight.x, weight.y}, low[2] = {weight.z, weight.w};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_matrices<T>(left[m], high, sums[tile][m]);
          multiply_matrices<T>(left[m], low, sums[tile][m]);
        }
      }
    }
    if (!active) continue;
    float* const to = static_cast<float*>(args.workspace) + row * seen_w * args.O + channel;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = tile * 8 + t * 2 + i;
        if (k >= seen_w) continue;
        const float four[4] = {sums[tile][0][i], sums[tile][0][2 + i], sums[tile][1][i], sums[tile][1][2 + i]};
        store(to + k * args.O, four);
      }
    }
  }
}

// jobs == 0: there are too many cells or pixels, or channels that fill no vector.
template <class T>
RowProducts plan_row_products(const PyramidContextBackwardArgs& args) {
  if (sizeof(T) != 2 || !kProducts) return {};
  const Image& grad = args.grad_conv;
  if (args.channels_last ? !vectors_of_channels<T>(grad, args.O) : args.O % 4 != 0) return {};
  const int seen_w = seen_cells(args.levels, args.levels.bins_w, args.window.size_w);
  RowProducts plan = {static_cast<int>(divide_up(args.W, kStep)), static_cast<int>(divide_up(seen_w, 8)), 0, false, 0};
  plan.bytes = size_t{16} * kWarp * plan.steps * plan.tiles;
  if (plan.tiles > kTiles || plan.bytes > kSharedBytes) return plan;
  const int64_t warps = args.N * args.H * divide_up(args.O, kChannels);
  plan.jobs = static_cast<int>(std::clamp<int64_t>(warps / (kThreads / kWarp) / 512, 1, 8));
  const int64_t strides = grad.stride_n | grad.stride_c | grad.stride_h | args.W;
  plan.pairs = strides % 2 == 0 && reinterpret_cast<uintptr_t>(grad.data) % 4 == 0;
  return plan;
}

template <class T>
cudaError_t launch_row_products(const PyramidContextBackwardArgs& args, const RowProducts& plan, void* stream) {
  const int64_t jobs = args.N * args.H * divide_up(args.O, kChannels);
  return launch(args.channels_last ? context_backward_row_products<T, false> : context_backward_row_products<T, true>,
                divide_up(jobs, int64_t{plan.jobs} * (kThreads / kWarp)), kThreads, plan.bytes, stream, args, plan);
}

}  // namespace
}  // namespace pspnet_fast::cuda
