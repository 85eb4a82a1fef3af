// Operands of a matrix product, and their tiles in shared memory.
#pragma once

#include "tensor_cores.cuh"

namespace pspnet_fast::cuda {

// A tile of rows x columns outputs; its stages hold `stage_bytes` of each index along k. Warps lie in a grid over rows,
// columns, and, since few outputs would leave many idle, over the k of a stage.
template <int rows, int columns, int stage_bytes, int stages, int warps_i, int warps_j, int warps_k>
struct Shape {
  static constexpr int kRows = rows, kColumns = columns, kStageBytes = stage_bytes, kStages = stages;
  static constexpr int kWarpsI = warps_i, kWarpsJ = warps_j, kWarpsK = warps_k;
  static constexpr int kWarpRows = rows / warps_i, kWarpColumns = columns / warps_j;
  static_assert(warps_i * warps_j * warps_k * kWarp == kThreads);
  static_assert((rows + columns) * stage_bytes * stages <= static_cast<int>(kSharedBytes));
};

// Where rows of a matrix lie that are `cells` of every image, of P: row m is number m % cells of image m / cells.
struct Rows {
  int P, first, cells, count;

  struct Place {
    int row, cell;  // in memory, and of the image's cells
  };
  __device__ __forceinline__ Place at(int m) const {
    const int image = static_cast<int>(static_cast<unsigned>(m) / static_cast<unsigned>(cells));
    return {image * P + first + m - image * cells, m - image * cells};
  }
  // The same of row m + step, step = images * cells + rest.
  __device__ __forceinline__ void advance(Place& place, int images, int rest) const {
    place.row += images * P + rest;
    place.cell += rest;
    if (place.cell >= cells) place.cell -= cells, place.row += P - cells;
  }
};

// All rows of one matrix.
__device__ __forceinline__ Rows plain_rows(int64_t count) {
  return {0, 0, static_cast<int>(count), static_cast<int>(count)};
}

// An operand: rows of `length` elements in memory. `along_k`: of an index, the elements along k; else of a k, those of
// all indices.
template <class T, bool along_k>
struct Operand {
  static constexpr bool kAlongK = along_k;
  const T* data;
  int length;
  Rows rows;
};

// The tile of an operand in shared memory, `size` indices x `depth` of k, in 16-byte chunks. Chunks are exchanged
// within rows, so that eight rows' chunks of one column lie in different banks.
template <class T, bool along_k, int size, int depth>
struct Tile {
  static constexpr int kRows = along_k ? size : depth, kLength = along_k ? depth : size;
  static constexpr int kChunks = kLength / kVector<T>, kPieces = kRows * kChunks / kThreads;
  static_assert(kPieces * kThreads == kRows * kChunks && kChunks >= 4 && kThreads % kChunks == 0);

  __device__ __forceinline__ static int chunk(int row, int column) {
    return (row * kChunks + (column ^ (kChunks >= 8 ? row % 8 : row / 2 % 4))) * kVector<T>;
  }
};

// Copies the tiles of an operand for one stage after the other.
template <class T, bool along_k, int size, int depth, bool vectors>
class Source {
 public:
  using Tile = cuda::Tile<T, along_k, size, depth>;

  // Indices from `first` on.
  __device__ __forceinline__ Source(const Operand<T, along_k>& operand, int first) : operand_(operand), first_(first) {
#pragma unroll
    for (int i = 0; i < Tile::kPieces; ++i) {
      places_[i] = operand.rows.at(row(i) + (along_k ? first : 0));  // beyond the last: never copied
      if constexpr (along_k) from_[i] = address(i) + column_of_thread() * kVector<T>;
    }
    if constexpr (!along_k) images_ = depth / operand.rows.cells, rest_ = depth % operand.rows.cells;
  }

  // k from `k` on; the next call's is `depth` more.
  __device__ __forceinline__ void copy(T* stage, SharedAddress stage_address, int k) {
    const int column = column_of_thread() * kVector<T> + (along_k ? k : first_);
#pragma unroll
    for (int i = 0; i < Tile::kPieces; ++i) {
      const int chunk = Tile::chunk(row(i), column_of_thread());
      const bool inside = row(i) + (along_k ? first_ : k) < operand_.rows.count;
      const T* from;
      if constexpr (along_k) {
        if (!inside) continue;  // an index beyond the last: of it, no output is stored
        from = from_[i] + k;
      } else {
        from = address(i) + column;
        operand_.rows.advance(places_[i], images_, rest_);
      }
      if constexpr (vectors) {
        copy_async(stage_address + chunk * static_cast<int>(sizeof(T)), from, inside && column < operand_.length);
      } else {
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          stage[chunk + v] = inside && column + v < operand_.length ? from[v] : narrow<T>(0);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static int row(int piece) {
    return static_cast<int>(threadIdx.x) / Tile::kChunks + piece * (kThreads / Tile::kChunks);
  }
  __device__ __forceinline__ static int column_of_thread() { return static_cast<int>(threadIdx.x) % Tile::kChunks; }
  __device__ __forceinline__ const T* address(int piece) const {
    return operand_.data + static_cast<int64_t>(places_[piece].row) * operand_.length;
  }

  const Operand<T, along_k>& operand_;
  int first_, images_, rest_;
  Rows::Place places_[Tile::kPieces];
  const T* from_[Tile::kPieces];
};

}  // namespace pspnet_fast::cuda
