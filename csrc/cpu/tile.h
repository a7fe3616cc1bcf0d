// Sampling over a tile of output pixels.
//
// Addresses and weights are computed once per pixel, tap and deform group, vectorised over the pixels, and shared
// by all channels of the deform group, over which the sampling itself is vectorised.

#pragma once

#include "../sampling.h"
#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// Most pixels of a tile: eight register blocks of AVX-512. 112 x 384 floats are 172 KB, which leaves room in an L2
// of 512 KB for the panels of the other operand.
inline constexpr int kTileRows = 112;

// The output pixels [begin, begin + rows) of all images, in order.
template <class Real>
struct Tile {
  int64_t begin;
  int rows;
  int64_t image[kTileRows];       // index of the first pixel of the pixel's image
  alignas(64) Real y[kTileRows];  // where tap (0, 0) samples with no offset
  alignas(64) Real x[kTileRows];
};

template <class Real>
void FillTile(const Geometry& g, int64_t begin, int rows, Tile<Real>& tile) {
  tile.begin = begin;
  tile.rows = rows;
  int64_t n = begin / g.image_out();
  int64_t ho = begin % g.image_out() / g.w_out;
  int64_t wo = begin % g.w_out;
  for (int p = 0; p < rows; ++p) {
    tile.image[p] = n * g.image();
    tile.y[p] = static_cast<Real>(ho * g.stride_h - g.padding_h);
    tile.x[p] = static_cast<Real>(wo * g.stride_w - g.padding_w);
    if (++wo == g.w_out) {
      wo = 0;
      if (++ho == g.h_out) {
        ho = 0;
        ++n;
      }
    }
  }
}

// --- offset and mask of a tile, per channel ---

// Channel by channel: the rows' cache lines, one for each pixel, stay in L1 from one channel to the next.
template <class T, class Real>
void TransposeRows(const T* rows, int64_t row_stride, int row_count, int64_t channels, Real* out) {
  for (int64_t c = 0; c < channels; ++c, out += kTileRows) {
    for (int p = 0; p < row_count; ++p) out[p] = static_cast<Real>(ToReal(rows[p * row_stride + c]));
  }
}

// out[c][p] = channel first + c of the tile's pixel p, for an array of `row_stride` channels.
template <class Real>
void LoadChannels(const Array& array, const Tile<Real>& tile, int64_t row_stride, int64_t first, int64_t channels,
                  Real* out) {
  const int64_t start = tile.begin * row_stride + first;
  switch (array.dtype) {
    case DType::kFloat32:
      return TransposeRows(static_cast<const float*>(array.data) + start, row_stride, tile.rows, channels, out);
    case DType::kFloat64:
      return TransposeRows(static_cast<const double*>(array.data) + start, row_stride, tile.rows, channels, out);
    case DType::kBFloat16:
      return TransposeRows(static_cast<const BFloat16*>(array.data) + start, row_stride, tile.rows, channels, out);
    case DType::kFloat16:
      return TransposeRows(static_cast<const Float16*>(array.data) + start, row_stride, tile.rows, channels, out);
  }
}

template <class T, class Real>
void TransposeColumns(const Real* in, int row_count, int64_t channels, T* rows, int64_t row_stride) {
  for (int64_t c = 0; c < channels; ++c, in += kTileRows) {
    for (int p = 0; p < row_count; ++p) rows[p * row_stride + c] = FromReal<T>::Convert(in[p]);
  }
}

// The inverse of LoadChannels, for the pixels [begin, begin + rows).
template <class Real>
void StoreChannels(const Real* in, int64_t begin, int rows, int64_t row_stride, int64_t first, int64_t channels,
                   const Array& array) {
  const int64_t start = begin * row_stride + first;
  switch (array.dtype) {
    case DType::kFloat32:
      return TransposeColumns(in, rows, channels, static_cast<float*>(array.data) + start, row_stride);
    case DType::kFloat64:
      return TransposeColumns(in, rows, channels, static_cast<double*>(array.data) + start, row_stride);
    case DType::kBFloat16:
      return TransposeColumns(in, rows, channels, static_cast<BFloat16*>(array.data) + start, row_stride);
    case DType::kFloat16:
      return TransposeColumns(in, rows, channels, static_cast<Float16*>(array.data) + start, row_stride);
  }
}

// --- one tap of one deform group ---

template <class Real>
struct Tap {
  alignas(64) int32_t corner[kCorners][kTileRows];
  alignas(64) Real weight[kCorners][kTileRows];
  alignas(64) Real ly[kTileRows];
  alignas(64) Real lx[kTileRows];
  alignas(64) Real mask[kTileRows];  // 0 where the sample is invalid
};

