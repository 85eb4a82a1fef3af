// glibc hands every block of more than 32 MB back to the system as it is freed, and the system has to clear the pages
// of the next one: for the 59 MB that FusedPPM writes at 60 x 60 that costs 4 ms in huge pages and 23 ms in ordinary
// ones, beside kernels of 3 ms. So freed outputs are kept, up to a bound, as PyTorch does on GPUs.
//
// Blocks are mapped and unmapped one by one: malloc keeps what threads free in arenas of their own, beyond any bound.
#include "kept_memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <optional>

namespace pspnet_fast {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kSmallest = int64_t{8} << 20;  // smaller blocks glibc keeps by itself
constexpr int64_t kMostKept = int64_t{1} << 20;  // megabytes

struct Block {
  void* data = nullptr;  // nullptr: none
  int64_t size = 0;      // whole huge pages
};

// A block of at least `bytes` that begins on a huge page.
Block map_block(int64_t bytes) {
  if (bytes > std::numeric_limits<int64_t>::max() - 2 * kHugePage) return {};
  const int64_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* const mapped =
      mmap(nullptr, static_cast<size_t>(size + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  char* const begin = static_cast<char*>(mapped);
  const int64_t before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(begin) % kHugePage);
  if (before > 0) munmap(begin, static_cast<size_t>(before));
  if (before < kHugePage) munmap(begin + before + size, static_cast<size_t>(kHugePage - before));
#if defined(MADV_HUGEPAGE)
  madvise(begin + before, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
  return {begin + before, size};
}

void unmap(const Block& block) { munmap(block.data, static_cast<size_t>(block.size)); }

class KeptMemory {
 public:
  KeptMemory() { idle_.reserve(static_cast<size_t>(limit_ / kSmallest)); }  // giving back must not fail

  // A kept block serves sizes down to 4/5 of its own: tensors never hold much more memory than they need.
  Block take(int64_t bytes) {
    if (const Block kept = take_kept(bytes); kept.data) return kept;
    if (const Block fresh = map_block(bytes); fresh.data) return fresh;
    {
      const std::lock_guard lock(mutex_);
      give_up_beyond(0);
    }
    return map_block(bytes);
  }

  // Keeps the block and gives up the ones that were kept longest, as the bound demands.
  void give_back(const Block& block) {
    const std::lock_guard lock(mutex_);
    if (block.size > limit_) return unmap(block);
    give_up_beyond(limit_ - block.size);
    idle_.push_back(block);
    idle_bytes_ += block.size;
  }

  // The bound from now on; gives up what lies beyond it. The bound before.
  int64_t bound(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    idle_.reserve(static_cast<size_t>(bytes / kSmallest));
    give_up_beyond(bytes);
    return limit_.exchange(bytes);
  }

  bool keeps_nothing() const { return limit_ == 0; }

  // A fork copies the mutex as it is: held by another thread, it would stay so for ever in the child.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  Block take_kept(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      const bool fits = block->size >= bytes && block->size - bytes <= bytes / 4 + kHugePage;
      if (fits && (best == idle_.end() || block->size <= best->size)) best = block;
    }
    if (best == idle_.end()) return {};
    const Block block = *best;
    idle_bytes_ -= block.size;
    idle_.erase(best);
    return block;
  }

  void give_up_beyond(int64_t most) {
    size_t first = 0;
    for (; idle_bytes_ > most; ++first) {
      idle_bytes_ -= idle_[first].size;
      unmap(idle_[first]);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<int64_t>(first));
  }

  std::atomic<int64_t> limit_ = [] {
    const char* megabytes = std::getenv("PSPNET_FAST_KEEP_MB");
    return megabytes ? std::max<int64_t>(0, std::min<int64_t>(std::atoll(megabytes), kMostKept)) << 20
                     : int64_t{256} << 20;
  }();
  std::mutex mutex_;
  std::vector<Block> idle_;  // in the order in which they came back
  int64_t idle_bytes_ = 0;
};

// Made as the library is loaded, since a fork may come at any time after; never destroyed, since tensors may outlive
// every static object.
KeptMemory& kept_memory = []() -> KeptMemory& {
  static KeptMemory& memory = *new KeptMemory;
  pthread_atfork([] { memory.lock(); }, [] { memory.unlock(); }, [] { memory.unlock(); });
  return memory;
}();

// In deterministic mode torch fills fresh tensors, integers with their largest value. The stable ABI does not tell the
// mode, a fresh tensor does.
bool torch_fills_fresh_tensors(const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  const std::vector<int64_t> one{1};
  const auto probe = torch::stable::empty(one, ScalarType::Long, std::nullopt, like.device());
  return *static_cast<const int64_t*>(probe.data_ptr()) == std::numeric_limits<int64_t>::max();
}

}  // namespace

torch::stable::Tensor new_in_kept_memory(const torch::stable::Tensor& like, torch::headeronly::ScalarType dtype,
                                         const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                         int64_t bytes, bool& short_of_memory) {
  if (!like.is_cpu() || bytes < kSmallest || kept_memory.keeps_nothing() || torch_fills_fresh_tensors(like)) return {};
  const Block block = kept_memory.take(bytes);
  if (block.data == nullptr) {
    short_of_memory = true;
    return {};
  }
  try {
    return torch::stable::from_blob(block.data, sizes, strides, like.device(), dtype,
                                    [size = block.size](void* data) { kept_memory.give_back({data, size}); });
  } catch (...) {
    unmap(block);
    throw;
  }
}

int64_t keep_memory(int64_t megabytes) {
  STD_TORCH_CHECK(0 <= megabytes && megabytes <= kMostKept, "megabytes must be from 0 to ", kMostKept, ", but is ",
                  megabytes);
  return kept_memory.bound(megabytes << 20) >> 20;
}

}  // namespace pspnet_fast
