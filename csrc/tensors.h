// From stable-ABI tensors to the kernels' arguments: checks that keep memory safe, layouts, allocation, launches.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <optional>
#include <vector>

#include "errors.h"
#include "kept_memory.h"
#include "kernels.h"
#include "overlap.h"

#if defined(PSPNET_FAST_WITH_CUDA) || defined(PSPNET_FAST_CUDA_ON_CPU)
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
      PSP_CHECK(false, "dtype must be float32, float64, bfloat16 or float16");
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
      PSP_CHECK(false, name, " must be uint8, int16, int32 or int64");
  }
}

inline Levels levels_of(const std::vector<int64_t>& bins) {
  Levels levels{};
  PSP_CHECK(!bins.empty() && bins.size() % 2 == 0 && bins.size() / 2 <= kMaxLevels,
            "bins must list (bins_h, bins_w) of 1 to ", kMaxLevels, " levels");
  levels.count = static_cast<int>(bins.size() / 2);
  int64_t cells = 0;
  for (int l = 0; l < levels.count; ++l) {
    const int64_t bins_h = bins[2 * l], bins_w = bins[2 * l + 1];
    PSP_CHECK(bins_h > 0 && bins_w > 0 && bins_h <= 4096 && bins_w <= 4096, "bins must be from 1 to 4096");
    levels.bins_h[l] = static_cast<int>(bins_h), levels.bins_w[l] = static_cast<int>(bins_w);
    levels.first[l] = static_cast<int>(cells);
    cells += bins_h * bins_w;
  }
  PSP_CHECK(cells <= int64_t{1} << 24, "bins must make at most 2^24 cells together");
  levels.first[levels.count] = static_cast<int>(cells);
  return levels;
}

// Whether a map is meant as channels-last; pspnet_fast/ops/checks.py states the same rule.
inline bool is_channels_last(const Tensor& map) {
  return map.stride(1) == 1 && map.size(1) > 1 && !map.is_contiguous();
}

// Whether the kernels take the map's strides.
inline bool is_native(const Tensor& map, bool channels_last) {
  const int dense = channels_last ? 1 : 3;
  return map.numel() == 0 || map.size(dense) == 1 || map.stride(dense) == 1;  // of nothing, any will do
}

