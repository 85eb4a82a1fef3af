// The threads of a block as fibers of one thread of the CPU; barriers and warp operations, at which they wait.
#include <sys/mman.h>

#include <cstring>

#include "runtime.h"

#if !defined(__x86_64__)
#error "switch_stack is written for x86-64"
#endif

#if defined(CUDA_ON_CPU_THREAD)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif
#if defined(CUDA_ON_CPU_ADDRESS)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
}
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 4096, kStack = 128 * 1024;

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

// Sites are literals, of which each source has its own.
bool same(const char* site, const char* other) { return site == other || std::strcmp(site, other) == 0; }

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

// The calling lane waits for its warp.
void warp_wait(unsigned mask, const char* site, bool orders_memory) {
  Thread& thread = *block.current;
  const unsigned number = thread.number / kWarp;
  Warp& warp = block.warps[number];
  if (mask != ~0u || warp.size != kWarp) fail("%s: a warp operation without all 32 lanes", site);
  if (warp.arrived != 0 && !same(warp.site, site)) fail("%s: other lanes wait at %s", site, warp.site);
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
  thread.copies.clear();
  thread.copy_groups = 0;
  thread.state = State::kReady;
}

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

void barrier(const char* site) {
  if (block.waiting > 0 && !same(block.site, site)) {
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

void gather(const void* value, void* values, const char* site) {
  Warp& warp = block.warps[block.current->number / kWarp];
  const unsigned turn = warp.turn % 2;
  copy(warp.slots[turn][lane()], value, sizeof(warp.slots[turn][0]));
  warp_wait(~0u, site, false);
  copy(values, warp.slots[turn], sizeof(warp.slots[turn]));
}

void multiply(const Factors& own, float (&sums)[4], const char* site) {
  Warp& warp = block.warps[block.current->number / kWarp];
  const unsigned turn = warp.turn % 2;
  const Factors *const pointer = &own, *all[kWarp];
  const int thread = lane();
  copy(warp.slots[turn][thread], &pointer, sizeof(pointer));
  warp_wait(~0u, site, false);
  copy(all, warp.slots[turn], sizeof(all));
  for (int v = 0; v < 4; ++v) {
    const int row = thread / 4, column = thread % 4 * 2 + v % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      sums[v] += all[row * 4 + pair]->left[v / 2 + k / 8 * 2][k % 2] * all[column * 4 + pair]->right[k / 8][k % 2];
    }
  }
  warp_wait(~0u, site, false);  // the factors lie on the lanes' stacks
}

void begin_copy(const AsyncCopy& copy) {
  Thread& thread = *block.current;
  thread.copies.push_back(copy);
  thread.copies.back().group = thread.copy_groups;
}

void end_copy_group() { ++block.current->copy_groups; }

bool take_copy(unsigned groups, AsyncCopy& copy) {
  Thread& thread = *block.current;
  if (thread.copies.empty() || thread.copies.front().group + groups >= thread.copy_groups) return false;
  copy = thread.copies.front();
  thread.copies.pop_front();
  return true;
}

int lane() { return static_cast<int>(block.current->number % kWarp); }

}  // namespace cuda_on_cpu
