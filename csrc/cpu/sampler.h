// Sampling of a slice of channels over a tile of pixels, block of taps by block of taps.

#pragma once

#include "memory.h"
#include "slices.h"
#include "visit.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class T>
class Sampler {
 public:
  using Real = Accumulation<T>;

  Sampler(const Geometry& g, DataFormat format, const Array& offset, const Array& mask, const Slices& slices)
      : g_(g),
        format_(format),
        offset_(offset),
        mask_(mask),
        max_channels_(slices.max_channels()),
        max_deform_groups_(Min(g.deform_groups, CeilDiv(slices.max_channels(), g.deform_in()) + 1)) {}

  // A thread's work space.
  struct Scratch {
    Scratch(const Sampler& s, Carver& carver)
        : tile(carver.Take<Tile<Real>>(1)),
          tap(carver.Take<Tap<Real>>(1)),
          sums(carver.Take<Real[kTileRows]>(kCorners)),
          offset(carver.Take<Real>(s.max_deform_groups_ * s.g_.taps() * 2 * kTileRows)),
          mask(carver.Take<Real>(s.mask_ ? s.max_deform_groups_ * s.g_.taps() * kTileRows : kTileRows)),
          zeros(carver.Take<T>(s.max_channels_)),
          spill(carver.Take<Real>(s.max_channels_)) {}

    Tile<Real>* tile;
    Tap<Real>* tap;
    Real (*sums)[kTileRows];
    Real* offset;  // (deform groups of a slice, taps, 2, kTileRows)
    Real* mask;    // (deform groups of a slice, taps, kTileRows); ones, (kTileRows), where there is no mask
    T* zeros;
    Real* spill;
  };

  // The deform groups that a slice touches.
  Range DeformGroups(const Slice& slice) const {
    return {slice.begin / g_.deform_in(), (slice.end - 1) / g_.deform_in() + 1};
  }
  int64_t max_deform_groups() const { return max_deform_groups_; }

  void StartTile(const Rectangle& rectangle, const Scratch& space) const {
    FillTile(g_, rectangle, *space.tile);
    for (int64_t c = 0; c < max_channels_; ++c) {
      space.zeros[c] = T{};
      space.spill[c] = 0;
    }
    for (int p = 0; !mask_ && p < kTileRows; ++p) space.mask[p] = 1;
  }

  void StartSlice(const Slice& slice, const Scratch& space) const {
    const Range groups = DeformGroups(slice);
    const int64_t channels = g_.mask_channels();
    const int64_t first = groups.begin * g_.taps();
    const int64_t count = groups.size() * g_.taps();
    LoadChannels(g_, offset_, format_, *space.tile, channels * 2, first * 2, count * 2, space.offset);
    if (mask_) LoadChannels(g_, mask_, format_, *space.tile, channels, first, count, space.mask);
  }

  // Visits the taps of a block: see VisitTap. x and grad_x are NHWC; samples and grad_samples are (pixels, taps,
  // channels of the slice). After each visit calls after(tap index, deform group, tap), with the sums in the work
  // space.
  template <bool kSamples, bool kSums, bool kGradX, class Operand, class After>
  void VisitBlock(const Slice& slice, Range taps, const Scratch& space, const T* x, Operand* samples,
                  const Real* grad_samples, Real* grad_x, After after) const {
    const Range groups = DeformGroups(slice);
    // The taps of a deform group read much the same pixels, which stay in the L1 cache if they come one after another.
    for (int64_t d = groups.begin; d < groups.end; ++d) {
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const int64_t i = (d - groups.begin) * g_.taps() + t;
        const int64_t begin = Max(slice.begin, d * g_.deform_in());
        const Real* dy = space.offset + i * 2 * kTileRows;
        const Real* mask = space.mask + (mask_ ? i * kTileRows : 0);
        FillTap<Real, kSums, kGradX>(g_, *space.tile, t, dy, dy + kTileRows, mask, PixelsOf(x, begin, space.zeros),
                                     PixelsOf(grad_x, begin, space.spill), *space.tap);

        const int64_t column = (t - taps.begin) * slice.channels() + begin - slice.begin;
        Visit<Real, Operand> visit;
        visit.channels = Min(slice.end, (d + 1) * g_.deform_in()) - begin;
        visit.row_stride = taps.size() * slice.channels();
        visit.samples = kSamples ? samples + column : nullptr;
        visit.grad_samples = kSums || kGradX ? grad_samples + column : nullptr;
        visit.sums = space.sums;
        VisitTap<T, kSamples, kSums, kGradX>(*space.tile, *space.tap, visit);
        after(t, d, *space.tap);
      }
    }
  }

 private:
  template <class Element>
  Pixels PixelsOf(const Element* array, int64_t channel, const Element* outside) const {
    return {reinterpret_cast<intptr_t>(array + (array == nullptr ? 0 : channel)),
            g_.c_in * static_cast<int64_t>(sizeof(Element)), reinterpret_cast<intptr_t>(outside)};
  }

  const Geometry& g_;
  const DataFormat format_;
  const Array& offset_;
  const Array& mask_;
  const int64_t max_channels_;
  const int64_t max_deform_groups_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
