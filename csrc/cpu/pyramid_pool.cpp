// Pyramid pooling on the CPU. All levels' bin edges together cut an axis into segments; each segment cell is summed
// once while the input streams by, then cells are added into bins, always in the same order.
#include "vectors.h"

namespace pspnet_fast::cpu {
namespace {

// The pieces into which the bin edges of all levels cut an axis of `size` pixels.
struct Segments {
  Scratch<int64_t> edges;              // ascending, from 0 to size
  Scratch<int64_t> first[kMaxLevels];  // of each bin of each level: its first segment
  Scratch<int64_t> last[kMaxLevels];   // and the one behind its last

  Segments(const Levels& levels, const int (&bins)[kMaxLevels], int64_t size) : edges{0, size} {
    for (int l = 0; l < levels.count; ++l) {
      for (int i = 0; i < bins[l]; ++i) {
        edges.push_back(start_index(i, bins[l], size));
        edges.push_back(end_index(i, bins[l], size));
      }
    }
    std::sort(edges.begin(), edges.end());
    edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
    const auto position = [&](int64_t edge) {
      return std::lower_bound(edges.begin(), edges.end(), edge) - edges.begin();
    };
    for (int l = 0; l < levels.count; ++l) {
      for (int i = 0; i < bins[l]; ++i) {
        first[l].push_back(position(start_index(i, bins[l], size)));
        last[l].push_back(position(end_index(i, bins[l], size)));
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(edges.size()) - 1; }
  int64_t begin(int64_t s) const { return edges[s]; }
  int64_t end(int64_t s) const { return edges[s + 1]; }
  int64_t size() const { return edges.back(); }
  int64_t pixels(int level, int64_t bin) const { return edges[last[level][bin]] - edges[first[level][bin]]; }
};

// Cells are summed in double from short sums in the accumulation type: a mean over thousands of pixels stays as
// accurate as that of a tree of additions, and costs one more addition a row.
template <class T>
struct PoolBase {
  using acc_t = acc_type<T>;
  const PyramidPoolArgs& a;
  const Segments &rows, &columns;
  bool stream;

  // pooled[k] = the mean over bin (i, j) of level l from cells [rows][columns][stride]; sum is scratch
  PSP_INLINE void bin_mean(const double* cells, int64_t stride, int l, int64_t i, int64_t j, double* __restrict__ sum,
                           T* __restrict__ pooled, int64_t n) const {
    std::fill_n(sum, n, 0.0);
    for (int64_t s = rows.first[l][i]; s < rows.last[l][i]; ++s) {
      for (int64_t t = columns.first[l][j]; t < columns.last[l][j]; ++t) {
        const double* cell = cells + (s * columns.count() + t) * stride;
        for (int64_t k = 0; k < n; ++k) sum[k] += cell[k];
      }
    }
    const double pixels = static_cast<double>(rows.pixels(l, i) * columns.pixels(l, j));
    for (int64_t k = 0; k < n; ++k) pooled[k] = from_acc<T>(static_cast<acc_t>(sum[k] / pixels));
  }
};

// Planar maps, a unit is 16 planes: so many that the bins' sums run over them as a vector.
template <class T>
struct PlanarPool : PoolBase<T> {
  using acc_t = acc_type<T>;
  static constexpr int64_t kPlanes = 16;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t blocks = (a.C + kPlanes - 1) / kPlanes, S = this->rows.count(), Q = this->columns.count();
    Scratch<acc_t> column_sums(a.W);
    Scratch<double> cells(S * Q * kPlanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, c0 = unit % blocks * kPlanes, planes = std::min(kPlanes, a.C - c0);
      for (int64_t k = 0; k < planes; ++k) {
        const T* plane = at<T>(a.input, n, c0 + k, 0);
        for (int64_t s = 0; s < S; ++s) {
          sum_segment_row<kBytes>(plane, s, column_sums.data(), &cells[s * Q * kPlanes + k]);
        }
        copy_plane<kBytes>(n, c0 + k);
      }
      write_bins(n, c0, planes, cells.data());
    }
    if (this->stream) store_fence();
  }

  template <int kBytes>
  PSP_INLINE void sum_segment_row(const T* plane, int64_t s, acc_t* __restrict__ sums, double* cells) const {
    const int64_t W = this->a.W, stride = this->a.input.stride_h, first = this->rows.begin(s);
    const int64_t count = this->rows.end(s) - first;
    if constexpr (std::is_same_v<T, acc_t>) {  // row by row, as it streams
      std::fill_n(sums, W, acc_t(0));
      add_rows(sums, plane + first * stride, stride, count, W);
    } else {  // column by column, each sum in a register: widening costs more than reading
      sum_rows<kBytes>(sums, plane + first * stride, stride, count, W);
    }
    for (int64_t t = 0; t < this->columns.count(); ++t) {
      double sum = 0;
      for (int64_t w = this->columns.begin(t); w < this->columns.end(t); ++w) sum += sums[w];
      cells[t * kPlanes] = sum;
    }
  }

  // The plane has just been read and is still in the cache.
  template <int kBytes>
  PSP_INLINE void copy_plane(int64_t n, int64_t c) const {
    const auto& a = this->a;
    if (!a.concat.data) return;
    const T* from = at<T>(a.input, n, c, 0);
    if (a.input.stride_h == a.W) {
      return store_plane<kBytes>(a.concat, n, c, a.H, a.W, from, this->stream, from + a.input.stride_c);
    }
    for (int64_t h = 0; h < a.H; ++h) {
      store<kBytes>(mutable_at<T>(a.concat, n, c, h), from + h * a.input.stride_h, a.W, this->stream);
    }
  }

  PSP_INLINE void write_bins(int64_t n, int64_t c0, int64_t planes, const double* cells) const {
    const auto& levels = this->a.levels;
    T* pooled = static_cast<T*>(this->a.pooled) + n * levels.first[levels.count] * this->a.C + c0;
    double sum[kPlanes];
    T mean[kPlanes];
    for (int l = 0; l < levels.count; ++l) {
      for (int64_t i = 0; i < levels.bins_h[l]; ++i) {
        for (int64_t j = 0; j < levels.bins_w[l]; ++j, pooled += this->a.C) {
          this->bin_mean(cells, kPlanes, l, i, j, sum, mean, kPlanes);
          std::copy_n(mean, planes, pooled);
        }
      }
    }
  }
};

// Channels-last maps, first pass: a unit is one segment row of one chunk of channels.
template <class T>
struct ChannelsLastPool : PoolBase<T> {
  using acc_t = acc_type<T>;
  int64_t chunk;
  double* cells;  // [N, rows, columns, C]

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t S = this->rows.count(), Q = this->columns.count(), chunks = (a.C + chunk - 1) / chunk;
    Scratch<acc_t> row(chunk);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (S * chunks), s = unit / chunks % S, c = unit % chunks * chunk;
      const int64_t channels = std::min(chunk, a.C - c);
      double* sums = cells + (n * S + s) * Q * a.C + c;
      for (int64_t t = 0; t < Q; ++t) std::fill_n(sums + t * a.C, channels, 0.0);
      for (int64_t h = this->rows.begin(s); h < this->rows.end(s); ++h) {
        for (int64_t t = 0; t < Q; ++t) {
          std::fill(row.begin(), row.end(), acc_t(0));
          for (int64_t w = this->columns.begin(t), pixels; w < this->columns.end(t); w += pixels) {
            pixels = std::min<int64_t>(4, this->columns.end(t) - w);
            const T* from = at<T>(a.input, n, c, h) + w * a.input.stride_w;
            add_rows(row.data(), from, a.input.stride_w, pixels, channels);
            if (!a.concat.data) continue;
            T* to = mutable_at<T>(a.concat, n, c, h) + w * a.concat.stride_w;
            for (int64_t i = 0; i < pixels; ++i) {
              store(to + i * a.concat.stride_w, from + i * a.input.stride_w, channels, this->stream);
            }
          }
          double* __restrict__ sum = sums + t * a.C;
          for (int64_t k = 0; k < channels; ++k) sum[k] += row[k];
        }
      }
    }
    if (this->stream) store_fence();
  }
};

// Channels-last maps, second pass: a unit is one bin.
template <class T>
struct ChannelsLastBins : PoolBase<T> {
  using acc_t = acc_type<T>;
  const double* cells;  // [N, rows, columns, C]

  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t P = a.levels.first[a.levels.count], area = this->rows.count() * this->columns.count();
    Scratch<double> sum(a.C);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / P, p = unit % P;
      int l = 0;
      while (p >= a.levels.first[l + 1]) ++l;
      const int64_t bin = p - a.levels.first[l], i = bin / a.levels.bins_w[l], j = bin % a.levels.bins_w[l];
      this->bin_mean(cells + n * area * a.C, a.C, l, i, j, sum.data(), static_cast<T*>(a.pooled) + unit * a.C, a.C);
    }
  }
};

