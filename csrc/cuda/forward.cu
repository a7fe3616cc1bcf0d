#include "forward.h"

#include <algorithm>

#include "arithmetic.h"
#include "launcher.h"
#include "layout.h"
#include "sums_calls.h"
#include "workspace.h"

namespace jax_dcn {
namespace cuda {
namespace {

// What a forward call needs beside its arrays, where a block may have `shared_bytes`.
template <class A>
struct ForwardPlan {
  using T = typename A::T;
  using Weight = std::conditional_t<A::kBundles, ForwardBundleWeight<T>, ForwardWeight<T>>;

  ForwardPlan(const Geometry& g, int shared_bytes, void* workspace)
      : small_groups(g),
        problem(ProblemOf<A>(g)),
        pixel_tiles(CeilDiv(problem.pixels, kRows)),
        packed(Packed(SampleOrder(problem, kVector<T>, TableColumns(shared_bytes)), MostColumns(shared_bytes))),
        zeros(problem.c_in / kVector<T>),
        input_pixels(g.batch * g.image()) {
    if (A::kSmallGroups) {
      packed.vectors = 0;
    } else {
      ShareStages();
    }
    WorkspaceCarver carver(workspace, input_pixels, problem.pixels);
    weights = carver.Take<Vector16>(packed.vectors + zeros);
    padded_x = carver.TakePerInputPixel<T>(problem.pads_in() ? problem.c_in : 0);
    sums = carver.TakeUpTo<Accumulation<T>>(most_sums, parts.parts > 1 ? blocks() * kRows * packed.columns : 0);
    size = carver.size();
  }

  SmallGroups small_groups;
  Problem problem;
  int64_t pixel_tiles;
  Weight packed;
  StageParts parts{1, 0};
  int zeros;  // vectors of one pixel
  int64_t input_pixels;
  int64_t most_sums = 0;
  Vector16* weights;
  T* padded_x;
  Accumulation<T>* sums;
  WorkspaceSize size;

  int64_t blocks() const { return pixel_tiles * problem.bundles() * packed.tiles * parts.parts; }

 private:
  Weight Packed(const SampleOrder& order, int columns) const {
    if constexpr (A::kBundles) {
      return Weight(problem, order);
    } else {
      return Weight(problem, order, columns);
    }
  }
  // The widest tiles make the fewest samples.
  int MostColumns(int shared_bytes) const {
    const auto bytes = [](auto columns) { return ForwardSharedBytes<T, columns>(kTableColumns); };
    return TileColumns<A::kColumns>(problem.group_out, shared_bytes, bytes);
  }
  // All, or what the narrowest tiles leave where devices have the least memory; nothing between, as the work space must
  // do for any device.
  static int TableColumns(int shared_bytes) {
    if (ForwardSharedBytes<T, 64>(kTableColumns) <= shared_bytes) return kTableColumns;
    return (kLeastSharedBytes - ForwardSharedBytes<T, 64>(0)) / SampleTable<T>::kPitch;
  }

  // Where so few blocks came out that processors stood idle, parts of the stages have blocks of their own, unless they
  // became too short for what a block does once; where that does not suffice, the tiles are narrower.
  void ShareStages() {
    constexpr int kLeastStages = 4;
    const int most = packed.stages / kLeastStages;
    if (most > 1) most_sums = kProcessors * kRows * A::kColumns;
    const auto share = [&] {
      parts = {1, packed.stages};
      if (pixel_tiles == 0) return;
      const int64_t wanted = std::min<int64_t>(most, kProcessors / blocks());
      parts.part_stages = static_cast<int>(CeilDiv(packed.stages, std::max<int64_t>(1, wanted)));
      parts.parts = static_cast<int>(CeilDiv(packed.stages, parts.part_stages));
    };
    share();
    while (packed.columns > 64 && 2 * blocks() <= kProcessors) {
      packed = Packed(packed.order, packed.columns / 2);
      share();
    }
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

  launcher.RunForEach("PackWeight", PackWeightKernel<T, Tag, typename ForwardPlan<A>::Weight>,
                      plan.packed.vectors + plan.zeros, p, plan.packed, weight, plan.zeros, plan.weights);
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
    const int table_columns = plan.packed.order.table_columns();
    const auto run = [&](const auto& kernel, int shared_bytes) {
      launcher.Run("Forward", kernel, plan.blocks(), shared_bytes, p, samples, plan.packed, plan.parts, plan.weights,
                   bias, y, plan.sums);
    };
    if constexpr (A::kBundles) {
      run(ForwardBundleKernel<T, Tag>, ForwardSharedBytes<T, kBundleColumns>(table_columns));
    } else {
      WithColumns<A::kColumns>(plan.packed.columns, [&](auto columns) {
        run(ForwardKernel<T, Tag, columns>, ForwardSharedBytes<T, columns>(table_columns));
      });
    }
    if (plan.parts.parts > 1) {
      launcher.RunForEach("ReduceY", ReduceYKernel<T>, p.pixels * g.c_out, p, plan.packed, plan.parts.parts, plan.sums,
                          bias, y);
    }
  }
  return launcher.status();
}

}  // namespace

WorkspaceSize ForwardWorkspace(const Geometry& geometry, DType dtype, const Options& options) {
  if (!geometry.weighted) return ForwardSumsWorkspace(geometry, dtype);
  return WithArithmetic(geometry, dtype, options.precision, [&](auto a) {
    return OnAnyDevice(
        [&](int shared_bytes) { return ForwardPlan<decltype(a)>(geometry, shared_bytes, nullptr).size; });
  });
}

Status Forward(const Geometry& geometry, const ForwardArrays& arrays, void* workspace, const Options& options,
               int device, cudaStream_t stream) {
  Launcher launcher(device, stream, options.load_only);
  if (launcher.status().error != cudaSuccess) return launcher.status();
  if (!geometry.weighted) return ForwardSums(geometry, arrays, workspace, launcher);
  return WithArithmetic(geometry, arrays.x.dtype, options.precision,
                        [&](auto a) { return RunForward<decltype(a)>(geometry, arrays, workspace, launcher); });
}

}  // namespace cuda
}  // namespace jax_dcn
