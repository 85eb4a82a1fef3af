// Cross entropy of bilinearly upsampled logits. Forward a thread owns a pixel and walks over the classes; backward a
// thread owns a class and walks over the pixels, so that a logit's gradient is gathered in one register.
//
// A pixel's loss: focus[t] * (lse - z_t) + sum over k of smooth[k] * (lse - z_k), t the target,
// focus[t] = (1 - label_smoothing) * weight[t], smooth[k] = label_smoothing / K * weight[k].
#include "axis.cuh"
#include "logits.cuh"

namespace pspnet_fast::cuda {
namespace {

template <class T>
constexpr int kRows = sizeof(T) == 8 ? 2 : 4;  // rows of logits that a block of the backward takes, in registers
constexpr int kColumns = 8;                    // and columns, one after another
constexpr int kBatch = 128;                    // pixels whose terms are in shared memory at once
constexpr int kMost = 256;                     // classes of a block of the backward

// Losses are summed times this, so that 2^32 of the largest do not overflow: double precision would be slow.
template <class A>
constexpr A kSummed = sizeof(A) == 8 ? A(1) : A(0x1p-32);

template <class T, class Args>
__device__ __forceinline__ acc_t<T> weight_of(const Args& args, int k) {
  return args.weight == nullptr ? acc_t<T>(1) : static_cast<const acc_t<T>*>(args.weight)[k];
}

template <class T, class Args>
__device__ __forceinline__ acc_t<T> focus_of(const Args& args, int k) {
  return (1 - static_cast<acc_t<T>>(args.label_smoothing)) * weight_of<T>(args, k);
}

template <class Args>
__device__ __forceinline__ int64_t target_at(const Args& args, int64_t pixel) {
  switch (args.target_type) {
    case IntType::kUInt8:
      return static_cast<const uint8_t*>(args.target)[pixel];
    case IntType::kInt16:
      return static_cast<const int16_t*>(args.target)[pixel];
    case IntType::kInt32:
      return static_cast<const int32_t*>(args.target)[pixel];
    default:
      return static_cast<const int64_t*>(args.target)[pixel];
  }
}

// The sums over a block's threads of two numbers, the same in every run; thread 0 gets them.
template <class A>
__device__ __forceinline__ void block_sums(A& a, A& b) {
  PSP_SHARED(A, sums, 2 * kThreads);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  sums[2 * thread] = a;
  sums[2 * thread + 1] = b;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      sums[2 * thread] += sums[2 * (thread + half)];
      sums[2 * thread + 1] += sums[2 * (thread + half) + 1];
    }
  }
  if (thread == 0) a = sums[0], b = sums[1];
}

