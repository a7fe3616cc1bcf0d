// The Python module jax_dcn._native_cuda. It stands apart from _native so that whatever keeps it from loading leaves
// the CPU kernels in place.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cuda/kernels.h"
#include "checks.h"
#include "cuda_options.h"
#include "handlers.h"

namespace py = pybind11;

namespace jax_dcn {
namespace {

using IntPair = std::array<int64_t, 2>;
using Dimensions = std::array<int64_t, 4>;

template <size_t n>
Pair Span(const std::array<int64_t, n>& values) {
  return {values.data(), n};
}

Geometry ToGeometry(const Dimensions& x, const Dimensions& weight, const Attributes& attributes) {
  Checker check;
  const Geometry g = check.ToGeometry(Span(x), Span(weight), attributes);
  if (!check.ok()) throw std::invalid_argument(check.error().message());
  return g;
}

DType ToDType(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("jax_dcn: unsupported type " + name);
}

// The bytes of work space that a handler wants. They take the handlers' attributes by name.

int64_t ForwardWorkspace(const Dimensions& x, const Dimensions& weight, const std::string& dtype, const IntPair& stride,
                         const IntPair& padding, const IntPair& dilation, int64_t groups, int64_t deform_groups,
                         bool nchw, bool has_mask, bool highest_precision, bool deterministic) {
  const Geometry g =
      ToGeometry(x, weight, {Span(stride), Span(padding), Span(dilation), groups, deform_groups, nchw, has_mask});
  return cuda::ForwardWorkspace(g, ToDType(dtype), ToOptions(highest_precision, deterministic));
}

int64_t BackwardWorkspace(const Dimensions& x, const Dimensions& weight, const std::string& dtype,
                          const IntPair& stride, const IntPair& padding, const IntPair& dilation, int64_t groups,
                          int64_t deform_groups, bool nchw, bool has_mask, bool grad_x, bool grad_offset,
                          bool grad_mask, bool grad_weight, bool grad_bias, bool highest_precision,
                          bool deterministic) {
  const Geometry g =
      ToGeometry(x, weight, {Span(stride), Span(padding), Span(dilation), groups, deform_groups, nchw, has_mask});
  return cuda::BackwardWorkspace(g, {grad_x, grad_offset, grad_mask, grad_weight, grad_bias}, ToDType(dtype),
                                 ToOptions(highest_precision, deterministic));
}

}  // namespace
}  // namespace jax_dcn

PYBIND11_MODULE(_native_cuda, m) {
  using py::arg;
  const auto capsule = [](XLA_FFI_Handler* handler) { return py::capsule(reinterpret_cast<void*>(handler)); };
  m.def("handlers", [capsule] {
    const auto stages = [capsule](XLA_FFI_Handler* initialize, XLA_FFI_Handler* execute) {
      py::dict handlers;
      handlers["initialize"] = capsule(initialize);
      handlers["execute"] = capsule(execute);
      return handlers;
    };
    py::dict handlers;
    handlers["jax_dcn_deform_conv2d"] = stages(jax_dcn::DeformConv2dCudaInitialize, jax_dcn::DeformConv2dCuda);
    handlers["jax_dcn_deform_conv2d_backward"] =
        stages(jax_dcn::DeformConv2dBackwardCudaInitialize, jax_dcn::DeformConv2dBackwardCuda);
    return handlers;
  });
  m.def("architectures", [] { return jax_dcn::cuda::Architectures(); });
  m.def("forward_workspace", jax_dcn::ForwardWorkspace, arg("x"), arg("weight"), arg("dtype"), py::kw_only(),
        arg("stride"), arg("padding"), arg("dilation"), arg("groups"), arg("deform_groups"), arg("nchw"),
        arg("has_mask"), arg("highest_precision"), arg("deterministic"));
  m.def("backward_workspace", jax_dcn::BackwardWorkspace, arg("x"), arg("weight"), arg("dtype"), py::kw_only(),
        arg("stride"), arg("padding"), arg("dilation"), arg("groups"), arg("deform_groups"), arg("nchw"),
        arg("has_mask"), arg("grad_x"), arg("grad_offset"), arg("grad_mask"), arg("grad_weight"), arg("grad_bias"),
        arg("highest_precision"), arg("deterministic"));
}
