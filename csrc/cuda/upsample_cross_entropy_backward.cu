// Gradient of the cross entropy of bilinearly upsampled logits (cross_entropy.cuh).
#include <type_traits>

#include "cross_entropy_share.cuh"

namespace pspnet_fast::cuda {
namespace {

// What the classes of a pixel have in common: the softmax is exp(z - lse), its gradient scale * softmax - smooth *
// weight[k], and at the target less by focus.
template <class A>
struct Terms {
  A lse, scale, focus, smooth;
};

// What all pixels have in common.
template <class A>
struct Whole {
  A factor, smooth_total;  // of the gradient; sum of smooth[k]
};

template <class T>
__device__ __forceinline__ Terms<acc_t<T>> terms_of(const UpsampleCrossEntropyBackwardArgs& args, int64_t pixel,
                                                    int target, Smoothing<acc_t<T>> smoothing, Whole<acc_t<T>> whole) {
  const acc_t<T> lse = static_cast<const acc_t<T>*>(args.lse)[pixel];
  if (target == kIgnored) return {lse, 0, 0, 0};
  if (target == kUnknown) return {lse, 1, 0, 0};  // NaN, for so is lse
  const acc_t<T> grad =
      args.reduction == Reduction::kNone ? static_cast<const acc_t<T>*>(args.grad_loss)[pixel] : whole.factor;
  const acc_t<T> focus = grad * smoothing.focus * weight_of<T>(args, target);
  return {lse, focus + grad * whole.smooth_total, focus, grad * smoothing.share};
}

// The pixels of one column from `first_pixel` on, W apart, into shared memory as number `to`.
template <class T>
__device__ __forceinline__ void fill_column(const UpsampleCrossEntropyBackwardArgs& args, const Share& share,
                                            const Shared<acc_t<T>>& shared, Smoothing<acc_t<T>> smoothing,
                                            Whole<acc_t<T>> whole, const acc_t<T> (&lambda)[kRows], int count,
                                            int64_t first_pixel, int first_class, const acc_t<T> (&greatest)[4],
                                            Column<acc_t<T>> column, int to) {
  using A = acc_t<T>;
  int targets[kRows];
  targets_of(args, first_pixel, count, targets);
  A lse[kRows], scale[kRows], least = INFINITY, most = -INFINITY;
  const bool is_relative = has_fast_way(args);
  bool slow = args.K == 1 || !has_fast_way(greatest);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    Terms<A> terms = {0, 0, 0, 0};
    if (i < count) {
      terms = terms_of<T>(args, first_pixel + i * args.W, targets[i], smoothing, whole);
      if (!is_relative) terms.lse -= bound_of(greatest, column.right, lambda[i]);
      slow = slow || !is_finite(terms.lse);
      least = min(least, terms.lse);
      most = max(most, terms.lse);
    }
    lse[i] = targets[i] == kIgnored ? static_cast<A>(INFINITY) : terms.lse;
    scale[i] = terms.scale;
    column.smooth += terms.smooth;
    column.smooth_below += lambda[i] * terms.smooth;
    shared.focus[to * kRows + i] = terms.focus;
    const int target = targets[i] - first_class;
    const bool is_mine = targets[i] >= 0 && target >= 0 && target < share.classes;
    shared.targets[to * kRows + i] = static_cast<int16_t>(is_mine ? target : -1);
    if (is_mine) column.targets |= 1u << target / kBucket;
  }
  slow = slow || !(least >= -kLeast);
  column.reference = slow ? static_cast<A>(NAN) : most * kLog2E<A>;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    shared.factors[to * kRows + i] = scale[i] * exp2_fast((most - lse[i]) * kLog2E<A>);
  }
  shared.columns[to] = column;
}