// The log-sum-exp and the loss of every pixel, by a running maximum over the classes; sums [blocks, 2] of losses and
// weights.
// Layout: logits of any strides, classes in 16-byte vectors (V > 1) where channels-last allows them.
// A block takes a tile of pixels, a thread one pixel.
// Traffic: target read and lse written once; logits are read by all pixels around them, from the caches.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    cross_entropy_pixels(const __grid_constant__ UpsampleCrossEntropyArgs args) {
  const int K = static_cast<int>(args.K), H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const Pixel at = pixel_of_thread(H, W);
  acc_t<T> loss_sum = 0, weight_sum = 0;
  if (at.x < W && at.y < H) {
    const int64_t to = (at.n * H + at.y) * W + at.x, target = target_at(args, to);
    acc_t<T> loss = 0, lse = 0;
    if (target != args.ignore_index && (target < 0 || target >= K)) {
      loss = lse = static_cast<acc_t<T>>(NAN);
      loss_sum = weight_sum = loss;
    } else if (target != args.ignore_index) {
      const Corners<T> corners(args, at.n, at.x, at.y);
      const bool smoothing = static_cast<acc_t<T>>(args.label_smoothing) > 0;
      const auto share = static_cast<acc_t<T>>(args.label_smoothing) / static_cast<acc_t<T>>(K);
      acc_t<T> greatest, sum, logit, smooth, smooth_total, values[V];  // logit is as it is, smooth less the greatest
      bool careful = false;
      for (;;) {
        greatest = kLowest<acc_t<T>>, sum = 0, logit = 0, smooth = 0, smooth_total = 0;
        for (int k = 0; k < K; k += V) {
          corners.template at<V>(k, values, careful);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            if (values[v] > greatest) {
              if (sum > 0) {
                sum *= exponential(greatest - values[v]);
                smooth += smooth_total * (greatest - values[v]);
              }
              greatest = values[v];
            }
            sum += exponential(values[v] - greatest);
            if (k + v == target) logit = values[v];
            if (smoothing) {
              const acc_t<T> weight = share * weight_of<T>(args, k + v);
              smooth += weight * (values[v] - greatest);
              smooth_total += weight;
            }
          }
        }
        if (sum == sum || careful) break;
        careful = true;
      }
      const acc_t<T> log_sum = logarithm(sum);
      lse = sum > 0 ? greatest + log_sum : static_cast<acc_t<T>>(NAN);  // NaN where all logits are -infinity, too
      loss = focus_of<T>(args, static_cast<int>(target)) * (log_sum - (logit - greatest));
      if (smoothing) loss += smooth_total * log_sum - smooth;
      loss_sum = kSummed<acc_t<T>> * loss;
      weight_sum = weight_of<T>(args, static_cast<int>(target));
    }
    static_cast<acc_t<T>*>(args.lse)[to] = lse;
    if (args.reduction == Reduction::kNone) static_cast<acc_t<T>*>(args.loss)[to] = loss;
  }
  block_sums(loss_sum, weight_sum);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    auto* const sums = static_cast<acc_t<T>*>(args.workspace) + 2 * static_cast<int64_t>(blockIdx.x);
    sums[0] = loss_sum;
    sums[1] = weight_sum;
  }
}

// Adds to a sum; what its rounding loses goes to the next summand, but not beside an infinite sum.
template <class A>
__device__ __forceinline__ void add_exactly(A& sum, A& lost, A summand) {
  const A next = summand - lost, total = sum + next;
  lost = total - sum - next;
  if (lost != lost) lost = 0;
  sum = total;
}

// The reduced loss and the sum of the weights, of the blocks' sums. One block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_total(const __grid_constant__ UpsampleCrossEntropyArgs args, int64_t blocks) {
  const auto* const sums = static_cast<const acc_t<T>*>(args.workspace);
  acc_t<T> loss = 0, weight = 0, lost_loss = 0, lost_weight = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    add_exactly(loss, lost_loss, sums[2 * i]);
    add_exactly(weight, lost_weight, sums[2 * i + 1]);
  }
  block_sums(loss, weight);
  if (threadIdx.x != 0) return;
  *static_cast<acc_t<T>*>(args.total_weight) = weight;
  if (args.reduction == Reduction::kNone) return;
  if (args.reduction == Reduction::kMean) loss = weight == 0 ? 0 * loss : loss / weight;  // a NaN stays
  *static_cast<acc_t<T>*>(args.loss) = loss / kSummed<acc_t<T>>;
}

// What the classes of a pixel have in common: the softmax is exp(z - lse), its gradient scale * softmax - smooth *
// weight[k], and at the target less by focus.
template <class A>
struct Terms {
  A right, bottom, lse, scale, focus, smooth;
  int target;
};

template <class T>
__device__ __forceinline__ Terms<acc_t<T>> terms_of(const UpsampleCrossEntropyBackwardArgs& args, int64_t pixel,
                                                    acc_t<T> factor, acc_t<T> smooth_total) {
  const int64_t target = target_at(args, pixel);
  if (target == args.ignore_index) return {0, 0, -kLowest<acc_t<T>>, 0, 0, 0, -1};  // exp(z - lse) is 0, not infinite
  const auto* const lse = static_cast<const acc_t<T>*>(args.lse);
  if (target < 0 || target >= args.K) return {0, 0, lse[pixel], 1, 0, 0, -1};  // NaN, for so is its lse
  const acc_t<T> grad =
      args.reduction == Reduction::kNone ? static_cast<const acc_t<T>*>(args.grad_loss)[pixel] : factor;
  const acc_t<T> focus = grad * focus_of<T>(args, static_cast<int>(target));
  const acc_t<T> smooth = grad * (static_cast<acc_t<T>>(args.label_smoothing) / static_cast<acc_t<T>>(args.K));
  return {0, 0, lse[pixel], focus + smooth * smooth_total, focus, smooth, static_cast<int>(target)};
}

