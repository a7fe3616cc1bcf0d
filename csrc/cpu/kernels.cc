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

template <template <class> class Kernel, class Arrays>
bool Run(const Geometry& g, const Arrays& arrays, int64_t depth, Workers& workers) {
  switch (arrays.x.dtype) {
    case DType::kFloat32: return RunWithProducts<Kernel, float>(g, arrays, depth, workers);
    case DType::kFloat64: return RunWithProducts<Kernel, double>(g, arrays, depth, workers);
    case DType::kBFloat16: return RunWithProducts<Kernel, BFloat16>(g, arrays, depth, workers);
    case DType::kFloat16: return RunWithProducts<Kernel, Float16>(g, arrays, depth, workers);
  }
  return false;
}

template <template <class> class Kernel, class Arrays>
bool RunSums(const Geometry& g, const Arrays& arrays, Workers& workers) {
  switch (arrays.x.dtype) {
    case DType::kFloat32: return Kernel<float>(g, arrays).Run(workers);
    case DType::kFloat64: return Kernel<double>(g, arrays).Run(workers);
    case DType::kBFloat16: return Kernel<BFloat16>(g, arrays).Run(workers);
    case DType::kFloat16: return Kernel<Float16>(g, arrays).Run(workers);
  }
  return false;
}

// The depth is made of the channels of each tap.
bool RunForward(const Geometry& g, const ForwardArrays& arrays, Workers& workers) {
  if (!g.weighted) return RunSums<ForwardSums>(g, arrays, workers);
  return Run<Forward>(g, arrays, g.group_in(), workers);
}

// That of grad_samples is the output channels; that of grad_weight is the pixels of a tile, made up to whole pairs.
bool RunBackward(const Geometry& g, const BackwardArrays& arrays, Workers& workers) {
  if (!g.weighted) return RunSums<BackwardSums>(g, arrays, workers);
  return Run<Backward>(g, arrays, g.group_out(), workers);
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {JAX_DCN_STRING(JAX_DCN_TARGET), RunForward, RunBackward};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
