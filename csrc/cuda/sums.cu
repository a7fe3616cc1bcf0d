#include "sums.h"

#include <algorithm>

#include "layout.h"
#include "sums_calls.h"
#include "workspace.h"

namespace jax_dcn {
namespace cuda {
namespace {

template <class T>
struct SumsPlan {
  using Real = Accumulation<T>;

  SumsPlan(const Geometry& g, const WantedGradients* wanted, void* workspace)
      : problem(g, kChannelVector<T>),
        pads(problem.pads_in()),
        pairs(problem.pixels * problem.deform_groups),
        input_pixels(g.batch * g.image()) {
    WorkspaceCarver carver(workspace, input_pixels, problem.pixels);
    padded_x = carver.TakePerInputPixel<T>(pads ? problem.c_in : 0);
    padded_grad_y = carver.TakePerOutputPixels<T>(pads && wanted != nullptr ? problem.c_in : 0);
    padded_grad_x = carver.TakePerInputPixel<Real>(pads && wanted != nullptr && wanted->x ? problem.c_in : 0);
    size = carver.size();
  }

  SumsProblem problem;
  bool pads;
  int64_t pairs, input_pixels;
  T* padded_x;
  T* padded_grad_y;
  Real* padded_grad_x;
  WorkspaceSize size;

  // An array of `pixels` as the kernels read it: itself, or its padded copy.
  const T* Padded(Launcher& launcher, const Array& array, int64_t pixels, T* copy) const {
    const T* data = static_cast<const T*>(array.data);
    if (!pads) return data;
    Pad(launcher, data, pixels * problem.deform_groups, problem.unit, problem.padded_unit, copy);
    return copy;
  }
};

// Of a pair in the backward pass.
template <class T>
int PairThreads(const SumsProblem& p) {
  int threads = 1;
  while (threads < kWarp && threads * kRun<T> < p.deform_in) threads *= 2;
  return threads;
}

template <class T>
Status RunForward(const Geometry& g, const ForwardArrays& arrays, void* workspace, Launcher& launcher) {
  const SumsPlan<T> plan(g, nullptr, workspace);
  const SumsProblem& p = plan.problem;
  if (p.pixels == 0) return launcher.status();
  const Windows windows(p, std::max(1, kThreads / (p.deform_in / kVector<T>)), kSamples<Accumulation<T>>);
  const Samples<T> samples{plan.Padded(launcher, arrays.x, plan.input_pixels, plan.padded_x), arrays.offset,
                           arrays.mask, nullptr};
  launcher.Run("ForwardSums", ForwardSumsKernel<T>, CeilDiv(plan.pairs, windows.pairs), PairSamples<T>::kBytes, p,
               windows, samples, plan.pairs, static_cast<T*>(arrays.y.data));
  return launcher.status();
}

template <class T>
Status RunBackward(const Geometry& g, const BackwardArrays& arrays, void* workspace, bool deterministic,
                   Launcher& launcher) {
  using Real = Accumulation<T>;
  const WantedGradients wanted{bool(arrays.grad_x), bool(arrays.grad_offset), bool(arrays.grad_mask), false, false};
  const SumsPlan<T> plan(g, &wanted, workspace);
  const SumsProblem& p = plan.problem;
  Real* grad_x = static_cast<Real*>(arrays.grad_x.data);
  Real* sums = wanted.x && plan.pads ? plan.padded_grad_x : grad_x;
  if (wanted.x) launcher.Zero("grad_x", sums, plan.input_pixels * p.c_in * static_cast<int64_t>(sizeof(Real)));
  if (p.pixels > 0) {
    const T* grad_y = plan.Padded(launcher, arrays.grad_y, p.pixels, plan.padded_grad_y);
    const Samples<T> samples{plan.Padded(launcher, arrays.x, plan.input_pixels, plan.padded_x), arrays.offset,
                             arrays.mask, nullptr};
    const bool in_order = wanted.x && deterministic;
    if (in_order) {
      const int parts = static_cast<int>(CeilDiv(p.c_in, kThreads));
      const Windows windows(p, kThreads, kSamples<Real>);
      launcher.Run("GradXInOrderSums", GradXInOrderSumsKernel<T>, g.batch * parts, PairSamples<T>::kBytes, p, windows,
                   samples, grad_y, sums);
    }
    if (!in_order || wanted.offset || wanted.mask) {
      const int threads = PairThreads<T>(p);
      const Windows windows(p, kThreads / threads, kSamples<Real>);
      launcher.Run("GradSums", GradSumsKernel<T>, CeilDiv(plan.pairs, windows.pairs),
                   PairSamples<T>::kBytesForGradients, p, windows, samples, plan.pairs, threads, grad_y,
                   in_order ? nullptr : sums, arrays.grad_offset, arrays.grad_mask);
    }
  }
  if (wanted.x && plan.pads) {
    const int64_t runs = plan.input_pixels * p.deform_groups;
    launcher.RunForEach("Unpad", UnpadKernel<Real>, runs * p.unit, sums, runs, p.unit, p.padded_unit, grad_x);
  }
  return launcher.status();
}

// Calls function(a value of the element type).
template <class Function>
auto WithElement(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat64: return function(double());
    case DType::kBFloat16: return function(BFloat16());
    case DType::kFloat16: return function(Float16());
    case DType::kFloat32: break;
  }
  return function(float());
}

}  // namespace

WorkspaceSize ForwardSumsWorkspace(const Geometry& geometry, DType dtype) {
  return WithElement(dtype, [&](auto t) { return SumsPlan<decltype(t)>(geometry, nullptr, nullptr).size; });
}

WorkspaceSize BackwardSumsWorkspace(const Geometry& geometry, const WantedGradients& wanted, DType dtype) {
  return WithElement(dtype, [&](auto t) { return SumsPlan<decltype(t)>(geometry, &wanted, nullptr).size; });
}

Status ForwardSums(const Geometry& geometry, const ForwardArrays& arrays, void* workspace, Launcher& launcher) {
  return WithElement(arrays.x.dtype,
                     [&](auto t) { return RunForward<decltype(t)>(geometry, arrays, workspace, launcher); });
}

Status BackwardSums(const Geometry& geometry, const BackwardArrays& arrays, void* workspace, bool deterministic,
                    Launcher& launcher) {
  return WithElement(arrays.x.dtype, [&](auto t) {
    return RunBackward<decltype(t)>(geometry, arrays, workspace, deterministic, launcher);
  });
}

}  // namespace cuda
}  // namespace jax_dcn
