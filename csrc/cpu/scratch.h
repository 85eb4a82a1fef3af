// Scratch memory of the CPU kernels: a std::vector whose failed allocation tells the bytes. Includes no torch header.
#pragma once

#include <limits>
#include <new>
#include <vector>

#include "../errors.h"

namespace pspnet_fast::cpu {

template <class T>
struct ScratchAllocator {
  using value_type = T;
  ScratchAllocator() = default;
  template <class U>
  ScratchAllocator(const ScratchAllocator<U>&) {}

  T* allocate(size_t count) {
    static_assert(alignof(T) <= alignof(std::max_align_t));
    void* const data = ::operator new(count * sizeof(T), std::nothrow);  // std::vector has checked the product
    if (data == nullptr) {
      throw_out_of_memory(false, static_cast<int64_t>(count * sizeof(T)), "what the kernel computes with");
    }
    return static_cast<T*>(data);
  }
  void deallocate(T* data, size_t) { ::operator delete(data); }
  friend bool operator==(const ScratchAllocator&, const ScratchAllocator&) { return true; }
};

template <class T>
using Scratch = std::vector<T, ScratchAllocator<T>>;

}  // namespace pspnet_fast::cpu
