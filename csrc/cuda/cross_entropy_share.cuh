// What a block of the cross entropy's backward takes, and its shared memory.
#pragma once

#include "cross_entropy.cuh"

namespace pspnet_fast::cuda {

constexpr int kMostClasses = 256;  // of a block
constexpr int kMostAcross = 8;     // columns of logits of a thread
constexpr int kMostColumns = 32;   // and of a block
constexpr int kMostRows = 16;      // of logits of a block
constexpr int kLeast = 45;         // a column's log-sum-exps, below their bounds, may have lost 63 powers of 2 at most
constexpr int kBucket = kMostClasses / 32;
template <class A>
constexpr int kColumns = 512 / static_cast<int>(sizeof(A));  // of pixels, in shared memory at once

// What a column of pixels has in common; `smooth` and `smooth_below` are sums over it, the latter times lambda.
template <class A>
struct Column {
  A right;
  A reference;  // the greatest log-sum-exp, a power of 2 as logits are; NaN where the column goes the slow way
  A smooth, smooth_below;
  int cell;
  unsigned targets;  // a bit for each kBucket classes of the block: whether a pixel has one of them as its target
};

// A block takes `rows` rows of logits, and `groups` times `across` columns; a group of threads takes `across` of them,
// a thread a class there.
struct Share {
  int threads, groups, across, rows, classes;
};

// Shared memory of a block.
template <class A>
struct Shared {
  A *factors, *focus;  // [columns, kRows]: softmaxes times these are gradients; the targets' are less by focus
  A *powers, *sums;    // [2, across + 2, threads], [2, across, threads]: of two rows of logits, and their gradients
  A* greatest;         // [rows + 2, groups * across + 2]: logits
  Column<A>* columns;
  int16_t* targets;  // [columns, kRows]: among the block's classes, or none

  __device__ __forceinline__ Shared(unsigned char* bytes, const Share& share) {
    factors = reinterpret_cast<A*>(bytes);
    focus = factors + kColumns<A> * kRows;
    powers = focus + kColumns<A> * kRows;
    sums = powers + 2 * (share.across + 2) * share.threads;
    targets = reinterpret_cast<int16_t*>(sums + 2 * share.across * share.threads);
    columns = reinterpret_cast<Column<A>*>(targets + kColumns<A> * kRows);
    greatest = reinterpret_cast<A*>(columns + kColumns<A>);
  }
};

template <class A>
size_t shared_bytes(const Share& share) {
  const int greatest = (share.rows + 2) * (share.groups * share.across + 2);
  return (2 * kColumns<A> * kRows + 2 * (2 * share.across + 2) * share.threads + greatest) * sizeof(A) +
         kColumns<A> * (kRows * sizeof(int16_t) + sizeof(Column<A>));
}

template <class A>
Share make_share(const UpsampleCrossEntropyBackwardArgs& args) {
  Share best = {1, 0, 0, 0, 0};
  const int64_t chunks = divide_up(args.K, kMostClasses);
  const int classes = static_cast<int>(divide_up(args.K, chunks));
  for (int threads = kWarp; threads <= kMostClasses; threads += kWarp) {
    const int groups = threads / classes;
    if (groups * best.threads > best.groups * threads) best = {threads, groups, 0, 0, classes};
  }
  const int64_t longest = std::min<int64_t>(longest_interval(args.w, args.W, args.align_corners), kColumns<A>);
  best.across = static_cast<int>(std::max<int64_t>((kColumns<A> / longest - 1) / best.groups, 1));
  best.across = static_cast<int>(std::min<int64_t>({best.across, kMostAcross, divide_up(args.w, best.groups)}));
  best.rows = kMostRows;
  while (best.across > 1 && (best.groups * best.across > kMostColumns || shared_bytes<A>(best) > kSharedBytes)) {
    --best.across;
  }
  // The cells around a block are computed by its neighbours too: the more rows the better, but all of the GPU must
  // work.
  constexpr int64_t kBlocks = 512;
  const int64_t strips = std::max<int64_t>(args.N * divide_up(args.w, best.groups * best.across) * chunks, 1);
  best.rows = static_cast<int>(std::min<int64_t>(std::max<int64_t>(args.h * strips / kBlocks, 2), kMostRows));
  return best;
}

}  // namespace pspnet_fast::cuda
