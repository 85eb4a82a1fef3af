// Planar maps: the rows of one plane as 16-byte vectors, whatever the alignment of the plane.
#pragma once

#include "common.cuh"

namespace pspnet_fast::cuda {

// Up to kVector elements from or to memory: at once where there are that many and the pointer is aligned.
template <class T>
__device__ __forceinline__ void load_some(const T* from, int count, T (&values)[kVector<T>]) {
  if (count == kVector<T> && aligned(from)) {
    load(from, values);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < count) values[i] = from[i];
    }
  }
}

template <class T>
__device__ __forceinline__ void store_some(T* to, int count, const T (&values)[kVector<T>]) {
  if (count == kVector<T> && aligned(to)) {
    store(to, values);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < count) to[i] = values[i];
    }
  }
}

// Elements between the last 16-byte boundary and `pointer`.
template <class T>
__device__ __forceinline__ int misalignment(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % 16 / sizeof(T));
}

// Rows without gaps are one run of elements.
PSP_HOST_DEVICE bool dense(const Image& image, int64_t H, int64_t W) { return image.stride_h == W || H == 1; }

// Shares `rows` rows of W elements among the block's threads, cut at the 16-byte boundaries of memory: calls
// visit(y, x, count) with count <= kVector elements of row y from x on.
template <class T, class F>
__device__ __forceinline__ void for_each_vector(const T* data, int64_t stride_h, int rows, int W, F visit) {
  constexpr int V = kVector<T>;
  const int pieces = W / V + 2;
  for (int at = static_cast<int>(threadIdx.x); at < rows * pieces; at += static_cast<int>(blockDim.x)) {
    const int y = at / pieces, first = (at - y * pieces) * V - misalignment(data + y * stride_h);
    const int begin = max(first, 0), end = min(first + V, W);
    if (begin < end) visit(y, begin, end - begin);
  }
}

// Reads `count` neighbours into shared memory, aligned alike.
template <class T>
__device__ __forceinline__ void stage_run(const T* from, int count, T* tile) {
  constexpr int V = kVector<T>, kLoads = 4;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lead = min((V - misalignment(from)) % V, count), end = lead + (count - lead) / V * V;
  const int step = threads * V;
  for (int first = lead + thread * V; first < end; first += kLoads * step) {
    T values[kLoads][V];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * step < end) load(from + first + i * step, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * step < end) store_shared(tile + first + i * step, values[i]);
    }
  }
  for (int i = thread; i < lead + count - end; i += threads) {  // before and after the vectors
    const int at = i < lead ? i : end + i - lead;
    tile[at] = from[at];
  }
}

// Reads rows of a plane into shared memory. Returns the first element there, which must have room for kVector more; a
// barrier must follow.
template <class T>
__device__ __forceinline__ const T* stage_rows(const T* from, int64_t stride, int rows, int W, bool is_dense,
                                               T* shared) {
  T* const tile = shared + misalignment(from);
  if (is_dense) {
    stage_run(from, rows * W, tile);
    return tile;
  }
  for_each_vector(from, stride, rows, W, [&](int y, int x, int count) {
    T values[kVector<T>];
    load_some(from + y * stride + x, count, values);
    T* const to = tile + y * W + x;
    if (count == kVector<T> && aligned(to)) {
      store_shared(to, values);
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        if (i < count) to[i] = values[i];
      }
    }
  });
  return tile;
}

// The shared memory of a block that stages rows beside its tables; rows == 0: they do not fit.
struct Staging {
  int rows;
  size_t tile_bytes, bytes;
};

template <class T>
Staging plan_staging(int64_t H, int64_t W, size_t table_bytes) {
  const size_t row_bytes = static_cast<size_t>(W) * sizeof(T), fixed = table_bytes + 32;  // lead and rounding
  if (table_bytes > kSharedBytes || fixed + row_bytes > kSharedBytes) return {0, 0, 0};
  const int64_t room = static_cast<int64_t>((kSharedBytes - fixed) / row_bytes), rows = room < H ? room : H;
  const size_t tile_bytes = (rows * row_bytes + 31) / 16 * 16;
  return {static_cast<int>(rows), tile_bytes, tile_bytes + table_bytes};
}

// Where column x of a table row in shared memory lies, whose columns are read in fours: neighbours a thread then meet
// few banks twice.
PSP_HOST_DEVICE int padded_by_four(unsigned x) { return static_cast<int>(x + x / kWarp * 4); }

}  // namespace pspnet_fast::cuda
