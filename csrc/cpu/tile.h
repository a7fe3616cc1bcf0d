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
// Most pixels of a tile side by side. 16 x 7 pixels with offsets of a few pixels read a third of the image that a tile
// of 112 x 1 would, so that it stays in the cache from tap to tap and from tile to tile.
inline constexpr int kTileWidth = 16;

// [begin, end), or the i-th of `pieces` nearly equal ranges of [0, total).
struct Range {
  int64_t begin, end;

  static Range Piece(int64_t total, int64_t pieces, int64_t i) {
    return {total * i / pieces, total * (i + 1) / pieces};
  }
  int64_t size() const { return end - begin; }
};

// A rectangle of output pixels. Rows are counted through all images.
struct Rectangle {
  Range rows, columns;
};

// Cuts rows of output pixels into tiles of at most `pixels` pixels.
class TileGrid {
 public:
  TileGrid(const Geometry& g, Range rows, int64_t pixels)
      : first_row_(rows.begin),
        rows_(rows.size()),
        columns_(g.w_out),
        across_(CeilDiv(columns_, kTileWidth)),
        down_(CeilDiv(rows_, Max<int64_t>(1, pixels / CeilDiv(columns_, across_)))) {}

  int64_t count() const { return across_ * down_; }
  int64_t max_pixels() const { return CeilDiv(rows_, down_) * CeilDiv(columns_, across_); }

  Rectangle operator[](int64_t i) const {
    const Range rows = Range::Piece(rows_, down_, i / across_);
    return {{first_row_ + rows.begin, first_row_ + rows.end}, Range::Piece(columns_, across_, i % across_)};
  }

 private:
  int64_t first_row_, rows_, columns_;
  int64_t across_, down_;
};

template <class Real>
struct Tile {
  int pixels;
  int width, height;               // in pixels
  int64_t first[kTileRows];        // per row of the tile: index of its first pixel, of all output pixels
  int64_t first_image[kTileRows];  // per row: index of its image
  int64_t image[kTileRows];        // per pixel: index of the first input pixel of its image
  alignas(64) Real y[kTileRows];   // where tap (0, 0) samples with no offset
  alignas(64) Real x[kTileRows];
};

template <class Real>
void FillTile(const Geometry& g, const Rectangle& r, Tile<Real>& tile) {
  tile.width = static_cast<int>(r.columns.size());
  tile.height = static_cast<int>(r.rows.size());
  tile.pixels = tile.width * tile.height;
  for (int i = 0, p = 0; i < tile.height; ++i) {
    const int64_t row = r.rows.begin + i;
    tile.first[i] = row * g.w_out + r.columns.begin;
    tile.first_image[i] = row / g.h_out;
    const Real y = static_cast<Real>(row % g.h_out * g.stride_h - g.padding_h);
    for (int64_t wo = r.columns.begin; wo < r.columns.end; ++wo, ++p) {
      tile.image[p] = tile.first_image[i] * g.image();
      tile.y[p] = y;
      tile.x[p] = static_cast<Real>(wo * g.stride_w - g.padding_w);
    }
  }
}

// --- between arrays of output pixels and a tile ---

// Calls function(pointer to the array's elements).
template <class Function>
JAX_DCN_SIMD void WithElements(const Array& array, const Function& function) {
  switch (array.dtype) {
    case DType::kFloat32: return function(static_cast<float*>(array.data));
    case DType::kFloat64: return function(static_cast<double*>(array.data));
    case DType::kBFloat16: return function(static_cast<BFloat16*>(array.data));
    case DType::kFloat16: return function(static_cast<Float16*>(array.data));
  }
}

// Where channel 0 of a row of the tile begins in an array of `channels` channels.
template <class T, class Real>
JAX_DCN_SIMD T* RowStart(const Geometry& g, T* data, const Tile<Real>& tile, int row, int64_t channels,
                         DataFormat format) {
  if (format == DataFormat::kNHWC) return data + tile.first[row] * channels;
  const int64_t image = tile.first_image[row];
  return data + image * channels * g.image_out() + (tile.first[row] - image * g.image_out());
}

template <class Real, class From, class To>
JAX_DCN_SIMD void CopyRow(const From* from, int count, To* to) {
  ForVectors<Vector<Real>>(count, [&](int64_t i, auto load, auto store) { store(to + i, load(from + i)); });
}

