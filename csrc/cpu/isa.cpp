// Chooses the instruction set that the CPU kernels run with, once a process.
#include <cstdlib>
#include <string>

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {
namespace {

Isa best() {
#if PSP_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Isa::kAvx512;
    }
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

// The best that the processor has, or a lower one that PSPNET_FAST_ISA names, to test or to compare.
Isa choose() {
  const char* wanted = std::getenv("PSPNET_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  std::string allowed;
  for (const Isa set : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (set > best()) break;
    const char* name = set == Isa::kBaseline ? "baseline" : set == Isa::kAvx2 ? "avx2" : "avx512";
    if (name == std::string(wanted)) return set;
    allowed += std::string(allowed.empty() ? "" : ", ") + name;
  }
  PSP_CHECK(false, "PSPNET_FAST_ISA must be one of ", allowed, " on this processor, but is '", wanted, "'");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace pspnet_fast::cpu
