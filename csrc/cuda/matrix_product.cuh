// A block's tile of a product of two matrices, out[i, j] = sum over k of left[i, k] * right[j, k]: both operands go
// through shared memory in stages, copied while earlier ones are multiplied; sums are taken in a fixed order.
#pragma once

#include <type_traits>

#include "matrix_tiles.cuh"

namespace pspnet_fast::cuda {

// Where a warp works: its place in the grid of warps.
template <class Shape>
struct WarpPlace {
  int i, j, k;
  __device__ __forceinline__ WarpPlace() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    i = warp / Shape::kWarpsJ % Shape::kWarpsI;
    j = warp % Shape::kWarpsJ;
    k = warp / (Shape::kWarpsJ * Shape::kWarpsI);
  }
};

template <class A, int count>
struct alignas(count * sizeof(A)) Neighbours {
  A values[count];
  __device__ __forceinline__ void operator+=(const Neighbours& other) {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] += other.values[i];
  }
};

// A warp's sums, on tensor cores.
template <class T, class Shape, bool left_along_k, bool right_along_k>
class TensorSums {
  static constexpr int kDepth = Shape::kStageBytes / static_cast<int>(sizeof(T)), kStep = 16;
  static constexpr int kTilesI = Shape::kWarpRows / 16, kTilesJ = Shape::kWarpColumns / 8;
  static_assert(kTilesJ % 2 == 0 && kDepth % (kStep * Shape::kWarpsK) == 0);
  using Left = Tile<T, left_along_k, Shape::kRows, kDepth>;
  using Right = Tile<T, right_along_k, Shape::kColumns, kDepth>;

 public:
  __device__ __forceinline__ TensorSums(const WarpPlace<Shape>& warp, int) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, half = lane / 8 % 2, other = lane / 16, eighth = lane % 8;
    const int i = warp.i * Shape::kWarpRows, j = warp.j * Shape::kWarpColumns, k = warp.k * kStep;
    left_ = chunk<Left, left_along_k>(i, half, k, other, eighth);
    right_ = chunk<Right, right_along_k>(j, other, k, half, eighth);
  }

  __device__ __forceinline__ void add(const T*, const T*, SharedAddress left, SharedAddress right) {
#pragma unroll
    for (int step = 0; step < kDepth / kStep / Shape::kWarpsK; ++step) {
      unsigned factors[kTilesJ][2];
#pragma unroll
      for (int j = 0; j < kTilesJ; j += 2) {
        unsigned four[4];
        load_matrices<!right_along_k>(right + moved<Right, right_along_k>(right_, j / 2, step), four);
        factors[j][0] = four[0], factors[j][1] = four[1], factors[j + 1][0] = four[2], factors[j + 1][1] = four[3];
      }
#pragma unroll
      for (int i = 0; i < kTilesI; ++i) {
        unsigned four[4];
        load_matrices<!left_along_k>(left + moved<Left, left_along_k>(left_, i, step), four);
#pragma unroll
        for (int j = 0; j < kTilesJ; ++j) multiply_matrices<T>(four, factors[j], sums_[i][j]);
      }
    }
  }

  // Calls visit(i, j, sums) for the lane's outputs, neighbours along j together; i and j are counted in the warp's.
  template <class F>
  __device__ __forceinline__ void for_each(F visit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kTilesI; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesJ; ++j) {
#pragma unroll
        for (int v = 0; v < 4; v += 2) {
          const Neighbours<float, 2> sums = {{sums_[i][j][v], sums_[i][j][v + 1]}};
          visit(i * 16 + lane / 4 + v * 4, j * 8 + lane % 4 * 2, sums);
        }
      }
    }
  }

 private:
  // The byte in the tile of the lane's row of four matrices: 16 indices, of which it is in the first or second 8, and
  // 16 k, likewise.
  template <class Tile, bool along_k>
  __device__ __forceinline__ static int chunk(int index, int index_half, int k, int k_half, int eighth) {
    const int at = along_k ? Tile::chunk(index + index_half * 8 + eighth, k / 8 + k_half)
                           : Tile::chunk(k + k_half * 8 + eighth, index / 8 + index_half);
    return at * static_cast<int>(sizeof(T));
  }
  // The same `indices` times 16 indices and some steps on. Chunks are numbered by exclusive or, within rows.
  template <class Tile, bool along_k>
  __device__ __forceinline__ static int moved(int chunk, int indices, int step) {
    constexpr int kRow = Tile::kChunks * 16;
    const int steps = step * Shape::kWarpsK;
    return along_k ? (chunk ^ (steps * 32)) + indices * 16 * kRow : (chunk ^ (indices * 32)) + steps * 16 * kRow;
  }

  int left_, right_;
  float sums_[kTilesI][kTilesJ][4] = {};
};

