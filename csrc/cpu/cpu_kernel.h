// What the CPU kernels share: storage types, dispatch over dtype and instruction set, threads, streaming stores.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "../kernels.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PSP_X86_64 1
#include <emmintrin.h>
#else
#define PSP_X86_64 0
#endif

#define PSP_INLINE inline __attribute__((always_inline))

namespace pspnet_fast::cpu {

// ---- storage types -----------------------------------------------------------------------------------------------
// Conversions are branch-free integer and float arithmetic, so that loops over them vectorise on every target; F and U
// are float and uint32_t, or vectors of them.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using acc_type = typename AccumulateType<T>::type;

template <class F, class U>
PSP_INLINE F widen_bfloat16(U bits) {
  return std::bit_cast<F>(bits << 16);
}
template <class F, class U>
PSP_INLINE F widen_half(U bits) {
  // The multiplication by 2^112 moves the exponent's bias, exactly, for normal and subnormal numbers alike.
  const F scaled = std::bit_cast<F>((bits & 0x7fffu) << 13) * 0x1p112f;
  const U special = (bits & 0x7c00u) == 0x7c00u ? U{} + 0x7f800000u : U{};  // infinity, NaN
  return std::bit_cast<F>(std::bit_cast<U>(scaled) | special | (bits & 0x8000u) << 16);
}
template <class U, class F>
PSP_INLINE U round_bfloat16(F v) {  // to nearest even, in the upper 16 bits; the lower ones are of no meaning
  const U bits = std::bit_cast<U>(v);
  return v == v ? bits + 0x7fffu + (bits >> 16 & 1u) : U{} + 0x7fc00000u;
}
template <class U, class F>
PSP_INLINE U narrow_bfloat16(F v) {
  return round_bfloat16<U>(v) >> 16;
}
template <class U, class F>
PSP_INLINE U narrow_half(F v) {  // round to nearest even
  const U bits = std::bit_cast<U>(v), magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the addition of 0.5 leaves the multiple of 2^-24, rounded, in the mantissa's low bits.
  const U subnormal = std::bit_cast<U>(std::bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U large = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  return (magnitude >= 0x47800000u ? large : finite) | (bits >> 16 & 0x8000u);
}

PSP_INLINE float to_acc(float v) { return v; }
PSP_INLINE double to_acc(double v) { return v; }
PSP_INLINE float to_acc(BFloat16 v) { return widen_bfloat16<float>(uint32_t{v.bits}); }
PSP_INLINE float to_acc(Half v) { return widen_half<float>(uint32_t{v.bits}); }

template <class T>
PSP_INLINE T from_acc(acc_type<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) return {static_cast<uint16_t>(narrow_bfloat16<uint32_t>(v))};
  if constexpr (std::is_same_v<T, Half>) return {static_cast<uint16_t>(narrow_half<uint32_t>(v))};
  if constexpr (std::is_same_v<T, acc_type<T>>) return v;
}

template <class Function>
void dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat64:
      return function(double{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Half{});
  }
}

// ---- instruction sets and threads --------------------------------------------------------------------------------
// A task is a struct whose always-inline operator()(begin, end) does the units [begin, end) of the work. It is compiled
// once for each instruction set, and the best that this processor has runs (isa.cpp). A task whose operator() is a
// template gets the bytes of that instruction set's vectors: the compiler takes wider ones apart, but builds them
// element by element where it cannot see through.

enum class Isa : int { kBaseline, kAvx2, kAvx512 };
Isa isa();

template <int kBytes, class Task>
PSP_INLINE void run_with(const Task& task, int64_t begin, int64_t end) {
  if constexpr (requires { task.template operator()<kBytes>(begin, end); }) {
    task.template operator()<kBytes>(begin, end);
  } else {
    task(begin, end);
  }
}

template <class Task>
void run_baseline(const Task& task, int64_t begin, int64_t end) {
  run_with<16>(task, begin, end);
}
#if PSP_X86_64
template <class Task>
__attribute__((target("avx2,fma,bmi2"))) void run_avx2(const Task& task, int64_t begin, int64_t end) {
  run_with<32>(task, begin, end);
}
template <class Task>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512"))) void run_avx512(
    const Task& task, int64_t begin, int64_t end) {
  run_with<64>(task, begin, end);
}
#endif

template <class Task>
void run(Isa set, const Task& task, int64_t begin, int64_t end) {
#if PSP_X86_64
  if (set == Isa::kAvx512) return run_avx512(task, begin, end);
  if (set == Isa::kAvx2) return run_avx2(task, begin, end);
#endif
  run_baseline(task, begin, end);
}

