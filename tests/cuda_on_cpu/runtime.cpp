// Runs the blocks of a launch one after another, the threads of a block as fibers of one thread of the CPU.
// Compiled without -fsanitize; CUDA_ON_CPU_ADDRESS or CUDA_ON_CPU_THREAD says which sanitizer the kernels have.
//
// CUDA_ON_CPU_ORDER=forward|reverse|random:SEED: the order of the blocks, and of the threads that can run.
// CUDA_ON_CPU_BLOCKS=unordered (ThreadSanitizer): two crews of fibers take the blocks in turn, and nothing orders one
// crew's accesses before the other's, so that races between blocks show as well.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "device.h"

#if !defined(__x86_64__)
#error "switch_stack is written for x86-64"
#endif

#if defined(CUDA_ON_CPU_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(CUDA_ON_CPU_ADDRESS)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 4096, kStack = 128 * 1024, kArena = 64 * 1024;
constexpr size_t kShared = 48 * 1024;  // what a block may have
constexpr unsigned kWarp = 32, kBlockThreads = 1024;
constexpr size_t kEdges = 1024;

// ---- sanitizers: what they must be told --------------------------------------------------------------------------
// An edge of ThreadSanitizer's "happens before" through `address`. Shuffles make none: they exchange registers, and do
// not order memory.
void release([[maybe_unused]] void* address) {
#if defined(CUDA_ON_CPU_THREAD)
  __tsan_release(address);
#endif
}
void acquire([[maybe_unused]] void* address) {
#if defined(CUDA_ON_CPU_THREAD)
  __tsan_acquire(address);
#endif
}

// ---- memory ------------------------------------------------------------------------------------------------------
char* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::perror("cuda_on_cpu: mmap"), std::abort();
  return static_cast<char*>(memory);
}

// Plain loops: the sanitizers' own memset and memcpy would count as accesses of the kernel.
void fill(void* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(memory)[i] = 0xff;  // NaN, or -1
}
void copy(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
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

// ---- the running block -------------------------------------------------------------------------------------------
enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  uint3 index{};
  unsigned number = 0;
  State state = State::kDone;
  char* stack = nullptr;  // kPage of guard, then kStack
  void* stack_pointer = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
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
} block;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("cuda_on_cpu: ", stderr);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, " [block (%u, %u, %u), thread (%u, %u, %u)]\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
               threadIdx.y, threadIdx.z);
  std::fflush(nullptr);
  std::abort();
}

// Saves the callee's registers on the running stack, its pointer in *from, and goes on where `to` was saved.
extern "C" void cuda_on_cpu_switch_stack(void** from, void* to);
asm(R"(
  .text
  .globl cuda_on_cpu_switch_stack
  .type cuda_on_cpu_switch_stack, @function
cuda_on_cpu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_cpu_switch_stack, . - cuda_on_cpu_switch_stack
)");

void resume(Thread& thread) {
  block.current = &thread;
  threadIdx = thread.index;
#if defined(CUDA_ON_CPU_ADDRESS)
  __sanitizer_start_switch_fiber(&block.host_fake_stack, thread.stack + kPage, kStack);
#elif defined(CUDA_ON_CPU_THREAD)
  __tsan_switch_to_fiber(thread.tsan, 1);  // 1: no edge
#endif
  cuda_on_cpu_switch_stack(&block.host_stack_pointer, thread.stack_pointer);
#if defined(CUDA_ON_CPU_ADDRESS)
  __sanitizer_finish_switch_fiber(block.host_fake_stack, nullptr, nullptr);
#endif
}

void yield() {
  Thread& thread = *block.current;
#if defined(CUDA_ON_CPU_ADDRESS)
  __sanitizer_start_switch_fiber(thread.state == State::kDone ? nullptr : &thread.fake_stack, block.host_stack,
                                 block.host_stack_size);
#elif defined(CUDA_ON_CPU_THREAD)
  __tsan_switch_to_fiber(block.host_tsan, 1);
#endif
  cuda_on_cpu_switch_stack(&thread.stack_pointer, block.host_stack_pointer);
#if defined(CUDA_ON_CPU_ADDRESS)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &block.host_stack, &block.host_stack_size);
#endif
}