// A warp's sums, by multiply-adds: lanes share out the rows (or vectors of rows) and the columns.
template <class T, class Shape, bool left_along_k, bool right_along_k>
class PlainSums {
  using A = acc_t<T>;
  static constexpr int V = kVector<T>, kDepth = Shape::kStageBytes / static_cast<int>(sizeof(T));
  static constexpr int kLanesI = Shape::kWarpRows / 8, kLanesJ = kWarp / kLanesI;  // 8 rows a lane
  static constexpr int kOwnRows = Shape::kWarpRows / kLanesI, kOwnColumns = Shape::kWarpColumns / kLanesJ;
  static_assert(kDepth % (V * Shape::kWarpsK) == 0);

  // A lane's index number e of those that `lanes` lanes share.
  template <bool along_k, int lanes>
  __device__ __forceinline__ static int index(int lane, int e) {
    return along_k ? lane + lanes * e : (e / V * lanes + lane) * V + e % V;
  }

  // Of the lane's indices of an operand those from number e on, one along k, else V, at V values of k from `k` on.
  template <bool along_k, int lanes, int size>
  __device__ __forceinline__ static void read(const T* shared, int first, int lane, int e, int k, T (*values)[V]) {
    using Tile = cuda::Tile<T, along_k, size, kDepth>;
    const int at = first + index<along_k, lanes>(lane, e);
    if constexpr (along_k) {
      load(shared + Tile::chunk(at, k / V), values[0]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T neighbours[V];
        load(shared + Tile::chunk(k + v, at / V), neighbours);
#pragma unroll
        for (int i = 0; i < V; ++i) values[i][v] = neighbours[i];
      }
    }
  }

 public:
  // `rows`: how many the matrix has from the warp's first on.
  __device__ __forceinline__ PlainSums(const WarpPlace<Shape>& warp, int rows) : warp_(warp), rows_(rows) {}

  __device__ __forceinline__ void add(const T* left, const T* right, SharedAddress, SharedAddress) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int i = warp_.i * Shape::kWarpRows, j = warp_.j * Shape::kWarpColumns;
    constexpr int kRowsAtOnce = left_along_k ? 1 : V, kColumnsAtOnce = right_along_k ? 1 : V;
#pragma unroll
    for (int step = 0; step < kDepth / V / Shape::kWarpsK; ++step) {
      const int k = (step * Shape::kWarpsK + warp_.k) * V;
      T factors[kOwnColumns][V];
#pragma unroll
      for (int e = 0; e < kOwnColumns; e += kColumnsAtOnce) {
        read<right_along_k, kLanesJ, Shape::kColumns>(right, j, lane % kLanesJ, e, k, factors + e);
      }
#pragma unroll
      for (int e = 0; e < kOwnRows; e += kRowsAtOnce) {
        if (e * kLanesI >= rows_) break;
        T values[kRowsAtOnce][V];
        read<left_along_k, kLanesI, Shape::kRows>(left, i, lane / kLanesJ, e, k, values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int row = 0; row < kRowsAtOnce; ++row) {
#pragma unroll
            for (int column = 0; column < kOwnColumns; ++column) {
              sums_[e + row][column] += widen(values[row][v]) * widen(factors[column][v]);
            }
          }
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each(F visit) {
    constexpr int kTogether = right_along_k ? 1 : 16 / static_cast<int>(sizeof(A));
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnColumns; j += kTogether) {
        Neighbours<A, kTogether> sums;
#pragma unroll
        for (int v = 0; v < kTogether; ++v) sums.values[v] = sums_[i][j + v];
        visit(index<left_along_k, kLanesI>(lane / kLanesJ, i), index<right_along_k, kLanesJ>(lane % kLanesJ, j), sums);
      }
    }
  }

 private:
  WarpPlace<Shape> warp_;
  int rows_;
  A sums_[kOwnRows][kOwnColumns] = {};
};

