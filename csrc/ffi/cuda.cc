// The CUDA handlers. A call may be captured into a CUDA graph, so it launches kernels on the given stream and does
// nothing else: no memory of its own, no synchronisation. Its work space is its last result, which the lowering drops.
//
// Each has two stages of the same signature. `Initialize`, before the program runs, loads the kernels into the GPU:
// CUDA would do so at their first launch, which may wait for other kernels to end, and those of a collective operation
// may wait for that launch.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <utility>

#include "../cuda/kernels.h"
#include "checks.h"
#include "cuda_options.h"
#include "handlers.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dcn {
namespace {

using Stream = ffi::PlatformStream<cudaStream_t>;
using Workspace = ffi::BufferR2<ffi::DataType::U8>;

// What the kernels ask for beyond what Checker checks.
template <class... Arrays>
void CheckBuffers(Checker& check, bool nchw, Workspace workspace, int64_t needed, const Arrays&... arrays) {
  if (nchw) check.Fail("the CUDA kernels take NHWC");
  const auto size = static_cast<int64_t>(workspace.element_count());
  if (size < needed) {
    check.Fail("the work space has " + std::to_string(size) + " bytes, needs " + std::to_string(needed) +
               "; was the program exported by another version of jax_dcn?");
  }
  // The kernels read and write vectors of 16 bytes. XLA aligns its buffers to 128.
  for (const void* data :
       {static_cast<const void*>(workspace.untyped_data()), static_cast<const void*>(arrays.data)...}) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) check.Fail("a buffer is not aligned to 16 bytes");
  }
}

// Like "8.6".
std::string ComputeCapability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "unknown";
  }
  return std::to_string(major) + "." + std::to_string(minor);
}

ffi::Error ToError(const cuda::Status& status, int device) {
  const auto precondition = [](const std::string& message) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "jax_dcn: " + message);
  };
  switch (status.error) {
    case cudaSuccess: return ffi::Error::Success();
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return precondition("the CUDA kernels were built for the architectures " + std::string(cuda::Architectures()) +
                          ", none of which runs on this GPU, of compute capability " + ComputeCapability(device) +
                          ". Install jax_dcn with CUDAARCHS=native in the environment, which takes 7.5 or later, or "
                          "set JAX_DCN_IMPLEMENTATION=xla");
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
      return precondition("the GPU's driver is too old for the CUDA kernels (" +
                          std::string(cudaGetErrorString(status.error)) +
                          "). Update it, or install jax_dcn with a CUDA toolkit that it supports, or set "
                          "JAX_DCN_IMPLEMENTATION=xla");
    default:
      return ffi::Error::Internal("jax_dcn: " + std::string(status.what == nullptr ? "CUDA" : status.what) + ": " +
                                  cudaGetErrorName(status.error) + ": " + cudaGetErrorString(status.error));
  }
}

template <ffi::ExecutionStage kStage>
cuda::Options StageOptions(const Attributes& attributes) {
  cuda::Options options = ToOptions(attributes);
  options.load_only = kStage == ffi::ExecutionStage::kInitialize;
  return options;
}

template <ffi::ExecutionStage kStage>
ffi::Error DeformConv2d(cudaStream_t stream, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer offset,
                        ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> y, ffi::Result<Workspace> workspace,
                        const Attributes& attributes) {
  Checker check;
  const auto [g, a] = check.Forward(x, offset, optional, y, attributes);
  if (!check.ok()) return check.error();
  const cuda::Options options = StageOptions<kStage>(attributes);
  const int64_t needed = cuda::ForwardWorkspace(g, a.x.dtype, options).bytes;
  CheckBuffers(check, attributes.nchw, *workspace, needed, a.x, a.offset, a.mask, a.weight, a.bias, a.y);
  return check.ok() ? ToError(cuda::Forward(g, a, workspace->untyped_data(), options, device, stream), device)
                    : check.error();
}

template <ffi::ExecutionStage kStage>
ffi::Error DeformConv2dBackward(cudaStream_t stream, int32_t device, ffi::AnyBuffer grad_y, ffi::AnyBuffer x,
                                ffi::AnyBuffer offset, ffi::RemainingArgs optional, ffi::RemainingRets results,
                                const BackwardAttributes& attributes) {
  Checker check;
  const auto [g, a] = check.Backward(grad_y, x, offset, optional, results, attributes, 1);
  if (!check.ok()) return check.error();
  auto last = results.get<Workspace>(results.size() - 1);
  if (!last.has_value()) return last.error();
  const Workspace workspace = **last;
  const cuda::Options options = StageOptions<kStage>(attributes);
  const int64_t needed = cuda::BackwardWorkspace(g, attributes.wanted, a.x.dtype, options).bytes;
  CheckBuffers(check, attributes.nchw, workspace, needed, a.grad_y, a.x, a.offset, a.mask, a.weight, a.grad_x,
               a.grad_offset, a.grad_mask, a.grad_weight, a.grad_bias);
  return check.ok() ? ToError(cuda::Backward(g, a, workspace.untyped_data(), options, device, stream), device)
                    : check.error();
}

constexpr auto kInitialize = ffi::ExecutionStage::kInitialize;
constexpr auto kExecute = ffi::ExecutionStage::kExecute;

template <ffi::ExecutionStage kStage>
auto BindForwardStage() {
  return BindForward(ffi::Ffi::Bind<kStage>().template Ctx<Stream>().template Ctx<ffi::DeviceOrdinal>())
      .template Ret<Workspace>()
      .template Attrs<Attributes>();
}

template <ffi::ExecutionStage kStage>
auto BindBackwardStage() {
  return BindBackward(ffi::Ffi::Bind<kStage>().template Ctx<Stream>().template Ctx<ffi::DeviceOrdinal>())
      .template Attrs<BackwardAttributes>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dCudaInitialize, DeformConv2d<kInitialize>, BindForwardStage<kInitialize>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dCuda, DeformConv2d<kExecute>, BindForwardStage<kExecute>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dBackwardCudaInitialize, DeformConv2dBackward<kInitialize>,
                              BindBackwardStage<kInitialize>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dBackwardCuda, DeformConv2dBackward<kExecute>, BindBackwardStage<kExecute>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_dcn
