#include <algorithm>

#include "arithmetic.h"
#include "grad_bias.h"
#include "grad_samples.h"
#include "grad_weight.h"
#include "launcher.h"
#include "layout.h"
#include "parts.h"
#include "sums_calls.h"
#include "workspace.h"

namespace jax_dcn {
namespace cuda {
namespace {

// Four for each processor, so that an uneven share costs little.
constexpr int64_t kWeightBlocks = 4 * kProcessors;

// Parts of 64 stages of some pixels each at least, with sums of no more than 64 MB, which are written and read once.
// `blocks` and `bytes` are of a part.
PixelParts PlanParts(int64_t pixels, int64_t stage, int64_t blocks, int64_t bytes) {
  constexpr int64_t kLeastStages = 64;
  constexpr int64_t kMostBytes = 64 << 20;
  // There are as many parts as there may be, even if that of the pixels is rounded up to whole stages.
  static_assert(kManyPixels >= kWeightBlocks * kWeightBlocks * kLeastStages * kTransposedStage<uint16_t>);
  const int64_t parts = std::max<int64_t>(
      1, std::min({CeilDiv(pixels, kLeastStages * stage), CeilDiv(kWeightBlocks, blocks), kMostBytes / bytes}));
  const int64_t part_pixels = RoundUp(CeilDiv(pixels, parts), stage);
  return {part_pixels == 0 ? 0 : static_cast<int>(CeilDiv(pixels, part_pixels)), part_pixels};
}

template <class A>
WeightParts PlanWeightParts(const Problem& p, int shared_bytes) {
  using T = typename A::T;
  WeightParts w{};
  w.row_tiles = static_cast<int>(CeilDiv(int64_t{p.taps} * p.bundle_in, kRows));
  const auto bytes = [](auto columns) { return kProductSharedBytes<T, columns, true>; };
  w.columns = TileColumns<A::kTransposedColumns>(p.bundle_out(), shared_bytes, bytes);
  w.column_tiles = static_cast<int>(CeilDiv(p.bundle_out(), w.columns));
  w.parts = 1;
  static_cast<PixelParts&>(w) =
      PlanParts(p.pixels, kTransposedStage<T>, w.blocks(p), w.size(p) * int64_t{sizeof(Accumulation<T>)});
  return w;
}

// What a backward call needs beside its arrays, where a block may have `shared_bytes`.
template <class A>
struct BackwardPlan {
  using T = typename A::T;
  using Real = Accumulation<T>;
  using Weight = std::conditional_t<A::kBundles, TapBundleWeight<T>, TapWeight<T>>;

  BackwardPlan(const Geometry& g, const WantedGradients& wanted, int shared_bytes, void* workspace)
      : small_groups(g),
        problem(ProblemOf<A>(g)),
        pads_out(!A::kSmallGroups && problem.pads_out()),
        want_samples(wanted.x || wanted.offset || wanted.mask),
        packed(problem),
        grad_samples(A::kSmallGroups ? 0 : packed.stages, shared_bytes),
        zeros(problem.c_in / kVector<T>),
        input_pixels(g.batch * g.image()),
        bias_parts(CeilDiv(problem.pixels, kBiasPixels)) {
    if (!want_samples || A::kSmallGroups) packed.vectors = 0;
    if constexpr (A::kSmallGroups) {
      const int64_t blocks = int64_t{problem.taps} * small_groups.tiles();
      weight_size = g.weights();
      static_cast<PixelParts&>(weight_parts) =
          PlanParts(problem.pixels, kTilePixels, blocks, weight_size * int64_t{sizeof(Real)});
    } else {
      weight_parts = PlanWeightParts<A>(problem, shared_bytes);
      weight_size = weight_parts.size(problem);
    }
    const bool sampled = want_samples || wanted.weight;
    WorkspaceCarver carver(workspace, input_pixels, problem.pixels);
    weights = carver.Take<Vector16>(sampled ? packed.vectors + zeros : 0);
    padded_x = carver.TakePerInputPixel<T>(sampled && problem.pads_in() ? problem.c_in : 0);
    padded_grad_y = carver.TakePerOutputPixels<T>(sampled && pads_out ? problem.groups * problem.padded_group_out : 0);
    padded_grad_x = carver.TakePerInputPixel<Real>(wanted.x && problem.pads_in() ? problem.c_in : 0);
    weight_sums = carver.Take<Real>(wanted.weight ? weight_parts.parts * weight_size : 0);
    bias_sums = carver.TakePerOutputPixels<Real>(wanted.bias ? g.c_out : 0, kBiasPixels);
    size = carver.size();
  }

