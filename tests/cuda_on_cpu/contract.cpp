// The functions of kernels.h by C names, for contract.py; and what the operators do with a launch that fails.
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace pspnet_fast {

void check_cuda(int error);
void check_cuda(int error) {
  if (error != 0) throw std::runtime_error("cuda_on_cpu: a launch failed with cudaError_t " + std::to_string(error));
}

}  // namespace pspnet_fast

using namespace pspnet_fast;

extern "C" {
size_t pyramid_pool_workspace(const PyramidPoolArgs* args) { return cuda::pyramid_pool_workspace(*args); }
int pyramid_pool(const PyramidPoolArgs* args) { return cuda::pyramid_pool(*args, nullptr); }
int pyramid_pool_backward(const PyramidPoolBackwardArgs* args) { return cuda::pyramid_pool_backward(*args, nullptr); }
int pyramid_upsample_concat(const PyramidUpsampleConcatArgs* args) {
  return cuda::pyramid_upsample_concat(*args, nullptr);
}
size_t pyramid_upsample_concat_backward_workspace(const PyramidUpsampleConcatBackwardArgs* args) {
  return cuda::pyramid_upsample_concat_backward_workspace(*args);
}
int pyramid_upsample_concat_backward(const PyramidUpsampleConcatBackwardArgs* args) {
  return cuda::pyramid_upsample_concat_backward(*args, nullptr);
}
size_t pyramid_reduce_workspace(const PyramidReduceArgs* args) { return cuda::pyramid_reduce_workspace(*args); }
int pyramid_reduce(const PyramidReduceArgs* args) { return cuda::pyramid_reduce(*args, nullptr); }
int pyramid_reduce_backward(const PyramidReduceBackwardArgs* args) {
  return cuda::pyramid_reduce_backward(*args, nullptr);
}
int pyramid_context(const PyramidContextArgs* args) { return cuda::pyramid_context(*args, nullptr); }
size_t pyramid_context_backward_workspace(const PyramidContextBackwardArgs* args) {
  return cuda::pyramid_context_backward_workspace(*args);
}
int pyramid_context_backward(const PyramidContextBackwardArgs* args) {
  return cuda::pyramid_context_backward(*args, nullptr);
}
}
