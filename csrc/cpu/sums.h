// The kernels without a weight, in NHWC: each channel is the sum of its own samples over the taps.
//
// Of a tile of output pixels a few at a time are located at all taps of a deform group, which then are visited vector
// of channels by vector: forward they are summed in registers. Backward has two parts, the gradients of offset and
// mask, for which threads can share the tiles, and that of x, for which they can share the images and the channels.
// With enough images and deform groups for all threads both are done in one go, and located once. No sum depends on how
// the work is shared.

#pragma once

#include "arrays.h"
#include "memory.h"
#include "visit.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// Calls function(what so many channels are visited in): vectors, half a vector if that is all, as 8 channels in a
// vector of 16 lanes would cross cache lines for nothing, or one number.
template <class Real, class Function>
JAX_DCN_SIMD void WithVector(int64_t channels, const Function& function) {
  if (channels == 1) return function(Real());
  if constexpr (kLanes<Real> >= 8) {
    if (channels == kLanes<Real> / 2) return function(Half<Real>());
  }
  function(Vector<Real>());
}

// Calls function(channel, count, load, store) for blocks of as many whole vectors as `count`, a constant, says, at most
// kMost, and for what is left, which load and store take in part.
template <class V, class Real, int kMost, class Function>
JAX_DCN_SIMD void ForBlocks(int64_t begin, int64_t end, const Function& function) {
  constexpr int lanes = kLanesOf<V, Real>;
  for (; end - begin >= kMost * lanes; begin += kMost * lanes) {
    function(
        begin, std::integral_constant<int, kMost>(), [](const auto* from) { return LoadAs<V>(from); },
        [](auto* to, V v) { Store(to, v); });
  }
  if (begin == end) return;
  if constexpr (kMost > 1) {
    ForBlocks<V, Real, kMost / 2>(begin, end, function);
  } else if constexpr (lanes > 1) {
    const int rest = static_cast<int>(end - begin);
    function(
        begin, std::integral_constant<int, 1>(), [rest](const auto* from) { return LoadPartAs<V>(from, rest); },
        [rest](auto* to, V v) { StorePart(to, v, rest); });
  }
}

// The samples of a deform group at the pixels of a tile, some of them located at all taps.
template <class T>
class LocatedTaps {
 public:
  using Real = Accumulation<T>;

  // Pixels that are located together: their addresses and weights at nine taps are 7 KB.
  static constexpr int kPixels = 16;
  using Located = Tap<Real, kPixels>;

  LocatedTaps(const Geometry& g, const Array& offset, const Array& mask) : g_(g), offset_(offset), mask_(mask) {}

  // A thread's work space.
  struct Scratch {
    Scratch(const LocatedTaps& s, Carver& carver)
        : tile(carver.Take<Tile<Real>>(1)),
          taps(carver.Take<Located>(s.g_.taps())),
          places(carver.Take<Place<Real>>(s.g_.taps())),
          offset(carver.Take<Real>(s.g_.taps() * 2 * kTileRows)),
          mask(carver.Take<Real>(s.mask_ ? s.g_.taps() * kTileRows : kTileRows)),
          zeros(carver.Take<T>(s.g_.deform_in())),
          spill(carver.Take<Real>(s.g_.deform_in())) {}

    Tile<Real>* tile;
    Located* taps;
    Place<Real>* places;
    Real* offset;  // (taps, 2, kTileRows)
    Real* mask;    // (taps, kTileRows); ones, (kTileRows), where there is no mask
    T* zeros;
    Real* spill;
  };

  void Start(const Scratch& space) const {
    for (int64_t t = 0; t < g_.taps(); ++t) space.places[t] = PlaceOf<Real>(g_, static_cast<int>(t));
    for (int64_t c = 0; c < g_.deform_in(); ++c) {
      space.zeros[c] = T{};
      space.spill[c] = 0;
    }
    for (int p = 0; !mask_ && p < kTileRows; ++p) space.mask[p] = 1;
  }

  // For the tile that the work space has.
  void StartGroup(int64_t deform_group, const Scratch& space) const {
    const int64_t taps = g_.taps(), channels = g_.mask_channels(), first = deform_group * taps;
    LoadChannels(g_, offset_, DataFormat::kNHWC, *space.tile, channels * 2, first * 2, taps * 2, space.offset);
    if (mask_) LoadChannels(g_, mask_, DataFormat::kNHWC, *space.tile, channels, first, taps, space.mask);
  }

