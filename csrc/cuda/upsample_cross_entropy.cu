// Cross entropy of bilinearly upsampled logits (cross_entropy.cuh).
#include "cross_entropy.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kStrips = 4;                      // of a block, one a warp: columns of up to kRows pixels
constexpr int kPixelThreads = kStrips * kWarp;  // a thread takes a column
template <class A>
constexpr A kUnit = A(1ull << 32);  // losses are summed in units of it: the mean of huge ones is finite
template <class A>
constexpr int kClasses = 128 / static_cast<int>(sizeof(A));  // whose logits are in shared memory at once
template <class A>
constexpr int kPitch = kClasses<A> + kVector<A>;  // of a logit's classes there: neighbours in different banks
template <class A>
constexpr A kSmallest = A(1) / (1ull << 63);  // sum of exponentials: below it the terms are too close to 0

// The logits around a block's pixels. An interval of the map's rows lies between two rows of logits, or outside the
// first or last: h + 1 of them, each cut into `parts` strips. rows == 0: every pixel goes the slow way.
struct Tile {
  int parts, rows, columns;
};

Tile make_tile(const UpsampleCrossEntropyArgs& args) {
  if (!has_fast_way(args)) return {1, 0, 0};
  const int64_t parts = divide_up(longest_interval(args.h, args.H, args.align_corners), kRows);
  const double scale = source_scale<double>(static_cast<int>(args.w), args.W, args.align_corners);
  return {static_cast<int>(parts), static_cast<int>(divide_up(kStrips - 1, parts)) + 2,
          static_cast<int>((kWarp - 1) * scale + 1e-3) + 3};
}

int64_t count_blocks(const UpsampleCrossEntropyArgs& args, const Tile& tile) {
  return args.N * divide_up((args.h + 1) * tile.parts, kStrips) * divide_up(args.W, kWarp);
}

template <class A>
size_t shared_bytes(const Tile& tile) {
  const int positions = tile.rows * tile.columns;
  return (std::max(positions * kPitch<A>, kRows * kPixelThreads) + positions + 2 * std::max(positions, kPixelThreads)) *
         sizeof(A);
}

// The sums over a block's threads of two numbers, the same in every run; thread 0 gets them.
template <int kCount, class A>
__device__ __forceinline__ void block_sums(A& a, A& b) {
  PSP_SHARED(A, sums, 2 * kCount);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  sums[2 * thread] = a;
  sums[2 * thread + 1] = b;
  for (int half = kCount / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      sums[2 * thread] += sums[2 * (thread + half)];
      sums[2 * thread + 1] += sums[2 * (thread + half) + 1];
    }
  }
  if (thread == 0) a = sums[0], b = sums[1];
}

// What is known of a pixel once its classes are summed: the logarithm of the sum of exp(z - greatest), the target's
// logit and the sum of smooth[k] * z_k, both less the greatest.
template <class A>
struct Summed {
  A greatest, log_sum, logit, smooth;
};

// One pixel, class by class, by a running maximum. A logit of -infinity does not count where its weight is 0.
template <class T>
__device__ __forceinline__ Summed<acc_t<T>> sum_carefully(const UpsampleCrossEntropyArgs& args,
                                                          const Corners<T>& corners, acc_t<T> share, int target) {
  acc_t<T> greatest = kLowest<acc_t<T>>, sum = 0, logit = 0, smooth = 0, smooth_total = 0, value[1];
  for (int k = 0; k < args.K; ++k) {
    corners.template at<1>(k, value, true);
    if (value[0] > greatest) {
      if (sum > 0) {
        sum *= exponential(greatest - value[0]);
        smooth += smooth_total * (greatest - value[0]);
      }
      greatest = value[0];
    }
    sum += exponential(value[0] - greatest);
    if (k == target) logit = value[0];
    if (share > 0) {
      const acc_t<T> weight = share * weight_of<T>(args, k);
      smooth += weight * (value[0] - greatest);
      smooth_total += weight;
    }
  }
  // NaN where all logits are -infinity, too
  return {greatest, sum > 0 ? logarithm(sum) : static_cast<acc_t<T>>(NAN), logit - greatest, smooth};
}

