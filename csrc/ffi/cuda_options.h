// The CUDA kernels' options as the handlers' attributes and the Python module state them.

#pragma once

#include "../cuda/kernels.h"
#include "attributes.h"

namespace jax_dcn {

inline cuda::Options ToOptions(const Attributes& a) {
  return {a.highest_precision ? cuda::Precision::kHighest : cuda::Precision::kDefault, a.deterministic};
}

}  // namespace jax_dcn
