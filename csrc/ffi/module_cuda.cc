// The Python module jax_dcn._operator._native_cuda. It stands apart from _native so that whatever keeps it from loading
// leaves the CPU kernels in place.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../cuda/kernels.h"
#include "checks.h"
#include "cuda_options.h"
#include "handlers.h"

namespace py = pybind11;

namespace jax_dcn {
namespace {

using xla::ffi::StructMember;

template <class T>
T FromPython(const py::handle& value) {
  if constexpr (std::is_same_v<T, Sizes>) {
    // The caller's array, which outlives the call; anything else would be converted to one that does not.
    if (!py::isinstance<py::array_t<int64_t, py::array::c_style>>(value)) {
      throw py::type_error("jax_dcn: sizes must be an array of int64");
    }
    const auto sizes = py::reinterpret_borrow<py::array_t<int64_t>>(value);
    return {sizes.data(), static_cast<size_t>(sizes.size())};
  } else {
    return value.cast<T>();
  }
}

// The attributes of a call from the keyword arguments that name them.
template <class T, class... Members>
T FromKeywords(const py::kwargs& keywords, const StructMember<Members>&... members) {
  if (keywords.size() != sizeof...(Members)) throw py::type_error("jax_dcn: these are not a call's attributes");
  return {FromPython<Members>(keywords[py::str(members.name.data(), members.name.size())])...};
}

using Dimensions = std::array<int64_t, 4>;
using KnownDimensions = std::array<std::optional<int64_t>, 4>;

bool IsKnown(const KnownDimensions& x) { return x[0] && x[1] && x[2] && x[3]; }

// The geometry of a call, or where some of the batch, height and width of x are not known, one that stands for all.
Geometry ToGeometry(const KnownDimensions& x, const Dimensions& weight, const Attributes& a) {
  Checker check;
  Dimensions sizes;
  for (size_t i = 0; i < sizes.size(); ++i) {
    // What is not known is as small as it may be, for the check's sake.
    const bool spatial = i == 1 || i == 2;
    const int64_t least = spatial && IsPair(a.dilation) && a.padding.size() == 4
                              ? std::max<int64_t>(1, a.dilation[i - 1] * (weight[i - 1] - 1) + 1 -
                                                         a.padding[2 * i - 2] - a.padding[2 * i - 1])
                              : 1;
    sizes[i] = x[i].value_or(least);
  }
  const Geometry g = check.ToGeometry({sizes.data(), sizes.size()}, {weight.data(), weight.size()}, a);
  if (!check.ok()) throw std::invalid_argument(check.error().message());
  return IsKnown(x) ? g : cuda::OfAnySize(g);
}

DType ToDType(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("jax_dcn: unsupported type " + name);
}

// The formula, or where all sizes are known the bytes.
py::tuple ToTuple(const cuda::WorkspaceSize& size, const KnownDimensions& x) {
  if (IsKnown(x)) return py::make_tuple(size.bytes, 0, 0);
  return py::make_tuple(size.constant, size.per_input_pixel, size.per_output_pixel);
}

// The work space that a handler wants, by the handler's attributes.

py::tuple ForwardWorkspace(const KnownDimensions& x, const Dimensions& weight, const std::string& dtype,
                           const py::kwargs& attributes) {
  const auto a = FromKeywords<Attributes>(attributes, JAX_DCN_ATTRIBUTES);
  return ToTuple(cuda::ForwardWorkspace(ToGeometry(x, weight, a), ToDType(dtype), ToOptions(a)), x);
}

py::tuple BackwardWorkspace(const KnownDimensions& x, const Dimensions& weight, const std::string& dtype,
                            const py::kwargs& attributes) {
  const auto a = FromKeywords<BackwardAttributes>(attributes, JAX_DCN_BACKWARD_ATTRIBUTES);
  return ToTuple(cuda::BackwardWorkspace(ToGeometry(x, weight, a), a.wanted, ToDType(dtype), ToOptions(a)), x);
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
  m.def("forward_workspace", jax_dcn::ForwardWorkspace, arg("x"), arg("weight"), arg("dtype"));
  m.def("backward_workspace", jax_dcn::BackwardWorkspace, arg("x"), arg("weight"), arg("dtype"));
}