template <class T>
struct PoolBackwardBase {
  using acc_t = acc_type<T>;
  const PyramidPoolBackwardArgs& a;
  const Segments &rows, &columns;
  bool stream;

  struct Term {
    int64_t bin;
    acc_t share;  // 1 / the bin's pixels
  };
  // The bins that cover each cell, [rows][columns].
  Scratch<Scratch<Term>> terms = [this] {
    Scratch<Scratch<Term>> result(rows.count() * columns.count());
    for (int l = 0; l < a.levels.count; ++l) {
      for (int64_t bin = 0; bin < a.levels.first[l + 1] - a.levels.first[l]; ++bin) {
        const int64_t i = bin / a.levels.bins_w[l], j = bin % a.levels.bins_w[l];
        const acc_t share = acc_t(1) / static_cast<acc_t>(rows.pixels(l, i) * columns.pixels(l, j));
        for (int64_t s = rows.first[l][i]; s < rows.last[l][i]; ++s) {
          for (int64_t t = columns.first[l][j]; t < columns.last[l][j]; ++t) {
            result[s * columns.count() + t].push_back({a.levels.first[l] + bin, share});
          }
        }
      }
    }
    return result;
  }();

  // grad[k] = sum over the bins that cover the cell of grad_pooled / the bin's pixels, channels c .. c + count
  PSP_INLINE void cell_gradient(int64_t n, int64_t c, int64_t cell, acc_t* __restrict__ grad, int64_t count) const {
    std::fill_n(grad, count, acc_t(0));
    const T* pooled = static_cast<const T*>(a.grad_pooled) + n * a.levels.first[a.levels.count] * a.C + c;
    for (const Term& term : terms[cell]) {
      const T* __restrict__ from = pooled + term.bin * a.C;
      for (int64_t k = 0; k < count; ++k) grad[k] += to_acc(from[k]) * term.share;
    }
  }

