// The 1x1 convolutions of all levels on the CPU: products of tall, thin matrices (P cells of C values against R x C
// weights), held in register tiles of vectors; lower precisions are widened a block of a tile's rows at a time.
#include "folded_norm.h"
#include "vectors.h"

namespace pspnet_fast::cpu {
namespace {

// A register tile: 24 accumulators of the 32 vector registers of AVX-512, 12 of the 16 that others have.
constexpr int kRows = 6, kColumns = 4;
template <int kBytes>
constexpr int kTileRows = kBytes == 64 ? kRows : kRows / 2;

// Calls tile(row, rows_in_tile as a constant) over all of `rows`, in tiles of kTile and one smaller.
template <int kTile, class Tile>
PSP_INLINE void for_tiles(int64_t row, int64_t rows, const Tile& tile) {
  for (; row + kTile <= rows; row += kTile) tile(row, std::integral_constant<int, kTile>{});
  if constexpr (kTile > 1) {
    if (row < rows) for_tiles<kTile - 1>(row, rows, tile);
  }
}

// A cell's row in [N, P, ...] from its index among the N * cells rows of its level.
struct LevelRows {
  int64_t first, cells, P;
  LevelRows(const Levels& levels, int l)
      : first(levels.first[l]), cells(levels.first[l + 1] - levels.first[l]), P(levels.first[levels.count]) {}
  PSP_INLINE int64_t operator()(int64_t m) const { return m / cells * P + first + m % cells; }
};

// reduced[m, r] = relu(norm(sum over c of pooled[m, c] * weight[r, c])); a unit is kColumns channels r of all levels.
// Blocks of columns c keep a tile's rows in the first-level cache; between blocks the sums wait in memory as vectors.
template <class T>
struct Reduce {
  using acc_t = acc_type<T>;
  static constexpr int64_t kBlock = 2048 / sizeof(acc_t);
  const PyramidReduceArgs& a;
  const acc_t* pooled;  // [blocks of c][rows: level, n, cell][kBlock], widened, zeros behind C
  int64_t rows;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    Scratch<acc_t> scratch(kColumns * kBlock), sums(rows * kColumns * kL);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t r0 = unit * kColumns, columns = std::min<int64_t>(kColumns, a.R - r0);
      int64_t first = 0;  // of the level's rows
      NextWeights next(a, r0 + kColumns, unit + 1 < end);
      for (int l = 0; l < a.levels.count; ++l) {
        const LevelRows row(a.levels, l);
        const int64_t M = a.N * row.cells;
        std::fill(sums.begin(), sums.begin() + M * kColumns * kL, acc_t(0));
        for (int64_t c = 0; c < a.C; c += kBlock) {
          const int64_t n = std::min(kBlock, a.C - c);
          const T* const from = static_cast<const T*>(a.weights[l]) + r0 * a.C + c;
          const Rows weight = weight_rows<kBytes>(from, columns, n, scratch);
          const acc_t* const x = pooled + c * rows + first * kBlock;
          for_tiles<kTileRows<kBytes>>(0, M, [&](int64_t m, auto tile_rows) __attribute__((always_inline)) {
            tile<kBytes, tile_rows()>(x + m * kBlock, weight, n, &sums[m * kColumns * kL], next());
          });
        }
        finish<kL>(l, row, r0, columns, sums.data());
        first += M;
      }
    }
  }

  // The next unit's weights, a row's block at a time in the order in which memory has them, for each tile to prefetch:
  // levels of few cells wait for memory, which is idle while those of many are computed.
  struct NextWeights {
    const PyramidReduceArgs& a;
    int64_t r0, blocks, piece, pieces;
    NextWeights(const PyramidReduceArgs& args, int64_t r, bool any)
        : a(args),
          r0(r),
          blocks((a.C + kBlock - 1) / kBlock),
          piece(0),
          pieces(any ? a.levels.count * kColumns * blocks : 0) {}
    PSP_INLINE const T* operator()() {
      if (piece == pieces) return static_cast<const T*>(a.pooled);  // none left: anything that is near
      const int64_t row = piece / blocks, block = piece++ % blocks;
      return static_cast<const T*>(a.weights[row / kColumns]) + (r0 + row % kColumns) * a.C + block * kBlock;
    }
  };

