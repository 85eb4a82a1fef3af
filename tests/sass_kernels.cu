// Small kernels with known results and counts, for tests/test_sass.py; one warp each.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// A loop, and lanes that part.
__global__ void sums(const float* from, float* to, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 32) sum += from[i];
  if (threadIdx.x % 2) sum = sqrtf(sum);
  to[threadIdx.x] = sum;
}

__global__ void in_double(const float* from, float* to, double factor) {
  to[threadIdx.x] = static_cast<float>(from[threadIdx.x] * factor);
}

__device__ uint32_t shared_at(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// d [16, 8] = a [16, 16] b [8, 16]^T + 1, the rows of a from `rows` on as zeros: cp.async, ldmatrix, mma.
__global__ void product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int rows) {
  constexpr int kPitch = 24;
  __shared__ __align__(16) __nv_bfloat16 shared_a[16 * kPitch], shared_b[8 * kPitch];
  const int lane = threadIdx.x, row = lane / 2, half = lane % 2 * 8;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_at(shared_a + row * kPitch + half)),
               "l"(a + row * 16 + half), "r"(row < rows ? 16 : 0));
  if (row < 8) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_at(shared_b + row * kPitch + half)),
                 "l"(b + row * 16 + half));
  }
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 0;");
  __syncthreads();
  uint32_t x[4], y[2];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_at(shared_a + lane % 16 * kPitch + lane / 16 * 8)));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(y[0]), "=r"(y[1])
               : "r"(shared_at(shared_b + lane % 8 * kPitch + lane / 8 % 2 * 8)));
  float c[4] = {1, 1, 1, 1};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

__global__ void lanes(const float* from, float* to, unsigned* votes) {
  const float x = from[threadIdx.x];
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  to[threadIdx.x] = power + __log2f(x) + __shfl_down_sync(~0u, x, 3) + 2 * __shfl_up_sync(~0u, x, 1) +
                    4 * __shfl_sync(~0u, x, 5) + 8 * __shfl_xor_sync(~0u, x, 9);
  votes[threadIdx.x] = __ballot_sync(~0u, x > 1) + __any_sync(~0u, x > 1.4f) + 2 * __all_sync(~0u, x > 0);
}

__global__ void pairs(const __nv_bfloat162* x, __nv_bfloat162* y, const __half2* u, __half2* v) {
  const int i = threadIdx.x;
  y[i] = __hfma2(x[i], x[i + 32], x[i + 64]);
  v[i] = __hfma2(u[i], u[i + 32], u[i + 64]);
}

// Bits as predicates, byte by byte, and a clamp that knows 0 as its lower end.
__global__ void bits(const int* x, const float* y, float* to) {
  const int bits = x[threadIdx.x];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (bits >> (24 + i) & 1) sum += y[threadIdx.x * 8 + i];
  }
  to[threadIdx.x] = sum + max(min(bits, 1000), 0);
}
