// Adds the softmax of upsampled logits to a map of probabilities.
#include <type_traits>

#include "logits.cuh"

namespace pspnet_fast::cuda {
namespace {

// The greatest logit, then the sum of exponentials, then the additions; the logits are interpolated anew each time.
// Layout: logits and probabilities of any strides, logits in 16-byte vectors (V > 1) where channels-last allows them.
// A block takes a tile of pixels, a thread one pixel.
// Traffic: probabilities read and written once; logits are read by all pixels around them, from the caches.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) softmax_pixels(const __grid_constant__ UpsampleSoftmaxAccumulateArgs args) {
  const int K = static_cast<int>(args.K), H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const Pixel at = pixel_of_thread(H, W);
  if (at.x >= W || at.y >= H) return;
  const Corners<T> corners(args, at.n, args.mirrored ? W - 1 - at.x : at.x, at.y);

  // Two instances of the whole, since a flag would cost registers. False: nothing is added, the sum is NaN.
  const auto add = [&](auto chosen) {
    constexpr bool careful = decltype(chosen)::value;
    acc_t<T> values[V];
    corners.template at<V>(0, values, careful);
    acc_t<T> greatest = values[0], sum = 0;
    for (int k = 0; k < K; k += V) {
      corners.template at<V>(k, values, careful);
#pragma unroll
      for (int v = 0; v < V; ++v) greatest = values[v] > greatest ? values[v] : greatest;
    }
    for (int k = 0; k < K; k += V) {
      corners.template at<V>(k, values, careful);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += exponential(values[v] - greatest);
    }
    if (!careful && sum != sum) return false;
    const acc_t<T> scale = static_cast<acc_t<T>>(args.weight) / sum;
    for (int k = 0; k < K; k += V) {
      corners.template at<V>(k, values, careful);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        *pixel<acc_t<T>>(args.probabilities, at.n, k + v, at.y, at.x) += scale * exponential(values[v] - greatest);
      }
    }
    return true;
  };
  if (!add(std::false_type{})) add(std::true_type{});
}

}  // namespace

int upsample_softmax_accumulate(const UpsampleSoftmaxAccumulateArgs& args, void* stream) {
  if (!classes_fit_int(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = args.logits.stride_c == 1 && vectors_of_channels<T>(args.logits, args.K);
    return launch(vectors ? softmax_pixels<T, kVector<T>> : softmax_pixels<T, 1>, count_tiles(args.N, args.H, args.W),
                  dim3(kTileX, kTileY), 0, stream, args);
  });
}

}  // namespace pspnet_fast::cuda
