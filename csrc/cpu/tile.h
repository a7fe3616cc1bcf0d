// Tiles of output pixels.

#pragma once

#include "../geometry.h"
#include "../operands.h"
#include "integers.h"
#include "simd.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// Most pixels of a tile: eight register blocks of AVX-512. 112 x 384 floats are 172 KB, which leaves room in an L2
// of 512 KB for the panels of the other operand.
inline constexpr int kTileRows = 112;
// Most pixels of a tile side by side. 16 x 7 pixels with offsets of a few pixels read a third of the image that a tile
// of 112 x 1 would, so that it stays in the cache from tap to tap and from tile to tile.
inline constexpr int kTileWidth = 16;

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
  int64_t output[kTileRows];       // per pixel: its index, of all output pixels
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
      tile.output[p] = row * g.w_out + wo;
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

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
