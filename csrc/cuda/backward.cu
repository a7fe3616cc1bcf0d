#include "layout.h"

#include "backward.h"
#include "launcher.h"

namespace jax_dcn {
namespace cuda {
namespace {

template <class A>
WeightParts PlanWeightParts(const Problem& p) {
  using T = typename A::T;
  // Four blocks for each of an H200's 132 processors, so that an uneven share costs little, of 64 stages at least, and
  // sums of no more than 64 MB, which are written and read once.
  constexpr int64_t kBlocks = 528;
  constexpr int64_t kLeastStages = 64;
  constexpr int64_t kMostBytes = 64 << 20;
  WeightParts w{};
  w.row_tiles = static_cast<int>(CeilDiv(int64_t{p.taps} * p.group_in, kRows));
  w.columns = TileColumns<A::kTransposedColumns>(p.group_out, kBlocks);
  w.column_tiles = static_cast<int>(CeilDiv(p.group_out, w.columns));
  w.parts = 1;
  const int64_t wanted = CeilDiv(kBlocks, w.blocks(p));
  const int64_t fitting = kMostBytes / (w.size(p) * static_cast<int64_t>(sizeof(Accumulation<T>)));
  int64_t parts = CeilDiv(p.pixels, kLeastStages * kStage<T>);
  parts = parts < wanted ? parts : wanted;
  parts = parts < fitting ? parts : fitting;
  parts = parts > 1 ? parts : 1;
  w.part_pixels = RoundUp(CeilDiv(p.pixels, parts), kStage<T>);
  w.parts = w.part_pixels == 0 ? 0 : static_cast<int>(CeilDiv(p.pixels, w.part_pixels));
  return w;
}

// What a backward call needs beside its arrays.
template <class A>
struct BackwardPlan {
  using T = typename A::T;
  using Real = Accumulation<T>;

  BackwardPlan(const Geometry& g, const Wanted& wanted, void* workspace)
      : problem(g, kChannelVector<T>),
        want_samples(wanted.x || wanted.offset || wanted.mask),
        packed(problem, true, kChannels, kStage<T>),
        zeros(problem.c_in / kVector<T>),
        input_pixels(g.batch * g.image()),
        weight_parts(PlanWeightParts<A>(problem)),
        bias_parts(CeilDiv(problem.pixels, kBiasPixels)) {
    if (!want_samples) packed.vectors = 0;
    const bool product = want_samples || wanted.weight;
    const int64_t grad_y = problem.pixels * problem.groups * problem.padded_group_out;
    Carver carver(workspace);
    weights = carver.Take<Vector16>(product ? packed.vectors + zeros : 0);
    padded_x = carver.Take<T>(product && problem.pads_in() ? input_pixels * problem.c_in : 0);
    padded_grad_y = carver.Take<T>(product && problem.pads_out() ? grad_y : 0);
    padded_grad_x = carver.Take<Real>(wanted.x && problem.pads_in() ? input_pixels * problem.c_in : 0);
    weight_sums = carver.Take<Real>(wanted.weight ? weight_parts.parts * weight_parts.size(problem) : 0);
    bias_sums = carver.Take<Real>(wanted.bias ? bias_parts * g.c_out : 0);
    bytes = carver.used();
  }

  Problem problem;
  bool want_samples;  // gradients of the samples
  PackedWeight packed;
  int zeros;  // vectors of one pixel
  int64_t input_pixels;
  WeightParts weight_parts;
  int64_t bias_parts;

