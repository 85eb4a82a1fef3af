// Copies to shared memory that run beside arithmetic, and the tensor cores; tests/cuda_on_cpu has its own of these.
// Below compute capability 8.0 the copies are plain, and nothing here multiplies (has_tensor_cores).
#pragma once

#include "common.cuh"

#ifdef PSP_TENSOR_CORES
namespace pspnet_fast::cuda {
using namespace PSP_TENSOR_CORES;
}
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PSP_SINCE_80(...)
#else
#define PSP_SINCE_80(...) asm volatile(__VA_ARGS__)
#endif

namespace pspnet_fast::cuda {

using SharedAddress = unsigned;  // in bytes

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  SharedAddress address = static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
  asm volatile("" : "+r"(address));  // kept in a register: found anew, it takes four instructions
  return address;
}

// 16 bytes to shared memory, some time before wait_for_copies returns; zeros, if not `real`.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool real) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  const uint4 bytes = real ? *static_cast<const uint4*>(from) : uint4{};
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bytes.x), "r"(bytes.y), "r"(bytes.z),
               "r"(bytes.w)
               : "memory");
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
#endif
}

// Ends a group of the thread's copies; wait_for_copies<n> waits for all but the last n groups.
__device__ __forceinline__ void end_of_copies() { PSP_SINCE_80("cp.async.commit_group;" :: : "memory"); }

template <int n>
__device__ __forceinline__ void wait_for_copies() {
  PSP_SINCE_80("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements: lane i gives the address of row i % 8 of matrix i / 8, and gets of each the
// elements 2 (i % 4) and the next of row i / 4; transposed, of column i / 4.
template <bool transposed>
__device__ __forceinline__ void load_matrices(SharedAddress row, unsigned (&values)[4]) {
  if constexpr (transposed) {
    PSP_SINCE_80("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(values[0]),
                 "=r"(values[1]), "=r"(values[2]), "=r"(values[3]) : "r"(row) : "memory");
  } else {
    PSP_SINCE_80("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(values[0]), "=r"(values[1]),
                 "=r"(values[2]), "=r"(values[3]) : "r"(row) : "memory");
  }
}

// sums [16, 8] += left [16, 16] right [16, 8], spread over the registers of a warp: lane i holds of `sums` rows i / 4
// and i / 4 + 8, columns 2 (i % 4) and the next.
#define PSP_MMA(type)                                                                                                \
  PSP_SINCE_80("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                                                           \
               "{%8, %9}, {%0, %1, %2, %3};" : "+f"(sums[0]),                                                        \
               "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), \
               "r"(right[0]), "r"(right[1]))
template <class T>
__device__ __forceinline__ void multiply_matrices(const unsigned (&left)[4], const unsigned* right, float (&sums)[4]);
template <>
__device__ __forceinline__ void multiply_matrices<__nv_bfloat16>(const unsigned (&left)[4], const unsigned* right,
                                                                 float (&sums)[4]) {
  PSP_MMA("bf16");
}
template <>
__device__ __forceinline__ void multiply_matrices<__half>(const unsigned (&left)[4], const unsigned* right,
                                                          float (&sums)[4]) {
  PSP_MMA("f16");
}

}  // namespace pspnet_fast::cuda
#endif

namespace pspnet_fast::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool has_tensor_cores = false;
#else
template <class T>
constexpr bool has_tensor_cores = sizeof(T) == 2;
#endif

}  // namespace pspnet_fast::cuda
