// Visits of the samples of a tile.
//
// Addresses and weights are computed once per pixel, tap and deform group, vectorised over the pixels, and shared
// by all channels of the deform group, over which the sampling itself is vectorised.

#pragma once

#include "../sampling.h"
#include "tile.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// What a visit is for, or'ed.
inline constexpr int kSamples = 1;  // the modulated samples
inline constexpr int kSums = 2;     // the sums over channels from which the gradients of offset and mask follow
inline constexpr int kGradX = 4;

// --- one tap of one deform group ---

// Pixels of some channels: those of the images of the batch, one after another, and one that stands for all pixels
// outside them.
struct Pixels {
  intptr_t first;
  int64_t stride;  // bytes
  intptr_t outside;
};

// Those of an array, from a channel on.
template <class Element>
Pixels PixelsOf(const Geometry& g, const Element* array, int64_t channel, const Element* outside) {
  return {reinterpret_cast<intptr_t>(array + (array == nullptr ? 0 : channel)),
          g.c_in * static_cast<int64_t>(sizeof(Element)), reinterpret_cast<intptr_t>(outside)};
}

// Of at most kPixels pixels.
template <class Real, int kPixels>
struct Tap {
  alignas(64) intptr_t corner[kCorners][kPixels];       // address of the corner's pixel
  alignas(64) intptr_t grad_corner[kCorners][kPixels];  // the same in grad_x
  alignas(64) Real weight[kCorners][kPixels];           // bilinear, times the mask
  alignas(64) Real ly[kPixels];
  alignas(64) Real lx[kPixels];
  alignas(64) Real mask[kPixels];   // 0 where the sample is invalid
  alignas(64) Real valid[kPixels];  // 1 or 0
};

// Locates the samples of a tile's pixels from `first` on. dy, dx and mask are those of the tile's pixels. What only
// kSums or kGradX needs is computed where it is wanted.
template <int kWant, class Real, int kPixels>
JAX_DCN_SIMD void FillTap(const Place<Real>& place, const Tile<Real>& tile, int first, int pixels, const Real* dy,
                          const Real* dx, const Real* mask, Pixels x, Pixels grad_x, Tap<Real, kPixels>& tap) {
  constexpr bool want_sums = (kWant & kSums) != 0;
  constexpr bool want_grad_x = (kWant & kGradX) != 0;
  const Real* tile_y = tile.y + first;
  const Real* tile_x = tile.x + first;
  const int64_t* image = tile.image + first;
  const int64_t row = place.width * x.stride;
  const int64_t grad_row = place.width * grad_x.stride;
  dy += first, dx += first, mask += first;
  JAX_DCN_INDEPENDENT
  for (int p = 0; p < pixels; ++p) {
    const Sample<Real> s = Locate(place, tile_y[p], tile_x[p], dy[p], dx[p]);
    const Real factor = s.valid ? mask[p] : Real(0);
    const int64_t pixel = image[p] + (place.first + s.index);
    const int64_t corner = x.first + pixel * x.stride;
    const int64_t grad_corner = want_grad_x ? grad_x.first + pixel * grad_x.stride : 0;
    for (int k = 0; k < kCorners; ++k) {
      tap.weight[k][p] = s.weight[k] * factor;
      tap.corner[k][p] = s.inside[k] ? corner + (k & 1) * x.stride + (k >> 1) * row : x.outside;
      if (want_grad_x) {
        tap.grad_corner[k][p] =
            s.inside[k] ? grad_corner + (k & 1) * grad_x.stride + (k >> 1) * grad_row : grad_x.outside;
      }
    }
    if (want_sums) {
      tap.ly[p] = s.ly;
      tap.lx[p] = s.lx;
      tap.mask[p] = factor;
      tap.valid[p] = s.valid ? Real(1) : Real(0);
    }
  }
}

// --- the channels of one tap of one deform group ---

// What VisitTap reads and writes besides the pixels of x and grad_x. Row p of samples and grad_samples is pixel p.
template <class Real, class Operand>
struct TapChannels {
  int64_t count;
  int64_t row_stride;                  // of samples and grad_samples
  Operand* samples = nullptr;          // out: the modulated samples
  const Real* grad_samples = nullptr;  // in: the gradient of the modulated samples
  Real (*sums)[kTileRows];             // out: per corner, the sum over channels of grad_samples * the corner's value
};