void run_thread() {
#if defined(CUDA_ON_CPU_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, &block.host_stack, &block.host_stack_size);
#endif
  acquire(&block.start);
  acquire(block.crew->next_block_edge());
  (*block.body)();
  Thread& thread = *block.current;
  if (block.waiting > 0) fail("a thread ends while others wait at the barrier %s", block.site);
  if (block.warps[thread.number / kWarp].arrived != 0) {
    fail("a thread ends while its warp waits at %s", block.warps[thread.number / kWarp].site);
  }
  release(block.crew->next_block_edge());
  release(&block.end);
  thread.state = State::kDone;
  --block.alive;
  yield();
}

void prepare(Thread& thread) {
  if (thread.stack == nullptr) {
    thread.stack = map_pages(kPage + kStack);
    mprotect(thread.stack, kPage, PROT_NONE);
  }
  void** top = reinterpret_cast<void**>(thread.stack + kPage + kStack - 64);
  *--top = nullptr;  // run_thread never returns; this keeps its stack aligned
  *--top = reinterpret_cast<void*>(&run_thread);
  thread.stack_pointer = top - 6;
#if defined(CUDA_ON_CPU_THREAD)
  if (thread.tsan == nullptr) thread.tsan = __tsan_create_fiber(0);
#endif
  thread.state = State::kReady;
}

// The order in which blocks, and threads that can run, take their turns.
class Order {
 public:
  Order() {
    const char* wish = std::getenv("CUDA_ON_CPU_ORDER");
    kind_ = wish != nullptr ? wish : "forward";
    if (kind_.starts_with("random:")) {
      generator_.seed(std::stoul(kind_.substr(7)));
    } else if (kind_ != "forward" && kind_ != "reverse") {
      std::fprintf(stderr, "cuda_on_cpu: CUDA_ON_CPU_ORDER must be forward, reverse or random:SEED, not %s\n", wish);
      std::abort();
    }
  }
  void arrange(std::vector<uint64_t>& numbers) {
    if (kind_ == "reverse") std::sort(numbers.rbegin(), numbers.rend());
    if (kind_.starts_with("random:")) std::shuffle(numbers.begin(), numbers.end(), generator_);
  }

 private:
  std::string kind_;
  std::mt19937 generator_;
};

void run_block(Order& order) {
  std::vector<uint64_t> numbers(block.size);
  std::iota(numbers.begin(), numbers.end(), 0);
  while (block.alive > 0) {
    bool ran = false;
    order.arrange(numbers);
    for (const uint64_t number : numbers) {
      if (block.crew->threads[number].state != State::kReady) continue;
      resume(block.crew->threads[number]);
      ran = true;
    }
    if (!ran) {
      fail("deadlock: %u of %u threads wait at the barrier %s, the others at warp operations", block.waiting,
           block.alive, block.site != nullptr ? block.site : "(none)");
    }
  }
}

// The calling lane waits for its warp.
void warp_wait(unsigned mask, const char* site, bool orders_memory) {
  Thread& thread = *block.current;
  const unsigned number = thread.number / kWarp;
  Warp& warp = block.warps[number];
  if (mask != ~0u || warp.size != kWarp) fail("%s: a warp operation without all 32 lanes", site);
  if (warp.arrived != 0 && std::strcmp(warp.site, site) != 0) fail("%s: other lanes wait at %s", site, warp.site);
  const unsigned turn = warp.turn % 2;
  char* const edge = block.crew->warp_edge(number, turn);
  warp.site = site;
  if (orders_memory) release(edge);
  if (++warp.arrived == kWarp) {
    for (unsigned i = 0; i < kWarp; ++i) block.crew->threads[number * kWarp + i].state = State::kReady;
    warp.arrived = 0;
    ++warp.turn;
  } else {
    thread.state = State::kAtWarp;
  }
  yield();
  if (orders_memory) acquire(edge);
}

}  // namespace