// Shared memory of a block: the stages, then the sums of a row of warps.
template <class T, class Shape>
constexpr int kProductBytes = [] {
  constexpr int stages = (Shape::kRows + Shape::kColumns) * Shape::kStageBytes * Shape::kStages;
  constexpr int sums = Shape::kWarpRows * (Shape::kColumns + 8) * static_cast<int>(sizeof(acc_t<T>));
  return stages > sums ? stages : sums;
}();

// The tile of outputs from (first_i, first_j) on: calls write(i, j, values) with V neighbours along j, V = kVector<T>
// where `vectors`, else 1.
template <class T, class Shape, bool vectors, bool left_along_k, bool right_along_k, class F>
__device__ __forceinline__ void product_tile(unsigned char* shared, const Operand<T, left_along_k>& left,
                                             const Operand<T, right_along_k>& right, int first_i, int first_j,
                                             F write) {
  constexpr int kDepth = Shape::kStageBytes / static_cast<int>(sizeof(T));
  constexpr int kLeft = Shape::kRows * kDepth, kStage = kLeft + Shape::kColumns * kDepth;
  const int depth = left_along_k ? left.length : left.rows.count;
  const int count_i = left_along_k ? left.rows.count : left.length;
  const int count_j = right_along_k ? right.rows.count : right.length;
  T* const tiles = reinterpret_cast<T*>(shared);
  const SharedAddress address = shared_address(shared);
  constexpr int kSize = static_cast<int>(sizeof(T));
  Source<T, left_along_k, Shape::kRows, kDepth, vectors> from_left(left, first_i);
  Source<T, right_along_k, Shape::kColumns, kDepth, vectors> from_right(right, first_j);
  const int steps = (depth + kDepth - 1) / kDepth;
  const auto copy = [&](int step, int stage) {
    if (step < steps) {
      from_left.copy(tiles + stage, address + stage * kSize, step * kDepth);
      from_right.copy(tiles + stage + kLeft, address + (stage + kLeft) * kSize, step * kDepth);
    }
    end_of_copies();
  };

  const WarpPlace<Shape> warp;
  std::conditional_t<has_tensor_cores<T>, TensorSums<T, Shape, left_along_k, right_along_k>,
                     PlainSums<T, Shape, left_along_k, right_along_k>>
      sums(warp, count_i - first_i - warp.i * Shape::kWarpRows);
  const bool works = first_i + warp.i * Shape::kWarpRows < count_i && first_j + warp.j * Shape::kWarpColumns < count_j;
#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; ++step) copy(step, step * kStage);
  int stage = 0, last = (Shape::kStages - 1) * kStage;  // where they begin
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();  // the stage has come, and the last is read
    copy(step + Shape::kStages - 1, last);
    if (works) {
      sums.add(tiles + stage, tiles + stage + kLeft, address + stage * kSize, address + (stage + kLeft) * kSize);
    }
    last = stage;
    stage = stage == (Shape::kStages - 1) * kStage ? 0 : stage + kStage;
  }
  wait_for_copies<0>();

  using A = acc_t<T>;
  A* const totals = reinterpret_cast<A*>(shared);
  constexpr int kPitch = Shape::kColumns + 8, V = vectors ? kVector<T> : 1, kWide = Shape::kColumns / V;
  static_assert(kThreads % kWide == 0 || kWide % kThreads == 0);
  for (int row = 0; row < Shape::kWarpsI; ++row) {  // of warps
    for (int turn = 0; turn < Shape::kWarpsK; ++turn) {
      __syncthreads();
      if (warp.i != row || warp.k != turn) continue;
      sums.for_each([&](int i, int j, auto sum) {
        auto& total = reinterpret_cast<decltype(sum)&>(totals[i * kPitch + warp.j * Shape::kWarpColumns + j]);
        if (turn > 0) sum += total;
        total = sum;
      });
    }
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < Shape::kWarpRows * kWide; at += kThreads) {
      const int i = at / kWide, j = at % kWide * V;
      const int out_i = first_i + row * Shape::kWarpRows + i, out_j = first_j + j;
      if (out_i >= count_i || out_j >= count_j) continue;
      A values[V];
      load(totals + i * kPitch + j, values);
      write(out_i, out_j, values);
    }
  }
}

}  // namespace pspnet_fast::cuda
