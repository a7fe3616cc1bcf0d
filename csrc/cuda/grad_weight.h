// The kernels of the gradient of the weight.
//
// GradWeight: a block takes a part of the pixels, 128 rows of the weight (taps and channels) and a tile of output
// channels, and multiplies the samples, which it makes again, with grad_y. The sums of the parts are added up in their
// order by ReduceWeight. Groups of a bundle are multiplied with each other's grad_y too, which nothing is made of.
// Small groups have a kernel of their own, in small_groups.h.

#pragma once

#include "parts.h"
#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// How the blocks of GradWeight share the work.
struct WeightParts : PixelParts {
  int columns, row_tiles, column_tiles;

  int64_t blocks(const Problem& p) const { return int64_t{parts} * p.bundles() * row_tiles * column_tiles; }
  // Elements of the sums of a part: (bundle of groups, tile of rows, tile of columns, row, column), padded.
  JAX_DCN_INLINE int64_t size(const Problem& p) const {
    return int64_t{p.bundles()} * row_tiles * kRows * column_tiles * columns;
  }
};

// The left operand, transposed: a stage is some pixels, each with kRows of the taps and channels of a bundle in a row.
// A thread makes two vectors of the same pixel, for one tap, channel and deform group each in all stages.
template <class T, class Tag>
class SampleColumns {
 public:
  using Real = Accumulation<T>;
  static constexpr int kRounds = 1;

  JAX_DCN_DEVICE SampleColumns(const Problem& p, const Samples<T>& samples, int64_t first_pixel, int64_t end,
                               int bundle, int first_row)
      : p_(p), samples_(samples), end_(end), pixel_(p, first_pixel + ThreadIndex() / kPixelThreads) {
    for (int i = 0; i < kOwn; ++i) {
      const int row = first_row + Vector(i) * kVector<T>;
      tap_[i] = row / p.bundle_in;
      channel_[i] = bundle * p.bundle_in + row % p.bundle_in;
      if (channel_[i] >= p.c_in) {  // the last bundle may have fewer groups
        tap_[i] = p.taps;
        channel_[i] = 0;
      }
      deform_group_[i] = channel_[i] / p.deform_in;
    }
    same_ = tap_[0] == tap_[1] && deform_group_[0] == deform_group_[1];
    LoadDisplacements();
  }

  JAX_DCN_DEVICE void Next(int) {}

  JAX_DCN_DEVICE void Fetch(int) {
    Corners<T> corners;
    for (int i = 0; i < kOwn; ++i) {
      if (i == 0 || !same_) corners.Locate(p_, samples_, pixel_, tap_[i], displacement_[i]);
      vector_[i].Load(corners, channel_[i]);
    }
    pixel_.Advance(p_, kTransposedStage<T>);
    LoadDisplacements();
  }

  JAX_DCN_DEVICE void Store(int, Shared<Vector16> to) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      to[ThreadIndex() / kPixelThreads * kTransposedPitch<T, kRows> + Vector(i)] =
          Interpolate<T, Tag>(vector_[i].corner, vector_[i].weight);
    }
  }

 private:
  static constexpr int kOwn = 2;
  static constexpr int kPixelThreads = kRows / kVector<T> / kOwn;
  static_assert(kTransposedStage<T> * kPixelThreads == kThreads);

  static JAX_DCN_DEVICE int Vector(int i) { return ThreadIndex() % kPixelThreads + i * kPixelThreads; }

  JAX_DCN_DEVICE void LoadDisplacements() {
    for (int i = 0; i < kOwn; ++i) {
      if (i == 0 || !same_) displacement_[i].Load(p_, samples_, pixel_.index, end_, tap_[i], deform_group_[i]);
    }
  }

  const Problem& p_;
  const Samples<T>& samples_;
  const int64_t end_;
  OutputPixel pixel_;
  int tap_[kOwn], channel_[kOwn], deform_group_[kOwn];
  bool same_;  // the vectors share their samples
  Displacement<Real> displacement_[kOwn];
  SampleVector<T> vector_[kOwn];
};

template <class T, class Tag, int kColumns>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 1)
    GradWeightKernel(Problem p, Samples<T> samples, const T* grad_y, WeightParts parts, Accumulation<T>* sums) {
  int block = BlockIndex().x;  // blocks of the same pixels run at the same time
  const int column_tile = block % parts.column_tiles;
  block /= parts.column_tiles;
  const int row_tile = block % parts.row_tiles;
  block /= parts.row_tiles;
  const int bundle = block % p.bundles();
  const int part = block / p.bundles();
  const int64_t first_pixel = part * parts.part_pixels;
  const int64_t end = first_pixel + parts.part_pixels < p.pixels ? first_pixel + parts.part_pixels : p.pixels;
  const int first_out = bundle * p.bundle_out() + column_tile * kColumns;
  const int bundle_end = (bundle + 1) * p.bundle_out();
  const int end_out = bundle_end < p.c_out() ? bundle_end : p.c_out();

  const auto right = [&](int stage, Shared<Vector16> to) {
    constexpr int kVectors = kColumns / kVector<T>;
    static_assert(kThreads % kVectors == 0);
    const int vector = ThreadIndex() % kVectors;
    const int channel = first_out + vector * kVector<T>;
#pragma unroll
    for (int row = 0; row < kTransposedStage<T>; row += kThreads / kVectors) {
      const int in_stage = row + ThreadIndex() / kVectors;
      const int64_t pixel = first_pixel + int64_t{stage} * kTransposedStage<T> + in_stage;
      const bool there = pixel < end && channel < end_out;
      const T* from = there ? grad_y + (pixel * p.c_out() + channel) : grad_y;
      CopyAsync16(to + (in_stage * kTransposedPitch<T, kColumns> + vector), from, there);
    }
  };
  SampleColumns<T, Tag> left(p, samples, first_pixel, end, bundle, row_tile * kRows);
  Product<T, Tag, kColumns, true> product;
  MultiplyStages<T, kColumns, true>(0, static_cast<int>(CeilDiv(end - first_pixel, kTransposedStage<T>)), left, right,
                                    product);

  Accumulation<T>* to = sums + int64_t{BlockIndex().x} * (kRows * kColumns);
  product.ForEach(
      [&](int row, int column, const auto& values) { StoreRun(to + row * kColumns + column, values, true); });
}

// A thread adds up an element of the weight.
template <class Real>
JAX_DCN_GLOBAL void ReduceWeightKernel(Problem p, WeightParts parts, const Real* sums, Real* grad_weight) {
  const int64_t i = GlobalThread();
  const int group_in = p.group_in / p.padded_unit * p.unit;
  const int c_out = p.groups * p.group_out;
  if (i >= int64_t{p.taps} * group_in * c_out) return;
  const int out = static_cast<int>(i % c_out);
  const int channel = static_cast<int>(i / c_out % group_in);
  const int tap = static_cast<int>(i / c_out / group_in);
  const int group = out / p.group_out;
  const int row =
      tap * p.bundle_in + group % p.bundle * p.group_in + channel / p.unit * p.padded_unit + channel % p.unit;
  const int column = group % p.bundle * p.padded_group_out + out % p.group_out;
  const int64_t tile =
      (int64_t{group / p.bundle} * parts.row_tiles + row / kRows) * parts.column_tiles + column / parts.columns;
  const Real* from = sums + (tile * kRows + row % kRows) * parts.columns + column % parts.columns;
  Real sum = 0;
  for (int part = 0; part < parts.parts; ++part) sum += from[part * parts.size(p)];
  grad_weight[i] = sum;
}

}  // namespace cuda
}  // namespace jax_dcn
