// The handlers that the modules offer to XLA.

#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_dcn {

extern "C" XLA_FFI_Error* DeformConv2dCpu(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* DeformConv2dBackwardCpu(XLA_FFI_CallFrame* call_frame);

extern "C" XLA_FFI_Error* DeformConv2dCudaInitialize(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* DeformConv2dCuda(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* DeformConv2dBackwardCudaInitialize(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* DeformConv2dBackwardCuda(XLA_FFI_CallFrame* call_frame);

}  // namespace jax_dcn