  struct Rows {
    const acc_t* data;
    int64_t stride;
  };

  // kColumns rows of n weights: in place, or widened, whole vectors with zeros behind them.
  template <int kBytes>
  PSP_INLINE Rows weight_rows(const T* from, int64_t columns, int64_t n, Scratch<acc_t>& scratch) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    if constexpr (std::is_same_v<T, acc_t>) {
      if (columns == kColumns && n % kL == 0) return {from, a.C};
    }
    for (int64_t q = 0; q < columns; ++q, from += a.C) {
      acc_t* const to = &scratch[q * kBlock];
      int64_t k = 0;
      for (; k + kL <= n; k += kL) store(to + k, load_wide<kBytes>(from + k));
      if (k < n) store(to + k, load_wide<kBytes>(from + k, n - k));
    }
    return {scratch.data(), kBlock};
  }

  template <int kBytes, int kM>
  PSP_INLINE void tile(const acc_t* x, const Rows& weight, int64_t n, acc_t* to, const T* next) const {
    using V = Vector<acc_t, kBytes>;
    constexpr int64_t kL = kLanes<acc_t, kBytes>, kLine = 64 / sizeof(T);
    V sums[kM][kColumns];
    for (int i = 0; i < kM; ++i) {
      for (int q = 0; q < kColumns; ++q) sums[i][q] = load<acc_t, kBytes>(to + (i * kColumns + q) * kL);
    }
    for (int64_t c = 0; c < n; c += kL) {
      if (kL >= kLine || c % kLine == 0) __builtin_prefetch(next + c, 0, 2);
      V inputs[kM];
      for (int i = 0; i < kM; ++i) inputs[i] = load<acc_t, kBytes>(x + i * kBlock + c), in_register(inputs[i]);
      for (int q = 0; q < kColumns; ++q) {
        V w = load<acc_t, kBytes>(weight.data + q * weight.stride + c);
        in_register(w);
        for (int i = 0; i < kM; ++i) sums[i][q] += inputs[i] * w;
      }
    }
    for (int i = 0; i < kM; ++i) {
      for (int q = 0; q < kColumns; ++q) store(to + (i * kColumns + q) * kL, sums[i][q]);
    }
  }

  // Adds up the lanes of a level's sums, [M][kColumns][kL].
  template <int64_t kL>
  PSP_INLINE void finish(int l, const LevelRows& row, int64_t r0, int64_t columns, const acc_t* sums) const {
    acc_t scale[kColumns], shift[kColumns];
    for (int64_t q = 0; q < columns; ++q) {
      const FoldedNorm<T> norm(a.norm[l], a.norm_dtype == a.dtype, a.eps[l], r0 + q);
      scale[q] = norm.scale, shift[q] = norm.shift;
    }
    for (int64_t m = 0; m < a.N * row.cells; ++m, sums += kColumns * kL) {
      acc_t totals[kColumns] = {};
      for (int64_t k = 0; k < kL; ++k) {
        for (int q = 0; q < kColumns; ++q) totals[q] += sums[q * kL + k];
      }
      T* const out = static_cast<T*>(a.reduced) + row(m) * a.R + r0;
      for (int64_t q = 0; q < columns; ++q) {
        out[q] = from_acc<T>(FoldedNorm<T>::apply(totals[q], scale[q], shift[q], a.relu));
      }
    }
  }
};

