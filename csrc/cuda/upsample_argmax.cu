// The class of the greatest logit at every pixel of an upsampled map, and its probability.
#include "logits.cuh"

namespace pspnet_fast::cuda {
namespace {

// A running maximum over the classes, then, if asked for, the sum of exp(logit - greatest).
// Layout: logits of any strides, classes in 16-byte vectors (V > 1) where channels-last allows them.
// A block takes a tile of pixels, a thread one pixel.
// Traffic: classes and confidence written once; logits are read by all pixels around them, from the caches.
template <class T, class Class, int V>
__global__ void __launch_bounds__(kThreads) argmax_pixels(const __grid_constant__ UpsampleArgmaxArgs args) {
  const int K = static_cast<int>(args.K), H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const Pixel at = pixel_of_thread(H, W);
  if (at.x >= W || at.y >= H) return;
  const Corners<T> corners(args, at.n, at.x, at.y);
  const int64_t to = (at.n * H + at.y) * W + at.x;

  // Steps of a loop over classes: more would spill registers. Compilers for CPUs do not know the pragma.
  [[maybe_unused]] constexpr int kAtOnce = V == 1 && sizeof(acc_t<T>) == 4 ? 2 : 1;
  acc_t<T> best, values[V];
  int found;
  bool careful = false;
  for (;;) {
    best = 0, found = -1;
#pragma unroll kAtOnce
    for (int k = 0; k < K; k += V) {
      corners.template at<V>(k, values, careful);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        // As in torch.argmax, the first of equals wins, and NaN is the greatest.
        if (found < 0 || (best == best && !(values[v] <= best))) {
          best = values[v];
          found = k + v;
        }
      }
    }
    if (best == best || careful) break;
    careful = true;
  }
  static_cast<Class*>(args.classes)[to] = static_cast<Class>(found);

  if (args.confidence == nullptr) return;
  acc_t<T> sum = 0;
#pragma unroll kAtOnce
  for (int k = 0; k < K; k += V) {
    corners.template at<V>(k, values, careful);
#pragma unroll
    for (int v = 0; v < V; ++v) sum += exponential(values[v] - best);
  }
  static_cast<acc_t<T>*>(args.confidence)[to] = 1 / sum;
}

}  // namespace

int upsample_argmax(const UpsampleArgmaxArgs& args, void* stream) {
  if (!classes_fit_int(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = args.logits.stride_c == 1 && vectors_of_channels<T>(args.logits, args.K);
    const auto run = [&](auto byte) {
      using Class = decltype(byte);
      return launch(vectors ? argmax_pixels<T, Class, kVector<T>> : argmax_pixels<T, Class, 1>,
                    count_tiles(args.N, args.H, args.W), dim3(kTileX, kTileY), 0, stream, args);
    };
    return args.int_type == IntType::kUInt8 ? run(uint8_t{}) : run(int32_t{});
  });
}

}  // namespace pspnet_fast::cuda
