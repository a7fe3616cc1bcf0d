// The CPU handlers.

#include <cstdint>

#include "../cpu/kernels.h"
#include "checks.h"
#include "handlers.h"
#include "xla/ffi/api/ffi.h"
#include "xla_workers.h"

namespace jax_dcn {
namespace {

// Runs a kernel of the chosen instruction set, on one thread if the work is too little to share.
template <class Arrays>
ffi::Error Run(bool (*Kernels::*kernel)(const Geometry&, const Arrays&, Workers&), const Geometry& g,
               const Arrays& arrays, const ffi::ThreadPool& pool) {
  const Kernels* kernels = ChosenKernels();
  if (kernels == nullptr) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "jax_dcn: JAX_DCN_CPU_ISA names an instruction set that was not built or does not run here; "
                      "jax_dcn.show_config() lists those built");
  }
  SerialWorkers serial;
  XlaWorkers shared(pool);
  // Some 10 microseconds of work; waking another thread takes about as long. A sample costs about 8 multiply-adds.
  constexpr double kSharedMultiplyAdds = 200000;
  const double pixel_work = static_cast<double>(g.weights()) + 8.0 * static_cast<double>(g.taps() * g.c_in);
  const bool small = static_cast<double>(g.pixels()) * pixel_work < kSharedMultiplyAdds;
  if (!(kernels->*kernel)(g, arrays, small ? static_cast<Workers&>(serial) : shared)) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_dcn: no memory for the work space");
  }
  return ffi::Error::Success();
}

ffi::Error DeformConv2d(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer offset, ffi::RemainingArgs optional,
                        ffi::Result<ffi::AnyBuffer> y, const Attributes& attributes) {
  Checker check;
  const auto call = check.Forward(x, offset, optional, y, attributes);
  return check.ok() ? Run(&Kernels::forward, call.geometry, call.arrays, pool) : check.error();
}

ffi::Error DeformConv2dBackward(ffi::ThreadPool pool, ffi::AnyBuffer grad_y, ffi::AnyBuffer x, ffi::AnyBuffer offset,
                                ffi::RemainingArgs optional, ffi::RemainingRets gradients,
                                const BackwardAttributes& attributes) {
  Checker check;
  const auto call = check.Backward(grad_y, x, offset, optional, gradients, attributes);
  return check.ok() ? Run(&Kernels::backward, call.geometry, call.arrays, pool) : check.error();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dCpu, DeformConv2d,
                              BindForward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Attrs<Attributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dBackwardCpu, DeformConv2dBackward,
                              BindBackward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Attrs<BackwardAttributes>());

}  // namespace jax_dcn
