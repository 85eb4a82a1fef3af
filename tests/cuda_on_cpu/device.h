// What a CUDA source needs in order to compile with g++ and run on a CPU; force-included before each csrc/cuda/*.cu.
// launch.cpp runs the threads of a block as fibers; README.md says what that can prove. Only what the kernels use is
// here: a kernel that needs more fails to compile, and is added to.
#pragma once

#if defined(__CUDACC__)
#error "device.h stands in for nvcc: compile with g++"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>  // types of the host interface; nothing of it is linked

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

// ---- the runtime ------------------------------------------------------------------------------------------------
// `site` is the source line that asks, for messages.
namespace cuda_on_cpu {
void barrier(const char* site);
void warp_barrier(unsigned mask, const char* site);
// Every lane gives `value` of `bytes` bytes and takes that of lane `source`.
void exchange(unsigned mask, const void* value, void* result, unsigned bytes, int source, const char* site);
// Every lane gives 8 bytes and takes those of all 32.
void gather(const void* value, void* values, const char* site);
// Every lane gives its elements of a 16 x 16 and a 16 x 8 matrix, as PTX spreads them, and adds its part of their
// product.
struct Factors {
  float left[4][2], right[2][2];
};
void multiply(const Factors& own, float (&sums)[4], const char* site);
int lane();
void* dynamic_shared();
void* static_shared(const void* variable, size_t bytes, const char* site);
void check_device_memory(const void* pointer, const char* site);
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
// Asynchronous copies of the thread, in the order of their beginning.
struct AsyncCopy {
  void* to;
  const void* from;
  bool real;
  unsigned group;
};
void begin_copy(const AsyncCopy& copy);
void end_copy_group();
// Takes one that must be done when all but the last `groups` groups are; false: there is none.
bool take_copy(unsigned groups, AsyncCopy& copy);
// Tells a launch to who asked for it (cuda_on_cpu_observe); true if that has taken it over.
bool observed(const void* kernel, const cudaLaunchConfig_t& config, const void* parameters, size_t bytes);
}  // namespace cuda_on_cpu

#define PSP_STRING_(x) #x
#define PSP_STRING(x) PSP_STRING_(x)
#define PSP_SITE __FILE__ ":" PSP_STRING(__LINE__)

// ---- language ----------------------------------------------------------------------------------------------------
#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#define PSP_SHARED(type, name, count)    \
  static const char name##_variable = 0; \
  type* const name =                     \
      static_cast<type*>(::cuda_on_cpu::static_shared(&name##_variable, sizeof(type) * (count), PSP_SITE))
#define PSP_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::cuda_on_cpu::dynamic_shared())

// ---- barriers, warps, atomics ------------------------------------------------------------------------------------
#define __syncthreads() ::cuda_on_cpu::barrier(PSP_SITE)
#define __syncwarp() ::cuda_on_cpu::warp_barrier(~0u, PSP_SITE)
#define __shfl_xor_sync(mask, value, lanes) \
  ::cuda_on_cpu::shuffle(mask, value, ::cuda_on_cpu::lane() ^ (lanes), PSP_SITE)
#define __shfl_sync(mask, value, source) ::cuda_on_cpu::shuffle(mask, value, source, PSP_SITE)

namespace cuda_on_cpu {
template <class T>
T shuffle(unsigned mask, T value, int source, const char* site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  T result;
  exchange(mask, &value, &result, sizeof(T), source, site);
  return result;
}
}  // namespace cuda_on_cpu

template <class T>
  requires std::is_integral_v<T>  // float atomics would not be deterministic
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}

// ---- memory, arithmetic ------------------------------------------------------------------------------------------
#define __stwb(pointer, value) ::cuda_on_cpu::store_wide(pointer, value, PSP_SITE)

namespace cuda_on_cpu {
inline void store_wide(uint4* pointer, uint4 value, const char* site) {
  check_device_memory(pointer, site);
  *pointer = value;
}
}  // namespace cuda_on_cpu

// As the special function unit: the last bit is lost, and what is below the normal numbers.
#define PSP_EXP2(x, result) result = ::cuda_on_cpu::exp2(x)

namespace cuda_on_cpu {
inline float exp2(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : std::bit_cast<float>(std::bit_cast<unsigned>(result) & ~1u);
}
}  // namespace cuda_on_cpu

// ---- asynchronous copies, tensor cores (csrc/cuda/tensor_cores.cuh) ----------------------------------------------
#define PSP_TENSOR_CORES ::cuda_on_cpu

namespace cuda_on_cpu {
using SharedAddress = char*;
inline SharedAddress shared_address(void* pointer) { return static_cast<char*>(pointer); }

// Done when it is waited for, the latest that is allowed; until then what was there is lost, as it may be at once.
inline void copy_async(SharedAddress to, const void* from, bool real) {
  *reinterpret_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};  // NaN
  begin_copy({to, from, real, 0});
}
inline void end_of_copies() { end_copy_group(); }
template <unsigned n>
void wait_for_copies() {
  for (AsyncCopy copy; take_copy(n, copy);) {
    *static_cast<uint4*>(copy.to) = copy.real ? *static_cast<const uint4*>(copy.from) : uint4{};
  }
}

template <bool transposed>
void load_matrices(SharedAddress row, unsigned (&values)[4]) {
  const unsigned short* rows[32];
  gather(&row, rows, "load_matrices");
  for (int i = 0; i < 4; ++i) {
    unsigned short pair[2];
    for (int j = 0; j < 2; ++j) {
      const int other = lane() % 4 * 2 + j, own = lane() / 4;
      pair[j] = transposed ? rows[8 * i + other][own] : rows[8 * i + own][other];
    }
    std::memcpy(&values[i], pair, 4);
  }
}

template <class T>
void multiply_matrices(const unsigned (&left)[4], const unsigned* right, float (&sums)[4]) {
  T halves[6][2];
  std::memcpy(halves, left, 16);
  std::memcpy(halves + 4, right, 8);
  Factors own;
  for (int i = 0; i < 8; ++i) own.left[i / 2][i % 2] = halves[i / 2][i % 2];
  for (int i = 0; i < 4; ++i) own.right[i / 2][i % 2] = halves[4 + i / 2][i % 2];
  multiply(own, sums, "multiply_matrices");
}
}  // namespace cuda_on_cpu

template <class A, class B>
auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <class A, class B>
auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}

// ---- launches ----------------------------------------------------------------------------------------------------
namespace cuda_on_cpu {
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  alignas(16) unsigned char bytes[4096];  // the parameters as a GPU gets them
  size_t size = 0;
  const auto put = [&](const auto& value) {
    size = (size + alignof(decltype(value)) - 1) / alignof(decltype(value)) * alignof(decltype(value));
    std::memcpy(bytes + size, &value, sizeof(value));
    size += sizeof(value);
  };
  std::apply([&](const auto&... value) { (put(value), ...); }, values);
  if (observed(reinterpret_cast<const void*>(kernel), *config, bytes, size)) return cudaSuccess;
  return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
}
}  // namespace cuda_on_cpu
#define cudaLaunchKernelEx(config, ...) ::cuda_on_cpu::launch_kernel(config, __VA_ARGS__)
