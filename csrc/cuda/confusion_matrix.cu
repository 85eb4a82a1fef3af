// Counts pixels by target and prediction: integer atomics, whose sums are the same in every order.
#include <algorithm>

#include "common.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kRun = 8;                                                     // pixels of a thread, side by side
constexpr int64_t kFewest = int64_t{kThreads} * kRun, kMost = 8 * kFewest;  // of a block
constexpr int64_t kBlocks = 512;                                            // where the fewest allow it

// Pixels whose target or prediction is out of range do not count.
// Layout: dense prediction and target.
// A block takes `pixels` pixels, a thread kRun at a time, of which equal neighbours are one addition; it counts in
// shared memory where the matrix fits there. Traffic: prediction and target read once. Instructions a
// pixel: 53.
template <class Prediction, class Target>
__global__ void __launch_bounds__(kThreads)
    count_pixels(const __grid_constant__ ConfusionMatrixArgs args, int private_cells, int64_t pixels) {
  PSP_DYNAMIC_SHARED(unsigned int, own);  // [K, K]
  auto* const counts = reinterpret_cast<unsigned long long*>(args.counts);
  const int thread = static_cast<int>(threadIdx.x);
  for (int cell = thread; cell < private_cells; cell += kThreads) own[cell] = 0;
  __syncthreads();

  const auto* const prediction = static_cast<const Prediction*>(args.prediction);
  const auto* const target = static_cast<const Target*>(args.target);
  const auto add = [&](int64_t cell, unsigned int count) {
    if (cell < 0) return;
    if (private_cells > 0) {
      atomicAdd(own + cell, count);
    } else {
      atomicAdd(counts + cell, static_cast<unsigned long long>(count));
    }
  };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * pixels, last = min(first + pixels, args.pixels);
  for (int64_t i = first + thread * kRun; i < last; i += kFewest) {
    int64_t rows[kRun], columns[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      rows[j] = i + j < last ? static_cast<int64_t>(target[i + j]) : -1;
      columns[j] = i + j < last ? static_cast<int64_t>(prediction[i + j]) : -1;
    }
    int64_t cell = -1;  // none
    unsigned int count = 0;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int64_t row = rows[j], column = columns[j];
      const bool counts_here = row != args.ignore_index && row >= 0 && row < args.K && column >= 0 && column < args.K;
      const int64_t next = counts_here ? row * args.K + column : -1;
      if (next != cell) {
        add(cell, count);
        cell = next;
        count = 0;
      }
      ++count;
    }
    add(cell, count);
  }
  __syncthreads();
  for (int cell = thread; cell < private_cells; cell += kThreads) {
    if (own[cell] != 0) atomicAdd(counts + cell, static_cast<unsigned long long>(own[cell]));
  }
}

}  // namespace

int confusion_matrix(const ConfusionMatrixArgs& args, void* stream) {
  const bool fits = args.K <= 4096 && args.K * args.K * sizeof(unsigned int) <= kSharedBytes;
  const int private_cells = fits ? static_cast<int>(args.K * args.K) : 0;
  const int64_t share = divide_up(divide_up(args.pixels, kBlocks), kFewest) * kFewest;
  const int64_t pixels = std::min(share, kMost);
  return dispatch_int(args.prediction_type, [&](auto prediction) {
    return dispatch_int(args.target_type, [&](auto target) {
      return launch(count_pixels<decltype(prediction), decltype(target)>, divide_up(args.pixels, pixels), kThreads,
                    private_cells * sizeof(unsigned int), stream, args, private_cells, pixels);
    });
  });
}

}  // namespace pspnet_fast::cuda
