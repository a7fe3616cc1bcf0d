// Sums over the pixels: blocks sum parts of them, and the sums of the parts are added up in their order.

#pragma once

#include "product.h"

namespace jax_dcn {
namespace cuda {

// How blocks share the pixels where they sum over them; a function of the sizes and the kind of device, as it decides
// the order of sums.
struct PixelParts {
  int parts;
  int64_t part_pixels;
};

// A thread adds up one of `size` elements.
template <class Real>
JAX_DCN_GLOBAL void ReduceKernel(int64_t parts, int64_t size, const Real* sums, Real* gradient) {
  const int64_t i = GlobalThread();
  if (i >= size) return;
  Real sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[part * size + i];
  gradient[i] = sum;
}

}  // namespace cuda
}  // namespace jax_dcn