// grad_pooled[m, c] = sum over r of grad[m, r] * weight[r, c]; a unit is one block of columns c of one level.
template <class T>
struct ReduceBackwardPooled {
  using acc_t = acc_type<T>;
  static constexpr int64_t kBlock = kColumns * kLanes<acc_t>;
  const PyramidReduceBackwardArgs& a;
  const acc_t* grad;  // [N, P, R], widened

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    Scratch<acc_t> weight(a.R * kBlock);  // rows of it lie side by side, with zeros behind the last block's
    for (int64_t unit = begin; unit < end; ++unit) {
      const int l = static_cast<int>(unit % a.levels.count);
      const int64_t c0 = unit / a.levels.count * kBlock, columns = std::min(kBlock, a.C - c0);
      const T* from = static_cast<const T*>(a.weights[l]) + c0;
      for (int64_t r = 0; r < a.R; ++r, from += a.C) {
        __builtin_prefetch(from + 16 * a.C);  // rows lie pages apart: the hardware does not foresee them
        __builtin_prefetch(from + 16 * a.C + kBlock / 2);
        acc_t* const to = &weight[r * kBlock];
        if (columns == kBlock) {
          for (int64_t k = 0; k < kBlock; k += kLanes<acc_t, kBytes>) store(to + k, load_wide<kBytes>(from + k));
        } else {
          for (int64_t k = 0; k < columns; ++k) to[k] = to_acc(from[k]);
          std::fill(to + columns, to + kBlock, acc_t(0));
        }
      }
      const LevelRows row(a.levels, l);
      for_tiles<kTileRows<kBytes>>(0, a.N * row.cells, [&](int64_t m, auto rows) __attribute__((always_inline)) {
        for (int64_t c = 0; c < columns; c += kColumns * kLanes<acc_t, kBytes>) {
          tile<kBytes, rows()>(row, m, c0, c, columns, weight.data());
        }
      });
    }
  }

  // The columns of a tile, from column c of the block on.
  template <int kBytes, int kM>
  PSP_INLINE void tile(const LevelRows& row, int64_t m, int64_t c0, int64_t c, int64_t columns,
                       const acc_t* weight) const {
    using V = Vector<acc_t, kBytes>;
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    V sums[kM][kColumns] = {};
    const acc_t* grads[kM];
    for (int i = 0; i < kM; ++i) grads[i] = grad + row(m + i) * a.R;
    for (int64_t r = 0; r < a.R; ++r) {
      V w[kColumns];
      for (int q = 0; q < kColumns; ++q) w[q] = load<acc_t, kBytes>(weight + r * kBlock + c + q * kL);
      for (int i = 0; i < kM; ++i) {
        for (int q = 0; q < kColumns; ++q) sums[i][q] += grads[i][r] * w[q];
      }
    }
    for (int i = 0; i < kM; ++i) {
      acc_t values[kColumns * kL];
      __builtin_memcpy(values, sums[i], sizeof values);
      T* out = static_cast<T*>(a.grad_pooled) + row(m + i) * a.C + c0 + c;
      for (int64_t k = 0; k < std::min(kColumns * kL, columns - c); ++k) out[k] = from_acc<T>(values[k]);
    }
  }
};

// grad_weight[r, c] = sum over m of grad[m, r] * pooled[m, c]; a unit is up to kRows channels r of one level.
template <class T>
struct ReduceBackwardWeight {
  using acc_t = acc_type<T>;
  const PyramidReduceBackwardArgs& a;
  const acc_t *grad, *pooled;  // [N, P, R], [N, P, C + padding], widened
  int64_t pooled_stride;
  bool stream;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int l = static_cast<int>(unit % a.levels.count);
      const int64_t r0 = unit / a.levels.count * kRows, last = std::min(r0 + kRows, a.R);
      const LevelRows row(a.levels, l);
      for_tiles<kTileRows<kBytes>>(r0, last, [&](int64_t r, auto rows) __attribute__((always_inline)) {
        for (int64_t c = 0; c < a.C; c += kColumns * kLanes<acc_t, kBytes>) {
          if (a.N * row.cells > kTerms) {
            tile<kBytes, rows(), true>(l, row, r, c);
          } else {
            tile<kBytes, rows(), false>(l, row, r, c);
          }
        }
      });
    }
    if (stream) store_fence();
  }

  static constexpr int kTerms = 256;  // of a sum: one chain of thousands would round more than a matrix product does

  template <int kBytes, int kR, bool kManyTerms>
  PSP_INLINE void tile(int l, const LevelRows& row, int64_t r, int64_t c) const {
    using V = Vector<acc_t, kBytes>;
    constexpr int64_t kL = kLanes<acc_t, kBytes>, kTile = kColumns * kL;
    V sums[kR][kColumns] = {}, totals[kR][kColumns] = {};
    const auto add_up = [&]() __attribute__((always_inline)) {
      for (int i = 0; i < kR; ++i) {
        for (int q = 0; q < kColumns; ++q) totals[i][q] += sums[i][q], sums[i][q] = V{};
      }
    };
    int terms = 0;
    for (int64_t n = 0; n < a.N; ++n) {
      for (int64_t p = row.first; p < row.first + row.cells; ++p) {
        if (kManyTerms && terms++ == kTerms) add_up(), terms = 1;
        const acc_t* grads = grad + (n * row.P + p) * a.R + r;
        const acc_t* from = pooled + (n * row.P + p) * pooled_stride + c;
        V x[kColumns];
        for (int q = 0; q < kColumns; ++q) x[q] = load<acc_t, kBytes>(from + q * kL);
        for (int i = 0; i < kR; ++i) {
          for (int q = 0; q < kColumns; ++q) sums[i][q] += grads[i] * x[q];
        }
      }
    }
    if (kManyTerms) add_up();
    const int64_t columns = std::min(kTile, a.C - c);
    for (int i = 0; i < kR; ++i) {
      T narrow[kTile];
      for (int q = 0; q < kColumns; ++q) store_narrow(narrow + q * kL, kManyTerms ? totals[i][q] : sums[i][q]);
      T* out = static_cast<T*>(a.grad_weights) + ((l * a.R + r + i) * a.C) + c;
      store(out, narrow, columns, stream);
    }
  }
};