// out[c][p] = channel first + c of the tile's pixel p, for `count` channels.
template <class Real>
void LoadChannels(const Geometry& g, const Array& array, DataFormat format, const Tile<Real>& tile, int64_t channels,
                  int64_t first, int64_t count, Real* out) {
  WithElements(array, [&](auto* data) {
    for (int row = 0; row < tile.height; ++row, out += tile.width) {
      const auto* start = RowStart(g, data, tile, row, channels, format);
      if (format == DataFormat::kNHWC) {
        Transpose<Real>(start + first, channels, tile.width, count, out, kTileRows);
      } else {
        for (int64_t c = 0; c < count; ++c) {
          CopyRow<Real>(start + (first + c) * g.image_out(), tile.width, out + c * kTileRows);
        }
      }
    }
  });
}

// The inverse of LoadChannels.
template <class Real>
void StoreChannels(const Geometry& g, const Real* in, const Tile<Real>& tile, int64_t channels, int64_t first,
                   int64_t count, DataFormat format, const Array& array) {
  WithElements(array, [&](auto* data) {
    for (int row = 0; row < tile.height; ++row, in += tile.width) {
      auto* start = RowStart(g, data, tile, row, channels, format);
      if (format == DataFormat::kNHWC) {
        Transpose<Real>(in, kTileRows, count, tile.width, start + first, channels);
      } else {
        for (int64_t c = 0; c < count; ++c) {
          CopyRow<Real>(in + c * kTileRows, tile.width, start + (first + c) * g.image_out());
        }
      }
    }
  });
}

// --- one tap of one deform group ---

// Pixels of some channels: those of the images of the batch, one after another, and one that stands for all pixels
// outside them.
struct Pixels {
  intptr_t first;
  int64_t stride;  // bytes
  intptr_t outside;
};

template <class Real>
struct Tap {
  alignas(64) intptr_t corner[kCorners][kTileRows];       // address of the corner's pixel
  alignas(64) intptr_t grad_corner[kCorners][kTileRows];  // the same in grad_x
  alignas(64) Real weight[kCorners][kTileRows];           // bilinear, times the mask
  alignas(64) Real ly[kTileRows];
  alignas(64) Real lx[kTileRows];
  alignas(64) Real mask[kTileRows];   // 0 where the sample is invalid
  alignas(64) Real valid[kTileRows];  // 1 or 0
};

// Locates the samples. dy, dx and mask are per pixel. What only the sums or grad_x need is computed
// if kSums or kGradX.
template <class Real, bool kSums, bool kGradX>
void FillTap(const Geometry& g, const Tile<Real>& tile, int64_t tap_index, const Real* dy, const Real* dx,
             const Real* mask, Pixels x, Pixels grad_x, Tap<Real>& tap) {
  const Real tap_y = static_cast<Real>(tap_index / g.kernel_w * g.dilation_h);
  const Real tap_x = static_cast<Real>(tap_index % g.kernel_w * g.dilation_w);
  const int32_t height = static_cast<int32_t>(g.height);
  const int32_t width = static_cast<int32_t>(g.width);
  const int64_t row = g.width * x.stride;
  const int64_t grad_row = g.width * grad_x.stride;
  const int pixels = tile.pixels;
  JAX_DCN_INDEPENDENT
  for (int p = 0; p < pixels; ++p) {
    // The sum of the first two is a whole number, so that the coordinate is rounded once.
    const Sample<Real> s = Locate((tile.y[p] + tap_y) + dy[p], (tile.x[p] + tap_x) + dx[p], height, width);
    const Real factor = s.valid ? mask[p] : Real(0);
    const int64_t pixel = tile.image[p] + s.index;
    const int64_t corner = x.first + pixel * x.stride;
    const int64_t grad_corner = kGradX ? grad_x.first + pixel * grad_x.stride : 0;
    for (int k = 0; k < kCorners; ++k) {
      tap.weight[k][p] = s.weight[k] * factor;
      tap.corner[k][p] = s.inside[k] ? corner + (k & 1) * x.stride + (k >> 1) * row : x.outside;
      if (kGradX) {
        tap.grad_corner[k][p] =
            s.inside[k] ? grad_corner + (k & 1) * grad_x.stride + (k >> 1) * grad_row : grad_x.outside;
      }
    }
    if (kSums) {
      tap.ly[p] = s.ly;
      tap.lx[p] = s.lx;
      tap.mask[p] = factor;
      tap.valid[p] = s.valid ? Real(1) : Real(0);
    }
  }
}

