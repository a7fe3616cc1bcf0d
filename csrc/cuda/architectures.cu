#include "kernels.h"

#ifndef JAX_DCN_CUDA_ARCHITECTURES
#define JAX_DCN_CUDA_ARCHITECTURES "unknown"
#endif

namespace jax_dcn {
namespace cuda {

const char* Architectures() { return JAX_DCN_CUDA_ARCHITECTURES; }

}  // namespace cuda
}  // namespace jax_dcn
