// One instruction set's kernels; compiled once for each, with JAX_DCN_TARGET as its name.

#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "products.h"
#include "sums.h"

#define JAX_DCN_STRING_(x) #x
#define JAX_DCN_STRING(x) JAX_DCN_STRING_(x)

namespace jax_dcn {
namespace JAX_DCN_TARGET {
namespace {

// Runs a kernel with the kind of products that the convolution has. `depth` is that of a product of matrices.
template <template <class> class Kernel, class T, class Arrays>
bool RunWithProducts(const Geometry& g, const Arrays& arrays, int64_t depth, Workers& workers) {
  if (g.depthwise()) return Kernel<DepthwiseProducts<T>>(g, arrays).Run(workers);
  if constexpr (kHasPairs && std::is_same_v<T, BFloat16>) {
    if (arrays.round_samples && depth % 2 == 0) return Kernel<GroupedProducts<T, BFloat16>>(g, arrays).Run(workers);
  }
  return Kernel<GroupedProducts<T, Accumulation<T>>>(g, arrays).Run(workers);
}

// Calls function(an element of the type).
template <class Function>
bool WithElement(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32: return function(float{});
    case DType::kFloat64: return function(double{});
    case DType::kBFloat16: return function(BFloat16{});
    case DType::kFloat16: return function(Float16{});
  }
  return false;
}

template <template <class> class Kernel, template <class> class Sums, class Arrays>
bool Run(const Geometry& g, const Arrays& arrays, int64_t depth, Workers& workers) {
  return WithElement(arrays.x.dtype, [&](auto element) {
    using T = decltype(element);
    return g.weighted ? RunWithProducts<Kernel, T>(g, arrays, depth, workers) : Sums<T>(g, arrays).Run(workers);
  });
}

// The depth is made of the channels of each tap.
bool RunForward(const Geometry& g, const ForwardArrays& arrays, Workers& workers) {
  return Run<Forward, ForwardSums>(g, arrays, g.group_in(), workers);
}

// That of grad_samples is the output channels; that of grad_weight is the pixels of a tile, made up to whole pairs.
bool RunBackward(const Geometry& g, const BackwardArrays& arrays, Workers& workers) {
  return Run<Backward, BackwardSums>(g, arrays, g.group_out(), workers);
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {JAX_DCN_STRING(JAX_DCN_TARGET), RunForward, RunBackward};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
