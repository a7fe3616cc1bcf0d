// The CUDA kernels of deformable convolution, forward and backward.
//
// All arrays are in NHWC and dense, and begin at a multiple of 16 bytes. Nothing here allocates, synchronises or asks
// for what stream capture forbids: the caller hands over the work space, of the size that the functions below name.

#pragma once

#include <cstdint>

#ifdef JAX_DCN_CUDA_ON_CPU
#include "device_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../geometry.h"
#include "../operands.h"

namespace jax_dcn {
namespace cuda {

// Of the products of float32: on tensor cores with operands rounded to TF32, where they have it, or in float32
// throughout. The other types have one way only.
enum class Precision { kDefault, kHighest };

struct Options {
  Precision precision = Precision::kDefault;
  bool deterministic = false;  // the same bits of grad_x in every run; all other results always are
  bool load_only = false;      // load the kernels of the call into the GPU and launch none
};

// What failed first, if anything did.
struct Status {
  cudaError_t error = cudaSuccess;
  const char* what = nullptr;  // the launch or call
};

// The bytes of work space of a call, and a formula that gives no fewer: a constant, and so many for each pixel of all
// images of x, and of y.
struct WorkspaceSize {
  int64_t bytes = 0;
  int64_t constant = 0, per_input_pixel = 0, per_output_pixel = 0;
};

// A geometry whose formula holds for all sizes of batch, images and results: the constant depends on no more than the
// pixels of y, and on these up to a number that is smaller than this geometry's.
inline constexpr int64_t kManyPixels = int64_t{1} << 31;
inline Geometry OfAnySize(Geometry g) {
  g.batch = kManyPixels;
  g.height = g.width = g.h_out = g.w_out = 1;
  return g;
}

// They depend on the sizes alone, so that they can be asked for where there is no device.
WorkspaceSize ForwardWorkspace(const Geometry& geometry, DType dtype, const Options& options);
WorkspaceSize BackwardWorkspace(const Geometry& geometry, const WantedGradients& wanted, DType dtype,
                                const Options& options);

// On a stream of the device, whichever is the current one.
Status Forward(const Geometry& geometry, const ForwardArrays& arrays, void* workspace, const Options& options,
               int device, cudaStream_t stream);
Status Backward(const Geometry& geometry, const BackwardArrays& arrays, void* workspace, const Options& options,
                int device, cudaStream_t stream);

// The architectures whose machine code was built, for example "75 80 90 90+PTX".
const char* Architectures();

}  // namespace cuda
}  // namespace jax_dcn
