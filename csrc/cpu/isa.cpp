// Chooses the instruction set that the CPU kernels run with, once a process.
#include <cstdlib>
#include <string_view>

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {
namespace {

Isa detect() {
  Isa best = Isa::kBaseline;
#if PSP_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
#endif
  // A lower one can be asked for, to test or to compare; a higher one than the processor has cannot.
  if (const char* wanted = std::getenv("PSPNET_FAST_ISA")) {
    const std::string_view name(wanted);
    if (name == "baseline") best = Isa::kBaseline;
    if (name == "avx2") best = std::min(best, Isa::kAvx2);
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace pspnet_fast::cpu
