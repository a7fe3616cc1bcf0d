// One instruction set's kernels; compiled once for each, with JAX_DCN_TARGET as its name.

#include "kernels.h"

#include "backward.h"
#include "forward.h"

#define JAX_DCN_STRING_(x) #x
#define JAX_DCN_STRING(x) JAX_DCN_STRING_(x)

namespace jax_dcn {
namespace JAX_DCN_TARGET {
namespace {

bool RunForward(const Geometry& g, const ForwardArrays& arrays, Workers& workers) {
  switch (arrays.x.dtype) {
    case DType::kFloat32: return Forward<float, float>(g, arrays).Run(workers);
    case DType::kFloat64: return Forward<double, double>(g, arrays).Run(workers);
    case DType::kBFloat16:
      // The channels of a tap make whole pairs.
      if constexpr (kHasPairs) {
        if (arrays.round_samples && g.group_in() % 2 == 0) return Forward<BFloat16, BFloat16>(g, arrays).Run(workers);
      }
      return Forward<BFloat16, float>(g, arrays).Run(workers);
    case DType::kFloat16: return Forward<Float16, float>(g, arrays).Run(workers);
  }
  return false;
}

bool RunBackward(const Geometry& g, const BackwardArrays& arrays, Workers& workers) {
  switch (arrays.x.dtype) {
    case DType::kFloat32: return Backward<float, float>(g, arrays).Run(workers);
    case DType::kFloat64: return Backward<double, double>(g, arrays).Run(workers);
    case DType::kBFloat16:
      // So do the output channels, and a tile's pixels are made up to such.
      if constexpr (kHasPairs) {
        if (arrays.round_samples && g.group_out() % 2 == 0) return Backward<BFloat16, BFloat16>(g, arrays).Run(workers);
      }
      return Backward<BFloat16, float>(g, arrays).Run(workers);
    case DType::kFloat16: return Backward<Float16, float>(g, arrays).Run(workers);
  }
  return false;
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {JAX_DCN_STRING(JAX_DCN_TARGET), RunForward, RunBackward};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