inline int64_t element_size(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Short:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Int:
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

inline Image image_of(const Tensor& map, int64_t first_channel = 0) {
  char* data = static_cast<char*>(map.data_ptr()) + first_channel * map.stride(1) * element_size(map.scalar_type());
  return {data, map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// ---- allocation --------------------------------------------------------------------------------------------------

inline std::string shape_in_words(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d > 0 ? ", " : "") + std::to_string(sizes[d]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// An uninitialised tensor on the device of `like`; a large one on the CPU in kept memory. No size may be negative.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype,
                         bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  int64_t bytes = element_size(dtype);
  const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
  for (const int64_t size : sizes) {
    PSP_CHECK(empty || !__builtin_mul_overflow(bytes, size, &bytes), "a tensor of shape ", shape_in_words(sizes),
              " is too large: the number of its bytes does not fit into 64 bits");
  }
  bool short_of_memory = false;
  if (!empty) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    const auto lay = [&](size_t d) { strides[d] = stride, stride *= sizes[d]; };
    if (channels_last) lay(1);
    for (size_t d = sizes.size(); d-- > 0;) {
      if (!channels_last || d != 1) lay(d);
    }
    const Tensor tensor = new_in_kept_memory(like, dtype, sizes, strides, bytes, short_of_memory);
    if (tensor.defined()) return tensor;
  }
  if (!short_of_memory) {
    try {
      return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                                  channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    } catch (const std::runtime_error&) {  // tells neither the reason nor the bytes
      PSP_CHECK(!empty, "torch makes no tensor of shape ", shape_in_words(sizes));
    }
  }
  throw_out_of_memory(like.is_cuda(), bytes, "a tensor of shape " + shape_in_words(sizes));
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_tensor(like, sizes, like.scalar_type());
}

inline Tensor new_map(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W, bool channels_last) {
  return new_tensor(like, {N, C, H, W}, like.scalar_type(), channels_last);
}

inline Tensor copy_of(const Tensor& tensor, bool channels_last = false) {
  const auto sizes = tensor.sizes();
  Tensor copy = new_tensor(tensor, {sizes.begin(), sizes.end()}, tensor.scalar_type(), channels_last);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The tensor itself where it is contiguous, else a copy that is.
inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : copy_of(tensor); }

// The map itself where the kernels take its strides, else a copy in the layout asked for.
inline Tensor native(const Tensor& map, bool channels_last) {
  return is_native(map, channels_last) ? map : copy_of(map, channels_last);
}

// ---- checks ------------------------------------------------------------------------------------------------------

inline void check_like(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes, const Tensor& like) {
  const auto actual = tensor.sizes();
  PSP_CHECK(std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end()), name,
            " has the wrong shape: it must be ", shape_in_words(sizes), ", but is ",
            shape_in_words({actual.begin(), actual.end()}));
  PSP_CHECK(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(), name,
            " must have the dtype and the device of the first tensor");
}

// A map (N, C, H, W) whose channels, rows and columns the kernels can count.
inline void check_map(const char* name, const Tensor& map) {
  PSP_CHECK(map.dim() == 4, name, " must have 4 dimensions, but has ", map.dim());
  for (int d = 1; d < 4; ++d) {
    PSP_CHECK(map.size(d) <= INT_MAX, name, " must have at most ", INT_MAX,
              " channels, rows and columns, but its dimension ", d, " has ", map.size(d));
  }
}

// Rows and columns of a map to make.
inline void check_size(int64_t H, int64_t W) {
  PSP_CHECK(H > 0 && W > 0 && H <= INT_MAX && W <= INT_MAX, "height and width must be from 1 to ", INT_MAX,
            ": a map must have a pixel, but they are ", H, " and ", W);
}

inline Region region_of(const Tensor& tensor) {
  Region region{reinterpret_cast<uintptr_t>(tensor.data_ptr()), element_size(tensor.scalar_type()), {}};
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
  region.axes.reserve(sizes.size());
  for (size_t d = 0; d < sizes.size(); ++d) {
    // strides of a single index may be anything
    region.axes.push_back({sizes[d], sizes[d] > 1 && !empty ? strides[d] * region.element : 0});
  }
  return region;
}

// What is written may neither overlap itself nor what is read.
inline void check_written(const char* name, const Region& written) {
  PSP_CHECK(!overlaps_itself(written), "unsupported operation: more than one element of ", name,
            ", which is written to, refers to a single memory location: clone() it first");
}

inline void check_apart(const char* name, const Tensor& read, const char* written_name, const Region& written) {
  PSP_CHECK(!overlap(region_of(read), written), "unsupported operation: some elements of ", name, " and of ",
            written_name, ", which is written to, refer to a single memory location: clone() one of them first");
}

// ---- launches ----------------------------------------------------------------------------------------------------
// PSP_LAUNCH(op, tensor, args) runs op where `tensor` lives; PSP_WORKSPACE(op, tensor, args) sets args.workspace, held
// by the tensor that it returns. Tests build with PSPNET_FAST_CUDA_ON_CPU: the CUDA sources, executed on the CPU.

#if defined(PSPNET_FAST_CUDA_ON_CPU) || defined(PSPNET_FAST_WITH_CUDA)
// The kernels refuse what they cannot count before they launch; other errors are torch's to tell.
inline void check_launch(int error) {
#if defined(PSPNET_FAST_WITH_CUDA)
  if (error != cudaSuccess) cudaGetLastError();  // told here; the runtime would tell the next caller again
#endif
  PSP_CHECK(error != cudaErrorInvalidValue && error != cudaErrorInvalidConfiguration,
            "the tensors are too large for the CUDA kernels, which count along an axis in 31 bits");
#if defined(PSPNET_FAST_CUDA_ON_CPU)
  PSP_CHECK(error == cudaSuccess, "a kernel was not launched");
#else
  STD_CUDA_CHECK(static_cast<cudaError_t>(error));
#endif
}
#endif

#if defined(PSPNET_FAST_CUDA_ON_CPU)
#define PSP_LAUNCH(op, tensor, args) ::pspnet_fast::check_launch(::pspnet_fast::cuda::op(args, nullptr))
#elif defined(PSPNET_FAST_WITH_CUDA)
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#define PSP_LAUNCH(op, tensor, args)                                                    \
  do {                                                                                  \
    if (!(tensor).is_cuda()) {                                                          \
      ::pspnet_fast::cpu::op(args);                                                     \
      break;                                                                            \
    }                                                                                   \
    const torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index());   \
    ::pspnet_fast::check_launch(::pspnet_fast::cuda::op(args, current_stream(tensor))); \
  } while (false)
