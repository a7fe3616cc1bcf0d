// Products channel by channel, those of a depthwise convolution.

#pragma once

#include "arrays.h"
#include "memory.h"
#include "slices.h"
#include "tile.h"
#include "weights.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// Packed weights are (taps, channels), packed grad_y is (pixels, channels of the slice).
template <class T>
class DepthwiseProducts {
 public:
  using Element = T;
  using Operand = Accumulation<T>;
  using Real = Accumulation<T>;

  DepthwiseProducts(const Geometry& g, DataFormat format, const Array& weight, const Slices& slices,
                    const TapBlocks& tap_blocks)
      : g_(g), format_(format), weight_(weight), slices_(slices), tap_blocks_(tap_blocks) {}

  // --- forward ---

  int64_t ForwardWeightSize() const { return g_.weights(); }

  void PackForwardWeight(Workers&, Real* packed) const {
    const WeightView<T> weight(g_, format_, weight_, 0);
    for (int64_t t = 0; t < g_.taps(); ++t) {
      for (int64_t c = 0; c < g_.c_out; ++c, ++packed) {
        *packed = ToReal(weight.data[t * weight.tap + c * weight.out]);
      }
    }
  }

  int64_t out_parts() const { return g_.c_out; }
  Range Outs(int64_t parts, int64_t i) const { return Range::Piece(g_.c_out, parts, i); }

  void Output(const Slice& slice, int64_t block, Range, int64_t pixels, const Real* samples, const Real* weight,
              Real* sums) const {
    const int64_t taps = tap_blocks_[block].size();
    const int64_t channels = slice.channels();
    const int64_t c_out = g_.c_out;
    weight += tap_blocks_[block].begin * c_out + slice.begin;
    sums += slice.begin;
    for (int64_t p = 0; p < pixels; ++p, samples += taps * channels, sums += c_out) {
      ForVectors<Vector<Real>>(channels, [&](int64_t c, auto load, auto store) {
        Vector<Real> sum = block == 0 ? Vector<Real>{} : load(sums + c);
        const Real* sample = samples + c;
        const Real* factor = weight + c;
        for (int64_t t = 0; t < taps; ++t, sample += channels, factor += c_out) sum += load(sample) * load(factor);
        store(sums + c, sum);
      });
    }
  }

  // --- backward ---

  struct Scratch {
    Scratch(const DepthwiseProducts& p, Carver& carver)
        : grad_y(carver.Take<Real>(kTileRows * p.slices_.max_channels())) {}

    Real* grad_y;
  };

  int64_t BackwardWeightSize() const { return ForwardWeightSize(); }
  void PackBackwardWeight(Workers& workers, Real* packed) const { PackForwardWeight(workers, packed); }

  void PackGradY(const Slice& slice, const Tile<Real>& tile, const Array& grad_y, const Scratch& space) const {
    for (int row = 0; row < tile.height; ++row) {
      const T* from = RowStart(g_, static_cast<const T*>(grad_y.data), tile, row, g_.c_out, format_);
      Real* to = space.grad_y + row * tile.width * slice.channels();
      if (format_ == DataFormat::kNCHW) {
        Transpose<Real>(from + slice.begin * g_.image_out(), g_.image_out(), slice.channels(), tile.width, to,
                        slice.channels());
        continue;
      }
      for (int p = 0; p < tile.width; ++p) {
        CopyRow<Real>(from + p * g_.c_out + slice.begin, static_cast<int>(slice.channels()), to + p * slice.channels());
      }
    }
  }

  void SumGradY(const Slice& slice, int64_t pixels, bool accumulate, const Scratch& space, Real* grad_bias) const {
    SumRows(space.grad_y, slice.channels(), pixels, slice.channels(), accumulate, grad_bias + slice.begin);
  }

  void GradSamples(const Slice& slice, int64_t block, int64_t pixels, const Real* weight, const Scratch& space,
                   Real* grad_samples) const {
    const Range taps = tap_blocks_[block];
    for (int64_t p = 0; p < pixels; ++p, grad_samples += taps.size() * slice.channels()) {
      ForVectors<Vector<Real>>(slice.channels(), [&](int64_t c, auto load, auto store) {
        const Vector<Real> grad_y = load(space.grad_y + p * slice.channels() + c);
        for (int64_t t = taps.begin; t < taps.end; ++t) {
          store(grad_samples + (t - taps.begin) * slice.channels() + c,
                grad_y * load(weight + t * g_.c_out + slice.begin + c));
        }
      });
    }
  }

  void GradWeight(const Slice& slice, int64_t block, int64_t pixels, bool accumulate, const Real* samples,
                  const Scratch& space, Real* grad_weight) const {
    const Range taps = tap_blocks_[block];
    for (int64_t t = taps.begin; t < taps.end; ++t, samples += slice.channels()) {
      Real* out = grad_weight + t * g_.c_out + slice.begin;
      ForVectors<Vector<Real>>(slice.channels(), [&](int64_t c, auto load, auto store) {
        Vector<Real> sum = accumulate ? load(out + c) : Vector<Real>{};
        for (int64_t p = 0; p < pixels; ++p) {
          sum += load(samples + p * taps.size() * slice.channels() + c) * load(space.grad_y + p * slice.channels() + c);
        }
        store(out + c, sum);
      });
    }
  }

 private:
  const Geometry& g_;
  const DataFormat format_;
  const Array& weight_;
  const Slices& slices_;
  const TapBlocks& tap_blocks_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