// --- the channels of one tap of one deform group ---

// What VisitTap reads and writes besides the pixels of x and grad_x. Row p of the first two is pixel p.
template <class Real, class Operand>
struct Visit {
  int64_t channels;
  int64_t row_stride;        // of samples and grad_samples
  Operand* samples;          // out: the modulated samples
  const Real* grad_samples;  // in: the gradient of the modulated samples
  Real (*sums)[kTileRows];   // out: per corner, the sum over channels of grad_samples * the corner's value
};

// One pass over the samples of a tile for whatever is asked for: the samples themselves, the sums from which the
// gradients of offset and mask follow, and grad_x. V holds the channels visited at a time, kOnce all of them.
template <class T, class V, bool kOnce, bool kSamples, bool kSums, bool kGradX, class Real, class Operand>
void VisitChannels(const Tile<Real>& tile, const Tap<Real>& tap, const Visit<Real, Operand>& visit) {
  const int64_t row_stride = visit.row_stride;
  Operand* samples = visit.samples;
  const Real* grad_samples = visit.grad_samples;
  for (int p = 0, pixels = tile.pixels; p < pixels; ++p) {
    const T* corner[kCorners];
    Real* grad_corner[kCorners];
    V weight[kCorners];
    V sum[kCorners] = {};
    JAX_DCN_UNROLL
    for (int k = 0; k < kCorners; ++k) {
      if (kSamples || kSums) corner[k] = reinterpret_cast<const T*>(tap.corner[k][p]);
      if (kGradX) grad_corner[k] = reinterpret_cast<Real*>(tap.grad_corner[k][p]);
      if (kSamples || kGradX) weight[k] = Broadcast<V>(tap.weight[k][p]);
    }

    const auto channels = [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
      V value[kCorners];
      if constexpr (kSamples || kSums) {
        JAX_DCN_UNROLL
        for (int k = 0; k < kCorners; ++k) value[k] = load(corner[k] + c);
      }
      if constexpr (kSamples) {
        store(samples + c,
              (value[0] * weight[0] + value[1] * weight[1]) + (value[2] * weight[2] + value[3] * weight[3]));
      }
      if constexpr (kSums || kGradX) {
        const V grad = load(grad_samples + c);
        if constexpr (kSums) {
          JAX_DCN_UNROLL
          for (int k = 0; k < kCorners; ++k) sum[k] += grad * value[k];
        }
        if constexpr (kGradX) {
          JAX_DCN_UNROLL
          for (int k = 0; k < kCorners; ++k) {
            Real* out = grad_corner[k] + c;
            store(out, load(out) + grad * weight[k]);
          }
        }
      }
    };
    if constexpr (kOnce) {
      channels(0, [](const auto* from) { return LoadAs<V>(from); }, [](auto* to, V v) { Store(to, v); });
    } else {
      ForVectors<V>(visit.channels, channels);
    }
    if (kSums) {
      Real total[kCorners];
      SumLanes(sum, total);
      for (int k = 0; k < kCorners; ++k) visit.sums[k][p] = total[k];
    }
    if (kSamples) samples += row_stride;
    if (kSums || kGradX) grad_samples += row_stride;
  }
}

// Whole vectors and a part of one; half vectors where one is all, as 8 channels in a vector of 16 lanes would cross
// cache lines for nothing; and single channels.
template <class T, bool kSamples, bool kSums, bool kGradX, class Real, class Operand>
void VisitTap(const Tile<Real>& tile, const Tap<Real>& tap, const Visit<Real, Operand>& visit) {
  constexpr int lanes = kLanes<Real>;
  if constexpr (lanes >= 8) {
    if (visit.channels == lanes / 2) {
      return VisitChannels<T, Half<Real>, true, kSamples, kSums, kGradX>(tile, tap, visit);
    }
  }
  if (visit.channels == lanes) {
    return VisitChannels<T, Vector<Real>, true, kSamples, kSums, kGradX>(tile, tap, visit);
  }
  if (visit.channels == 1) return VisitChannels<T, Real, true, kSamples, kSums, kGradX>(tile, tap, visit);
  VisitChannels<T, Vector<Real>, false, kSamples, kSums, kGradX>(tile, tap, visit);
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
