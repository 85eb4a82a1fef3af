// A convolution's weight taken apart by its input channels, into what a convolution and pyramid_reduce take, and put
// together again for the gradient.
#include <type_traits>

#include "common.cuh"

namespace pspnet_fast::cuda {
namespace {

constexpr int kRows = 4;                   // of channels that a thread has in flight
constexpr int kChannels = 256;             // of a tile by vectors
constexpr int kTile = 64, kTileTaps = 32;  // channels and taps of a tile by elements, at most

// Where channels c.. of the weight lie: in the dense part, or in that of a level.
struct Part {
  __device__ __forceinline__ Part(const PyramidSplitWeightArgs& args, int64_t c) {
    const int64_t in_dense = c - args.first_dense, in_levels = c - args.first_level;
    dense = in_dense >= 0 && in_dense < args.dense;
    level = dense ? 0 : static_cast<int>(in_levels / args.R);
    channel = dense ? in_dense : in_levels - level * args.R;
  }

  bool dense;
  int level;
  int64_t channel;
};

// A block's tile: channels of one output channel and one part.
struct Tile {
  bool dense;
  int level, channels;
  int64_t o, first, part;  // the tile's first channel of the part's
  int64_t in_weight;       // that of the weight's

  // Number `number` of the tiles of `size` channels, output channel by output channel, the dense part's before the
  // levels'.
  __device__ __forceinline__ Tile(const PyramidSplitWeightArgs& args, int number, int size, int dense_tiles,
                                  int level_tiles) {
    const int tiles = dense_tiles + static_cast<int>(args.L) * level_tiles, index = number % tiles;
    o = number / tiles;
    dense = index < dense_tiles;
    level = dense ? 0 : (index - dense_tiles) / level_tiles;
    first = static_cast<int64_t>(dense ? index : (index - dense_tiles) % level_tiles) * size;
    part = dense ? args.dense : args.R;
    channels = static_cast<int>(min(static_cast<int64_t>(size), part - first));
    in_weight = (dense ? args.first_dense : args.first_level + level * args.R) + first;
  }
};

template <class T, class U>
constexpr int kBoth = kVector<T> > kVector<U> ? kVector<T> : kVector<U>;  // elements that are whole vectors of both

template <class T, class U, int V>
__device__ __forceinline__ void convert(const T (&from)[V], U (&to)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = narrow<U>(static_cast<acc_t<U>>(widen(from[v])));
}

// A channels-last weight is rows of channels, of a tap each, and so are its parts. A thread copies a vector of channels
// of several rows. Traffic: each element once. Instructions a vector: 46.
template <class T, class U, bool kForward>
__global__ void __launch_bounds__(kThreads)
    split_rows(const __grid_constant__ PyramidSplitWeightArgs args, int row_blocks) {
  constexpr int V = kBoth<T, U>;
  using From = std::conditional_t<kForward, T, U>;
  using To = std::conditional_t<kForward, U, T>;
  const int64_t C = args.dense + args.L * args.R, rows = args.O * args.taps;
  const int64_t c = (static_cast<int64_t>(blockIdx.x / row_blocks) * kThreads + threadIdx.x) * V;
  if (c >= C) return;
  const Part part(args, c);
  const int64_t row = static_cast<int64_t>(blockIdx.x % row_blocks) * kRows;
  int64_t o = row / args.taps, t = row % args.taps;

  const From* from[kRows];
  To* to[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t whole = (row + r) * C + c;
    const int64_t own = part.dense ? (row + r) * args.dense + part.channel
                                   : ((part.level * args.taps + t) * args.O + o) * args.R + part.channel;
    void* const target = part.dense ? args.dense_weight : args.matrices;
    from[r] = static_cast<const From*>(kForward ? args.weight : target) + (kForward ? whole : own);
    to[r] = static_cast<To*>(kForward ? target : args.weight) + (kForward ? own : whole);
    if (++t == args.taps) t = 0, ++o;
  }
  From read[kRows][V];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row + r < rows) load(from[r], read[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row + r >= rows) break;
    To values[V];
    convert(read[r], values);
    store(to[r], values);
  }
}

// Otherwise the taps of a channel lie together, in the weight and in its dense part: that is copied, and the levels'
// parts change their order in shared memory, a block one output channel of one part. Traffic: each element once.
// Instructions a vector: 85.
template <class T, class U, bool kForward>
__global__ void __launch_bounds__(kThreads)
    split_planes(const __grid_constant__ PyramidSplitWeightArgs args, int dense_tiles, int level_tiles) {
  constexpr int V = kBoth<T, U>;
  using From = std::conditional_t<kForward, T, U>;
  using To = std::conditional_t<kForward, U, T>;
  PSP_DYNAMIC_SHARED(U, shared);
  const Tile tile(args, static_cast<int>(blockIdx.x), kChannels, dense_tiles, level_tiles);
  const int64_t C = args.dense + args.L * args.R;
  const int taps = static_cast<int>(args.taps), vectors = tile.channels * taps / V;
  T* const weight = static_cast<T*>(args.weight) + (tile.o * C + tile.in_weight) * taps;

  if (tile.dense) {
    U* const target = static_cast<U*>(args.dense_weight) + (tile.o * tile.part + tile.first) * taps;
    for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) {
      From read[V];
      To values[V];
      load(kForward ? reinterpret_cast<const From*>(weight) + i * V : reinterpret_cast<const From*>(target) + i * V,
           read);
      convert(read, values);
      store(kForward ? reinterpret_cast<To*>(target) + i * V : reinterpret_cast<To*>(weight) + i * V, values);
    }
    return;
  }
  const int of_tap = tile.channels / V;  // vectors
  const auto matrix = [&](int i) {
    const int t = i / of_tap;
    const int64_t row = (tile.level * args.taps + t) * args.O + tile.o;
    return static_cast<U*>(args.matrices) + row * tile.part + tile.first + (i - t * of_tap) * V;
  };
  const auto in_tile = [&](int i, int v) -> U& {
    const int t = i / of_tap;
    return shared[((i - t * of_tap) * V + v) * taps + t];
  };
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) {
    if constexpr (kForward) {
      T read[V];
      U values[V];
      load(weight + i * V, read);
      convert(read, values);
      store_shared(shared + i * V, values);
    } else {
      U read[V];
      load(matrix(i), read);
#pragma unroll
      for (int v = 0; v < V; ++v) in_tile(i, v) = read[v];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) {
    if constexpr (kForward) {
      U values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = in_tile(i, v);
      store(matrix(i), values);
    } else {
      U read[V];
      T values[V];
      load(shared + i * V, read);
      convert(read, values);
      store(weight + i * V, values);
    }
  }
}