  SmallGroups small_groups;
  Problem problem;
  bool pads_out;
  bool want_samples;  // gradients of the samples
  Weight packed;
  GradSamplesMemory<T> grad_samples;
  int zeros;  // vectors of one pixel
  int64_t input_pixels;
  WeightParts weight_parts{};
  int64_t weight_size;  // elements of the sums of a part
  int64_t bias_parts;

  Vector16* weights;
  T* padded_x;
  T* padded_grad_y;
  Real* padded_grad_x;
  Real* weight_sums;
  Real* bias_sums;
  WorkspaceSize size;
};

template <class A>
Status RunBackward(const Geometry& g, const BackwardArrays& arrays, void* workspace, bool deterministic,
                   Launcher& launcher) {
  using T = typename A::T;
  using Tag = typename A::Tag;
  using Real = Accumulation<T>;
  const WantedGradients wanted{bool(arrays.grad_x), bool(arrays.grad_offset), bool(arrays.grad_mask),
                               bool(arrays.grad_weight), bool(arrays.grad_bias)};
  const BackwardPlan<A> plan(g, wanted, launcher.shared_bytes(), workspace);
  const Problem& p = plan.problem;
  const int c_out = static_cast<int>(g.c_out);
  Real* grad_x = static_cast<Real*>(arrays.grad_x.data);
  Real* grad_weight = static_cast<Real*>(arrays.grad_weight.data);
  Real* grad_bias = static_cast<Real*>(arrays.grad_bias.data);
  if (p.pixels == 0) {
    const int64_t size = sizeof(Real);
    if (wanted.x) launcher.Zero("grad_x", grad_x, plan.input_pixels * g.c_in * size);
    if (wanted.weight) launcher.Zero("grad_weight", grad_weight, g.weights() * size);
    if (wanted.bias) launcher.Zero("grad_bias", grad_bias, g.c_out * size);
    return launcher.status();
  }

  const T* grad_y = static_cast<const T*>(arrays.grad_y.data);
  const T* weight = static_cast<const T*>(arrays.weight.data);
  if (wanted.bias) {
    launcher.Run("GradBias", GradBiasKernel<T>, plan.bias_parts * CeilDiv(c_out, kBiasColumns),
                 kThreads * static_cast<int>(sizeof(Real)), p.pixels, c_out, grad_y, plan.bias_sums);
    launcher.RunForEach("ReduceBias", ReduceKernel<Real>, c_out, plan.bias_parts, c_out, plan.bias_sums, grad_bias);
  }
  if (!plan.want_samples && !wanted.weight) return launcher.status();

  launcher.RunForEach("PackWeight", PackWeightKernel<T, Tag, typename BackwardPlan<A>::Weight>,
                      plan.packed.vectors + plan.zeros, p, plan.packed, weight, plan.zeros, plan.weights);
  Samples<T> samples{static_cast<const T*>(arrays.x.data), arrays.offset, arrays.mask,
                     reinterpret_cast<const T*>(plan.weights + plan.packed.vectors)};
  const int64_t runs = plan.input_pixels * (p.c_in / p.padded_unit);
  if (p.pads_in()) {
    Pad(launcher, samples.x, runs, p.unit, p.padded_unit, plan.padded_x);
    samples.x = plan.padded_x;
  }
  if (plan.pads_out) {
    Pad(launcher, grad_y, p.pixels * p.groups, p.group_out, p.padded_group_out, plan.padded_grad_y);
    grad_y = plan.padded_grad_y;
  }

  if (plan.want_samples) {
    Real* sums = wanted.x && p.pads_in() ? plan.padded_grad_x : grad_x;
    if (wanted.x) launcher.Zero("grad_x", sums, plan.input_pixels * p.c_in * static_cast<int64_t>(sizeof(Real)));
    const bool in_order = wanted.x && deterministic;
    const auto run = [&](const auto& grads) {
      using Grads = std::decay_t<decltype(grads)>;
      if (in_order) {
        launcher.Run("GradXInOrder", GradXInOrderKernel<Grads>, g.batch * ChannelParts<T>(p), plan.grad_samples.bytes,
                     p, plan.grad_samples, samples, grads, sums);
      }
      if (!in_order || wanted.offset || wanted.mask) {
        launcher.Run("GradSamples", GradSamplesKernel<Grads>, CeilDiv(p.pixels, kRows) * p.taps,
                     plan.grad_samples.bytes, p, plan.grad_samples, samples, grads, in_order ? nullptr : sums,
                     arrays.grad_offset, arrays.grad_mask);
      }
    };
    if constexpr (A::kSmallGroups) {
      run(SmallGroupsGrads<T>{plan.small_groups, grad_y, weight});
    } else if constexpr (A::kBundles) {
      run(BundleGrads<T, Tag>{grad_y, plan.weights, plan.packed.shape});
    } else {
      run(ProductGrads<T, Tag>{grad_y, plan.weights, plan.packed.stages});
    }
    if (wanted.x && p.pads_in()) {
      launcher.RunForEach("Unpad", UnpadKernel<Real>, runs * p.unit, sums, runs, p.unit, p.padded_unit, grad_x);
    }
  }
  if (!wanted.weight) return launcher.status();
  if constexpr (A::kSmallGroups) {
    launcher.Run("GradWeightSmallGroups", GradWeightSmallGroupsKernel<T>,
                 int64_t{plan.weight_parts.parts} * p.taps * plan.small_groups.tiles(), SampleTiles<Real>::kBytes, p,
                 plan.small_groups, samples, grad_y, plan.weight_parts, plan.weight_sums);
    launcher.RunForEach("ReduceWeight", ReduceKernel<Real>, g.weights(), plan.weight_parts.parts, g.weights(),
                        plan.weight_sums, grad_weight);
  } else {
    WithColumns<A::kTransposedColumns>(plan.weight_parts.columns, [&](auto columns) {
      launcher.Run("GradWeight", GradWeightKernel<T, Tag, columns>, plan.weight_parts.blocks(p),
                   kProductSharedBytes<T, columns, true>, p, samples, grad_y, plan.weight_parts, plan.weight_sums);
    });
    launcher.RunForEach("ReduceWeight", ReduceWeightKernel<Real>, g.weights(), p, plan.weight_parts, plan.weight_sums,
                        grad_weight);
  }
  return launcher.status();
}

}  // namespace

WorkspaceSize BackwardWorkspace(const Geometry& geometry, const WantedGradients& wanted, DType dtype,
                                const Options& options) {
  if (!geometry.weighted) return BackwardSumsWorkspace(geometry, wanted, dtype);
  return WithArithmetic(geometry, dtype, options.precision, [&](auto a) {
    return OnAnyDevice(
        [&](int shared_bytes) { return BackwardPlan<decltype(a)>(geometry, wanted, shared_bytes, nullptr).size; });
  });
}

Status Backward(const Geometry& geometry, const BackwardArrays& arrays, void* workspace, const Options& options,
                int device, cudaStream_t stream) {
  Launcher launcher(device, stream, options.load_only);
  if (launcher.status().error != cudaSuccess) return launcher.status();
  if (!geometry.weighted) return BackwardSums(geometry, arrays, workspace, options.deterministic, launcher);
  return WithArithmetic(geometry, arrays.x.dtype, options.precision, [&](auto a) {
    return RunBackward<decltype(a)>(geometry, arrays, workspace, options.deterministic, launcher);
  });
}

}  // namespace cuda
}  // namespace jax_dcn
