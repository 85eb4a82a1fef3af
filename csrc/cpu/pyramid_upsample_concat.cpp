// Bilinear upsampling of every level into the concatenation, on the CPU: U = A_h z A_w^T with the interpolation
// matrices A, and backward grad_z = A_h^T grad A_w, one axis after the other.
#include "vectors.h"

namespace pspnet_fast::cpu {
namespace {

// The interpolation matrix A [size, bins] of one axis. A row has at most two non-zeros, so a column is non-zero in one
// short run: both views are kept.
template <class acc_t>
struct Interpolation {
  Scratch<SourceIndex<acc_t>> rows;
  struct Column {
    int64_t begin, end;      // where it is non-zero
    Scratch<acc_t> weights;  // there
  };
  Scratch<Column> columns;

  Interpolation(int bins, int64_t size, bool align_corners) : columns(bins, Column{size, 0, {}}) {
    const acc_t scale = source_scale<acc_t>(bins, size, align_corners);
    for (int64_t i = 0; i < size; ++i) {
      rows.push_back(source_index(i, scale, bins, align_corners));
      for (const int j : {rows[i].low, rows[i].high}) {
        columns[j].begin = std::min(columns[j].begin, i);
        columns[j].end = std::max(columns[j].end, i + 1);
      }
    }
    for (int j = 0; j < bins; ++j) {
      for (int64_t i = columns[j].begin; i < columns[j].end; ++i) {
        const auto& row = rows[i];
        columns[j].weights.push_back((row.low == j ? acc_t(1) - row.lambda : acc_t(0)) +
                                     (row.high == j ? row.lambda : acc_t(0)));
      }
    }
  }
};

template <class acc_t>
Scratch<Interpolation<acc_t>> interpolations(const Levels& levels, const int (&bins)[kMaxLevels], int64_t size,
                                             bool align_corners) {
  Scratch<Interpolation<acc_t>> result;
  for (int l = 0; l < levels.count; ++l) result.emplace_back(bins[l], size, align_corners);
  return result;
}

// to[k] = (1 - lambda) * low[k] + lambda * high[k]: from two tables of pairs.
template <int kBytes, class T, class acc_t = acc_type<T>>
PSP_INLINE void mix(T* to, const acc_t* low, const acc_t* high, acc_t lambda, int64_t n) {
  const acc_t rest = acc_t(1) - lambda;
  for_pairs<T, kBytes>(n, [&](int64_t at, int64_t k, auto lanes) __attribute__((always_inline)) {
    const auto a = pair_at<kBytes>(low + at), b = pair_at<kBytes>(high + at);
    using V = decltype(a.first);
    store_pair(to + k, Pair<V>{rest * a.first + lambda * b.first, rest * a.second + lambda * b.second}, lanes);
  });
}

// The transpose of mix over the rows [begin, end), which lie `stride` apart in `from`: to[low] += (1 - lambda) * row,
// to[high] += lambda * row, with the rows of `to`, tables of pairs, n_to apart. Four rows between the same two are
// taken at once, because each pass over `to` waits for the previous one.
template <int kBytes, class T, class acc_t = acc_type<T>>
PSP_INLINE void unmix(acc_t* to, int64_t n_to, const Scratch<SourceIndex<acc_t>>& rows, int64_t begin, int64_t end,
                      const T* from, int64_t stride, int64_t n) {
  const auto add = [&](int64_t i, auto count) __attribute__((always_inline)) {
    acc_t* const low = to + rows[i].low * n_to;
    acc_t* const high = to + rows[i].high * n_to;
    for_pairs<T, kBytes>(n, [&](int64_t at, int64_t k, auto lanes) __attribute__((always_inline)) {
      Pair<Vector<acc_t, kBytes>> a, b;
      for (int64_t j = 0; j < count; ++j) {
        const auto v = load_pair<kBytes>(from + (i + j) * stride + k, lanes);
        const acc_t lambda = rows[i + j].lambda, rest = acc_t(1) - lambda;
        a = {a.first + rest * v.first, a.second + rest * v.second};
        b = {b.first + lambda * v.first, b.second + lambda * v.second};
      }
      if (low == high) return add_pair(low + at, a.first + b.first, a.second + b.second);  // the last bin has both
      add_pair(low + at, a.first, a.second);
      add_pair(high + at, b.first, b.second);
    });
  };
  for (int64_t i = begin; i < end;) {
    int64_t count = 1;
    while (count < 4 && i + count < end && rows[i + count].low == rows[i].low) ++count;
    if (count == 4) {
      add(i, std::integral_constant<int64_t, 4>{});
      i += 4;
    } else {
      add(i++, std::integral_constant<int64_t, 1>{});
    }
  }
}

template <class T, class Args>
struct UpsampleBase {
  using acc_t = acc_type<T>;
  const Args& a;
  Scratch<Interpolation<acc_t>> vertical, horizontal;
  bool stream;

