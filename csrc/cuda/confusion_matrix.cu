// Counts pixels by target and prediction: integer atomics, whose sums are the same in every order.
#include <algorithm>

#include "common.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kPixels = 1 << 14;  // of a block

// Pixels whose target or prediction is out of range do not count.
// Layout: dense prediction and target.
// A block takes kPixels pixels, threads stride over them; it counts in shared memory where the matrix fits there.
// Traffic: prediction and target read once.
template <class Prediction, class Target>
__global__ void __launch_bounds__(kThreads)
    count_pixels(const __grid_constant__ ConfusionMatrixArgs args, int private_cells) {
  PSP_DYNAMIC_SHARED(unsigned int, own);  // [K, K]
  auto* const counts = reinterpret_cast<unsigned long long*>(args.counts);
  const int thread = static_cast<int>(threadIdx.x);
  for (int cell = thread; cell < private_cells; cell += kThreads) own[cell] = 0;
  __syncthreads();

  const auto* const prediction = static_cast<const Prediction*>(args.prediction);
  const auto* const target = static_cast<const Target*>(args.target);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPixels;
  const int64_t last = min(first + kPixels, args.pixels);
  for (int64_t i = first + thread; i < last; i += kThreads) {
    const int64_t row = target[i], column = prediction[i];
    if (row == args.ignore_index || row < 0 || row >= args.K || column < 0 || column >= args.K) continue;
    if (private_cells > 0) {
      atomicAdd(own + (row * args.K + column), 1u);
    } else {
      atomicAdd(counts + (row * args.K + column), 1ull);
    }
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
  return dispatch_int(args.prediction_type, [&](auto prediction) {
    return dispatch_int(args.target_type, [&](auto target) {
      return launch(count_pixels<decltype(prediction), decltype(target)>, divide_up(args.pixels, kPixels), kThreads,
                    private_cells * sizeof(unsigned int), stream, args, private_cells);
    });
  });
}

}  // namespace pspnet_fast::cuda
