// Large CPU outputs in memory that is kept for the next one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace pspnet_fast {

// An uninitialised dense CPU tensor in kept memory, on the device of `like`; an undefined one where torch should
// allocate as ever: small tensors, deterministic mode, no memory, PSPNET_FAST_KEEP_MB=0. `short_of_memory`: the system
// has refused, so torch need not ask again.
torch::stable::Tensor new_in_kept_memory(const torch::stable::Tensor& like, torch::headeronly::ScalarType dtype,
                                         const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                         int64_t bytes, bool& short_of_memory);

// Bounds what is kept, in units of 2^20 bytes, and gives up what lies beyond. The bound before.
int64_t keep_memory(int64_t megabytes);

}  // namespace pspnet_fast