  explicit UpsampleBase(const Args& args)
      : a(args),
        vertical(interpolations<acc_t>(a.levels, a.levels.bins_h, a.H, a.align_corners)),
        horizontal(interpolations<acc_t>(a.levels, a.levels.bins_w, a.W, a.align_corners)),
        stream(a.N * a.levels.count * a.R * a.H * a.W * static_cast<int64_t>(sizeof(T)) > kStreamBytes) {}

  // Offset of channel r of cell (i, j) of level l in the reduced map [N, P, R].
  PSP_INLINE int64_t cell(int64_t n, int l, int64_t i, int64_t j, int64_t r) const {
    return ((n * a.levels.first[a.levels.count] + a.levels.first[l] + i * a.levels.bins_w[l] + j) * a.R) + r;
  }
  int max_bins_w() const { return *std::max_element(a.levels.bins_w, a.levels.bins_w + a.levels.count); }
};

// Planar maps, a unit is one plane: a level's rows are widened once, then mixed vertically and rounded in registers.
template <class T>
struct PlanarUpsample : UpsampleBase<T, PyramidUpsampleConcatArgs> {
  using acc_t = acc_type<T>;
  using UpsampleBase<T, PyramidUpsampleConcatArgs>::UpsampleBase;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const T* reduced = static_cast<const T*>(a.reduced);
    const int64_t size = pairs_size<T, kBytes>(a.W);
    Scratch<acc_t> wide(a.W), rows(*std::max_element(a.levels.bins_h, a.levels.bins_h + a.levels.count) * size);
    Scratch<T> plane(a.H * a.W);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (a.levels.count * a.R), channel = unit % (a.levels.count * a.R), r = channel % a.R;
      const int l = static_cast<int>(channel / a.R), bins_h = a.levels.bins_h[l], bins_w = a.levels.bins_w[l];
      for (int64_t i = 0; i < bins_h; ++i) {
        std::fill(wide.begin(), wide.end(), acc_t(0));
        for (int64_t j = 0; j < bins_w; ++j) {
          const auto& column = this->horizontal[l].columns[j];
          const acc_t value = to_acc(reduced[this->cell(n, l, i, j, r)]);
          const acc_t* __restrict__ weights = column.weights.data();
          acc_t* __restrict__ row = &wide[column.begin];
          for (int64_t w = 0; w < column.end - column.begin; ++w) row[w] += value * weights[w];
        }
        to_pairs<T, kBytes>(&rows[i * size], wide.data(), a.W);
      }
      for (int64_t h = 0; h < a.H; ++h) {
        const auto& row = this->vertical[l].rows[h];
        mix<kBytes>(&plane[h * a.W], &rows[row.low * size], &rows[row.high * size], row.lambda, a.W);
      }
      store_plane<kBytes>(a.context, n, channel, a.H, a.W, plane.data(), this->stream);
    }
    if (this->stream) store_fence();
  }
};

