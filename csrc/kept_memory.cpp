// glibc hands every block of more than 32 MB back to the system as it is freed, and the system has to clear the pages
// of the next one: for the 59 MB that FusedPPM writes at 60 x 60 that costs 4 ms in huge pages and 23 ms in ordinary
// ones, beside kernels of 3 ms. So freed outputs are kept, up to a bound, as PyTorch does on GPUs.
#include "kept_memory.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pspnet_fast {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kSmallest = int64_t{8} << 20;  // smaller blocks glibc keeps by itself

class KeptMemory {
 public:
  // A block of at least `bytes`, or nullptr. A kept block serves sizes down to 4/5 of its own: tensors never hold much
  // more memory than they need.
  void* take(int64_t bytes, int64_t& size) {
    const std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      const bool fits = block->size >= bytes && block->size <= bytes + bytes / 4 + kHugePage;
      if (fits && (best == idle_.end() || block->size <= best->size)) best = block;
    }
    if (best != idle_.end()) {
      void* const data = best->data;
      size = best->size;
      idle_bytes_ -= size;
      idle_.erase(best);
      return data;
    }
    size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* const data = std::aligned_alloc(kHugePage, static_cast<size_t>(size));
#if defined(__linux__)
    if (data) madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
    return data;
  }

  // Keeps the block and gives up the ones that were kept longest, as the bound demands.
  void give_back(void* data, int64_t size) {
    if (size > limit) return std::free(data);
    const std::lock_guard lock(mutex_);
    idle_.push_back({data, size});
    idle_bytes_ += size;
    size_t first = 0;
    for (; idle_bytes_ > limit; ++first) {
      idle_bytes_ -= idle_[first].size;
      std::free(idle_[first].data);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<int64_t>(first));
  }

  const int64_t limit = [] {
    const char* megabytes = std::getenv("PSPNET_FAST_KEEP_MB");
    return megabytes ? std::max<int64_t>(0, std::min<int64_t>(std::atoll(megabytes), int64_t{1} << 40)) << 20
                     : int64_t{256} << 20;
  }();

 private:
  struct Block {
    void* data;
    int64_t size;
  };
  std::mutex mutex_;
  std::vector<Block> idle_;  // in the order in which they came back
  int64_t idle_bytes_ = 0;
};

KeptMemory& kept_memory() {
  static KeptMemory& memory = *new KeptMemory;  // never destroyed: tensors may outlive every static object
  return memory;
}

// In deterministic mode torch fills fresh tensors, integers with their largest value. The stable ABI does not tell the
// mode, a fresh tensor does.
bool torch_fills_fresh_tensors(const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  const std::vector<int64_t> one{1};
  const auto probe = torch::stable::empty(one, ScalarType::Long, std::nullopt, like.device());
  return *static_cast<const int64_t*>(probe.data_ptr()) == std::numeric_limits<int64_t>::max();
}

}  // namespace

torch::stable::Tensor new_in_kept_memory(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                         const std::vector<int64_t>& strides, int64_t bytes) {
  KeptMemory& memory = kept_memory();
  if (!like.is_cpu() || bytes < kSmallest || memory.limit == 0 || torch_fills_fresh_tensors(like)) return {};
  int64_t size = 0;
  void* const data = memory.take(bytes, size);
  if (data == nullptr) return {};
  return torch::stable::from_blob(data, sizes, strides, like.device(), like.scalar_type(),
                                  [size](void* block) { kept_memory().give_back(block, size); });
}

}  // namespace pspnet_fast