// The log-sum-exp and the loss of every pixel; sums [blocks, 2] of losses and weights. Logits are taken less the
// greatest of their own pixel of the source: interpolated, these bound the pixel's logits, and no maximum is needed.
// Layout: logits of any strides.
// A block takes kStrips strips of kWarp columns, a warp one strip, a thread one column; kClasses classes at a time.
// Traffic: target read and lse written once; a block reads the logits around it twice (3 % of what it computes).
// Instructions a class and pixel, at 8 pixels a column: 3, and 7 a class to interpolate; in all 9 for K = 150.
template <class T>
__global__ void __launch_bounds__(kPixelThreads, sizeof(T) == 8 ? 3 : 5)
    cross_entropy_pixels(const __grid_constant__ UpsampleCrossEntropyArgs args, Tile tile,
                         Smoothing<acc_t<T>> smoothing) {
  using A = acc_t<T>;
  constexpr int V = kVector<A>, C = kClasses<A>, P = kPitch<A>;
  PSP_DYNAMIC_SHARED(A, shared);
  const int positions = tile.rows * tile.columns, slots = max(positions, kPixelThreads);
  A* const greatest = shared + max(positions * P, kRows * kPixelThreads);  // of all classes
  A* const smooth = greatest + positions;                                  // sums of smooth[k] times logit
  A* const partial = smooth + slots;                                       // of either

  const int K = static_cast<int>(args.K), H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const int h = static_cast<int>(args.h), w = static_cast<int>(args.w);
  const int lane = static_cast<int>(threadIdx.x), thread = static_cast<int>(threadIdx.y) * kWarp + lane;
  const int across = (W + kWarp - 1) / kWarp, down = ((h + 1) * tile.parts + kStrips - 1) / kStrips;
  const int64_t n = static_cast<int64_t>(blockIdx.x) / across / down;
  const int first_x = static_cast<int>(blockIdx.x % across) * kWarp, x = first_x + lane;
  const int first_strip = static_cast<int>(static_cast<int64_t>(blockIdx.x) / across % down) * kStrips;
  const int strip = min(first_strip + static_cast<int>(threadIdx.y), (h + 1) * tile.parts);
  const int interval = strip / tile.parts;
  const Axis<T> rows(h, H, args.align_corners), columns(w, W, args.align_corners);
  const int begin = interval == 0 ? 0 : interval > h ? H : rows.first_at(interval - 1);
  const int length = (interval >= h ? H : rows.first_at(interval)) - begin, part = strip - interval * tile.parts;
  const int top = begin + length * part / tile.parts, count = begin + length * (part + 1) / tile.parts - top;
  const auto column = columns.at(min(x, W - 1));
  const A ahead = columns.weight_of_next(min(x, W - 1));

  // where the logits around the block's pixels begin, and within them those around the thread's
  const int first_row = max(first_strip / tile.parts - 1, 0), first_column = columns.at(first_x).low;
  const int low = max(interval - 1, 0) - first_row, high = min(max(interval, 1), h - 1) - first_row;
  const int left = column.low - first_column, right = column.high - first_column;
  const int at[4] = {low * tile.columns + left, low * tile.columns + right, high * tile.columns + left,
                     high * tile.columns + right};

  const int groups = max(kPixelThreads / max(positions, 1), 1);
  const Patch patch = {first_row, first_column, tile.rows, tile.columns, thread, kPixelThreads, groups};
  patch.find_greatest<T>(args, n, partial, greatest);
  for (int slot = thread; slot < slots; slot += kPixelThreads) smooth[slot] = 0;

  int next_target = target_at(args, x < W && count > 0 ? (n * H + top) * W + x : -1);  // long before it is needed
  A lambda[kRows], sums[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) lambda[i] = rows.weight_of_next(min(top + i, H - 1));
  for (int first = 0; first < K && positions > 0; first += C) {
    const int size = min((K - first + V - 1) / V * V, C);
    __syncthreads();
    patch.for_each<T>(args, n, [&](int p, int group, int slot, const T* logits) {
      const A most = greatest[p];
      A sum = smooth[slot];
#pragma unroll 1
      for (int k = group; k < size; k += kLoads * groups) {
        T values[kLoads];
        read_classes(args, logits, first + k, groups, values);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int to = k + i * groups, of_class = first + to;
          if (to >= size) break;
          const A logit = widen(values[i]);
          shared[p * P + to] = of_class < K ? power_of(logit, most) : static_cast<A>(kLowestPower);
          if (smoothing.share > 0 && of_class < K) {
            sum += smoothing.share * weight_of<T>(args, of_class) * (logit - most);
          }
        }
      }
      smooth[slot] = sum;
    });
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < size; k += V) {
      A a[V], b[V], c[V], d[V];
      load(shared + at[0] * P + k, a);
      load(shared + at[1] * P + k, b);
      load(shared + at[2] * P + k, c);
      load(shared + at[3] * P + k, d);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Line<A> line(a[v], b[v], c[v], d[v], 1 - ahead, ahead);
        a[v] = line.top, d[v] = line.slope;
      }
#pragma unroll
      for (int i = 0; i < kRows; i += 2) {
        if (i >= count) break;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[i] += exp2_fast(multiply_add(lambda[i], d[v], a[v]));
          sums[i + 1] += exp2_fast(multiply_add(lambda[i + 1], d[v], a[v]));
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows; ++i) shared[i * kPixelThreads + thread] = sums[i];
  for (int p = thread; p < positions; p += kPixelThreads) {
#pragma unroll 1
    for (int group = 1; group < groups; ++group) smooth[p] += smooth[group * positions + p];
  }
  __syncthreads();

  const A smooth_total = smoothing.share > 0 ? sum_of_smooth<T>(args, smoothing.share) : A(0);
  A loss_sum = 0, weight_sum = 0;
  Corners<T> corners(args, n, min(x, W - 1), min(top, H - 1));  // of the whole column, but for `bottom`