// Channels-last maps, a unit is one row of the output: the levels' rows are mixed vertically once, then per pixel.
template <class T>
struct ChannelsLastUpsample : UpsampleBase<T, PyramidUpsampleConcatArgs> {
  using acc_t = acc_type<T>;
  using UpsampleBase<T, PyramidUpsampleConcatArgs>::UpsampleBase;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const T* reduced = static_cast<const T*>(a.reduced);
    const int64_t size = pairs_size<T, kBytes>(a.R), step = this->max_bins_w() * size;
    Scratch<acc_t> rows(a.levels.count * step);
    Scratch<T> pixel(a.levels.count * a.R);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / a.H, h = unit % a.H;
      for (int l = 0; l < a.levels.count; ++l) {
        const auto& v = this->vertical[l].rows[h];
        for (int64_t j = 0; j < a.levels.bins_w[l]; ++j) {
          mix_cells<kBytes>(&rows[l * step + j * size], reduced + this->cell(n, l, v.low, j, 0),
                            reduced + this->cell(n, l, v.high, j, 0), v.lambda);
        }
      }
      for (int64_t w = 0; w < a.W; ++w) {
        for (int l = 0; l < a.levels.count; ++l) {
          const auto& u = this->horizontal[l].rows[w];
          mix<kBytes>(&pixel[l * a.R], &rows[l * step + u.low * size], &rows[l * step + u.high * size], u.lambda, a.R);
        }
        store<kBytes>(mutable_at<T>(a.context, n, 0, h) + w * a.context.stride_w, pixel.data(), a.levels.count * a.R,
                      this->stream);
      }
    }
    if (this->stream) store_fence();
  }

  // (1 - lambda) * low + lambda * high as a table of pairs
  template <int kBytes>
  PSP_INLINE void mix_cells(acc_t* to, const T* low, const T* high, acc_t lambda) const {
    const acc_t rest = acc_t(1) - lambda;
    for_pairs<T, kBytes>(this->a.R, [&](int64_t at, int64_t k, auto lanes) __attribute__((always_inline)) {
      const auto u = load_pair<kBytes>(low + k, lanes), v = load_pair<kBytes>(high + k, lanes);
      set_pair(to + at, rest * u.first + lambda * v.first, rest * u.second + lambda * v.second);
    });
  }
};

// Planar maps, a unit is 16 planes of one level, so that grad_reduced is written in whole cache lines.
template <class T>
struct PlanarUpsampleBackward : UpsampleBase<T, PyramidUpsampleConcatBackwardArgs> {
  using acc_t = acc_type<T>;
  using UpsampleBase<T, PyramidUpsampleConcatBackwardArgs>::UpsampleBase;
  static constexpr int64_t kPlanes = 16;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t blocks = (a.R + kPlanes - 1) / kPlanes, L = a.levels.count, size = pairs_size<T, kBytes>(a.W);
    Scratch<acc_t> row(a.W), rows(*std::max_element(a.levels.bins_h, a.levels.bins_h + L) * size);
    Scratch<T> grads(a.levels.first[L] * kPlanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (L * blocks), r0 = unit % blocks * kPlanes, planes = std::min(kPlanes, a.R - r0);
      const int l = static_cast<int>(unit / blocks % L), bins_h = a.levels.bins_h[l], bins_w = a.levels.bins_w[l];
      for (int64_t k = 0; k < planes; ++k) {
        std::fill_n(rows.begin(), bins_h * size, acc_t(0));
        unmix<kBytes>(rows.data(), size, this->vertical[l].rows, 0, a.H, at<T>(a.grad_context, n, l * a.R + r0 + k, 0),
                      a.grad_context.stride_h, a.W);
        for (int64_t i = 0; i < bins_h; ++i) {
          from_pairs<T, kBytes>(row.data(), &rows[i * size], a.W);
          for (int64_t j = 0; j < bins_w; ++j) {
            const auto& column = this->horizontal[l].columns[j];
            acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t w = 0; w < column.end - column.begin; ++w) {
              sum += row[column.begin + w] * column.weights[w];
            }
            grads[(i * bins_w + j) * kPlanes + k] = from_acc<T>(sum);
          }
        }
      }
      T* out = static_cast<T*>(a.grad_reduced) + this->cell(n, l, 0, 0, r0);
      for (int64_t p = 0; p < bins_h * bins_w; ++p) std::copy_n(&grads[p * kPlanes], planes, out + p * a.R);
    }
  }
};

