// The forward kernel.
//
// A block computes 128 output pixels by up to 256 output channels of a weight group as one product: its left operand
// are the samples of these pixels, with all taps and channels of the group in a row, made stage by stage in shared
// memory, and its right operand is the packed weight. So a sample is computed once for all the output channels of a
// block, and never stored outside it.

#pragma once

#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// The left operand. Two threads share a pixel: of each stage's four vectors one makes the even and the other the odd
// ones, so that together they read 32 bytes. Addresses and weights stay in registers until the tap or the deform group
// changes; the offsets of the next ones are on their way meanwhile.
template <class T, class Tag>
class SampleRows {
 public:
  using Real = Accumulation<T>;

  JAX_DCN_DEVICE SampleRows(const Problem& p, const Samples<T>& samples, int64_t first_pixel, int group)
      : p_(p),
        samples_(samples),
        pixel_(p, first_pixel + ThreadIndex() / 2),
        first_channel_(group * p.group_in),
        next_tap_(0),
        next_channel_(ThreadIndex() % 2 * kVector<T>) {
    LoadNext();
  }

  JAX_DCN_DEVICE void Fetch() {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (left_ == 0) StartNext();
      vector_[i].Load(corners_, channel_);
      channel_ += kStep;
      --left_;
    }
  }

  JAX_DCN_DEVICE void Store(Shared<Vector16> to) const {
    const int thread = ThreadIndex();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      to[thread / 2 * kRowPitch + thread % 2 + 2 * i] = vector_[i].template Interpolate<Tag>();
    }
  }

 private:
  static constexpr int kOwn = kStageVectors / 2;
  static constexpr int kStep = 2 * kVector<T>;  // from one of the thread's vectors to the next

  // Loads the displacement at the next tap and channel of the group.
  JAX_DCN_DEVICE void LoadNext() {
    if (next_channel_ >= p_.group_in) {
      next_tap_ += next_channel_ / p_.group_in;
      next_channel_ %= p_.group_in;
    }
    next_deform_group_ = (first_channel_ + next_channel_) / p_.deform_in;
    displacement_.Load(p_, samples_, pixel_.index, p_.pixels, next_tap_, next_deform_group_);
  }

  // Goes on there, for all vectors of the same tap and deform group.
  JAX_DCN_DEVICE void StartNext() {
    corners_.Locate(p_, samples_, pixel_, next_tap_, displacement_);
    channel_ = first_channel_ + next_channel_;
    int end = (next_deform_group_ + 1) * p_.deform_in - first_channel_;
    end = end < p_.group_in ? end : p_.group_in;
    left_ = (end - next_channel_ + kStep - 1) / kStep;
    next_channel_ += left_ * kStep;
    LoadNext();
  }

  const Problem& p_;
  const Samples<T>& samples_;
  const OutputPixel pixel_;
  const int first_channel_;

  Corners<T> corners_;
  int channel_;   // of the next vector
  int left_ = 0;  // vectors before the next tap or deform group
  int next_tap_, next_channel_, next_deform_group_;
  Displacement<Real> displacement_;
  SampleVector<T> vector_[kOwn];
};

// The packed weight is (group, tile of kColumns output channels, stage, output channel of the tile, k of the stage).
template <class T, class Tag, int kColumns>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 1)
    ForwardKernel(Problem p, Samples<T> samples, const Vector16* weights, int stages, const T* bias, T* y) {
  const int tiles = static_cast<int>(CeilDiv(p.group_out, kColumns));
  const int block = BlockIndex().x;
  const int part = block % (tiles * p.groups);  // blocks of the same pixels run at the same time
  const int64_t first_pixel = static_cast<int64_t>(block / (tiles * p.groups)) * kRows;
  const int group = part / tiles;
  const int first_column = part % tiles * kColumns;

  SampleRows<T, Tag> left(p, samples, first_pixel, group);
  Product<T, Tag, kColumns> product;
  const CopyPacked<kColumns> right{weights + int64_t{part} * stages * kColumns * kStageVectors};
  MultiplyStages<T, kColumns, false>(stages, left, right, product);

  const int64_t c_out = int64_t{p.groups} * p.group_out;
  const bool wide = p.group_out % 2 == 0;
  product.ForEach([&](int row, int column, const auto& values) {
    constexpr int kRun = decltype(product)::kRun;
    column += first_column;
    if (first_pixel + row >= p.pixels || column >= p.group_out) return;
    Accumulation<T> sums[kRun];
    const int valid = p.group_out - column < kRun ? p.group_out - column : kRun;
    for (int i = 0; i < kRun; ++i) {
      sums[i] = values[i];
      if (bias != nullptr && i < valid) sums[i] += ToReal(bias[group * p.group_out + column + i]);
    }
    T* to = y + (first_pixel + row) * c_out + group * p.group_out + column;
    if (valid == kRun) {
      StoreRun(to, sums, wide);
    } else {
      FromReal(sums[0], to[0]);
    }
  });
}

}  // namespace cuda
}  // namespace jax_dcn
