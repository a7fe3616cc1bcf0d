// The CUDA kernels' options as the handlers' attributes and the Python module state them.

#pragma once

#include "../cuda/kernels.h"

namespace jax_dcn {

inline cuda::Options ToOptions(bool highest_precision, bool deterministic) {
  return {highest_precision ? cuda::Precision::kHighest : cuda::Precision::kDefault, deterministic};
}

}  // namespace jax_dcn
