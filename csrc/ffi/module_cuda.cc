// The Python module jax_dcn._operator._native_cuda. It stands apart from _native so that whatever keeps it from loading
// leaves the CPU kernels in place.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

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

using Dimensions = std::vector<int64_t>;
using KnownDimensions = std::vector<std::optional<int64_t>>;

bool AreKnown(const KnownDimensions& sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [](const auto& size) { return size.has_value(); });
}

// The geometry of a call, or where some sizes of x and offset are not known, one that stands for all.
Geometry ToGeometry(const KnownDimensions& x, const KnownDimensions& offset, const Dimensions& weight,
                    const Attributes& a) {
  const auto at_least = [](const KnownDimensions& sizes) {
    Dimensions least;
    for (const auto& size : sizes) least.push_back(size.value_or(1));
    return least;
  };
  const auto span = [](const Dimensions& sizes) { return Sizes(sizes.data(), sizes.size()); };
  Checker check;
  const Dimensions x_sizes = at_least(x), offset_sizes = at_least(offset);
  const Geometry g = check.ToGeometry(span(x_sizes), span(offset_sizes), span(weight), a);
  if (!check.ok()) throw std::invalid_argument(check.error().message());
  return AreKnown(x) && AreKnown(offset) ? g : cuda::OfAnySize(g);
}

DType ToDType(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("jax_dcn: unsupported type " + name);
}

// The work space that a handler wants, by the handler's attributes: the bytes, or where not all sizes are known the
// formula.
py::tuple ToTuple(const cuda::WorkspaceSize& size, bool known) {
  if (known) return py::make_tuple(size.bytes, 0, 0);
  return py::make_tuple(size.constant, size.per_input_pixel, size.per_output_pixel);
}

py::tuple ForwardWorkspace(const KnownDimensions& x, const KnownDimensions& offset, const Dimensions& weight,
                           const std::string& dtype, const py::kwargs& attributes) {
  const auto a = FromKeywords<Attributes>(attributes, JAX_DCN_ATTRIBUTES);
  const Geometry g = ToGeometry(x, offset, weight, a);
  return ToTuple(cuda::ForwardWorkspace(g, ToDType(dtype), ToOptions(a)), AreKnown(x) && AreKnown(offset));
}

py::tuple BackwardWorkspace(const KnownDimensions& x, const KnownDimensions& offset, const Dimensions& weight,
                            const std::string& dtype, const py::kwargs& attributes) {
  const auto a = FromKeywords<BackwardAttributes>(attributes, JAX_DCN_BACKWARD_ATTRIBUTES);
  const Geometry g = ToGeometry(x, offset, weight, a);
  return ToTuple(cuda::BackwardWorkspace(g, a.wanted, ToDType(dtype), ToOptions(a)), AreKnown(x) && AreKnown(offset));
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
  m.def("forward_workspace", jax_dcn::ForwardWorkspace, arg("x"), arg("offset"), arg("weight"), arg("dtype"));
  m.def("backward_workspace", jax_dcn::BackwardWorkspace, arg("x"), arg("offset"), arg("weight"), arg("dtype"));
}