  // Locates up to kPixels of the tile's, from `first` on, and returns how many. The channels begin at `channel`.
  template <int kWant>
  int Locate(int first, int64_t channel, const T* x, Real* grad_x, const Scratch& space) const {
    const Pixels of_x = PixelsOf(g_, x, channel, static_cast<const T*>(space.zeros));
    const Pixels of_grad_x = PixelsOf(g_, grad_x, channel, space.spill);
    const auto locate = [&](int pixels) JAX_DCN_ALWAYS_INLINE {
      for (int64_t t = 0; t < g_.taps(); ++t) {
        const Real* offset = space.offset + 2 * t * kTileRows;
        FillTap<kWant>(space.places[t], *space.tile, first, pixels, offset + (g_.x_first ? kTileRows : 0),
                       offset + (g_.x_first ? 0 : kTileRows), space.mask + (mask_ ? t * kTileRows : 0), of_x, of_grad_x,
                       space.taps[t]);
      }
      return pixels;
    };
    const int pixels = Min(kPixels, space.tile->pixels - first);
    return pixels == kPixels ? locate(kPixels) : locate(pixels);  // a number that the compiler knows
  }

 private:
  const Geometry& g_;
  const Array& offset_;
  const Array& mask_;
};

// --- forward ---

template <class T>
class ForwardSums {
 public:
  using Real = Accumulation<T>;
  using Taps = LocatedTaps<T>;

  ForwardSums(const Geometry& g, const ForwardArrays& arrays)
      : g_(g),
        x_(static_cast<const T*>(arrays.x.data)),
        y_(static_cast<T*>(arrays.y.data)),
        taps_(g, arrays.offset, arrays.mask) {}

  bool Run(Workers& workers) const {
    if (g_.pixels() == 0) return true;
    const TileGrid tiles(g_, {0, g_.batch * g_.h_out}, kTileRows);
    const WorkSpace<typename Taps::Scratch, Taps> scratch(taps_, workers.count());
    if (!scratch) return false;
    for (int i = 0; i < workers.count(); ++i) taps_.Start(scratch[i]);
    ParallelFor(workers, tiles.count(), [&](int worker, int64_t i) { SumTile(tiles[i], scratch[worker]); });
    return true;
  }

 private:
  void SumTile(const Rectangle& rectangle, const typename Taps::Scratch& space) const {
    FillTile(g_, rectangle, *space.tile);
    for (int64_t d = 0; d < g_.deform_groups; ++d) {
      taps_.StartGroup(d, space);
      for (int first = 0; first < space.tile->pixels; first += Taps::kPixels) {
        const int pixels = taps_.template Locate<0>(first, d * g_.deform_in(), x_, static_cast<Real*>(nullptr), space);
        const int64_t* outputs = space.tile->output + first;
        WithVector<Real>(g_.deform_in(),
                         [&](auto v) { SumPixels<decltype(v)>(space.taps, outputs, pixels, d * g_.deform_in()); });
      }
    }
  }

  template <class V>
  void SumPixels(const typename Taps::Located* taps, const int64_t* outputs, int pixels, int64_t channel) const {
    constexpr int lanes = kLanesOf<V, Real>;
    ForBlocks<V, Real, 4>(0, g_.deform_in(), [&](int64_t c, auto count, auto load, auto store) JAX_DCN_ALWAYS_INLINE {
      constexpr int kVectors = count;
      for (int p = 0; p < pixels; ++p) {
        // Two sums each, as one addition has to wait for the one before.
        V sum[2][kVectors] = {};
        for (int64_t t = 0; t < g_.taps(); ++t) {
          JAX_DCN_UNROLL
          for (int k = 0; k < kCorners; ++k) {
            const T* corner = reinterpret_cast<const T*>(taps[t].corner[k][p]) + c;
            const V weight = Broadcast<V>(taps[t].weight[k][p]);
            JAX_DCN_UNROLL
            for (int v = 0; v < kVectors; ++v) sum[k / 2][v] += load(corner + v * lanes) * weight;
          }
        }
        T* y = y_ + outputs[p] * g_.c_in + channel + c;
        JAX_DCN_UNROLL
        for (int v = 0; v < kVectors; ++v) store(y + v * lanes, sum[0][v] + sum[1][v]);
      }
    });
  }

