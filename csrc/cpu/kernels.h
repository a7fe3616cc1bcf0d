// The CPU kernels of deformable convolution, forward and backward.

#pragma once

#include <cstdint>

#include "../geometry.h"
#include "../operands.h"
#include "workers.h"

namespace jax_dcn {

// One instruction set's kernels. They return false if there was no memory for their work space.
struct Kernels {
  const char* name;
  bool (*forward)(const Geometry&, const ForwardArrays&, Workers&);
  bool (*backward)(const Geometry&, const BackwardArrays&, Workers&);
};

// The instruction sets built in, worst first, ended by a null pointer.
const Kernels* const* BuiltKernels();

// The best that this processor runs, or the one that JAX_DCN_CPU_ISA names; null if it names none that runs here.
const Kernels* ChosenKernels();

}  // namespace jax_dcn