// Rows of C values in the accumulation type, `padding` zeros behind each. A cache line of them at least: rows whose
// distance is a power of two would share a few sets of the cache.
template <class T>
Scratch<acc_type<T>> widen_rows(const void* from, int64_t rows, int64_t C, int64_t padding = 0) {
  Scratch<acc_type<T>> to(rows * (C + padding));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < C; ++k) to[i * (C + padding) + k] = to_acc(static_cast<const T*>(from)[i * C + k]);
  }
  return to;
}

// The same in blocks of kBlock columns, [blocks][rows: level, n, cell][kBlock], zeros behind the last.
template <class T, int64_t kBlock>
Scratch<acc_type<T>> widen_blocks(const void* from, int64_t N, int64_t C, const Levels& levels) {
  const int64_t rows = N * levels.first[levels.count];
  Scratch<acc_type<T>> to(rows * ((C + kBlock - 1) / kBlock) * kBlock);
  for (int64_t l = 0, at = 0; l < levels.count; ++l) {
    const LevelRows row(levels, static_cast<int>(l));
    for (int64_t m = 0; m < N * row.cells; ++m, ++at) {
      for (int64_t c = 0; c < C; c += kBlock) {
        const T* x = static_cast<const T*>(from) + row(m) * C + c;
        acc_type<T>* __restrict__ y = &to[c * rows + at * kBlock];
        for (int64_t k = 0; k < std::min(kBlock, C - c); ++k) y[k] = to_acc(x[k]);
      }
    }
  }
  return to;
}

}  // namespace

void pyramid_reduce(const PyramidReduceArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto pooled = widen_blocks<T, Reduce<T>::kBlock>(a.pooled, a.N, a.C, a.levels);
    parallel((a.R + kColumns - 1) / kColumns, Reduce<T>{a, pooled.data(), a.N * a.levels.first[a.levels.count]});
  });
}

void pyramid_reduce_backward(const PyramidReduceBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kBlock = ReduceBackwardPooled<T>::kBlock;
    const int64_t rows = a.N * a.levels.first[a.levels.count], padding = kBlock - a.C % kBlock;
    const auto grad = widen_rows<T>(a.grad_reduced, rows, a.R);
    parallel(a.levels.count * ((a.C + kBlock - 1) / kBlock), ReduceBackwardPooled<T>{a, grad.data()});
    const auto pooled = widen_rows<T>(a.pooled, rows, a.C, padding);
    parallel(a.levels.count * ((a.R + kRows - 1) / kRows),
             ReduceBackwardWeight<T>{a, grad.data(), pooled.data(), a.C + padding,
                                     a.levels.count * a.R * a.C * static_cast<int64_t>(sizeof(T)) > kStreamBytes});
  });
}

}  // namespace pspnet_fast::cpu
