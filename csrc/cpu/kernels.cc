// One instruction set's kernels; compiled once for each, with JAX_DCN_TARGET as its name.

#include "kernels.h"

#include "backward.h"
#include "forward.h"

#define JAX_DCN_STRING_(x) #x
#define JAX_DCN_STRING(x) JAX_DCN_STRING_(x)

namespace jax_dcn {
namespace JAX_DCN_TARGET {
namespace {

template <template <class> class Kernel, class Arrays>
bool RunFor(const Geometry& g, const Arrays& arrays, Workers& workers) {
  switch (arrays.x.dtype) {
    case DType::kFloat32: return Kernel<float>(g, arrays).Run(workers);
    case DType::kFloat64: return Kernel<double>(g, arrays).Run(workers);
    case DType::kBFloat16: return Kernel<BFloat16>(g, arrays).Run(workers);
    case DType::kFloat16: return Kernel<Float16>(g, arrays).Run(workers);
  }
  return false;
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {JAX_DCN_STRING(JAX_DCN_TARGET), RunFor<Forward, ForwardArrays>,
                          RunFor<Backward, BackwardArrays>};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
