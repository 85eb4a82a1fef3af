// A convolution's weight taken apart by its input channels, into what a convolution and pyramid_reduce take, and put
// together again for the gradient.
#include "common.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kChannels = 64, kTaps = 32;  // of a tile, at most

// A block takes a tile of one output channel and one part, by way of shared memory, so that both sides are read and
// written as they lie. Traffic: each element once. Element by element: the convolution after it takes far longer.
template <class T, class U, bool kForward>
__global__ void __launch_bounds__(kThreads)
    split_weight(const __grid_constant__ PyramidSplitWeightArgs args, int dense_tiles, int level_tiles, int tap_tiles) {
  PSP_SHARED(U, tile, kChannels * (kTaps + 1));
  const int tiles = dense_tiles + static_cast<int>(args.L) * level_tiles;
  const int t0 = static_cast<int>(blockIdx.x) % tap_tiles * kTaps;
  const int index = static_cast<int>(blockIdx.x) / tap_tiles % tiles;
  const int64_t o = static_cast<int>(blockIdx.x) / tap_tiles / tiles;
  const bool dense = index < dense_tiles;
  const int level = dense ? 0 : (index - dense_tiles) / level_tiles;
  const int c0 = (dense ? index : (index - dense_tiles) % level_tiles) * kChannels;
  const int64_t first = (dense ? args.first_dense : args.first_level + level * args.R) + c0;
  const int64_t part = dense ? args.dense : args.R, C = args.dense + args.L * args.R;
  const int channels = static_cast<int>(min(int64_t{kChannels}, part - c0));
  const int taps = static_cast<int>(min(int64_t{kTaps}, args.taps - t0));

  T* const weight = static_cast<T*>(args.weight);
  U* const target = static_cast<U*>(dense ? args.dense_weight : args.matrices);
  const auto of_weight = [&](int c, int t) -> T& {
    return args.channels_last ? weight[(o * args.taps + t0 + t) * C + first + c]
                              : weight[(o * C + first + c) * args.taps + t0 + t];
  };
  const auto of_part = [&](int c, int t) -> U& {
    if (!dense) return target[((level * args.taps + t0 + t) * args.O + o) * part + c0 + c];
    return args.channels_last ? target[(o * args.taps + t0 + t) * part + c0 + c]
                              : target[(o * part + c0 + c) * args.taps + t0 + t];
  };
  const auto for_elements = [&](bool by_channels, const auto& f) {  // in the order of memory
    for (int i = static_cast<int>(threadIdx.x); i < channels * taps; i += kThreads) {
      if (by_channels) {
        f(i % channels, i / channels);
      } else {
        f(i / taps, i % taps);
      }
    }
  };
  const bool weight_by_channels = args.channels_last, part_by_channels = args.channels_last || !dense;

  if constexpr (kForward) {
    for_elements(weight_by_channels, [&](int c, int t) {
      tile[c * (kTaps + 1) + t] = narrow<U>(static_cast<acc_t<U>>(widen(of_weight(c, t))));
    });
  } else {
    for_elements(part_by_channels, [&](int c, int t) { tile[c * (kTaps + 1) + t] = of_part(c, t); });
  }
  __syncthreads();
  if constexpr (kForward) {
    for_elements(part_by_channels, [&](int c, int t) { of_part(c, t) = tile[c * (kTaps + 1) + t]; });
  } else {
    for_elements(weight_by_channels, [&](int c, int t) {
      of_weight(c, t) = narrow<T>(static_cast<acc_t<T>>(widen(tile[c * (kTaps + 1) + t])));
    });
  }
}

template <bool kForward>
cudaError_t launch_split(const PyramidSplitWeightArgs& args, void* stream) {
  const int64_t dense_tiles = divide_up(args.dense, kChannels), level_tiles = divide_up(args.R, kChannels);
  const int64_t tap_tiles = divide_up(args.taps, kTaps);
  const int64_t blocks = args.O * (dense_tiles + args.L * level_tiles) * tap_tiles;
  const auto run = [&](auto weight, auto part) {
    return launch(split_weight<decltype(weight), decltype(part), kForward>, blocks, kThreads, 0, stream, args,
                  static_cast<int>(dense_tiles), static_cast<int>(level_tiles), static_cast<int>(tap_tiles));
  };
  if (args.weight_dtype == args.dtype) return dispatch(args.dtype, [&](auto zero) { return run(zero, zero); });
  return args.dtype == DType::kBFloat16 ? run(float{}, __nv_bfloat16{}) : run(float{}, __half{});
}

}  // namespace

int pyramid_split_weight(const PyramidSplitWeightArgs& args, void* stream) { return launch_split<true>(args, stream); }

int pyramid_split_weight_backward(const PyramidSplitWeightArgs& args, void* stream) {
  return launch_split<false>(args, stream);
}

}  // namespace pspnet_fast::cuda