// One pass over the samples of a tile for all that is wanted. V holds the channels visited at a time; if kOnce, all.
template <int kWant, class T, class V, bool kOnce, class Real, class Operand>
void VisitChannels(const Tile<Real>& tile, const Tap<Real, kTileRows>& tap,
                   const TapChannels<Real, Operand>& channels) {
  constexpr bool want_samples = (kWant & kSamples) != 0;
  constexpr bool want_sums = (kWant & kSums) != 0;
  constexpr bool want_grad_x = (kWant & kGradX) != 0;
  const int64_t row_stride = channels.row_stride;
  Operand* samples = channels.samples;
  const Real* grad_samples = channels.grad_samples;
  for (int p = 0, pixels = tile.pixels; p < pixels; ++p) {
    const T* corner[kCorners];
    Real* grad_corner[kCorners];
    V weight[kCorners];
    V sum[kCorners] = {};
    JAX_DCN_UNROLL
    for (int k = 0; k < kCorners; ++k) {
      if (want_samples || want_sums) corner[k] = reinterpret_cast<const T*>(tap.corner[k][p]);
      if (want_grad_x) grad_corner[k] = reinterpret_cast<Real*>(tap.grad_corner[k][p]);
      if (want_samples || want_grad_x) weight[k] = Broadcast<V>(tap.weight[k][p]);
    }

    const auto visit = [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
      V value[kCorners];
      if constexpr (want_samples || want_sums) {
        JAX_DCN_UNROLL
        for (int k = 0; k < kCorners; ++k) value[k] = load(corner[k] + c);
      }
      if constexpr (want_samples) {
        store(samples + c,
              (value[0] * weight[0] + value[1] * weight[1]) + (value[2] * weight[2] + value[3] * weight[3]));
      }
      if constexpr (want_sums || want_grad_x) {
        const V grad = load(grad_samples + c);
        if constexpr (want_sums) {
          JAX_DCN_UNROLL
          for (int k = 0; k < kCorners; ++k) sum[k] += grad * value[k];
        }
        if constexpr (want_grad_x) {
          JAX_DCN_UNROLL
          for (int k = 0; k < kCorners; ++k) {
            Real* out = grad_corner[k] + c;
            store(out, load(out) + grad * weight[k]);
          }
        }
      }
    };
    if constexpr (kOnce) {
      visit(0, [](const auto* from) { return LoadAs<V>(from); }, [](auto* to, V v) { Store(to, v); });
    } else {
      ForVectors<V>(channels.count, visit);
    }
    if (want_sums) {
      Real total[kCorners];
      SumLanes(sum, total);
      for (int k = 0; k < kCorners; ++k) channels.sums[k][p] = total[k];
    }
    if (want_samples) samples += row_stride;
    if (want_sums || want_grad_x) grad_samples += row_stride;
  }
}

// Whole vectors and a part of one; half vectors where one is all, as 8 channels in a vector of 16 lanes would cross
// cache lines for nothing; and single channels.
template <int kWant, class T, class Real, class Operand>
void VisitTap(const Tile<Real>& tile, const Tap<Real, kTileRows>& tap, const TapChannels<Real, Operand>& channels) {
  constexpr int lanes = kLanes<Real>;
  if constexpr (lanes >= 8) {
    if (channels.count == lanes / 2) {
      return VisitChannels<kWant, T, Half<Real>, true>(tile, tap, channels);
    }
  }
  if (channels.count == lanes) {
    return VisitChannels<kWant, T, Vector<Real>, true>(tile, tap, channels);
  }
  if (channels.count == 1) return VisitChannels<kWant, T, Real, true>(tile, tap, channels);
  VisitChannels<kWant, T, Vector<Real>, false>(tile, tap, channels);
}

// From the sums per corner to the gradients of the tap's offset (y, then x) and mask.
template <class Real>
void FinishSums(int pixels, const Tap<Real, kTileRows>& tap, Real (*sums)[kTileRows], Real* grad_offset,
                Real* grad_mask) {
  JAX_DCN_INDEPENDENT
  for (int p = 0; p < pixels; ++p) {
    const Real value[kCorners] = {sums[0][p], sums[1][p], sums[2][p], sums[3][p]};
    // An invalid sample has no gradient, not even where grad_y is infinite.
    const bool valid = tap.valid[p] != 0;
    grad_offset[p] = valid ? tap.mask[p] * DerivativeY(value, tap.lx[p]) : Real(0);
    grad_offset[kTileRows + p] = valid ? tap.mask[p] * DerivativeX(value, tap.ly[p]) : Real(0);
    grad_mask[p] = valid ? Interpolate(value, tap.ly[p], tap.lx[p]) : Real(0);
  }
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