#pragma unroll 1
  for (int i = 0; i < (x < W ? count : 0); ++i) {
    const int64_t to = (n * H + top + i) * W + x;
    const int target = next_target, t = max(target, 0);
    next_target = target_at(args, i + 1 < count ? to + W : -1);
    corners.bottom = rows.weight_of_next(top + i);
    const auto mix = [&](auto value) {
      return bilinear<A>(value(0), value(1), value(2), value(3), ahead, corners.bottom);
    };
    A around[4] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) around[corner] = positions > 0 ? greatest[at[corner]] : A(0);
    const bool is_fast = positions > 0 && has_fast_way(around);
    const A base = is_fast ? bound_of(around, ahead, corners.bottom) : A(0);
    const A sum = is_fast && i < kRows ? shared[i * kPixelThreads + thread] : A(0);
    Summed<A> pixel = {base, 0, 0, 0};
    bool is_right = sum >= kSmallest<A>;
    if (is_right) {
      pixel.log_sum = logarithm(sum);
      pixel.logit = mix([&](int corner) { return widen(corners.of(corner)[t * corners.stride_c]) - around[corner]; });
      pixel.smooth = mix([&](int corner) { return smooth[at[corner]]; });
      is_right = is_finite(pixel.logit) && is_finite(pixel.smooth);
    }
    if (!is_right) pixel = sum_carefully(args, corners, smoothing.share, t);

    A loss = 0, lse = (pixel.greatest - base) + pixel.log_sum;
    if (target != kIgnored) {
      const A weight = weight_of<T>(args, t);
      loss = smoothing.focus * weight * (pixel.log_sum - pixel.logit);
      if (smoothing.share > 0) loss += smooth_total * pixel.log_sum - pixel.smooth;
      if (target == kUnknown) loss = lse = static_cast<A>(NAN);
      loss_sum += loss / kUnit<A>;
      weight_sum += target == kUnknown ? loss : weight;
    }
    static_cast<A*>(args.lse)[to] = lse;
    if (args.reduction == Reduction::kNone) static_cast<A*>(args.loss)[to] = loss;
  }
  block_sums<kPixelThreads>(loss_sum, weight_sum);
  if (thread == 0) {
    A* const block = static_cast<A*>(args.workspace) + 2 * static_cast<int64_t>(blockIdx.x);
    block[0] = loss_sum;
    block[1] = weight_sum;
  }
}

// A sum that remembers what rounding took from it (Knuth's two-sum).
template <class A>
struct ExactSum {
  A value = 0, lost = 0;

  __device__ __forceinline__ void add(A term) {
    const A total = value + term, part = total - value;
    lost += (value - (total - part)) + (term - part);
    value = total;
  }
  __device__ __forceinline__ A total() const { return is_finite(value) ? value + lost : value; }
};

// The reduced loss and the sum of the weights, of the blocks' sums. One block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_total(const __grid_constant__ UpsampleCrossEntropyArgs args, int64_t blocks) {
  const auto* const sums = static_cast<const acc_t<T>*>(args.workspace);
  ExactSum<acc_t<T>> losses, weights;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    losses.add(sums[2 * i]);
    weights.add(sums[2 * i + 1]);
  }
  acc_t<T> loss = losses.total(), weight = weights.total();
  block_sums<kThreads>(loss, weight);
  if (threadIdx.x != 0) return;
  *static_cast<acc_t<T>*>(args.total_weight) = weight;
  if (args.reduction == Reduction::kNone) return;
  if (args.reduction == Reduction::kMean) loss = weight == 0 ? 0 * loss : loss / weight;  // a NaN stays
  *static_cast<acc_t<T>*>(args.loss) = loss * kUnit<acc_t<T>>;
}

}  // namespace

size_t upsample_cross_entropy_workspace(const UpsampleCrossEntropyArgs& args) {
  return 2 * sizeof(double) * static_cast<size_t>(count_blocks(args, make_tile(args)));
}

int upsample_cross_entropy(const UpsampleCrossEntropyArgs& args, void* stream) {
  if (!classes_fit_int(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tile tile = make_tile(args);
    const int64_t blocks = count_blocks(args, tile);
    const cudaError_t error = launch(cross_entropy_pixels<T>, blocks, dim3(kWarp, kStrips),
                                     shared_bytes<acc_t<T>>(tile), stream, args, tile, Smoothing<acc_t<T>>(args));
    if (error != cudaSuccess) return error;
    return launch(cross_entropy_total<T>, 1, kThreads, 0, stream, args, blocks);
  });
}

}  // namespace pspnet_fast::cuda
