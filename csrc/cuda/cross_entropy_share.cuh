// What a block of the cross entropy's backward takes, and its shared memory.
#pragma once

#include "cross_entropy.cuh"

namespace pspnet_fast::cuda {

constexpr int kMostThreads = 256;  // of a block
constexpr int kMostClasses = 255;  // of a block: its numbers of classes are bytes
constexpr int kNoClass = 255;      // as one of those
constexpr int kMostAcross = 8;     // columns of logits of a thread
constexpr int kMostColumns = 32;   // and of a block
constexpr int kMostRows = 20;      // of logits of a block
constexpr int kLeast = 45;         // a pixel's log-sum-exp, below its bound, may have lost 63 powers of 2 at most
template <class A>
constexpr int kColumns = 512 / static_cast<int>(sizeof(A));  // of pixels, in shared memory at once
// Threads that a multiprocessor has registers for, 96 each where they are not for float64, and the compiler's bound of
// a block's that says so.
template <class A>
constexpr int kResident = sizeof(A) == 8 ? 256 : 640;
template <class A>
constexpr int kBound = sizeof(A) == 8 ? 256 : 320;

// What the pixels of a column have in common, and of each the number of its target among the block's classes.
template <class A>
struct alignas(16) Column {
  A left, right;  // weights of the logits beside it
  unsigned targets[kRows / 4];

  __device__ __forceinline__ unsigned char& target(int i) { return reinterpret_cast<unsigned char*>(targets)[i]; }
};

// A block takes `rows` rows of logits, and `groups` times `across` columns; a group of threads takes `across` of them,
// a thread a class there.
struct Share {
  int threads, groups, across, rows, classes;
};

// Shared memory of a block.
template <class A>
struct Shared {
  A* factors;        // [columns, 2, kRows]: exponentials times these are gradients, and these times lambda
  A* focus;          // [columns, kRows]: what the targets' gradients are less by
  A* smooth;         // [columns, 2]: sums of smooth over a column, and of these times lambda
  A *powers, *sums;  // [2, across + 2, threads], [2, across, threads]: of two rows of logits, and their gradients
  A* greatest;       // [rows + 2, groups * across + 2]: logits
  Column<A>* columns;
  int* starts;              // [groups * across + 2]: the first pixels of the cells
  unsigned* slow_pixels;    // how many went the slow way so far
  unsigned char* slow;      // [columns, kRows]: whether a pixel does
  unsigned char* group_of;  // [threads]: the group that a slot, a thread's place, belongs to

  __device__ __forceinline__ Shared(unsigned char* bytes, const Share& share) {
    columns = reinterpret_cast<Column<A>*>(bytes);
    factors = reinterpret_cast<A*>(columns + kColumns<A>);
    focus = factors + kColumns<A> * kRows * 2;
    smooth = focus + kColumns<A> * kRows;
    powers = smooth + kColumns<A> * 2;
    sums = powers + 2 * (share.across + 2) * share.threads;
    greatest = sums + 2 * share.across * share.threads;
    starts = reinterpret_cast<int*>(greatest + (share.rows + 2) * (share.groups * share.across + 2));
    slow_pixels = reinterpret_cast<unsigned*>(starts + share.groups * share.across + 2);
    slow = reinterpret_cast<unsigned char*>(slow_pixels + 1);
    group_of = slow + kColumns<A> * kRows;
  }
};

template <class A>
size_t shared_bytes(const Share& share) {
  const int all = share.groups * share.across + 2;
  return kColumns<A> * (sizeof(Column<A>) + (3 * kRows + 2) * sizeof(A) + kRows) +
         (2 * (2 * share.across + 2) * share.threads + (share.rows + 2) * all) * sizeof(A) + (all + 1) * sizeof(int) +
         share.threads;
}

// How long blocks of so many rows and columns of logits keep the busiest multiprocessor of a GPU. A block computes the
// cells around its logits too. A multiprocessor with few threads is slower, as it is in the end.
template <class A>
double cost_of(const UpsampleCrossEntropyBackwardArgs& args, const Share& share, int64_t chunks) {
  constexpr int64_t kProcessors = 132;  // of an H100
  constexpr double kBusy = 512;
  const int64_t down = divide_up(args.h, share.rows), across = divide_up(args.w, share.groups * share.across);
  const int64_t queued = divide_up(args.N * down * across * chunks, kProcessors);
  const int64_t resident = std::max(kResident<A> / share.threads, 1);
  const auto time_of = [&](int64_t blocks) { return std::max(static_cast<double>(blocks), kBusy / share.threads); };
  const double blocks = static_cast<double>(queued / resident) * time_of(resident) +
                        (queued % resident > 0 ? time_of(queued % resident) : 0);
  return blocks * (share.rows + 1) * (share.across + 1);
}

template <class A>
Share make_share(const UpsampleCrossEntropyBackwardArgs& args) {
  Share best = {1, 0, 0, 1, 0};
  const int64_t chunks = divide_up(args.K, kMostClasses);
  const int classes = static_cast<int>(divide_up(args.K, chunks));
  for (int threads = kWarp; threads <= kMostThreads; threads += kWarp) {
    const int groups = threads / classes;
    if (groups * best.threads > best.groups * threads) best = {threads, groups, 1, 1, classes};
  }
  const int64_t longest = std::min<int64_t>(longest_interval(args.w, args.W, args.align_corners), kColumns<A>);
  const int64_t most_across = std::min<int64_t>({(kColumns<A> / longest - 1) / best.groups, kMostAcross,
                                                 kMostColumns / best.groups, divide_up(args.w, best.groups)});
  double least = cost_of<A>(args, best, chunks);
  for (int across = 1; across <= std::max<int64_t>(most_across, 1); ++across) {
    for (int rows = 1; rows <= std::min<int64_t>(kMostRows, args.h); ++rows) {
      Share share = best;
      share.across = across, share.rows = rows;
      const double cost = cost_of<A>(args, share, chunks);
      if (cost < least && shared_bytes<A>(share) <= kSharedBytes) least = cost, best = share;
    }
  }
  return best;
}

}  // namespace pspnet_fast::cuda
