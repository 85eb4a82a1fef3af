// What the products of pyramid_reduce and of its backward share: the rows of a level, and which blocks are a level's.
#pragma once

#include "matrix_product.cuh"

namespace pspnet_fast::cuda {

// The cells of a level, in all images: rows of a matrix [N * P, ...].
__device__ __forceinline__ Rows rows_of_level(const Levels& levels, int level, int64_t N) {
  const int cells = levels.first[level + 1] - levels.first[level];
  return {levels.first[levels.count], levels.first[level], cells, static_cast<int>(N * cells)};
}

// Blocks of `rows` rows that a level takes.
PSP_HOST_DEVICE int64_t row_blocks(const Levels& levels, int level, int64_t N, int rows) {
  return divide_up(N * (levels.first[level + 1] - levels.first[level]), rows);
}

inline int64_t row_blocks(const Levels& levels, int64_t N, int rows) {
  int64_t blocks = 0;
  for (int level = 0; level < levels.count; ++level) blocks += row_blocks(levels, level, N, rows);
  return blocks;
}

// The level of a block of rows; `block` becomes its number within the level.
__device__ __forceinline__ int level_of_block(const Levels& levels, int64_t N, int rows, int64_t& block) {
  int level = 0;
  for (; block >= row_blocks(levels, level, N, rows); ++level) block -= row_blocks(levels, level, N, rows);
  return level;
}

// Rows of `length` elements start on 16-byte boundaries.
template <class T>
bool vectors_of_rows(const void* data, int64_t length) {
  return aligned(data) && length % kVector<T> == 0;
}

template <class T>
bool vectors_of_weights(const void* const (&weights)[kMaxLevels], const Levels& levels, int64_t C) {
  bool vectors = true;
  for (int level = 0; level < levels.count; ++level) vectors = vectors && vectors_of_rows<T>(weights[level], C);
  return vectors;
}

// Rows of all levels, and a stage beyond the last, are counted in int.
inline bool rows_fit_int(const Levels& levels, int64_t N, int64_t C, int64_t R) {
  constexpr int64_t kMost = INT_MAX - 1024;
  return C <= kMost && R <= kMost && N * levels.first[levels.count] <= kMost;
}

}  // namespace pspnet_fast::cuda