  // out[k] = grad[k] + the table's values; grad may be null
  template <int kBytes>
  PSP_INLINE void add(T* out, const T* grad, const acc_t* table, int64_t n) const {
    for_pairs<T, kBytes>(n, [&](int64_t at, int64_t k, auto lanes) __attribute__((always_inline)) {
      auto sum = pair_at<kBytes>(table + at);
      if (grad) {
        const auto v = load_pair<kBytes>(grad + k, lanes);
        sum = {v.first + sum.first, v.second + sum.second};
      }
      store_pair(out + k, sum, lanes);
    });
  }
};

// Planar maps, a unit is 16 planes.
template <class T>
struct PlanarPoolBackward : PoolBackwardBase<T> {
  using acc_t = acc_type<T>;
  static constexpr int64_t kPlanes = 16;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t blocks = (a.C + kPlanes - 1) / kPlanes, S = this->rows.count(), Q = this->columns.count();
    Scratch<acc_t> cells(S * Q * kPlanes), row(a.W), table(pairs_size<T, kBytes>(a.W));
    Scratch<T> plane(a.H * a.W);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, c0 = unit % blocks * kPlanes, planes = std::min(kPlanes, a.C - c0);
      for (int64_t cell = 0; cell < S * Q; ++cell) this->cell_gradient(n, c0, cell, &cells[cell * kPlanes], planes);
      for (int64_t k = 0; k < planes; ++k) {
        const T* grad = a.grad_concat.data ? at<T>(a.grad_concat, n, c0 + k, 0) : nullptr;
        for (int64_t s = 0; s < S; ++s) {
          for (int64_t t = 0; t < Q; ++t) {
            std::fill(&row[this->columns.begin(t)], &row[0] + this->columns.end(t), cells[(s * Q + t) * kPlanes + k]);
          }
          to_pairs<T, kBytes>(table.data(), row.data(), a.W);
          for (int64_t h = this->rows.begin(s); h < this->rows.end(s); ++h) {
            this->template add<kBytes>(&plane[h * a.W], grad ? grad + h * a.grad_concat.stride_h : nullptr,
                                       table.data(), a.W);
          }
        }
        store_plane<kBytes>(a.grad_input, n, c0 + k, a.H, a.W, plane.data(), this->stream,
                            grad ? grad + a.grad_concat.stride_c : nullptr);
      }
    }
    if (this->stream) store_fence();
  }
};

