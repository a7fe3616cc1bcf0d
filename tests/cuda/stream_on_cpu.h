// The CUDA handlers on the CPU, where XLA has no stream to give them: they get a null one.

#pragma once

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"

template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) {
    return static_cast<cudaStream_t>(nullptr);
  }
};
