// One small kernel and eleven bugs, one of which the argument plants: which mode of the harness finds which is the
// test.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

#include "cuda/tensor_cores.cuh"

namespace {

enum Bug {
  kNone,
  kNoBarrierAfterTable,   // another thread's entry is read before it is written
  kNoBarrierBeforeTotal,  // another warp's sum is read before it is written
  kNoBarrierAtLoopEnd,    // another thread still reads what the next round overwrites
  kDeviceStoreToShared,   // a store instruction for device memory, with an address in shared memory
  kReadPastShared,
  kWritePastOutput,
  kBlocksShareAWord,  // every block writes the same word; the value is the same, so results stay right
  kDivergentBarrier,
  kShuffleInHalfAWarp,
  kMisalignedVector,
  kCopyNotWaitedFor,
  kBugs
};

constexpr int kRow = 128, kHalf = 64;  // a block takes a row, its 64 threads two halves of it

// out[row] = sum over i of in[row, i] * ((63 - i % 64) % 7); copy = in; *ran = 1.
__global__ void weighted_sums(const float* in, float* out, float* copy, int* ran, int rows, int bug) {
  PSP_SHARED(int, factors, kHalf);
  PSP_SHARED(float, warp_sums, 2);
  PSP_SHARED(float, staged, kRow);
  PSP_DYNAMIC_SHARED(float, tile);
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.x), lane = thread % 32;
  factors[thread] = thread % 7;
  if (bug != kNoBarrierAfterTable) __syncthreads();
  const int factor = factors[kHalf - 1 - thread];

  float sum = 0;
  for (int half = 0; half < 2; ++half) {
    tile[thread] = in[row * kRow + half * kHalf + thread];
    __syncthreads();
    sum += static_cast<float>(factors[kHalf - 1 - thread] == factor ? factor : -1) *
           tile[bug == kReadPastShared ? thread + 1 : thread ^ 1];
    if (bug != kNoBarrierAtLoopEnd) __syncthreads();
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane == 0) warp_sums[thread / 32] = sum;
  if (bug != kNoBarrierBeforeTotal) __syncthreads();
  if (thread == 0) out[row] = warp_sums[0] + warp_sums[1];

  if (thread < kRow / 4) {
    float values[4];
    const int misplaced = bug == kMisalignedVector && thread < kRow / 4 - 1 ? 1 : 0;
    pspnet_fast::cuda::load(in + row * kRow + thread * 4 + misplaced, values);
    pspnet_fast::cuda::copy_async(pspnet_fast::cuda::shared_address(staged + thread * 4), in + row * kRow + thread * 4,
                                  true);
    pspnet_fast::cuda::end_of_copies();
    if (bug != kCopyNotWaitedFor) pspnet_fast::cuda::wait_for_copies<0>();
    if (misplaced == 0) pspnet_fast::cuda::store(copy + row * kRow + thread * 4, values);
    if (misplaced == 0 && staged[thread * 4 + 3] != values[3]) copy[row * kRow + thread * 4] = -1;
    if (bug == kDeviceStoreToShared) pspnet_fast::cuda::store(tile + thread / 2 * 4, values);
    if (misplaced == 1) {
      for (int i = 0; i < 4; ++i) copy[row * kRow + thread * 4 + i] = in[row * kRow + thread * 4 + i];
    }
  }
  if (bug == kWritePastOutput && row == rows - 1 && thread == 0) out[rows] = 0;
  if (thread == 0 && (row == 0 || bug == kBlocksShareAWord)) *ran = 1;
  if (bug == kDivergentBarrier && thread < 32) __syncthreads();
  if (bug == kShuffleInHalfAWarp && lane < 16) sum = __shfl_xor_sync(~0u, sum, 1);
}

float factor_of(int i) { return static_cast<float>((kHalf - 1 - (i % kHalf ^ 1)) % 7); }

}  // namespace

int main(int count, char** arguments) {
  const int bug = count == 2 ? std::atoi(arguments[1]) : -1;
  if (bug < 0 || bug >= kBugs) return std::fputs("usage: planted_bugs NUMBER\n", stderr), 2;
  constexpr int rows = 3;
  // Each of its exact size, for AddressSanitizer.
  const std::unique_ptr<float[]> in(new float[rows * kRow]), out(new float[rows]), copy(new float[rows * kRow]);
  const std::unique_ptr<int> ran(new int(0));
  for (int i = 0; i < rows * kRow; ++i) in[i] = static_cast<float>(i * 37 % 101);
  for (int i = 0; i < rows * kRow; ++i) copy[i] = std::numeric_limits<float>::quiet_NaN();
  for (int i = 0; i < rows; ++i) out[i] = std::numeric_limits<float>::quiet_NaN();

  const cudaError_t error = pspnet_fast::cuda::launch(weighted_sums, rows, dim3(kHalf), kHalf * sizeof(float), nullptr,
                                                      in.get(), out.get(), copy.get(), ran.get(), rows, bug);
  bool right = error == cudaSuccess && *ran == 1;
  for (int row = 0; row < rows; ++row) {
    float expected = 0;  // whole numbers: exact in any order
    for (int i = 0; i < kRow; ++i) expected += in[row * kRow + i] * factor_of(i);
    right = right && out[row] == expected;
    for (int i = 0; i < kRow; ++i) right = right && copy[row * kRow + i] == in[row * kRow + i];
  }
  if (!right) std::fputs("wrong result\n", stderr);
  return right ? 0 : 1;
}
