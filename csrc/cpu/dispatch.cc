// The choice of an instruction set at run time.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace jax_dcn {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(JAX_DCN_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#if defined(JAX_DCN_AVX512BF16)
namespace avx512bf16 {
extern const Kernels kKernels;
}
#endif
#endif

const Kernels* const* BuiltKernels() {
  static const Kernels* const kBuilt[] = {
      &baseline::kKernels,
#if defined(JAX_DCN_X86)
      &avx2::kKernels,
      &avx512::kKernels,
#if defined(JAX_DCN_AVX512BF16)
      &avx512bf16::kKernels,
#endif
#endif
      nullptr,
  };
  return kBuilt;
}

namespace {

bool Runs(const char* name) {
#if defined(JAX_DCN_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx512") == 0) return avx512;
#if defined(JAX_DCN_EMULATE_BF16)
  if (std::strcmp(name, "avx512bf16") == 0) return avx512;
#elif defined(JAX_DCN_AVX512BF16)
  if (std::strcmp(name, "avx512bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return std::strcmp(name, "baseline") == 0;
}

const Kernels* Choose() {
  const char* asked = std::getenv("JAX_DCN_CPU_ISA");
  const Kernels* best = nullptr;
  for (const Kernels* const* kernels = BuiltKernels(); *kernels != nullptr; ++kernels) {
    const char* name = (*kernels)->name;
    if ((asked == nullptr || *asked == 0 || std::strcmp(name, asked) == 0) && Runs(name)) best = *kernels;
  }
  return best;
}

}  // namespace

const Kernels* ChosenKernels() {
  static const Kernels* const chosen = Choose();
  return chosen;
}

}  // namespace jax_dcn