  Vector16* weights;
  T* padded_x;
  T* padded_grad_y;
  Real* padded_grad_x;
  Real* weight_sums;
  Real* bias_sums;
  int64_t bytes;
};

template <class A>
Status RunBackward(const Geometry& g, const BackwardArrays& arrays, void* workspace, bool deterministic,
                   cudaStream_t stream) {
  using T = typename A::T;
  using Tag = typename A::Tag;
  using Real = Accumulation<T>;
  const Wanted wanted{arrays.grad_x.data != nullptr, arrays.grad_offset.data != nullptr,
                      arrays.grad_mask.data != nullptr, arrays.grad_weight.data != nullptr,
                      arrays.grad_bias.data != nullptr};
  const BackwardPlan<A> plan(g, wanted, workspace);
  const Problem& p = plan.problem;
  const int c_out = p.groups * p.group_out;
  Real* grad_x = static_cast<Real*>(arrays.grad_x.data);
  Real* grad_weight = static_cast<Real*>(arrays.grad_weight.data);
  Real* grad_bias = static_cast<Real*>(arrays.grad_bias.data);
  Launcher launcher(stream);
  if (p.pixels == 0) {
    const int64_t size = sizeof(Real);
    if (wanted.x) launcher.Zero("grad_x", grad_x, plan.input_pixels * g.c_in * size);
    if (wanted.weight) launcher.Zero("grad_weight", grad_weight, g.weights() * size);
    if (wanted.bias) launcher.Zero("grad_bias", grad_bias, g.c_out * size);
    return launcher.status();
  }

  const T* grad_y = static_cast<const T*>(arrays.grad_y.data);
  if (wanted.bias) {
    launcher.Run("GradBias", GradBiasKernel<T>, plan.bias_parts * CeilDiv(c_out, kBiasColumns),
                 kThreads * static_cast<int>(sizeof(Real)), p.pixels, c_out, grad_y, plan.bias_sums);
    launcher.RunForEach("ReduceBias", ReduceBiasKernel<Real>, c_out, plan.bias_parts, c_out, plan.bias_sums, grad_bias);
  }
  if (!plan.want_samples && !wanted.weight) return launcher.status();

  launcher.RunForEach("PackWeight", PackWeightKernel<T, Tag>, plan.packed.vectors + plan.zeros, p, plan.packed,
                      static_cast<const T*>(arrays.weight.data), plan.zeros, plan.weights);
  Samples<T> samples{static_cast<const T*>(arrays.x.data), arrays.offset, arrays.mask,
                     reinterpret_cast<const T*>(plan.weights + plan.packed.vectors)};
  const int64_t runs = plan.input_pixels * (p.c_in / p.padded_unit);
  if (p.pads_in()) {
    Pad(launcher, samples.x, runs, p.unit, p.padded_unit, plan.padded_x);
    samples.x = plan.padded_x;
  }
  if (p.pads_out()) {
    Pad(launcher, grad_y, p.pixels * p.groups, p.group_out, p.padded_group_out, plan.padded_grad_y);
    grad_y = plan.padded_grad_y;
  }

  if (plan.want_samples) {
    Real* sums = wanted.x && p.pads_in() ? plan.padded_grad_x : grad_x;
    if (wanted.x) launcher.Zero("grad_x", sums, plan.input_pixels * p.c_in * static_cast<int64_t>(sizeof(Real)));
    const bool in_order = wanted.x && deterministic;
    if (in_order) {
      launcher.Run("GradXInOrder", GradXInOrderKernel<T, Tag>, g.batch * p.groups * plan.packed.tiles,
                   GradSamplesMemory<T>::kBytes, p, samples, grad_y, plan.weights, plan.packed.stages, sums);
    }
    if (!in_order || wanted.offset || wanted.mask) {
      launcher.Run("GradSamples", GradSamplesKernel<T, Tag>, CeilDiv(p.pixels, kRows) * p.taps,
                   GradSamplesMemory<T>::kBytes, p, samples, grad_y, plan.weights, plan.packed.stages,
                   in_order ? nullptr : sums, arrays.grad_offset, arrays.grad_mask);
    }
    if (wanted.x && p.pads_in()) {
      launcher.RunForEach("Unpad", UnpadKernel<Real>, runs * p.unit, sums, runs, p.unit, p.padded_unit, grad_x);
    }
  }
  if (wanted.weight) {
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

int64_t BackwardWorkspace(const Geometry& geometry, const Wanted& wanted, DType dtype, const Options& options) {
  return WithArithmetic(dtype, options.precision,
                        [&](auto a) { return BackwardPlan<decltype(a)>(geometry, wanted, nullptr).bytes; });
}

Status Backward(const Geometry& geometry, const BackwardArrays& arrays, void* workspace, const Options& options,
                cudaStream_t stream) {
  return WithArithmetic(arrays.x.dtype, options.precision, [&](auto a) {
    return RunBackward<decltype(a)>(geometry, arrays, workspace, options.deterministic, stream);
  });
}

}  // namespace cuda
}  // namespace jax_dcn