  const Geometry& g_;
  const T* x_;
  T* y_;
  const Taps taps_;
};

// --- backward ---

template <class T>
class BackwardSums {
 public:
  using Real = Accumulation<T>;
  using Taps = LocatedTaps<T>;

  BackwardSums(const Geometry& g, const BackwardArrays& arrays)
      : g_(g),
        arrays_(arrays),
        x_(static_cast<const T*>(arrays.x.data)),
        grad_y_(static_cast<const T*>(arrays.grad_y.data)),
        grad_x_(static_cast<Real*>(arrays.grad_x.data)),
        taps_(g, arrays.offset, arrays.mask) {}

  bool Run(Workers& workers) const {
    if (g_.pixels() == 0) {
      if (grad_x_ != nullptr) Zero(grad_x_, g_.batch * g_.image() * g_.c_in);
      return true;
    }
    const WorkSpace<Scratch, BackwardSums> scratch(*this, workers.count());
    if (!scratch) return false;
    for (int i = 0; i < workers.count(); ++i) taps_.Start(scratch[i].taps);
    const bool want_displacements = arrays_.grad_offset || arrays_.grad_mask;
    const Parts parts(g_, workers.count());
    const bool together = want_displacements && grad_x_ != nullptr && parts.whole_groups;
    // The long tasks first.
    const int64_t of_images = grad_x_ == nullptr ? 0 : g_.batch * parts.count;
    const int64_t image_tiles = Tiles(0).count();
    const int64_t of_tiles = want_displacements && !together ? g_.batch * image_tiles : 0;
    const auto compute = [&](int worker, int64_t i) {
      if (i >= of_images) {
        const int64_t tile = i - of_images;
        return Visit<kSums>(Tiles(tile / image_tiles)[tile % image_tiles], {0, g_.c_in}, scratch[worker]);
      }
      const int64_t image = i / parts.count;
      const Range channels = parts[i % parts.count];
      Real* pixel = grad_x_ + image * g_.image() * g_.c_in + channels.begin;
      for (int64_t j = 0; j < g_.image(); ++j, pixel += g_.c_in) Zero(pixel, channels.size());
      const TileGrid tiles = Tiles(image);
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        if (together) {
          Visit<kSums | kGradX>(tiles[tile], channels, scratch[worker]);
        } else {
          Visit<kGradX>(tiles[tile], channels, scratch[worker]);
        }
      }
    };
    ParallelFor(workers, of_images + of_tiles, compute);
    return true;
  }

 private:
  // A thread's work space.
  struct Scratch {
    Scratch(const BackwardSums& b, Carver& carver)
        : taps(b.taps_, carver),
          sums(carver.Take<Real[Taps::kPixels][kCorners]>(b.g_.taps())),
          grad_offset(carver.Take<Real>(b.g_.taps() * 2 * kTileRows)),
          grad_mask(carver.Take<Real>(b.g_.taps() * kTileRows)) {}

    typename Taps::Scratch taps;
    Real (*sums)[Taps::kPixels][kCorners];  // of each tap, pixel and corner, over the channels: grad_y * its value
    Real* grad_offset;                      // (taps, 2, kTileRows)
    Real* grad_mask;                        // (taps, kTileRows)
  };

  // How the channels are cut for grad_x: into enough parts to share the work well, of whole deform groups if these
  // suffice. Parts begin at a cache line of floats, as far as possible.
  class Parts {
   public:
    Parts(const Geometry& g, int workers) : c_in_(g.c_in) {
      constexpr int64_t kLine = 16, kTasksEach = 2;
      const int64_t wanted = CeilDiv(kTasksEach * workers, Max<int64_t>(1, g.batch));
      unit_ = g.deform_in() < kLine && kLine % g.deform_in() == 0 ? kLine : g.deform_in();
      whole_groups = CeilDiv(c_in_, unit_) >= wanted;
      if (!whole_groups) unit_ = kLine;
      count = Min(wanted, CeilDiv(c_in_, unit_));
    }

    Range operator[](int64_t i) const {
      const Range units = Range::Piece(CeilDiv(c_in_, unit_), count, i);
      return {units.begin * unit_, Min(c_in_, units.end * unit_)};
    }

    int64_t count;
    bool whole_groups;

   private:
    int64_t c_in_, unit_;
  };

  // Those of an image, whatever the threads share, so that a pixel has the same place in its tile.
  TileGrid Tiles(int64_t image) const { return TileGrid(g_, {image * g_.h_out, (image + 1) * g_.h_out}, kTileRows); }

  // The samples of a tile, of these channels, which are whole deform groups unless only grad_x is wanted.
  template <int kWant>
  void Visit(const Rectangle& rectangle, Range channels, const Scratch& space) const {
    const Tile<Real>& tile = *space.taps.tile;
    FillTile(g_, rectangle, *space.taps.tile);
    for (int64_t c = channels.begin, end = 0; c < channels.end; c = end) {
      const int64_t d = c / g_.deform_in();
      end = Min(channels.end, (d + 1) * g_.deform_in());
      taps_.StartGroup(d, space.taps);
      for (int first = 0; first < tile.pixels; first += Taps::kPixels) {
        const int pixels = taps_.template Locate<kWant>(first, c, x_, grad_x_, space.taps);
        const int64_t* outputs = tile.output + first;
        if constexpr ((kWant & kSums) != 0) {
          SumCorners(outputs, pixels, c, space);
          for (int64_t t = 0; t < g_.taps(); ++t) Finish(t, first, pixels, space);
        }
        if constexpr ((kWant & kGradX) != 0) AddPixels(space.taps.taps, outputs, pixels, c, end - c);
      }
      if constexpr ((kWant & kSums) != 0) {
        StoreGroup(d, space.grad_offset, 2, tile, arrays_.grad_offset);
        StoreGroup(d, space.grad_mask, 1, tile, arrays_.grad_mask);
      }
    }
  }

  // --- offset and mask ---

  // Of so many numbers per tap.
  void StoreGroup(int64_t deform_group, const Real* gradient, int64_t numbers, const Tile<Real>& tile,
                  const Array& to) const {
    const int64_t count = g_.taps() * numbers;
    if (to) {
      StoreChannels(g_, gradient, tile, g_.deform_groups * count, deform_group * count, count, DataFormat::kNHWC, to);
    }
  }

  void SumCorners(const int64_t* outputs, int pixels, int64_t channel, const Scratch& space) const {
    WithVector<Real>(g_.deform_in(), [&](auto v) {
      using V = decltype(v);
      constexpr int lanes = kLanesOf<V, Real>;
      if (g_.deform_in() == lanes) return SumCorners<V, 1>(outputs, pixels, channel, space);
      if constexpr (lanes == kLanes<Real>) {
        if (g_.deform_in() == 2 * lanes) return SumCorners<V, 2>(outputs, pixels, channel, space);
        SumCorners<V, 0>(outputs, pixels, channel, space);
      }
    });
  }

  // The channels are kVectors of V, or if that is 0 any number. As many pixels are visited together as make a vector of
  // their corners' sums.
  template <class V, int kVectors>
  JAX_DCN_ONE_COPY void SumCorners(const int64_t* outputs, int pixels, int64_t channel, const Scratch& space) const {
    constexpr int lanes = kLanesOf<V, Real>;
    constexpr int kTogether = Max(1, lanes / kCorners);
    const int64_t taps = g_.taps(), channels = g_.deform_in();
    for (int first = 0; first < pixels; first += kTogether) {
      int at[kTogether];
      const T* grad_y[kTogether];
      V grad[kTogether][Max(1, kVectors)];
      JAX_DCN_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        at[i] = Min(first + i, pixels - 1);
        grad_y[i] = grad_y_ + outputs[at[i]] * g_.c_in + channel;
        JAX_DCN_UNROLL
        for (int v = 0; v < kVectors; ++v) grad[i][v] = LoadAs<V>(grad_y[i] + v * lanes);
      }
      for (int64_t t = 0; t < taps; ++t) {
        V sum[kTogether * kCorners];
        JAX_DCN_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const T* corner[kCorners];
          JAX_DCN_UNROLL
          for (int k = 0; k < kCorners; ++k) {
            corner[k] = reinterpret_cast<const T*>(space.taps.taps[t].corner[k][at[i]]);
          }
          if constexpr (kVectors > 0) {
            JAX_DCN_UNROLL
            for (int k = 0; k < kCorners; ++k) {
              V& own = sum[i * kCorners + k];
              own = grad[i][0] * LoadAs<V>(corner[k]);
              JAX_DCN_UNROLL
              for (int v = 1; v < kVectors; ++v) own += grad[i][v] * LoadAs<V>(corner[k] + v * lanes);
            }
          } else {
            JAX_DCN_UNROLL
            for (int k = 0; k < kCorners; ++k) sum[i * kCorners + k] = V{};
            ForVectors<V>(channels, [&](int64_t c, auto load, auto) JAX_DCN_ALWAYS_INLINE {
              const V own = load(grad_y[i] + c);
              JAX_DCN_UNROLL
              for (int k = 0; k < kCorners; ++k) sum[i * kCorners + k] += own * load(corner[k] + c);
            });
          }
        }
        StoreSums(sum, &space.sums[t][first][0]);
      }
    }
  }

  // From the sums to the gradients of a tap's offset, in the order in which it comes, and mask.
  JAX_DCN_ONE_COPY void Finish(int64_t t, int first, int pixels, const Scratch& space) const {
    const typename Taps::Located& tap = space.taps.taps[t];
    const Real(*sums)[kCorners] = space.sums[t];
    const Place<Real> place = space.taps.places[t];
    Real* grad_y = space.grad_offset + (2 * t + (g_.x_first ? 1 : 0)) * kTileRows + first;
    Real* grad_x = space.grad_offset + (2 * t + (g_.x_first ? 0 : 1)) * kTileRows + first;
    Real* grad_mask = space.grad_mask + t * kTileRows + first;
    JAX_DCN_INDEPENDENT
    for (int p = 0; p < pixels; ++p) {
      const Real value[kCorners] = {sums[p][0], sums[p][1], sums[p][2], sums[p][3]};
      // An invalid sample has no gradient, not even where grad_y is infinite.
      const bool valid = tap.valid[p] != 0;
      grad_y[p] = valid ? place.scale_y * (tap.mask[p] * DerivativeY(value, tap.lx[p])) : Real(0);
      grad_x[p] = valid ? place.scale_x * (tap.mask[p] * DerivativeX(value, tap.ly[p])) : Real(0);
      grad_mask[p] = valid ? Interpolate(value, tap.ly[p], tap.lx[p]) : Real(0);
    }
  }

  // --- x ---

  void AddPixels(const typename Taps::Located* taps, const int64_t* outputs, int pixels, int64_t channel,
                 int64_t count) const {
    WithVector<Real>(count, [&](auto v) { AddPixels<decltype(v)>(taps, outputs, pixels, channel, count); });
  }

  template <class V>
  JAX_DCN_ONE_COPY void AddPixels(const typename Taps::Located* taps, const int64_t* outputs, int pixels,
                                  int64_t channel, int64_t channels) const {
    constexpr int lanes = kLanesOf<V, Real>;
    ForBlocks<V, Real, 2>(0, channels, [&](int64_t c, auto count, auto load, auto store) JAX_DCN_ALWAYS_INLINE {
      constexpr int kVectors = count;
      const int64_t all_taps = g_.taps();
      for (int p = 0; p < pixels; ++p) {
        V grad[kVectors];
        JAX_DCN_UNROLL
        for (int v = 0; v < kVectors; ++v) grad[v] = load(grad_y_ + outputs[p] * g_.c_in + channel + c + v * lanes);
        for (int64_t t = 0; t < all_taps; ++t) {
          JAX_DCN_UNROLL
          for (int k = 0; k < kCorners; ++k) {
            Real* corner = reinterpret_cast<Real*>(taps[t].grad_corner[k][p]) + c;
            const V weight = Broadcast<V>(taps[t].weight[k][p]);
            JAX_DCN_UNROLL
            for (int v = 0; v < kVectors; ++v) {
              store(corner + v * lanes, load(corner + v * lanes) + grad[v] * weight);
            }
          }
        }
      }
    });
  }

  const Geometry& g_;
  const BackwardArrays& arrays_;
  const T* x_;
  const T* grad_y_;
  Real* grad_x_;
  const Taps taps_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