// Gradient of the logits. The pixels of a cell, what lies between two rows and two columns of logits, are computed with
// the cell's corners in registers, and go to the gradients of the four.
// Layout: logits and grad_logits of any strides.
// A block takes kRows rows and kColumns columns of logits and the cells around them, a thread one class of these.
// Traffic: each pixel's terms are read by the blocks whose cells hold it (1.4 on average), logits likewise.
template <class T>
__global__ void __launch_bounds__(kMost, 1)
    cross_entropy_backward(const __grid_constant__ UpsampleCrossEntropyBackwardArgs args) {
  using A = acc_t<T>;
  constexpr int R = kRows<T>;
  PSP_SHARED(Terms<A>, batch, kBatch);
  const int h = static_cast<int>(args.h), w = static_cast<int>(args.w);
  const int down = (h + R - 1) / R, across = (w + kColumns - 1) / kColumns;
  const int chunks = (static_cast<int>(args.K) + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  int64_t block = blockIdx.x;
  const int k = static_cast<int>(block % chunks) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  block /= chunks;
  const int first_column = static_cast<int>(block % across) * kColumns;
  block /= across;
  const int first_row = static_cast<int>(block % down) * R;
  const int64_t n = block / down;
  const bool mine = k < args.K;
  const Axis<T> rows(h, args.H, args.align_corners), columns(w, args.W, args.align_corners);

  A factor = args.reduction == Reduction::kNone ? A(1) : *static_cast<const A*>(args.grad_loss);
  if (args.reduction == Reduction::kMean) {
    const A total = *static_cast<const A*>(args.total_weight);
    factor = total == 0 ? A(0) : factor / total;
  }
  A smooth_total = static_cast<A>(args.K);
  if (static_cast<A>(args.label_smoothing) > 0 && args.weight != nullptr) {
    smooth_total = 0;
    for (int i = 0; i < args.K; ++i) smooth_total += weight_of<T>(args, i);
  }
  const A weight = mine ? weight_of<T>(args, k) : A(0);

  int begin[R + 2];  // lines of the cells below row first_row - 1 + q
#pragma unroll
  for (int q = 0; q < R + 2; ++q) begin[q] = rows.start(min(max(first_row - 1 + q, 0), h));

  A left[R] = {}, right[R] = {};         // gradients of a column and the next one
  A here[R + 2] = {}, next[R + 2] = {};  // logits of a column and the next one, from row first_row - 1 on
  const auto read = [&](int column, A(&values)[R + 2]) {
#pragma unroll
    for (int q = 0; q < R + 2; ++q) {
      const int row = min(max(first_row - 1 + q, 0), h - 1);
      values[q] = mine ? widen(*pixel<const T>(args.logits, n, k, row, column)) : A(0);
    }
  };
  const int last_column = min(first_column + kColumns, w);
  read(max(first_column - 1, 0), next);
  for (int column = max(first_column - 1, 0); column < last_column; ++column) {
#pragma unroll
    for (int q = 0; q < R + 2; ++q) here[q] = next[q];
    read(min(column + 1, w - 1), next);
#pragma unroll
    for (int r = 0; r < R; ++r) left[r] = right[r], right[r] = 0;
    const int first = columns.start(column), width = columns.start(column + 1) - first;
#pragma unroll
    for (int q = 0; q <= R; ++q) {
      const int row = first_row - 1 + q;
      if (row < 0 || row >= h) continue;
      // Where the neighbours below or beside are the pixels themselves: at the edges and where nothing is interpolated.
      const bool bottom_row = row == h - 1 || h == args.H, last = column == w - 1 || w == args.W;
      const A top_left = here[q], top_right = last ? here[q] : next[q];
      const A bottom_left = bottom_row ? top_left : here[q + 1];
      const A bottom_right = bottom_row ? top_right : last ? here[q + 1] : next[q + 1];
      const bool infinite = fmin(fmin(top_left, top_right), fmin(bottom_left, bottom_right)) == -INFINITY;
      const int64_t count = static_cast<int64_t>(begin[q + 1] - begin[q]) * width;
      A sums[4] = {};
      for (int64_t start = 0; start < count; start += kBatch) {
        const int size = static_cast<int>(min(count - start, static_cast<int64_t>(kBatch)));
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
          const int y = begin[q] + static_cast<int>((start + i) / width);
          const int x = first + static_cast<int>((start + i) % width);
          Terms<A> terms = terms_of<T>(args, (n * args.H + y) * args.W + x, factor, smooth_total);
          terms.right = columns.at(x).lambda;
          terms.bottom = rows.at(y).lambda;
          batch[i] = terms;
        }
        __syncthreads();
        for (int i = 0; i < size; ++i) {
          const Terms<A> t = batch[i];
          A logit = bilinear(top_left, top_right, bottom_left, bottom_right, t.right, t.bottom);
          if (infinite) {
            logit = mix_infinite(mix_infinite(top_left, top_right, t.right),
                                 mix_infinite(bottom_left, bottom_right, t.right), t.bottom);
          }
          A grad = exponential(logit - t.lse) * t.scale - t.smooth * weight;
          if (k == t.target) grad -= t.focus;
          const A below = t.bottom * grad, above = grad - below;
          sums[0] += (1 - t.right) * above;
          sums[1] += t.right * above;
          sums[2] += (1 - t.right) * below;
          sums[3] += t.right * below;
        }
      }
      if (bottom_row) sums[0] += sums[2], sums[1] += sums[3];
      if (last) sums[0] += sums[1], sums[2] += sums[3], sums[1] = sums[3] = 0;
      if (q > 0) left[q - 1] += sums[0], right[q - 1] += sums[1];
      if (q < R && !bottom_row) left[q] += sums[2], right[q] += sums[3];
    }
    if (column < first_column || !mine) continue;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first_row + r < h) *pixel<T>(args.grad_logits, n, k, first_row + r, column) = narrow<T>(left[r]);
    }
  }
}

}  // namespace