// Gradient of the logits. The pixels of a cell, what lies between two rows and two columns of logits, are computed with
// the cell's corners in registers, and go to the gradients of the four. A column's softmaxes are taken relative to the
// greatest log-sum-exp of its pixels, what is left of theirs is a factor.
// Layout: logits and grad_logits of any strides.
// A block takes share.rows rows of logits and the cells around them, from top to bottom.
// Traffic: each pixel's terms and logits are read by the blocks whose cells hold it (1.2 times at N = 16).
// Instructions a class and pixel, at 8 pixels a column: 5, or 8 in warps that have a target of the column, and 13 a
// column.
template <class T>
__global__ void __launch_bounds__(kMostClasses, sizeof(T) == 8 ? 1 : 2)
    cross_entropy_backward(const __grid_constant__ UpsampleCrossEntropyBackwardArgs args, Share share,
                           Smoothing<acc_t<T>> smoothing) {
  using A = acc_t<T>;
  PSP_DYNAMIC_SHARED(unsigned char, bytes);
  const Shared<A> shared(bytes, share);
  const int h = static_cast<int>(args.h), w = static_cast<int>(args.w), thread = static_cast<int>(threadIdx.x);
  const int threads = share.threads;
  const int stretch = share.across + 2, all = share.groups * share.across + 2;  // columns of logits: of a group, of all
  const int across = (w + share.groups * share.across - 1) / (share.groups * share.across);
  const int down = (h + share.rows - 1) / share.rows;
  const int chunks = (static_cast<int>(args.K) + share.classes - 1) / share.classes;
  int64_t block = blockIdx.x;
  const int first_class = static_cast<int>(block % chunks) * share.classes;
  block /= chunks;
  const int first_column = static_cast<int>(block % across) * share.groups * share.across;
  block /= across;
  const int first_row = static_cast<int>(block % down) * share.rows, last_row = min(first_row + share.rows, h);
  const int64_t n = block / down;
  const Axis<T> rows(h, args.H, args.align_corners), columns(w, args.W, args.align_corners);

  const int group = thread / share.classes, own = thread - group * share.classes, k = first_class + own;
  const int own_column = first_column + group * share.across, last_column = min(own_column + share.across, w);
  const bool active = group < share.groups && k < args.K && own_column < w;
  const A weight = active ? weight_of<T>(args, k) : A(0);
  Whole<A> whole = {args.reduction == Reduction::kNone ? A(1) : *static_cast<const A*>(args.grad_loss),
                    sum_of_smooth<T>(args, smoothing.share)};
  if (args.reduction == Reduction::kMean) {
    const A total = *static_cast<const A*>(args.total_weight);
    whole.factor = total == 0 ? A(0) : whole.factor / total;
  }

  unsigned buckets = active ? 1u << own / kBucket : 0u;  // of the warp's classes
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) buckets |= __shfl_xor_sync(~0u, buckets, lanes);

  // Threads share a row of logits: planar ones over columns first, the others over classes.
  const int lanes = args.logits.stride_c == 1 ? 1 : stretch, lines = threads / lanes;
  const int line = thread / lanes, lane = thread - line * lanes;
  const auto for_each_logit = [&](int end, auto visit) {
    for (int slot = line; line < lines && slot < share.groups * share.classes; slot += lines) {
      const int of_group = share.groups == 1 ? 0 : slot / share.classes;
      const int of_class = first_class + slot - of_group * share.classes;
      if (of_class >= args.K) continue;
      for (int j = lane; j < end; j += lanes) visit(of_class, first_column + of_group * share.across + j, slot, j);
    }
  };
  const int first_cell = max(first_row - 1, 0);
  const auto read_row = [&](int row) {
    for_each_logit(stretch, [&](int of_class, int column, int slot, int j) {
      const T* const logit = pixel<const T>(args.logits, n, of_class, min(row, h - 1), min(max(column - 1, 0), w - 1));
      const A most = shared.greatest[(row - first_cell) * all + column - first_column];
      shared.powers[(row % 2 * stretch + j) * threads + slot] = power_of(widen(*logit), most);
    });
  };
  const Patch patch = {first_cell, first_column - 1, share.rows + 2, all, thread, threads};
  patch.find_greatest<T>(args, n, shared.factors, shared.greatest);

  const int left_x = columns.start(max(first_column - 1, 0));
  const int right_x = columns.start(min(first_column + share.groups * share.across, w));
  const int own_left = columns.start(max(own_column - 1, 0)), own_right = columns.start(last_column);
  for (int i = 0; i < 2 * share.across; ++i) shared.sums[i * threads + thread] = 0;
  read_row(first_cell);
  for (int row = first_cell; row < last_row; ++row) {
    const auto most_of = [&](int column, int corner) {
      return shared.greatest[(row - first_cell + corner / 2) * all + column - first_column + 1 + corner % 2];
    };
    const A* const upper = shared.powers + row % 2 * stretch * threads + thread;
    const A* const lower = shared.powers + (row + 1) % 2 * stretch * threads + thread;
    A* const upper_sums = shared.sums + row % 2 * share.across * threads + thread;
    A* const lower_sums = shared.sums + (row + 1) % 2 * share.across * threads + thread;
    // Where the neighbours below or beside are the pixels themselves: at the edges and where nothing is interpolated.
    const bool bottom_row = row == h - 1 || h == args.H;
    read_row(row + 1);
    const int begin = rows.start(row), length = rows.start(row + 1) - begin, parts = (length + kRows - 1) / kRows;
    for (int part = 0; part < parts; ++part) {
      const int top = begin + length * part / parts, count = begin + length * (part + 1) / parts - top;
      A lambda[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) lambda[i] = rows.weight_of_next(min(top + i, rows.size - 1));
      for (int first = left_x; first < right_x; first += kColumns<A>) {
        const int size = min(right_x - first, kColumns<A>);
        __syncthreads();
        for (int i = thread; i < size; i += threads) {
          const int x = first + i;
          const int of = columns.at(x).low;
          const A greatest[4] = {most_of(of, 0), most_of(of, 1), most_of(of, 2), most_of(of, 3)};
          fill_column<T>(args, share, shared, smoothing, whole, lambda, count, (n * args.H + top) * args.W + x,
                         first_class, greatest, {columns.weight_of_next(x), 0, 0, 0, columns.at(x).low, 0u}, i);
        }
        __syncthreads();
        if (!active) continue;

        int cell = -1;
        A top_left = 0, top_right = 0, bottom_left = 0, bottom_right = 0, sums[4] = {};
        const auto leave = [&] {
          const int j = cell - own_column;
          const bool has_right = j + 1 < share.across && w != args.W;  // NaN times 0 is none
          if (j >= 0) upper_sums[j * threads] += sums[0];
          if (has_right) upper_sums[(j + 1) * threads] += sums[1];
          if (j >= 0 && !bottom_row) lower_sums[j * threads] += sums[2];
          if (has_right && !bottom_row) lower_sums[(j + 1) * threads] += sums[3];
          sums[0] = sums[1] = sums[2] = sums[3] = 0;
        };
        const int end = min(own_right - first, size);
        for (int number = max(own_left - first, 0); number < end; ++number) {
          const Column<A> column = shared.columns[number];
          if (column.cell != cell) {
            if (cell >= 0) leave();
            cell = column.cell;
            const int at = (cell - own_column + 1) * threads;
            top_left = upper[at], top_right = upper[at + threads];
            bottom_left = lower[at], bottom_right = lower[at + threads];
          }
          A total = 0, lower_total = 0;  // of gradients, and of these times lambda
          if (!is_finite(column.reference)) {
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
              const int64_t pixel = (n * args.H + top + i) * args.W + first + number;
              const int target = target_at(args, pixel);
              if (target == kIgnored) continue;
              const Terms<A> terms = terms_of<T>(args, pixel, target, smoothing, whole);
              const A bottom = rows.weight_of_next(top + i);
              const A around[4] = {most_of(cell, 0), most_of(cell, 1), most_of(cell, 2), most_of(cell, 3)};
              const bool is_relative = has_fast_way(args) && has_fast_way(around);
              const A base = is_relative ? bound_of(around, column.right, bottom) : A(0);
              A logit[1];
              Corners<T>(args, n, first + number, top + i).template at<1>(k, logit, true);
              A grad = exponential(logit[0] - (base + terms.lse)) * terms.scale - terms.smooth * weight;
              if (target == k) grad -= terms.focus;
              total += grad;
              lower_total += bottom * grad;
            }
          } else {
            const A upper_power = (1 - column.right) * top_left + column.right * top_right;
            const A slope = (1 - column.right) * bottom_left + column.right * bottom_right - upper_power;
            const A start = upper_power - column.reference;
            total = -weight * column.smooth;
            lower_total = -weight * column.smooth_below;
            A factors[kRows];
            load(shared.factors + number * kRows, factors);
            const auto add = [&](auto choice) {
              constexpr bool minds_targets = decltype(choice)::value;
              [[maybe_unused]] int16_t targets[kRows];
              if constexpr (minds_targets) load(shared.targets + number * kRows, targets);
#pragma unroll
              for (int i = 0; i < kRows; i += kRows / 2) {
                if (i >= count) break;
#pragma unroll
                for (int j = i; j < i + kRows / 2; ++j) {
                  A grad = exp2_fast(lambda[j] * slope + start) * factors[j];
                  if constexpr (minds_targets) {
                    if (targets[j] == own) grad -= shared.focus[number * kRows + j];
                  }
                  total += grad;
                  lower_total += lambda[j] * grad;
                }
              }
            };
            if (column.targets & buckets) {
              add(std::true_type{});
            } else {
              add(std::false_type{});
            }
          }
          const A upper_total = total - lower_total;
          sums[0] += (1 - column.right) * upper_total;
          sums[1] += column.right * upper_total;
          sums[2] += (1 - column.right) * lower_total;
          sums[3] += column.right * lower_total;
        }
        if (cell >= 0) leave();
      }
    }
    __syncthreads();
    for_each_logit(share.across, [&](int of_class, int column, int slot, int j) {
      A& sum = shared.sums[(row % 2 * share.across + j) * threads + slot];
      if (row >= first_row && column < w) *pixel<T>(args.grad_logits, n, of_class, row, column) = narrow<T>(sum);
      sum = 0;
    });
  }
}

}  // namespace

int upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardArgs& args, void* stream) {
  if (!classes_fit_int(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Share share = make_share<A>(args);
    const int64_t blocks = args.N * divide_up(args.h, share.rows) * divide_up(args.w, share.groups * share.across) *
                           divide_up(args.K, share.classes);
    return launch(cross_entropy_backward<T>, blocks, share.threads, shared_bytes<A>(share), stream, args, share,
                  Smoothing<A>(args));
  });
}

}  // namespace pspnet_fast::cuda