// Locates the samples. dy, dx and mask are per pixel; mask may be null.
template <class Real>
void FillTap(const Geometry& g, const Tile<Real>& tile, int64_t tap_index, const Real* dy, const Real* dx,
             const Real* mask, Tap<Real>& tap) {
  const Real tap_y = static_cast<Real>(tap_index / g.kernel_w * g.dilation_h);
  const Real tap_x = static_cast<Real>(tap_index % g.kernel_w * g.dilation_w);
  const int32_t height = static_cast<int32_t>(g.height);
  const int32_t width = static_cast<int32_t>(g.width);
  for (int p = 0; p < tile.rows; ++p) {
    // The sum of the first two is a whole number, so that the coordinate is rounded once.
    const Sample<Real> s = Locate((tile.y[p] + tap_y) + dy[p], (tile.x[p] + tap_x) + dx[p], height, width);
    for (int k = 0; k < kCorners; ++k) {
      tap.corner[k][p] = s.corner[k];
      tap.weight[k][p] = s.weight[k];
    }
    tap.ly[p] = s.ly;
    tap.lx[p] = s.lx;
    tap.mask[p] = s.valid ? Real(1) : Real(0);
  }
  if (mask != nullptr) {
    for (int p = 0; p < tile.rows; ++p) tap.mask[p] = tap.mask[p] != 0 ? mask[p] : Real(0);
  }
}

// --- the channels of one tap of one deform group ---

// What VisitTap reads and writes. Row p of `samples` and `grad_samples` is pixel p; the others point at the first
// channel of the visit in an array of pixels of `c_in` channels.
template <class T>
struct Visit {
  using Real = Accumulation<T>;
  int64_t channels;
  int64_t c_in;
  int64_t row_stride;        // of samples and grad_samples
  const T* image;            // x
  const T* zeros;            // a pixel of zeros, for corners outside the image
  Real* samples;             // out: the modulated samples
  const Real* grad_samples;  // in: the gradient of the modulated samples
  Real* grad_image;          // in, out: grad_x, which this adds to
  Real* spill;               // a pixel to add to for corners outside the image
  Real (*sums)[kTileRows];   // out: per corner, the sum over channels of grad_samples * the corner's value
};

// One pass over the samples of a tile for whatever is asked for: the samples themselves, the sums from which the
// gradients of offset and mask follow, and grad_x.
template <class T, bool kSamples, bool kSums, bool kGradImage>
void VisitTap(const Tile<Accumulation<T>>& tile, const Tap<Accumulation<T>>& tap, const Visit<T>& visit) {
  using Real = Accumulation<T>;
  constexpr int lanes = kLanes<Real>;
  const int64_t whole = visit.channels / lanes * lanes;
  const int rest = static_cast<int>(visit.channels - whole);
  for (int p = 0; p < tile.rows; ++p) {
    Real* samples = kSamples ? visit.samples + p * visit.row_stride : nullptr;
    const Real* grad_samples = kSums || kGradImage ? visit.grad_samples + p * visit.row_stride : nullptr;
    if ((tap.corner[0][p] & tap.corner[1][p] & tap.corner[2][p] & tap.corner[3][p]) == -1) {
      if (kSamples) {
        for (int64_t c = 0; c < visit.channels; ++c) samples[c] = 0;
      }
      if (kSums) {
        for (int k = 0; k < kCorners; ++k) visit.sums[k][p] = 0;
      }
      continue;
    }
    const T* corner[kCorners];
    Real* grad_corner[kCorners];
    Vector<Real> weight[kCorners];
    for (int k = 0; k < kCorners; ++k) {
      const int32_t index = tap.corner[k][p];
      const int64_t at = (tile.image[p] + index) * visit.c_in;
      corner[k] = index < 0 ? visit.zeros : visit.image + at;
      if (kGradImage) grad_corner[k] = index < 0 ? visit.spill : visit.grad_image + at;
      weight[k] = Broadcast(tap.weight[k][p]);
    }
    const Vector<Real> mask = Broadcast(tap.mask[p]);
    Vector<Real> sum[kCorners] = {};

    const auto channels = [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
      Vector<Real> value[kCorners];
      if constexpr (kSamples || kSums) {
        for (int k = 0; k < kCorners; ++k) value[k] = load(corner[k] + c);
      }
      if constexpr (kSamples) {
        const Vector<Real> sample =
            (value[0] * weight[0] + value[1] * weight[1]) + (value[2] * weight[2] + value[3] * weight[3]);
        store(samples + c, sample * mask);
      }
      if constexpr (kSums || kGradImage) {
        const Vector<Real> grad = load(grad_samples + c);
        if constexpr (kSums) {
          for (int k = 0; k < kCorners; ++k) sum[k] += grad * value[k];
        }
        if constexpr (kGradImage) {
          const Vector<Real> modulated = grad * mask;
          for (int k = 0; k < kCorners; ++k) {
            Real* out = grad_corner[k] + c;
            store(out, load(out) + modulated * weight[k]);
          }
        }
      }
    };
    for (int64_t c = 0; c < whole; c += lanes) {
      channels(c, [](const auto* from) { return Load(from); }, [](Real* to, Vector<Real> v) { Store(to, v); });
    }
    if (rest != 0) {
      channels(
          whole, [rest](const auto* from) { return LoadPart(from, rest); },
          [rest](Real* to, Vector<Real> v) { StorePart(to, v, rest); });
    }
    if (kSums) {
      Real total[kCorners];
      SumLanes(sum, total);
      for (int k = 0; k < kCorners; ++k) visit.sums[k][p] = total[k];
    }
  }
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
