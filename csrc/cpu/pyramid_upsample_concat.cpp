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

// to[k] = (1 - lambda) * low[k] + lambda * high[k]
template <class Out, class In, class acc_t>
PSP_INLINE void mix(Out* __restrict__ to, const In* __restrict__ low, const In* __restrict__ high, acc_t lambda,
                    int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    to[k] = from_acc<Out>((acc_t(1) - lambda) * to_acc(low[k]) + lambda * to_acc(high[k]));
  }
}

// The transpose of mix over the rows [begin, end), which lie `stride` apart in `from`: to[low] += (1 - lambda) * row,
// to[high] += lambda * row, with the rows of `to` n apart. Four rows between the same pair are taken at once, because
// each pass over `to` waits for the previous one.
template <class T, class acc_t = acc_type<T>>
PSP_INLINE void unmix(acc_t* to, int64_t n_to, const Scratch<SourceIndex<acc_t>>& rows, int64_t begin, int64_t end,
                      const T* from, int64_t stride, int64_t n) {
  for (int64_t i = begin, count; i < end; i += count) {
    count = 1;
    while (count < 4 && i + count < end && rows[i + count].low == rows[i].low) ++count;
    acc_t* __restrict__ low = to + rows[i].low * n_to;
    acc_t* __restrict__ high = to + rows[i].high * n_to;
    const T* __restrict__ a = from + i * stride;
    if (low == high) {  // the last bin takes both weights
      add_rows(low, a, stride, count, n);
    } else if (count == 4) {
      const T* __restrict__ b = a + stride, * __restrict__ c = b + stride, * __restrict__ d = c + stride;
      const acc_t ha = rows[i].lambda, hb = rows[i + 1].lambda, hc = rows[i + 2].lambda, hd = rows[i + 3].lambda;
      const acc_t la = acc_t(1) - ha, lb = acc_t(1) - hb, lc = acc_t(1) - hc, ld = acc_t(1) - hd;
      for (int64_t k = 0; k < n; ++k) {
        const acc_t va = to_acc(a[k]), vb = to_acc(b[k]), vc = to_acc(c[k]), vd = to_acc(d[k]);
        low[k] += (la * va + lb * vb) + (lc * vc + ld * vd);
        high[k] += (ha * va + hb * vb) + (hc * vc + hd * vd);
      }
    } else {
      count = 1;
      for (int64_t k = 0; k < n; ++k) {
        low[k] += (acc_t(1) - rows[i].lambda) * to_acc(a[k]);
        high[k] += rows[i].lambda * to_acc(a[k]);
      }
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
    Scratch<acc_t> wide(*std::max_element(a.levels.bins_h, a.levels.bins_h + a.levels.count) * a.W);
    Scratch<T> plane(a.H * a.W);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (a.levels.count * a.R), channel = unit % (a.levels.count * a.R), r = channel % a.R;
      const int l = static_cast<int>(channel / a.R), bins_h = a.levels.bins_h[l], bins_w = a.levels.bins_w[l];
      std::fill_n(wide.begin(), bins_h * a.W, acc_t(0));
      for (int64_t i = 0; i < bins_h; ++i) {
        for (int64_t j = 0; j < bins_w; ++j) {
          const auto& column = this->horizontal[l].columns[j];
          const acc_t value = to_acc(reduced[this->cell(n, l, i, j, r)]);
          const acc_t* __restrict__ weights = column.weights.data();
          acc_t* __restrict__ row = &wide[i * a.W + column.begin];
          for (int64_t w = 0; w < column.end - column.begin; ++w) row[w] += value * weights[w];
        }
      }
      for (int64_t h = 0; h < a.H; ++h) {
        const auto& row = this->vertical[l].rows[h];
        mix_row<kBytes>(&plane[h * a.W], &wide[row.low * a.W], &wide[row.high * a.W], row.lambda);
      }
      store_plane(a.context, n, channel, a.H, a.W, plane.data(), this->stream);
    }
    if (this->stream) store_fence();
  }

  // mix, by vectors; the last one overlaps its neighbour, so there is no scalar rest.
  template <int kBytes>
  PSP_INLINE void mix_row(T* to, const acc_t* low, const acc_t* high, acc_t lambda) const {
    constexpr int64_t kL = kLanes<acc_t, kBytes>;
    const int64_t W = this->a.W;
    if (W < kL) return mix(to, low, high, lambda, W);
    const acc_t first = acc_t(1) - lambda;
    for (int64_t w = 0; w < W; w += kL) {
      const int64_t at = std::min(w, W - kL);
      store_narrow(to + at, first * load<acc_t, kBytes>(low + at) + lambda * load<acc_t, kBytes>(high + at));
    }
  }
};

