#include "forward.h"

#include <algorithm>

#include "arithmetic.h"
#include "launcher.h"
#include "layout.h"
#include "workspace.h"

namespace jax_dcn {
namespace cuda {
namespace {

// What a forward call needs beside its arrays, where a block may have `shared_bytes`.
template <class A>
struct ForwardPlan {
  using T = typename A::T;

  ForwardPlan(const Geometry& g, int shared_bytes, void* workspace)
      : small_groups(g),
        problem(ProblemOf<A>(g)),
        pixel_tiles(CeilDiv(problem.pixels, kRows)),
        packed(problem, SampleOrder(problem, kVector<T>, TableColumns(shared_bytes)), Columns(shared_bytes)),
        zeros(problem.c_in / kVector<T>),
        input_pixels(g.batch * g.image()) {
    if (A::kSmallGroups) packed.vectors = 0;
    WorkspaceCarver carver(workspace, input_pixels, problem.pixels);
    weights = carver.Take<Vector16>(packed.vectors + zeros);
    padded_x = carver.TakePerInputPixel<T>(problem.pads_in() ? problem.c_in : 0);
    size = carver.size();
  }

  SmallGroups small_groups;
  Problem problem;
  int64_t pixel_tiles;
  ForwardWeight<T> packed;
  int zeros;  // vectors of one pixel
  int64_t input_pixels;
  Vector16* weights;
  T* padded_x;
  WorkspaceSize size;

 private:
  // The widest tiles, as they make the fewest samples, unless so few blocks came out that processors stood idle.
  int Columns(int shared_bytes) const {
    const auto bytes = [](auto columns) { return ForwardSharedBytes<T, columns>(kTableColumns); };
    int columns = TileColumns<A::kColumns>(problem.group_out, shared_bytes, bytes);
    const int64_t others = pixel_tiles * problem.groups;
    while (columns > 64 && others * CeilDiv(problem.group_out, columns) < kProcessors) columns /= 2;
    return columns;
  }
  // The narrowest tiles leave the least memory where devices have little.
  static int TableColumns(int shared_bytes) {
    const int left = shared_bytes - ForwardSharedBytes<T, 64>(0);
    return std::min(kTableColumns, left / SampleTable<T>::kPitch);
  }
};

template <class A>
Status RunForward(const Geometry& g, const ForwardArrays& arrays, void* workspace, Launcher& launcher) {
  using T = typename A::T;
  using Tag = typename A::Tag;
  const ForwardPlan<A> plan(g, launcher.shared_bytes(), workspace);
  const Problem& p = plan.problem;
  const T* weight = static_cast<const T*>(arrays.weight.data);
  const T* bias = static_cast<const T*>(arrays.bias.data);
  T* y = static_cast<T*>(arrays.y.data);
  if (p.pixels == 0) return launcher.status();

  launcher.RunForEach("PackWeight", PackWeightKernel<T, Tag, ForwardWeight<T>>, plan.packed.vectors + plan.zeros, p,
                      plan.packed, weight, plan.zeros, plan.weights);
  Samples<T> samples{static_cast<const T*>(arrays.x.data), arrays.offset, arrays.mask,
                     reinterpret_cast<const T*>(plan.weights + plan.packed.vectors)};
  if (p.pads_in()) {
    Pad(launcher, samples.x, plan.input_pixels * (p.c_in / p.padded_unit), p.unit, p.padded_unit, plan.padded_x);
    samples.x = plan.padded_x;
  }
  if constexpr (A::kSmallGroups) {
    launcher.Run("ForwardSmallGroups", ForwardSmallGroupsKernel<T>,
                 CeilDiv(p.pixels, kTilePixels) * plan.small_groups.tiles(), SampleTiles<Accumulation<T>>::kBytes, p,
                 plan.small_groups, samples, weight, bias, y);
  } else {
    WithColumns<A::kColumns>(plan.packed.columns, [&](auto columns) {
      launcher.Run("Forward", ForwardKernel<T, Tag, columns>, plan.pixel_tiles * p.groups * plan.packed.tiles,
                   ForwardSharedBytes<T, columns>(plan.packed.order.table_columns()), p, samples, plan.packed,
                   plan.weights, bias, y);
    });
  }
  return launcher.status();
}

}  // namespace

WorkspaceSize ForwardWorkspace(const Geometry& geometry, DType dtype, const Options& options) {
  return WithArithmetic(geometry, dtype, options.precision, [&](auto a) {
    return OnAnyDevice(
        [&](int shared_bytes) { return ForwardPlan<decltype(a)>(geometry, shared_bytes, nullptr).size; });
  });
}

Status Forward(const Geometry& geometry, const ForwardArrays& arrays, void* workspace, const Options& options,
               int device, cudaStream_t stream) {
  Launcher launcher(device, stream, options.load_only);
  return WithArithmetic(geometry, arrays.x.dtype, options.precision,
                        [&](auto a) { return RunForward<decltype(a)>(geometry, arrays, workspace, launcher); });
}

}  // namespace cuda
}  // namespace jax_dcn
