// What every kernel file needs: shared memory, 16-byte vectors, float arithmetic for each dtype, dispatch and launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "../kernels.h"

// Shared memory by two macros, so that the same sources run on a CPU (tests/cuda_on_cpu defines its own).
#ifndef PSP_SHARED
#define PSP_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define PSP_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char psp_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(psp_shared_bytes)
#endif

namespace pspnet_fast::cuda {

constexpr int kThreads = 256;               // threads of a block, unless its kernel says otherwise
constexpr size_t kSharedBytes = 48 * 1024;  // what every GPU gives a block without asking
constexpr int kWarp = 32;

// ptxas 13.0 takes more registers for the same code from sm_100 on: the kernels that have none to spare ask for fewer
// blocks a multiprocessor there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kNewer = true;
#else
constexpr bool kNewer = false;
#endif

// Arithmetic is in float, in double for double.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(acc_t<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte access

PSP_HOST_DEVICE bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// V values from or to memory in one or more 16-byte accesses; V == 1 is the scalar form. The pointer must be aligned.
template <class T, int V>
__device__ __forceinline__ void load(const T* from, T (&values)[V]) {
  if constexpr (V == 1) {
    values[0] = *from;
  } else {
    static_assert(V % kVector<T> == 0);
#pragma unroll
    for (int i = 0; i < V; i += kVector<T>) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(from + i);
      memcpy(static_cast<void*>(values + i), &bytes, 16);
    }
  }
}

enum class Memory { kDevice, kShared };

// To device memory by an intrinsic: nvcc takes plain 16-byte stores of computed values apart.
template <Memory memory = Memory::kDevice, class T, int V>
__device__ __forceinline__ void store(T* to, const T (&values)[V]) {
  if constexpr (V == 1) {
    *to = values[0];
  } else {
    static_assert(V % kVector<T> == 0);
#pragma unroll
    for (int i = 0; i < V; i += kVector<T>) {
      uint4 bytes;
      memcpy(&bytes, static_cast<const void*>(values + i), 16);
      uint4* const target = reinterpret_cast<uint4*>(to + i);
      if constexpr (memory == Memory::kShared) {
        *target = bytes;
      } else {
        __stwb(target, bytes);
      }
    }
  }
}

template <class T, int V>
__device__ __forceinline__ void store_shared(T* to, const T (&values)[V]) {
  store<Memory::kShared>(to, values);
}

// As above with conversion: memory holds T, registers hold the accumulator type.
template <class T, int V>
__device__ __forceinline__ void load_wide(const T* from, acc_t<T> (&values)[V]) {
  T raw[V];
  load(from, raw);
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = widen(raw[i]);
}

template <class T, int V>
__device__ __forceinline__ void store_narrow(T* to, const acc_t<T> (&values)[V]) {
  T raw[V];
#pragma unroll
  for (int i = 0; i < V; ++i) raw[i] = narrow<T>(values[i]);
  store(to, raw);
}

// The level of a cell.
__device__ __forceinline__ int level_of(const Levels& levels, int cell) {
  int level = 0;
  while (cell >= levels.first[level + 1]) ++level;
  return level;
}

// Pixel (y, x) of channel c of image n.
template <class T>
__device__ __forceinline__ T* pixel(const Image& image, int64_t n, int64_t c, int64_t y, int64_t x) {
  return static_cast<T*>(image.data) + n * image.stride_n + c * image.stride_c + y * image.stride_h +
         x * image.stride_w;
}

// Where what follows `count` numbers in shared memory may begin, on a 16-byte boundary.
PSP_HOST_DEVICE constexpr int64_t in_fours(int64_t count) { return (count + 3) / 4 * 4; }

PSP_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernels count channels and along an axis in int, over whole tensors in int64_t.
inline bool fits_int(const Levels& levels, int64_t C, int64_t H, int64_t W) {
  bool fits = C <= INT_MAX && H <= INT_MAX && W <= INT_MAX;
  for (int level = 0; level < levels.count; ++level) {
    fits = fits && (levels.bins_h[level] + int64_t{1}) * (H + 1) <= INT_MAX;
    fits = fits && (levels.bins_w[level] + int64_t{1}) * (W + 1) <= INT_MAX;
  }
  return fits;
}

// Of the levels' bins along an axis.
inline int most_bins(const int* bins, int levels) { return levels > 0 ? *std::max_element(bins, bins + levels) : 0; }

// Channels-last maps are read in 16-byte vectors of channels where every one of them starts on a 16-byte boundary.
template <class T>
bool vectors_of_channels(const Image& image, int64_t C) {
  constexpr int V = kVector<T>;
  return image.data == nullptr || (aligned(image.data) && C % V == 0 && (image.stride_c == 1 || C == 1) &&
                                   image.stride_n % V == 0 && image.stride_h % V == 0 && image.stride_w % V == 0);
}

// The element types that are compiled, by the bits of DType: all, but for tests whose builds take long.
#ifndef PSPNET_FAST_DTYPES
#define PSPNET_FAST_DTYPES 15
#endif
constexpr bool compiled(DType dtype) { return (PSPNET_FAST_DTYPES >> static_cast<int>(dtype) & 1) != 0; }

// Calls f with a value of the element type.
template <class F>
cudaError_t dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      if constexpr (compiled(DType::kFloat32)) return f(float{});
      break;
    case DType::kFloat64:
      if constexpr (compiled(DType::kFloat64)) return f(double{});
      break;
    case DType::kBFloat16:
      if constexpr (compiled(DType::kBFloat16)) return f(__nv_bfloat16{});
      break;
    case DType::kFloat16:
      if constexpr (compiled(DType::kFloat16)) return f(__half{});
      break;
  }
  return cudaErrorInvalidValue;
}

// Queues `blocks` blocks; none is no launch at all.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace pspnet_fast::cuda