// What is no multiple of a vector: a block takes a tile of one output channel and one part, by way of shared memory, so
// that both sides are read and written as they lie.
template <class T, class U, bool kForward>
__global__ void __launch_bounds__(kThreads) split_elements(const __grid_constant__ PyramidSplitWeightArgs args,
                                                           int dense_tiles, int level_tiles, int tap_tiles) {
  PSP_SHARED(U, shared, kTile * (kTileTaps + 1));
  const int t0 = static_cast<int>(blockIdx.x) % tap_tiles * kTileTaps;
  const Tile tile(args, static_cast<int>(blockIdx.x) / tap_tiles, kTile, dense_tiles, level_tiles);
  const int64_t C = args.dense + args.L * args.R;
  const int channels = tile.channels, taps = static_cast<int>(min(int64_t{kTileTaps}, args.taps - t0));

  T* const weight = static_cast<T*>(args.weight);
  U* const target = static_cast<U*>(tile.dense ? args.dense_weight : args.matrices);
  const auto of_weight = [&](int c, int t) -> T& {
    return args.channels_last ? weight[(tile.o * args.taps + t0 + t) * C + tile.in_weight + c]
                              : weight[(tile.o * C + tile.in_weight + c) * args.taps + t0 + t];
  };
  const auto of_part = [&](int c, int t) -> U& {
    const int64_t channel = tile.first + c;
    if (!tile.dense) return target[((tile.level * args.taps + t0 + t) * args.O + tile.o) * tile.part + channel];
    return args.channels_last ? target[(tile.o * args.taps + t0 + t) * tile.part + channel]
                              : target[(tile.o * tile.part + channel) * args.taps + t0 + t];
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
  const bool weight_by_channels = args.channels_last, part_by_channels = args.channels_last || !tile.dense;

  if constexpr (kForward) {
    for_elements(weight_by_channels, [&](int c, int t) {
      shared[c * (kTileTaps + 1) + t] = narrow<U>(static_cast<acc_t<U>>(widen(of_weight(c, t))));
    });
  } else {
    for_elements(part_by_channels, [&](int c, int t) { shared[c * (kTileTaps + 1) + t] = of_part(c, t); });
  }
  __syncthreads();
  if constexpr (kForward) {
    for_elements(part_by_channels, [&](int c, int t) { of_part(c, t) = shared[c * (kTileTaps + 1) + t]; });
  } else {
    for_elements(weight_by_channels, [&](int c, int t) {
      of_weight(c, t) = narrow<T>(static_cast<acc_t<T>>(widen(shared[c * (kTileTaps + 1) + t])));
    });
  }
}

template <class T, class U, bool kForward>
cudaError_t launch_split(const PyramidSplitWeightArgs& args, void* stream) {
  constexpr int V = kBoth<T, U>;
  const auto launch_tiles = [&](auto kernel, int tile, int64_t tap_tiles, size_t shared, auto... more) {
    const int64_t dense_tiles = divide_up(args.dense, tile), level_tiles = divide_up(args.R, tile);
    return launch(kernel, args.O * (dense_tiles + args.L * level_tiles) * tap_tiles, kThreads, shared, stream, args,
                  static_cast<int>(dense_tiles), static_cast<int>(level_tiles), more...);
  };
  const int64_t C = args.dense + args.L * args.R, shared = kChannels * args.taps * static_cast<int64_t>(sizeof(U));
  const bool vectors = aligned(args.weight) && aligned(args.dense_weight) && aligned(args.matrices) &&
                       args.dense % V == 0 && args.R % V == 0;
  if (vectors && args.channels_last) {
    const int64_t row_blocks = divide_up(args.O * args.taps, kRows);
    if (row_blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    return launch(split_rows<T, U, kForward>, row_blocks * divide_up(C, V * kThreads), kThreads, 0, stream, args,
                  static_cast<int>(row_blocks));
  }
  if (vectors && shared <= static_cast<int64_t>(kSharedBytes)) {
    return launch_tiles(split_planes<T, U, kForward>, kChannels, 1, static_cast<size_t>(shared));
  }
  const int64_t tap_tiles = divide_up(args.taps, kTileTaps);
  return launch_tiles(split_elements<T, U, kForward>, kTile, tap_tiles, 0, static_cast<int>(tap_tiles));
}

template <bool kForward>
cudaError_t split(const PyramidSplitWeightArgs& args, void* stream) {
  if (args.weight_dtype == args.dtype) {
    return dispatch(args.dtype,
                    [&](auto zero) { return launch_split<decltype(zero), decltype(zero), kForward>(args, stream); });
  }
  return args.dtype == DType::kBFloat16 ? launch_split<float, __nv_bfloat16, kForward>(args, stream)
                                        : launch_split<float, __half, kForward>(args, stream);
}

}  // namespace

int pyramid_split_weight(const PyramidSplitWeightArgs& args, void* stream) { return split<true>(args, stream); }

int pyramid_split_weight_backward(const PyramidSplitWeightArgs& args, void* stream) {
  return split<false>(args, stream);
}

}  // namespace pspnet_fast::cuda