#else
#define PSP_LAUNCH(op, tensor, args) ::pspnet_fast::cpu::op(args)
#endif

#if defined(PSPNET_FAST_CUDA_ON_CPU) || defined(PSPNET_FAST_WITH_CUDA)
#define PSP_WORKSPACE(op, tensor, args)                                                                          \
  const Tensor workspace = new_tensor(tensor, {static_cast<int64_t>(::pspnet_fast::cuda::op##_workspace(args))}, \
                                      torch::headeronly::ScalarType::Byte);                                      \
  args.workspace = workspace.data_ptr()
#else
#define PSP_WORKSPACE(op, tensor, args) static_cast<void>(0)
#endif

// ---- registration ------------------------------------------------------------------------------------------------

template <size_t size>
struct OperatorName {
  char text[size];
  constexpr OperatorName(const char (&literal)[size]) { std::copy_n(literal, size, text); }
};

// A message of torch's stable interface without the path that it holds.
inline std::string without_path(std::string message) {
  const size_t end = message.find(" API call failed at");
  return end == std::string::npos ? message : "torch has refused " + message.substr(0, message.find('('));
}

// `function` boxed; its errors begin with the operator's name.
template <OperatorName name, auto function>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    torch::stable::detail::boxer<std::remove_pointer_t<decltype(function)>, function>::boxed_fn(stack, inputs, outputs);
  } catch (const std::out_of_range& error) {
    throw std::out_of_range(sentence(name.text, ": ", error.what()));
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(sentence(name.text, ": out of memory on the CPU"));
  } catch (const std::length_error&) {  // more than any vector holds
    throw std::runtime_error(sentence(name.text, ": out of memory on the CPU: the tensors are too large"));
  } catch (const std::exception& error) {
    throw std::runtime_error(sentence(name.text, ": ", without_path(error.what())));
  }
}

#define PSP_IMPL(m, name, function) m.impl(name, &::pspnet_fast::boxed<name, &function>)

// The name of a source file without its folders: torch lists where kernels come from, to users as well.
constexpr const char* file_name(const char* path) {
  const char* name = path;
  for (; *path != 0; ++path) {
    if (*path == '/') name = path + 1;
  }
  return name;
}

// PSP_KERNELS(m) { PSP_IMPL(m, ...); } registers kernels for every device that this build serves.
#define PSP_STRING_(...) #__VA_ARGS__
#define PSP_STRING(...) PSP_STRING_(__VA_ARGS__)
#define PSP_REGISTER(device)                                                                                           \
  static const torch::stable::detail::StableTorchLibraryInit registered_##device(                                      \
      torch::stable::detail::StableLibrary::Kind::IMPL, &register_kernels, PSP_STRING(PSPNET_FAST_NAMESPACE), #device, \
      file_name(__FILE__), __LINE__)
#if defined(PSPNET_FAST_WITH_CUDA)
#define PSP_CUDA_KERNELS PSP_REGISTER(CUDA);
#else
#define PSP_CUDA_KERNELS
#endif
#define PSP_KERNELS(m)                                                 \
  static void register_kernels(torch::stable::detail::StableLibrary&); \
  PSP_REGISTER(CPU);                                                   \
  PSP_CUDA_KERNELS                                                     \
  static void register_kernels(torch::stable::detail::StableLibrary& m)

}  // namespace pspnet_fast
