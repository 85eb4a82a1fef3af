// Gradient of the cross entropy of bilinearly upsampled logits (cross_entropy.cuh).
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
                                                    int target, acc_t<T> lse, Smoothing<acc_t<T>> smoothing,
                                                    Whole<acc_t<T>> whole) {
  if (target == kIgnored) return {lse, 0, 0, 0};
  if (target == kUnknown) return {lse, 1, 0, 0};  // NaN, for so is lse
  const acc_t<T> grad =
      args.reduction == Reduction::kNone ? static_cast<const acc_t<T>*>(args.grad_loss)[pixel] : whole.factor;
  const acc_t<T> focus = grad * smoothing.focus * weight_of<T>(args, target);
  return {lse, focus + grad * whole.smooth_total, focus, grad * smoothing.share};
}

template <class A>
__device__ __forceinline__ A sum_of_column(A value) {
  for (int lanes = kRows / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// Pixels of a map between two rows of logits: `rows` rows from `top` on, `columns` columns from `left` on.
struct Stripe {
  int64_t n;
  int top, rows, left, columns;
};

// The stripe's pixels into shared memory, a thread a pixel, kRows of them a column.
// greatest_of(column of logits, corner) are those of a cell.
template <class T, class F>
__device__ __forceinline__ void fill_columns(const UpsampleCrossEntropyBackwardArgs& args, const Share& share,
                                             const Shared<acc_t<T>>& shared, Smoothing<acc_t<T>> smoothing,
                                             Whole<acc_t<T>> whole, const Stripe& stripe, const Axis<T>& rows,
                                             const Axis<T>& columns, int first_class, F greatest_of) {
  using A = acc_t<T>;
  constexpr int kPixels = 3;  // of a thread whose loads are on their way at once
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, i = thread % kRows;
  const A lambda = rows.weight_of_next(min(stripe.top + i, rows.size - 1));
  for (int first = thread; first - lane < stripe.columns * kRows; first += kPixels * share.threads) {
    int64_t pixels[kPixels];
    int targets[kPixels];
    A lse[kPixels];
#pragma unroll
    for (int b = 0; b < kPixels; ++b) {
      const int number = (first + b * share.threads) / kRows;
      const bool is_pixel = number < stripe.columns && i < stripe.rows;
      pixels[b] = is_pixel ? (stripe.n * args.H + stripe.top + i) * args.W + stripe.left + number : -1;
      lse[b] = static_cast<const A*>(args.lse)[is_pixel ? pixels[b] : 0];
    }
    targets_of(args, pixels, targets);
#pragma unroll
    for (int b = 0; b < kPixels; ++b) {
      const int to = first + b * share.threads, number = to / kRows;
      if (to - lane >= stripe.columns * kRows) break;
      const int x = stripe.left + min(number, stripe.columns - 1);
      const int cell = columns.at(x).low;
      const A right = columns.weight_of_next(x);
      const A around[4] = {greatest_of(cell, 0), greatest_of(cell, 1), greatest_of(cell, 2), greatest_of(cell, 3)};
      Terms<A> terms = terms_of<T>(args, pixels[b], targets[b], lse[b], smoothing, whole);
      if (!has_fast_way(args)) terms.lse -= bound_of(around, right, lambda);
      A factor = terms.scale * exponential(-terms.lse);
      const bool is_fast =
          args.K > 1 && has_fast_way(around) && terms.lse >= -kLeast && is_finite(terms.lse) && is_finite(factor);
      const bool is_slow = targets[b] != kIgnored && !is_fast;
      if (!is_fast || targets[b] == kIgnored) factor = 0, terms.smooth = 0;
      if (smoothing.share > 0) {
        const A smooth = sum_of_column(terms.smooth), below = sum_of_column(lambda * terms.smooth);
        if (i < 2 && number < stripe.columns) shared.smooth[2 * number + i] = i == 0 ? smooth : below;
      }
      if (number >= stripe.columns) continue;
      const int target = targets[b] - first_class;
      const bool is_mine = targets[b] >= 0 && is_fast && target >= 0 && target < share.classes;
      A* const factors = shared.factors + 2 * kRows * number;
      factors[i] = factor, factors[kRows + i] = lambda * factor;
      shared.focus[to] = terms.focus;
      shared.slow[to] = is_slow;
      shared.columns[number].target(i) = static_cast<unsigned char>(is_mine ? target : kNoClass);
      if (i == 0) shared.columns[number].left = 1 - right, shared.columns[number].right = right;
      if (is_slow) atomicAdd(shared.slow_pixels, 1u);
    }
  }
}

// A bit for each of the words' bytes that is `byte`.
__device__ __forceinline__ unsigned bytes_that_are(unsigned byte, const unsigned (&words)[2]) {
  constexpr unsigned kHighest = 0x80808080u;
  unsigned found[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned other = words[i] ^ (byte * 0x01010101u);
    const unsigned zeros = ~(((other & ~kHighest) + ~kHighest) | other) & kHighest;  // highest bits of bytes that are 0
    found[i] = (zeros >> 7) * 0x10204080u >> 28;
  }
  return found[0] | found[1] << 4;
}

// Gradient of the logits. The pixels of a cell, what lies between two rows and two columns of logits, are computed with
// the cell's corners in registers, and go to the gradients of the four. A pixel's softmaxes are exponentials of the
// same powers as in the forward, times a factor of the pixel. Where that factor is too large, or unknown, it goes the
// slow way: it is no part of the loop over columns, and added after it. Layout: logits and grad_logits of any strides.
// A block takes share.rows rows of logits and the cells around them, from top to bottom.
// Traffic: each pixel's terms and logits are read by the blocks whose cells hold it (1.2 times at N = 16).
// Instructions a class and pixel, at 8 pixels a column: 4, and 35 a column, 25 more where a warp has its targets; with
// halo, terms of pixels and idle lanes 22 for K = 150.
template <class T>
__global__ void __launch_bounds__(kBound<acc_t<T>>, kNewer ? 1 : kResident<acc_t<T>> / kBound<acc_t<T>>)
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

  // Threads share a row of logits: planar ones over columns first, the others over classes.
  const int lanes = args.logits.stride_c == 1 ? 1 : stretch, lines = threads / lanes;
  const int slots = thread < lines * lanes ? share.groups * share.classes : 0;
  struct Place {
    int slot, j;
  };
  const Place first_place = {thread / lanes, thread % lanes};
  const auto step = [&](Place& place, int end) {
    place.j += lanes;
    if (place.j >= end) place.j = first_place.j, place.slot += lines;
  };
  const auto class_of = [&](int slot) { return first_class + slot - shared.group_of[slot] * share.classes; };
  const auto column_of = [&](const Place& place) {
    return first_column + shared.group_of[place.slot] * share.across + place.j;
  };
  const int first_cell = max(first_row - 1, 0);
  const auto read_row = [&](int row) {
    constexpr int kLogits = 4;  // of a thread that are on their way at once
    for (Place to = first_place; to.slot < slots;) {
      T logits[kLogits];
      Place from = to;
#pragma unroll
      for (int b = 0; b < kLogits; ++b) {
        const Place place = {min(from.slot, slots - 1), from.j};
        const int of_class = min(class_of(place.slot), static_cast<int>(args.K) - 1);
        const int column = min(max(column_of(place) - 1, 0), w - 1);
        logits[b] = *pixel<const T>(args.logits, n, of_class, min(row, h - 1), column);
        step(from, stretch);
      }
#pragma unroll
      for (int b = 0; b < kLogits; ++b, step(to, stretch)) {
        if (to.slot >= slots) break;
        const A most = shared.greatest[(row - first_cell) * all + column_of(to) - first_column];
        shared.powers[(row % 2 * stretch + to.j) * threads + to.slot] = power_of(widen(logits[b]), most);
      }
    }
  };
  const int positions = (share.rows + 2) * all;
  const Patch patch = {
      first_cell, first_column - 1, share.rows + 2, all, thread, threads, max(kColumns<A> * kRows / positions, 1)};
  shared.group_of[thread] = static_cast<unsigned char>(group);
  patch.find_greatest<T>(args, n, shared.factors, shared.greatest);

  for (int i = thread; i < all; i += threads) shared.starts[i] = columns.start(first_column - 1 + i);
  for (int i = 0; i < 2 * share.across; ++i) shared.sums[i * threads + thread] = 0;
  if (thread == 0) *shared.slow_pixels = 0;
  read_row(first_cell);
  __syncthreads();
  const int left_x = shared.starts[0], right_x = shared.starts[all - 1];
  unsigned slow_pixels = 0;  // so far
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
      for (int first = left_x; first < right_x; first += kColumns<A>) {
        const int size = min(right_x - first, kColumns<A>);
        __syncthreads();
        fill_columns<T>(args, share, shared, smoothing, whole, {n, top, count, first, size}, rows, columns, first_class,
                        most_of);
        __syncthreads();
        if (!active) continue;

        A lambda[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) lambda[i] = rows.weight_of_next(min(top + i, rows.size - 1));
        // visit(cell, first and end of its columns, sums for its four logits)
        const auto for_each_cell = [&](auto visit) {
#pragma unroll 1
          for (int cell = max(own_column - 1, 0); cell < last_column; ++cell) {
            const int* const starts = shared.starts + cell - first_column + 1;
            const int from = max(starts[0] - first, 0), to = min(starts[1] - first, size), j = cell - own_column;
            if (from >= to) continue;
            A sums[4] = {};
            visit(cell, from, to, sums);
            const bool has_right = j + 1 < share.across && w != args.W;  // NaN times 0 is none
            if (j >= 0) upper_sums[j * threads] += sums[0];
            if (has_right) upper_sums[(j + 1) * threads] += sums[1];
            if (j >= 0 && !bottom_row) lower_sums[j * threads] += sums[2];
            if (has_right && !bottom_row) lower_sums[(j + 1) * threads] += sums[3];
          }
        };
        const auto add = [](const Column<A>& column, A total, A lower_total, A(&sums)[4]) {
          const A upper_total = total - lower_total;
          sums[0] += column.left * upper_total;
          sums[1] += column.right * upper_total;
          sums[2] += column.left * lower_total;
          sums[3] += column.right * lower_total;
        };
        for_each_cell([&](int cell, int from, int to, A(&sums)[4]) {
          const int at = (cell - own_column + 1) * threads;
          const A top_left = upper[at], top_right = upper[at + threads];
          const A bottom_left = lower[at], bottom_right = lower[at + threads];
#pragma unroll 1
          for (int number = from; number < to; ++number) {
            const Column<A> column = shared.columns[number];
            const Line<A> line(top_left, top_right, bottom_left, bottom_right, column.left, column.right);
            A total = 0, lower_total = 0;  // of gradients, and of these times lambda
            A factors[kRows], lower_factors[kRows];
            load(shared.factors + number * 2 * kRows, factors);
            load(shared.factors + (number * 2 + 1) * kRows, lower_factors);
#pragma unroll
            for (int half = 0; half < kRows; half += kRows / 2) {
              if (half >= count) break;
#pragma unroll
              for (int i = half; i < half + kRows / 2; ++i) {
                const A power = exp2_fast(line.at(lambda[i]));
                total += power * factors[i];
                lower_total += power * lower_factors[i];
              }
            }
            if (smoothing.share > 0) {
              total -= weight * shared.smooth[2 * number];
              lower_total -= weight * shared.smooth[2 * number + 1];
            }
            const unsigned mine = bytes_that_are(own, column.targets);
            if (mine != 0) {
              A focus[kRows];
              load(shared.focus + number * kRows, focus);
#pragma unroll
              for (int i = 0; i < kRows; ++i) {
                if ((mine >> i & 1) == 0) continue;
                total -= focus[i];
                lower_total -= lambda[i] * focus[i];
              }
            }
            add(column, total, lower_total, sums);
          }
        });
        if (*shared.slow_pixels == slow_pixels) continue;
        slow_pixels = *shared.slow_pixels;
        for_each_cell([&](int cell, int from, int to, A(&sums)[4]) {
#pragma unroll 1
          for (int number = from; number < to; ++number) {
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
              if (!shared.slow[number * kRows + i]) continue;
              const Column<A> column = shared.columns[number];
              const int64_t pixel = (n * args.H + top + i) * args.W + first + number;
              const int target = target_at(args, pixel);
              const A lse = static_cast<const A*>(args.lse)[pixel], bottom = rows.weight_of_next(top + i);
              const Terms<A> terms = terms_of<T>(args, pixel, target, lse, smoothing, whole);
              const A around[4] = {most_of(cell, 0), most_of(cell, 1), most_of(cell, 2), most_of(cell, 3)};
              const bool is_relative = has_fast_way(args) && has_fast_way(around);
              const A base = is_relative ? bound_of(around, column.right, bottom) : A(0);
              A logit[1];
              Corners<T>(args, n, first + number, top + i).template at<1>(k, logit, true);
              A grad = exponential(logit[0] - (base + terms.lse)) * terms.scale - terms.smooth * weight;
              if (target == k) grad -= terms.focus;
              add(column, grad, bottom * grad, sums);
            }
          }
        });
      }
    }
    __syncthreads();
    for (Place place = first_place; place.slot < slots; step(place, share.across)) {
      if (place.j >= share.across) continue;
      A& sum = shared.sums[(row % 2 * share.across + place.j) * threads + place.slot];
      const int of_class = class_of(place.slot), column = column_of(place);
      if (row >= first_row && column < w && of_class < args.K) {
        *pixel<T>(args.grad_logits, n, of_class, row, column) = narrow<T>(sum);
      }
      sum = 0;
    }
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