// Throws what a thread has thrown first, once all are done: torch hands on that there was an error, not which.
template <class Task>
void parallel(int64_t units, const Task& task) {
  const Isa set = isa();
  std::atomic<bool> failed = false;
  std::exception_ptr error;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    try {
      run(set, task, begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Chunks of `size` elements so that `outer` x chunks keep every thread busy; a chunk is a multiple of 64 elements, and
// at least 256 unless size is smaller, so that each still streams.
inline int64_t chunk_size(int64_t outer, int64_t size) {
  const int64_t wanted = (4 * static_cast<int64_t>(torch::stable::get_num_threads()) + outer - 1) / outer;
  const int64_t chunk = (size + wanted - 1) / wanted;
  return std::min(size, std::max<int64_t>(256, (chunk + 63) / 64 * 64));
}

// ---- memory ------------------------------------------------------------------------------------------------------

template <class T>
PSP_INLINE const T* at(const Image& image, int64_t n, int64_t c, int64_t h) {
  return static_cast<const T*>(image.data) + n * image.stride_n + c * image.stride_c + h * image.stride_h;
}
template <class T>
PSP_INLINE T* mutable_at(const Image& image, int64_t n, int64_t c, int64_t h) {
  return static_cast<T*>(image.data) + n * image.stride_n + c * image.stride_c + h * image.stride_h;
}

// Outputs beyond the last-level caches go around them: a plain store reads its line first, which costs a third of a
// copy's traffic (measured on two Zen 4 cores: 26 GB/s plain, 40 GB/s streaming).
constexpr int64_t kStreamBytes = int64_t{8} << 20;

#if PSP_X86_64
// kBytes past the caches, to an address that is a multiple of them. GCC's header has the wider ones only for functions
// that ask for the instruction set themselves.
template <int kBytes>
PSP_INLINE void stream_bytes(void* to, const void* from) {
  if constexpr (kBytes == 16) {
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  } else {
    typedef char Bytes __attribute__((vector_size(kBytes), may_alias));
    Bytes v;
    __builtin_memcpy(&v, from, kBytes);
    asm("vmovntdq %1, %0" : "=m"(*static_cast<Bytes*>(to)) : "v"(v));
  }
}
#endif

// Copies n elements; with `stream`, whole cache lines by non-temporal stores of kBytes, and the n elements at `next`,
// which are read afterwards, are fetched meanwhile.
template <int kBytes = 16, class T>
PSP_INLINE void store(T* __restrict__ to, const T* __restrict__ from, int64_t n, bool stream, const T* next = nullptr) {
#if PSP_X86_64
  const int64_t misaligned =
      static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63) / static_cast<int64_t>(sizeof(T));
  if (stream && n > misaligned) {
    int64_t i = 0;
    for (; i < misaligned; ++i) to[i] = from[i];
    constexpr int64_t kLine = 64 / sizeof(T), kStep = kBytes / sizeof(T);
    for (; i + kLine <= n; i += kLine) {
      if (next != nullptr) __builtin_prefetch(next + i);
      for (int64_t k = 0; k < kLine; k += kStep) stream_bytes<kBytes>(to + i + k, from + i + k);
    }
    for (; i < n; ++i) to[i] = from[i];
    return;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

// Makes streamed stores visible to the threads that read them next.
PSP_INLINE void store_fence() {
#if PSP_X86_64
  _mm_sfence();
#endif
}

// Writes a plane of H rows of W elements that lie densely in `from`.
template <int kBytes = 16, class T>
PSP_INLINE void store_plane(const Image& image, int64_t n, int64_t c, int64_t H, int64_t W, const T* from, bool stream,
                            const T* next = nullptr) {
  T* to = mutable_at<T>(image, n, c, 0);
  if (image.stride_h == W) return store<kBytes>(to, from, H * W, stream, next);
  for (int64_t h = 0; h < H; ++h) store<kBytes>(to + h * image.stride_h, from + h * W, W, stream);
}

// 64 bytes of accumulators: one vector register or several, by instruction set; or as many bytes as are asked for.
template <class acc_t, int kBytes>
struct VectorType {
  typedef acc_t type __attribute__((vector_size(kBytes)));
};
template <class acc_t, int kBytes = 64>
using Vector = typename VectorType<acc_t, kBytes>::type;
template <class acc_t, int kBytes = 64>
constexpr int64_t kLanes = kBytes / sizeof(acc_t);

template <class acc_t, int kBytes = 64>
PSP_INLINE Vector<acc_t, kBytes> load(const acc_t* from) {
  Vector<acc_t, kBytes> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// to[k] += the sum of `count` rows that lie `stride` apart, four at a time: each pass over `to` costs a load, an add
// and a store that wait for the previous pass.
template <class T>
PSP_INLINE void add_rows(acc_type<T>* __restrict__ to, const T* __restrict__ from, int64_t stride, int64_t count,
                         int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T *a = from + i * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    for (int64_t k = 0; k < n; ++k) to[k] += (to_acc(a[k]) + to_acc(b[k])) + (to_acc(c[k]) + to_acc(d[k]));
  }
  for (; i < count; ++i) {
    const T* a = from + i * stride;
    for (int64_t k = 0; k < n; ++k) to[k] += to_acc(a[k]);
  }
}

}  // namespace pspnet_fast::cpu