// Channels-last maps, a unit is one segment row of one chunk of channels.
template <class T>
struct ChannelsLastPoolBackward : PoolBackwardBase<T> {
  using acc_t = acc_type<T>;
  int64_t chunk;

  template <int kBytes>
  PSP_INLINE void operator()(int64_t begin, int64_t end) const {
    const auto& a = this->a;
    const int64_t S = this->rows.count(), Q = this->columns.count(), chunks = (a.C + chunk - 1) / chunk;
    const int64_t size = pairs_size<T, kBytes>(chunk);
    Scratch<acc_t> cell(chunk), cells(Q * size);
    Scratch<T> out(chunk);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (S * chunks), s = unit / chunks % S, c = unit % chunks * chunk;
      const int64_t channels = std::min(chunk, a.C - c);
      for (int64_t t = 0; t < Q; ++t) {
        this->cell_gradient(n, c, s * Q + t, cell.data(), channels);
        to_pairs<T, kBytes>(&cells[t * size], cell.data(), channels);
      }
      for (int64_t h = this->rows.begin(s); h < this->rows.end(s); ++h) {
        for (int64_t t = 0; t < Q; ++t) {
          for (int64_t w = this->columns.begin(t); w < this->columns.end(t); ++w) {
            const T* grad = a.grad_concat.data ? at<T>(a.grad_concat, n, c, h) + w * a.grad_concat.stride_w : nullptr;
            this->template add<kBytes>(out.data(), grad, &cells[t * size], channels);
            store<kBytes>(mutable_at<T>(a.grad_input, n, c, h) + w * a.grad_input.stride_w, out.data(), channels,
                          this->stream, grad ? grad + a.grad_concat.stride_w : nullptr);
          }
        }
      }
    }
    if (this->stream) store_fence();
  }
};

}  // namespace

void pyramid_pool(const PyramidPoolArgs& a) {
  const Segments rows(a.levels, a.levels.bins_h, a.H), columns(a.levels, a.levels.bins_w, a.W);
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const PoolBase<T> base{a, rows, columns, a.N * a.C * a.H * a.W * static_cast<int64_t>(sizeof(T)) > kStreamBytes};
    if (!a.channels_last) return parallel(a.N * ((a.C + 15) / 16), PlanarPool<T>{base});
    Scratch<double> cells(a.N * rows.count() * columns.count() * a.C);
    const int64_t chunk = chunk_size(a.N * rows.count(), a.C), chunks = (a.C + chunk - 1) / chunk;
    parallel(a.N * rows.count() * chunks, ChannelsLastPool<T>{base, chunk, cells.data()});
    parallel(a.N * a.levels.first[a.levels.count], ChannelsLastBins<T>{base, cells.data()});
  });
}

void pyramid_pool_backward(const PyramidPoolBackwardArgs& a) {
  const Segments rows(a.levels, a.levels.bins_h, a.H), columns(a.levels, a.levels.bins_w, a.W);
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const PoolBackwardBase<T> base{a, rows, columns,
                                   a.N * a.C * a.H * a.W * static_cast<int64_t>(sizeof(T)) > kStreamBytes};
    if (!a.channels_last) return parallel(a.N * ((a.C + 15) / 16), PlanarPoolBackward<T>{base});
    const int64_t chunk = chunk_size(a.N * rows.count(), a.C), chunks = (a.C + chunk - 1) / chunk;
    parallel(a.N * rows.count() * chunks, ChannelsLastPoolBackward<T>{base, chunk});
  });
}

}  // namespace pspnet_fast::cpu
