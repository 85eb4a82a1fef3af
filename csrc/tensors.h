// From stable-ABI tensors to the kernels' arguments: checks that keep memory safe, layouts, allocation, launches.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kept_memory.h"
#include "kernels.h"

#if defined(PSPNET_FAST_WITH_CUDA)
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#endif
#ifndef PSPNET_FAST_NAMESPACE
#define PSPNET_FAST_NAMESPACE pspnet_fast
#endif

namespace pspnet_fast {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16");
  }
}

// The dtype of arithmetic: float64 for float64, else float32.
inline torch::headeronly::ScalarType accumulate_type(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  return dtype_of(tensor) == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline IntType int_type_of(const char* name, const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return IntType::kUInt8;
    case ScalarType::Short:
      return IntType::kInt16;
    case ScalarType::Int:
      return IntType::kInt32;
    case ScalarType::Long:
      return IntType::kInt64;
    default:
      STD_TORCH_CHECK(false, name, " must be uint8, int16, int32 or int64");
  }
}

inline Levels levels_of(const std::vector<int64_t>& bins) {
  Levels levels{};
  STD_TORCH_CHECK(!bins.empty() && bins.size() % 2 == 0 && bins.size() / 2 <= kMaxLevels,
                  "bins must list (bins_h, bins_w) of 1 to ", kMaxLevels, " levels");
  levels.count = static_cast<int>(bins.size() / 2);
  int64_t cells = 0;
  for (int l = 0; l < levels.count; ++l) {
    const int64_t bins_h = bins[2 * l], bins_w = bins[2 * l + 1];
    STD_TORCH_CHECK(bins_h > 0 && bins_w > 0 && bins_h <= 4096 && bins_w <= 4096, "bins must be from 1 to 4096");
    levels.bins_h[l] = static_cast<int>(bins_h), levels.bins_w[l] = static_cast<int>(bins_w);
    levels.first[l] = static_cast<int>(cells);
    cells += bins_h * bins_w;
  }
  STD_TORCH_CHECK(cells <= int64_t{1} << 24, "bins must make at most 2^24 cells together");
  levels.first[levels.count] = static_cast<int>(cells);
  return levels;
}

// Whether a map is meant as channels-last; pspnet_fast/ops/checks.py states the same rule.
inline bool is_channels_last(const Tensor& map) {
  return map.stride(1) == 1 && map.size(1) > 1 && !map.is_contiguous();
}

// The map itself where the kernels take its strides, else a copy in the layout asked for.
inline Tensor native(const Tensor& map, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const int dense = channels_last ? 1 : 3;
  if (map.size(dense) == 1 || map.stride(dense) == 1) return map;
  return torch::stable::contiguous(map, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline int64_t element_size(const Tensor& tensor) {
  const DType dtype = dtype_of(tensor);
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline Image image_of(const Tensor& map, int64_t first_channel = 0) {
  char* data = static_cast<char*>(map.data_ptr()) + first_channel * map.stride(1) * element_size(map);
  return {data, map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// Tensors to be written as a whole; large ones on the CPU in kept memory.
inline Tensor new_map(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const std::vector<int64_t> sizes{N, C, H, W};
  const std::vector<int64_t> strides =
      channels_last ? std::vector<int64_t>{C * H * W, 1, C * W, C} : std::vector<int64_t>{C * H * W, H * W, W, 1};
  const Tensor map = new_in_kept_memory(like, sizes, strides, N * C * H * W * element_size(like));
  if (map.defined()) return map;
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  int64_t elements = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; elements *= sizes[d]) strides[d] = elements;
  const Tensor tensor = new_in_kept_memory(like, sizes, strides, elements * element_size(like));
  if (tensor.defined()) return tensor;
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device());
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

inline void check_like(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes, const Tensor& like) {
  const auto actual = tensor.sizes();
  STD_TORCH_CHECK(std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end()), name, " has the wrong shape");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(), name,
                  " must have the dtype and the device of the first tensor");
}

// ---- launches ----------------------------------------------------------------------------------------------------
// PSP_LAUNCH(op, tensor, args) runs op where `tensor` lives; PSP_WORKSPACE(op, tensor, args) sets args.workspace, held
// by the tensor that it returns. Tests build with PSPNET_FAST_CUDA_ON_CPU: the CUDA sources, executed on the CPU.

#if defined(PSPNET_FAST_CUDA_ON_CPU)
#define PSP_LAUNCH(op, tensor, args) \
  STD_TORCH_CHECK(::pspnet_fast::cuda::op(args, nullptr) == 0, "a kernel was not launched")
#elif defined(PSPNET_FAST_WITH_CUDA)
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#define PSP_LAUNCH(op, tensor, args)                                                                 \
  do {                                                                                               \
    if (!(tensor).is_cuda()) {                                                                       \
      ::pspnet_fast::cpu::op(args);                                                                  \
      break;                                                                                         \
    }                                                                                                \
    const torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index());                \
    STD_CUDA_CHECK(static_cast<cudaError_t>(::pspnet_fast::cuda::op(args, current_stream(tensor)))); \
  } while (false)
#else
#define PSP_LAUNCH(op, tensor, args) ::pspnet_fast::cpu::op(args)
#endif

#if defined(PSPNET_FAST_CUDA_ON_CPU) || defined(PSPNET_FAST_WITH_CUDA)
inline Tensor bytes(const Tensor& like, size_t size) {
  const std::vector<int64_t> sizes{static_cast<int64_t>(size)};
  return torch::stable::empty(sizes, torch::headeronly::ScalarType::Byte, std::nullopt, like.device());
}
#define PSP_WORKSPACE(op, tensor, args)                                              \
  const Tensor workspace = bytes(tensor, ::pspnet_fast::cuda::op##_workspace(args)); \
  args.workspace = workspace.data_ptr()
#else
#define PSP_WORKSPACE(op, tensor, args) static_cast<void>(0)
#endif

// PSP_KERNELS(m) { m.impl(...); } registers kernels for every device that this build serves.
#if defined(PSPNET_FAST_WITH_CUDA)
#define PSP_CUDA_KERNELS \
  STABLE_TORCH_LIBRARY_IMPL(PSPNET_FAST_NAMESPACE, CUDA, library) { register_kernels(library); }
#else
#define PSP_CUDA_KERNELS
#endif
#define PSP_KERNELS(m)                                                                          \
  static void register_kernels(torch::stable::detail::StableLibrary&);                          \
  STABLE_TORCH_LIBRARY_IMPL(PSPNET_FAST_NAMESPACE, CPU, library) { register_kernels(library); } \
  PSP_CUDA_KERNELS                                                                              \
  static void register_kernels(torch::stable::detail::StableLibrary& m)

}  // namespace pspnet_fast
