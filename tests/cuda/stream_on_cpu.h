// The CUDA handlers on the CPU, where XLA has no stream to give them: they get that of the device.

#pragma once

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"

template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  template <class Context>
  static std::optional<Type> Decode(const XLA_FFI_Api* api, Context* context, DiagnosticEngine& diagnostic) {
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    if (!device) return std::nullopt;
    return &device_streams[*device];
  }
};
