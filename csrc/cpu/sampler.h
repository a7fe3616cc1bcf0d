// Sampling of a slice of channels over a tile of pixels, block of taps by block of taps.

#pragma once

#include "memory.h"
#include "slices.h"
#include "visit.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// What the visits of a block of taps read and write. A result that is null is not wanted. Samples are (pixels, taps of
// the block, channels of the slice).
template <class T, class Operand>
struct Visited {
  using Real = Accumulation<T>;

  const T* x = nullptr;                // NHWC
  Operand* samples = nullptr;          // result: the modulated samples
  const Real* grad_samples = nullptr;  // their gradients, for the results below
  Real* parts = nullptr;               // result: the slice's parts of the gradients of offset and mask
  Real* grad_x = nullptr;              // result, added to: NHWC
};

template <class T>
class Sampler {
 public:
  using Real = Accumulation<T>;

  // The gradients of a tap: offset y and x, and mask. Visited::parts is (deform group of the slice, kParts * taps,
  // kTileRows); those of the offset come first, tap by tap, as in the offset itself.
  static constexpr int64_t kParts = 3;

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
          tap(carver.Take<Tap<Real, kTileRows>>(1)),
          sums(carver.Take<Real[kTileRows]>(kCorners)),
          offset(carver.Take<Real>(s.max_deform_groups_ * s.g_.taps() * 2 * kTileRows)),
          mask(carver.Take<Real>(s.mask_ ? s.max_deform_groups_ * s.g_.taps() * kTileRows : kTileRows)),
          zeros(carver.Take<T>(s.max_channels_)),
          spill(carver.Take<Real>(s.max_channels_)) {}

    Tile<Real>* tile;
    Tap<Real, kTileRows>* tap;
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
  // The most values of Visited::parts.
  int64_t max_parts() const { return max_deform_groups_ * kParts * g_.taps() * kTileRows; }

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

  // Visits the taps of a block.
  template <class Operand>
  void Visit(const Slice& slice, Range taps, const Visited<T, Operand>& visited, const Scratch& space) const {
    switch ((visited.samples ? kSamples : 0) | (visited.parts ? kSums : 0) | (visited.grad_x ? kGradX : 0)) {
      case kSamples: return VisitBlock<kSamples>(slice, taps, visited, space);
      case kSums: return VisitBlock<kSums>(slice, taps, visited, space);
      case kGradX: return VisitBlock<kGradX>(slice, taps, visited, space);
      case kSamples | kSums: return VisitBlock<kSamples | kSums>(slice, taps, visited, space);
      case kSamples | kGradX: return VisitBlock<kSamples | kGradX>(slice, taps, visited, space);
      case kSums | kGradX: return VisitBlock<kSums | kGradX>(slice, taps, visited, space);
      case kSamples | kSums | kGradX: return VisitBlock<kSamples | kSums | kGradX>(slice, taps, visited, space);
    }
  }

 private:
  template <int kWant, class Operand>
  void VisitBlock(const Slice& slice, Range taps, const Visited<T, Operand>& visited, const Scratch& space) const {
    const Range groups = DeformGroups(slice);
    // The taps of a deform group read much the same pixels, which stay in the L1 cache if they come one after another.
    for (int64_t d = groups.begin; d < groups.end; ++d) {
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const int64_t i = (d - groups.begin) * g_.taps() + t;
        const int64_t begin = Max(slice.begin, d * g_.deform_in());
        const Real* dy = space.offset + i * 2 * kTileRows;
        const Real* mask = space.mask + (mask_ ? i * kTileRows : 0);
        FillTap<kWant & ~kSamples>(PlaceOf<Real>(g_, static_cast<int>(t)), *space.tile, 0, space.tile->pixels, dy,
                                   dy + kTileRows, mask, PixelsOf(g_, visited.x, begin, space.zeros),
                                   PixelsOf(g_, visited.grad_x, begin, space.spill), *space.tap);

        const int64_t column = (t - taps.begin) * slice.channels() + begin - slice.begin;
        TapChannels<Real, Operand> channels;
        channels.count = Min(slice.end, (d + 1) * g_.deform_in()) - begin;
        channels.row_stride = taps.size() * slice.channels();
        if (kWant & kSamples) channels.samples = visited.samples + column;
        if (kWant & (kSums | kGradX)) channels.grad_samples = visited.grad_samples + column;
        channels.sums = space.sums;
        VisitTap<kWant, T>(*space.tile, *space.tap, channels);
        if constexpr ((kWant & kSums) != 0) {
          Real* part = visited.parts + (d - groups.begin) * kParts * g_.taps() * kTileRows;
          FinishSums(space.tile->pixels, *space.tap, space.sums, part + 2 * t * kTileRows,
                     part + (2 * g_.taps() + t) * kTileRows);
        }
      }
    }
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
