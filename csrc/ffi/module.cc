// The Python module jax_dcn._operator._native.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "handlers.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  const auto capsule = [](XLA_FFI_Handler* handler) { return py::capsule(reinterpret_cast<void*>(handler)); };
  m.def("handlers", [capsule] {
    py::dict handlers;
    handlers["jax_dcn_deform_conv2d"] = capsule(jax_dcn::DeformConv2dCpu);
    handlers["jax_dcn_deform_conv2d_backward"] = capsule(jax_dcn::DeformConv2dBackwardCpu);
    return handlers;
  });
  m.def("cpu_isa", []() -> std::optional<std::string> {
    const jax_dcn::Kernels* chosen = jax_dcn::ChosenKernels();
    return chosen == nullptr ? std::nullopt : std::optional<std::string>(chosen->name);
  });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (auto* kernels = jax_dcn::BuiltKernels(); *kernels != nullptr; ++kernels) names.push_back((*kernels)->name);
    return names;
  });
}