void barrier(const char* site) {
  if (block.waiting > 0 && std::strcmp(block.site, site) != 0) {
    fail("a thread comes to the barrier %s while others wait at %s", site, block.site);
  }
  char* const edge = block.crew->barrier_edge(block.turn);
  block.site = site;
  release(edge);
  block.current->state = State::kAtBarrier;
  if (++block.waiting == block.alive) {
    for (unsigned i = 0; i < block.size; ++i) {
      Thread& thread = block.crew->threads[i];
      if (thread.state == State::kAtBarrier) thread.state = State::kReady;
    }
    block.waiting = 0;
    ++block.turn;
  }
  yield();
  acquire(edge);
}

void warp_barrier(unsigned mask, const char* site) { warp_wait(mask, site, true); }

void exchange(unsigned mask, const void* value, void* result, unsigned bytes, int source, const char* site) {
  Warp& warp = block.warps[block.current->number / kWarp];
  const unsigned turn = warp.turn % 2;
  if (source < 0 || source >= static_cast<int>(kWarp)) fail("%s: lane %d does not exist", site, source);
  copy(warp.slots[turn][lane()], value, bytes);
  warp_wait(mask, site, false);
  copy(result, warp.slots[turn][source], bytes);
}

int lane() { return static_cast<int>(block.current->number % kWarp); }

void* dynamic_shared() { return block.crew->shared.arrays.front().data; }

void* static_shared(const void* variable, size_t bytes, const char* site) {
  for (const SharedMemory::Array& array : block.crew->shared.arrays) {
    if (array.variable == variable) return array.data;
  }
  char* const data = block.crew->shared.take(variable, bytes);
  if (data == nullptr) fail("%s: more than %zu bytes of shared memory", site, kShared);
  return data;
}

void check_device_memory(const void* pointer, const char* site) {
  for (const SharedMemory::Array& array : block.crew->shared.arrays) {
    if (pointer >= array.data && pointer < array.data + array.bytes) {
      fail("%s: a store for device memory goes to shared memory", site);
    }
  }
}

cudaError_t launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const uint64_t size = uint64_t{threads.x} * threads.y * threads.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (size == 0 || size > kBlockThreads || threads.z > 64) return cudaErrorInvalidConfiguration;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kShared) return cudaErrorInvalidValue;

  const char* wish = std::getenv("CUDA_ON_CPU_BLOCKS");
  const bool unordered = wish != nullptr && std::strcmp(wish, "unordered") == 0;
  for (Crew& crew : block.crews) {
    if (crew.threads.size() < size) crew.threads.resize(size);
  }
  block.warps.assign((size + kWarp - 1) / kWarp, Warp{});
  block.size = static_cast<unsigned>(size);
  block.body = &thread;
  blockDim = threads;
  gridDim = grid;
#if defined(CUDA_ON_CPU_THREAD)
  block.host_tsan = __tsan_get_current_fiber();
#endif
  Order order;
  std::vector<uint64_t> numbers(blocks);
  std::iota(numbers.begin(), numbers.end(), 0);
  order.arrange(numbers);
  release(&block.start);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = numbers[i];
    blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                static_cast<unsigned>(number / grid.x / grid.y)};
    block.crew = &block.crews[unordered ? i % 2 : 0];
    block.crew->shared.start_block(shared_bytes);
    block.alive = block.size;
    block.waiting = 0;
    for (unsigned k = 0; k < block.size; ++k) {
      Thread& next = block.crew->threads[k];
      next.number = k;
      next.index = {k % threads.x, k / threads.x % threads.y, k / threads.x / threads.y};
      block.warps[k / kWarp].size = std::min(kWarp, block.size - k / kWarp * kWarp);
      block.warps[k / kWarp].arrived = 0;
      prepare(next);
    }
    run_block(order);
  }
  acquire(&block.end);
  for (Crew& crew : block.crews) crew.shared.clear();
  return cudaSuccess;
}

}  // namespace cuda_on_cpu