size_t upsample_cross_entropy_workspace(const UpsampleCrossEntropyArgs& args) {
  return 2 * sizeof(double) * static_cast<size_t>(count_tiles(args.N, args.H, args.W));
}

int upsample_cross_entropy(const UpsampleCrossEntropyArgs& args, void* stream) {
  if (!fits_int(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = sizeof(T) == 8 ? 1 : kVector<T>;  // two doubles at once spill registers
    const bool vectors = args.logits.stride_c == 1 && vectors_of_channels<T>(args.logits, args.K);
    const int64_t blocks = count_tiles(args.N, args.H, args.W);
    const cudaError_t error = launch(vectors ? cross_entropy_pixels<T, V> : cross_entropy_pixels<T, 1>, blocks,
                                     dim3(kTileX, kTileY), 0, stream, args);
    if (error != cudaSuccess) return error;
    return launch(cross_entropy_total<T>, 1, kThreads, 0, stream, args, blocks);
  });
}

int upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardArgs& args, void* stream) {
  if (!fits_int(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int threads = static_cast<int>(args.K < kMost ? divide_up(args.K, kWarp) * kWarp : kMost);
    const int64_t blocks =
        args.N * divide_up(args.h, kRows<T>) * divide_up(args.w, kColumns) * divide_up(args.K, threads);
    return launch(cross_entropy_backward<T>, blocks, threads, 0, stream, args);
  });
}

}  // namespace pspnet_fast::cuda
