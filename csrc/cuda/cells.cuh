// Channels-last maps: blocks that take a rectangle of pixels and a chunk of channels.
#pragma once

#include "common.cuh"

namespace pspnet_fast::cuda {

constexpr int kLoads = 4;  // that a thread has in flight

// C channels, `vector` a thread, in `count` chunks; a block is `lanes` threads x over a chunk, the others y over
// pixels.
struct Chunks {
  int lanes, count;
  dim3 threads() const { return dim3(lanes, kThreads / lanes); }
};

inline Chunks make_chunks(int64_t C, int vector) {
  const int64_t vectors = divide_up(C, vector);
  int lanes = 1;
  while (lanes < vectors && lanes < kWarp) lanes *= 2;
  return {lanes, static_cast<int>(divide_up(vectors, lanes))};
}

// How a thread goes through the pixels of a rectangle, row by row, to every `size`-th.
struct RectangleStep {
  int size, width, y, x;

  __device__ __forceinline__ RectangleStep(int size, int width)
      : size(size), width(width), y(size / width), x(size - y * width) {}
  // Of so many pixels, those from number `first` on that are the thread's.
  __device__ __forceinline__ int count(int pixels, int first) const { return (pixels - first + size - 1) / size; }
  // Moves on by x columns; true where that leads into one more row than y.
  __device__ __forceinline__ bool advance(int& column) const {
    column += x;
    const bool wraps = column >= width;
    if (wraps) column -= width;
    return wraps;
  }
};

// A block's number, with the chunk changing fastest, then the index of what blocks share out of an image: a cell, a
// row, a part or a tap.
struct Item {
  int64_t n;
  int index, chunk;
};

__device__ __forceinline__ Item item_of_block(int count, int chunks) {
  const int number = static_cast<int>(blockIdx.x / chunks);
  return {number / count, number % count, static_cast<int>(blockIdx.x % chunks)};
}

// The thread's first channel, of V.
template <int V>
__device__ __forceinline__ int64_t first_channel(int chunk) {
  return (static_cast<int64_t>(chunk) * blockDim.x + threadIdx.x) * V;
}

// Adds the V values that the threads y hold for each channel, in the order of y. Thread t of the block gets channel t
// of the chunk, for t < blockDim.x * V.
template <int V, class A>
__device__ A block_total(const A (&values)[V]) {
  static_assert(kWarp * V <= kThreads);  // make_chunks gives at most a warp of lanes: a thread a channel
  PSP_SHARED(A, partial, kThreads * V);
  const int channels = static_cast<int>(blockDim.x) * V;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  __syncthreads();  // an earlier call's readers
  store_shared(partial + thread * V, values);
  __syncthreads();
  A total = 0;
  if (thread < channels) {
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) total += partial[y * channels + thread];
  }
  return total;
}

// Calls write(channel, total) in the thread that has the total of that channel of C.
template <int V, class A, class F>
__device__ void write_total(const A (&values)[V], int chunk, int64_t C, F write) {
  const A total = block_total(values);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int64_t channel = static_cast<int64_t>(chunk) * blockDim.x * V + thread;
  if (thread < static_cast<int>(blockDim.x) * V && channel < C) write(channel, total);
}

}  // namespace pspnet_fast::cuda