// Channels-last maps, a unit is one row of the output: the levels' rows are mixed vertically once, then per pixel.
template <class T>
struct ChannelsLastUpsample : UpsampleBase<T, PyramidUpsampleConcatArgs> {
  using acc_t = acc_type<T>;
  using UpsampleBase<T, PyramidUpsampleConcatArgs>::UpsampleBase;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const T* reduced = static_cast<const T*>(a.reduced);
    const int64_t step = this->max_bins_w() * a.R;
    Scratch<acc_t> rows(a.levels.count * step);
    Scratch<T> pixel(a.levels.count * a.R);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / a.H, h = unit % a.H;
      for (int l = 0; l < a.levels.count; ++l) {
        const auto& v = this->vertical[l].rows[h];
        mix(&rows[l * step], reduced + this->cell(n, l, v.low, 0, 0), reduced + this->cell(n, l, v.high, 0, 0),
            v.lambda, a.levels.bins_w[l] * a.R);
      }
      for (int64_t w = 0; w < a.W; ++w) {
        for (int l = 0; l < a.levels.count; ++l) {
          const auto& u = this->horizontal[l].rows[w];
          mix(&pixel[l * a.R], &rows[l * step + u.low * a.R], &rows[l * step + u.high * a.R], u.lambda, a.R);
        }
        store(mutable_at<T>(a.context, n, 0, h) + w * a.context.stride_w, pixel.data(), a.levels.count * a.R,
              this->stream);
      }
    }
    if (this->stream) store_fence();
  }
};

// Planar maps, a unit is 16 planes of one level, so that grad_reduced is written in whole cache lines.
template <class T>
struct PlanarUpsampleBackward : UpsampleBase<T, PyramidUpsampleConcatBackwardArgs> {
  using acc_t = acc_type<T>;
  using UpsampleBase<T, PyramidUpsampleConcatBackwardArgs>::UpsampleBase;
  static constexpr int64_t kPlanes = 16;

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t blocks = (a.R + kPlanes - 1) / kPlanes, L = a.levels.count;
    Scratch<acc_t> rows(*std::max_element(a.levels.bins_h, a.levels.bins_h + L) * a.W), wide;
    Scratch<T> grads(a.levels.first[L] * kPlanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (L * blocks), r0 = unit % blocks * kPlanes, planes = std::min(kPlanes, a.R - r0);
      const int l = static_cast<int>(unit / blocks % L), bins_h = a.levels.bins_h[l], bins_w = a.levels.bins_w[l];
      for (int64_t k = 0; k < planes; ++k) {
        std::fill_n(rows.begin(), bins_h * a.W, acc_t(0));
        const WidePlane<T> grad(a.grad_context, n, l * a.R + r0 + k, a.H, a.W, wide);
        unmix(rows.data(), a.W, this->vertical[l].rows, 0, a.H, grad.data, a.W, a.W);
        for (int64_t i = 0; i < bins_h; ++i) {
          for (int64_t j = 0; j < bins_w; ++j) {
            const auto& column = this->horizontal[l].columns[j];
            acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t w = 0; w < column.end - column.begin; ++w) {
              sum += rows[i * a.W + column.begin + w] * column.weights[w];
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
  static constexpr int64_t kBlocks = 8;
  int64_t chunk = chunk_size(this->a.N * kBlocks, this->a.R);
  int64_t chunks = (this->a.R + chunk - 1) / chunk;
  int64_t P = this->a.levels.first[this->a.levels.count];
  acc_t* partial = nullptr;  // [N, kBlocks, P, R]

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    Scratch<acc_t> row(this->max_bins_w() * chunk), sums(P * chunk);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (kBlocks * chunks), block = unit / chunks % kBlocks, r0 = unit % chunks * chunk;
      const int64_t channels = std::min(chunk, a.R - r0);
      std::fill(sums.begin(), sums.end(), acc_t(0));
      for (int64_t h = block * a.H / kBlocks; h < (block + 1) * a.H / kBlocks; ++h) {
        for (int l = 0; l < a.levels.count; ++l) {
          const int64_t line = a.levels.bins_w[l] * chunk;
          std::fill_n(row.begin(), line, acc_t(0));
          unmix(row.data(), chunk, this->horizontal[l].rows, 0, a.W, at<T>(a.grad_context, n, l * a.R + r0, h),
                a.grad_context.stride_w, channels);
          unmix(&sums[a.levels.first[l] * chunk], line, this->vertical[l].rows, h, h + 1, row.data(), 0, line);
        }
      }
      acc_t* out = partial + (n * kBlocks + block) * P * a.R + r0;
      for (int64_t p = 0; p < P; ++p) std::copy_n(&sums[p * chunk], channels, out + p * a.R);
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