// Channels-last maps, first pass: a unit is one chunk of every level's channels in one block of rows. The blocks do not
// depend on the number of threads, nor then does the result.
template <class T>
struct ChannelsLastUpsampleBackward : UpsampleBase<T, PyramidUpsampleConcatBackwardArgs> {
  using acc_t = acc_type<T>;
  using UpsampleBase<T, PyramidUpsampleConcatBackwardArgs>::UpsampleBase;
  static constexpr int64_t kBlocks = 8, kPixels = 12;  // of a row, all levels' channels of which are read at a time
  int64_t chunk = chunk_size(this->a.N * kBlocks, this->a.R);
  int64_t chunks = (this->a.R + chunk - 1) / chunk;
  int64_t P = this->a.levels.first[this->a.levels.count];
  acc_t* partial = nullptr;  // [N, kBlocks, P, R]

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t size = pairs_size<T, kBytes>(chunk), step = this->max_bins_w() * size;
    Scratch<acc_t> row(a.levels.count * step), sums(P * size);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (kBlocks * chunks), block = unit / chunks % kBlocks, r0 = unit % chunks * chunk;
      const int64_t channels = std::min(chunk, a.R - r0);
      std::fill(sums.begin(), sums.end(), acc_t(0));
      for (int64_t h = block * a.H / kBlocks; h < (block + 1) * a.H / kBlocks; ++h) {
        std::fill(row.begin(), row.end(), acc_t(0));
        for (int64_t w = 0; w < a.W; w += kPixels) {
          for (int l = 0; l < a.levels.count; ++l) {
            unmix<kBytes>(&row[l * step], size, this->horizontal[l].rows, w, std::min(w + kPixels, a.W),
                          at<T>(a.grad_context, n, l * a.R + r0, h), a.grad_context.stride_w, channels);
          }
        }
        for (int l = 0; l < a.levels.count; ++l) {
          const int64_t line = a.levels.bins_w[l] * size;
          unmix<kBytes>(&sums[a.levels.first[l] * size], line, this->vertical[l].rows, h, h + 1, &row[l * step], 0,
                        line);
        }
      }
      acc_t* out = partial + (n * kBlocks + block) * P * a.R + r0;
      for (int64_t p = 0; p < P; ++p) from_pairs<T, kBytes>(out + p * a.R, &sums[p * size], channels);
    }
  }
};

// Channels-last maps, second pass: adds the blocks; a unit is one cell.
template <class T>
struct SumBlocks {
  const PyramidUpsampleConcatBackwardArgs& a;
  const acc_type<T>* partial;
  int64_t blocks, P;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    Scratch<acc_type<T>> sum(a.R);
    for (int64_t unit = begin; unit < end; ++unit) {
      std::fill(sum.begin(), sum.end(), acc_type<T>(0));
      add_rows(sum.data(), partial + (unit / P * blocks * P + unit % P) * a.R, P * a.R, blocks, a.R);
      T* out = static_cast<T*>(a.grad_reduced) + unit * a.R;
      for (int64_t k = 0; k < a.R; ++k) out[k] = from_acc<T>(sum[k]);
    }
  }
};

}  // namespace

void pyramid_upsample_concat(const PyramidUpsampleConcatArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) return parallel(a.N * a.H, ChannelsLastUpsample<T>(a));
    parallel(a.N * a.levels.count * a.R, PlanarUpsample<T>(a));
  });
}

void pyramid_upsample_concat_backward(const PyramidUpsampleConcatBackwardArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) {
      ChannelsLastUpsampleBackward<T> task(a);
      Scratch<acc_type<T>> partial(a.N * task.kBlocks * task.P * a.R);
      task.partial = partial.data();
      parallel(a.N * task.kBlocks * task.chunks, task);
      return parallel(a.N * task.P, SumBlocks<T>{a, partial.data(), task.kBlocks, task.P});
    }
    parallel(a.N * a.levels.count * ((a.R + 15) / 16), PlanarUpsampleBackward<T>(a));
  });
}

}  // namespace pspnet_fast::cpu
