// Calls without a weight, which those of kernels.h hand on.

#pragma once

#include "kernels.h"
#include "launcher.h"

namespace jax_dcn {
namespace cuda {

WorkspaceSize ForwardSumsWorkspace(const Geometry& geometry, DType dtype);
WorkspaceSize BackwardSumsWorkspace(const Geometry& geometry, const WantedGradients& wanted, DType dtype);
Status ForwardSums(const Geometry& geometry, const ForwardArrays& arrays, void* workspace, Launcher& launcher);
Status BackwardSums(const Geometry& geometry, const BackwardArrays& arrays, void* workspace, bool deterministic,
                    Launcher& launcher);

}  // namespace cuda
}  // namespace jax_dcn
