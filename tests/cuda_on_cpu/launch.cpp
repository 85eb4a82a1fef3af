// Runs the blocks of a launch one after another, and gives out their shared memory.
//
// CUDA_ON_CPU_ORDER=forward|reverse|random:SEED: the order of the blocks, and of the threads that can run.
// CUDA_ON_CPU_BLOCKS=unordered (ThreadSanitizer): two crews of fibers take the blocks in turn, and nothing orders one
// crew's accesses before the other's, so that races between blocks show as well.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Block block;

char* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::perror("cuda_on_cpu: mmap"), std::abort();
  return static_cast<char*>(memory);
}

void fail(const char* format, ...) {
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

namespace {

constexpr unsigned kBlockThreads = 1024;

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

}  // namespace

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

namespace {
using Observer = int (*)(const void* kernel, const unsigned* grid_and_block, size_t shared_bytes,
                         const void* parameters, size_t bytes);
Observer observer = nullptr;
}  // namespace

// Every launch is told to `wanted`, which returns whether it has taken it over; nullptr: to nobody.
extern "C" void cuda_on_cpu_observe(Observer wanted) { observer = wanted; }

bool observed(const void* kernel, const cudaLaunchConfig_t& config, const void* parameters, size_t bytes) {
  if (observer == nullptr) return false;
  const dim3 &grid = config.gridDim, &threads = config.blockDim;
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, threads.x, threads.y, threads.z};
  return observer(kernel, sizes, config.dynamicSmemBytes, parameters, bytes) != 0;
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
