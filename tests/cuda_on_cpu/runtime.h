// What launch.cpp and fibers.cpp share: a block that runs, its threads and its memory.
// Compiled without -fsanitize; CUDA_ON_CPU_ADDRESS or CUDA_ON_CPU_THREAD says which sanitizer the kernels have.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <vector>

#include "device.h"

#if defined(CUDA_ON_CPU_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace cuda_on_cpu {

constexpr size_t kArena = 64 * 1024;
constexpr size_t kShared = 48 * 1024;  // what a block may have
constexpr unsigned kWarp = 32;
constexpr size_t kEdges = 1024;

// An edge of ThreadSanitizer's "happens before" through `address`. Shuffles make none: they exchange registers, and do
// not order memory.
inline void release([[maybe_unused]] void* address) {
#if defined(CUDA_ON_CPU_THREAD)
  __tsan_release(address);
#endif
}
inline void acquire([[maybe_unused]] void* address) {
#if defined(CUDA_ON_CPU_THREAD)
  __tsan_acquire(address);
#endif
}

char* map_pages(size_t bytes);

// Plain loops: the sanitizers' own memset and memcpy would count as accesses of the kernel.
inline void fill(void* memory, size_t bytes) {
  for (size_t i = 0; i < bytes / 8; ++i) static_cast<volatile uint64_t*>(memory)[i] = ~uint64_t{0};  // NaN, or -1
  for (size_t i = bytes / 8 * 8; i < bytes; ++i) static_cast<volatile unsigned char*>(memory)[i] = 0xff;
}
inline void copy(void* to, const void* from, size_t bytes) {  // 4, or a multiple of 8
  if (bytes == 4) {
    *static_cast<volatile uint32_t*>(to) = *static_cast<const volatile uint32_t*>(from);
  }
  for (size_t i = 0; i < bytes / 8; ++i) {
    static_cast<volatile uint64_t*>(to)[i] = static_cast<const volatile uint64_t*>(from)[i];
  }
}

// A block's shared memory, 16-byte aligned and poisoned. Under AddressSanitizer each array is an allocation of its
// exact size; else all lie in one arena, which the host never touches in a way that ThreadSanitizer sees.
struct SharedMemory {
  struct Array {
    const void* variable;
    char* data;
    size_t bytes;
  };
  std::vector<Array> arrays;
  char* const arena = map_pages(kEdges + kArena);
  size_t used = 0;  // what the hardware would give out

  void start_block(size_t dynamic_bytes) {
    clear();
    used = 0;
    take(nullptr, dynamic_bytes);
  }
  char* take(const void* variable, size_t bytes) {
#if defined(CUDA_ON_CPU_ADDRESS)
    void* data = nullptr;
    if (posix_memalign(&data, 16, bytes) != 0) std::abort();
#else
    void* data = arena + kEdges + used;
#endif
    used += (bytes + 15) / 16 * 16;
    if (used > kShared) return nullptr;
    fill(data, bytes);
    arrays.push_back({variable, static_cast<char*>(data), bytes});
    return arrays.back().data;
  }
  void clear() {
#if defined(CUDA_ON_CPU_ADDRESS)
    for (const Array& array : arrays) free(array.data);
#endif
    arrays.clear();
  }
};

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  uint3 index{};
  unsigned number = 0;
  State state = State::kDone;
  char* stack = nullptr;  // kPage of guard, then kStack
  void* stack_pointer = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  std::deque<AsyncCopy> copies;  // not done
  unsigned copy_groups = 0;      // ended
};

struct Warp {
  unsigned size = 0, arrived = 0, turn = 0;
  const char* site = nullptr;
  char slots[2][kWarp][8];  // by turn: a slow lane may still read while a fast one writes its next value
};

// Fibers and memory that serve one block after another. ThreadSanitizer sees the crew's barriers in the first bytes of
// its arena, which are no array's.
struct Crew {
  std::vector<Thread> threads;
  SharedMemory shared;

  char* barrier_edge(unsigned turn) { return shared.arena + turn % 2; }
  char* warp_edge(unsigned warp, unsigned turn) { return shared.arena + 2 + 2 * warp + turn % 2; }
  char* next_block_edge() { return shared.arena + kEdges - 1; }
};

struct Block {
  Crew crews[2];
  Crew* crew = nullptr;
  std::vector<Warp> warps;
  unsigned size = 0, alive = 0, waiting = 0, turn = 0;
  const char* site = nullptr;
  char start, end;  // edges from and to the host
  const std::function<void()>* body = nullptr;
  Thread* current = nullptr;
  void* host_stack_pointer = nullptr;
  void* host_tsan = nullptr;
  void* host_fake_stack = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;
};
extern Block block;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// fibers.cpp: a thread of the block made ready to begin, and run until it waits or ends.
void prepare(Thread& thread);
void resume(Thread& thread);

}  // namespace cuda_on_cpu
