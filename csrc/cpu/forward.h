// The forward kernel.
//
// Threads share the tiles of output pixels. Of each tile a block of (channels x taps) is sampled into a work space
// that stays in the L2 cache and multiplied with the packed weight, block after block, into sums of
// (pixels x c_out), which are rounded and stored at the end. Where there are fewer tiles than threads, several threads
// sample the same tile, each for a part of the output channels. Products is a class of products.h.

#pragma once

#include "arrays.h"
#include "sampler.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class Products>
class Forward {
 public:
  using T = typename Products::Element;
  using Operand = typename Products::Operand;
  using Real = Accumulation<T>;

  Forward(const Geometry& g, const ForwardArrays& arrays)
      : g_(g),
        arrays_(arrays),
        nchw_(arrays.format == DataFormat::kNCHW),
        slices_(g, SliceChannels(g), kLanes<Real>),
        tap_blocks_(g, slices_.max_channels()),
        tiles_(g, {0, g.batch * g.h_out}, TilePixels()),
        sampler_(g, arrays.format, arrays.offset, arrays.mask, slices_),
        products_(g, arrays.format, arrays.weight, slices_, tap_blocks_) {}

  bool Run(Workers& workers) const {
    if (g_.pixels() == 0) return true;
    const WorkSpace<Shared, Forward> shared_space(*this, 1);
    const WorkSpace<Scratch, Forward> scratch(*this, workers.count());
    if (!shared_space || !scratch) return false;
    const Shared shared = shared_space[0];

    products_.PackForwardWeight(workers, shared.weight);
    if (nchw_) TransposeImages(workers, g_.batch, g_.c_in, g_.image(), static_cast<const T*>(arrays_.x.data), shared.x);

    const int64_t parts = Min(CeilDiv(workers.count(), tiles_.count()), products_.out_parts());
    const auto compute = [&](int worker, int64_t i) {
      ComputeTile(tiles_[i / parts], products_.Outs(parts, i % parts), shared, scratch[worker]);
    };
    ParallelFor(workers, tiles_.count() * parts, compute);
    return true;
  }

 private:
  // Deform groups with few channels are sampled with all taps in a row, which read the same pixels. Otherwise many
  // channels share an address: 128, of which three taps make a block of kMaxDepth.
  static int64_t SliceChannels(const Geometry& g) {
    return g.deform_in() * g.taps() <= kMaxDepth ? kMaxDepth / g.taps() : 128;
  }
  // How many tasks to aim at with smaller tiles.
  static constexpr int64_t kTasks = 8;
  // The least work that is worth a task of its own: some 5 microseconds, ten times what handing it over takes.
  static constexpr int64_t kTaskFlops = 200000;

  // Memory that all threads see. In NCHW x is worked on in NHWC.
  struct Shared {
    Shared(const Forward& f, Carver& carver)
        : x(carver.Take<T>(f.nchw_ ? f.g_.batch * f.g_.image() * f.g_.c_in : 0)),
          weight(carver.Take<Operand>(f.products_.ForwardWeightSize())) {
      if (!f.nchw_) x = static_cast<T*>(f.arrays_.x.data);
    }

    T* x;
    Operand* weight;  // packed
  };

  // A thread's work space.
  struct Scratch {
    Scratch(const Forward& f, Carver& carver)
        : sampler(f.sampler_, carver),
          samples(carver.Take<Operand>(f.tiles_.max_pixels() * f.tap_blocks_.max_taps() * f.slices_.max_channels())),
          sums(carver.Take<Real>(f.tiles_.max_pixels() * f.g_.c_out)) {}

    typename Sampler<T>::Scratch sampler;
    Operand* samples;  // (pixels, taps of a block, channels of a slice)
    Real* sums;        // (pixels, c_out)
  };

  // The most pixels of a tile: full tiles, unless kTasks threads would share fewer than kTasks of them and smaller ones
  // are worth a thread each (as far as whole rows of pixels allow).
  int64_t TilePixels() const {
    const int64_t pixel_flops = 2 * g_.taps() * g_.group_in() * g_.c_out;
    const int64_t least = Max<int64_t>(2 * kMaxRows, CeilDiv(kTaskFlops, pixel_flops));
    return Min<int64_t>(kTileRows, Max(least, CeilDiv(g_.pixels(), kTasks)));
  }

  // Computes the output channels `outs`.
  void ComputeTile(const Rectangle& rectangle, Range outs, const Shared& shared, const Scratch& space) const {
    sampler_.StartTile(rectangle, space.sampler);
    Visited<T, Operand> visited;
    visited.x = shared.x;
    visited.samples = space.samples;
    for (int64_t i = 0; i < slices_.count(); ++i) {
      const Slice slice = slices_[i];
      const Range of_slice{slice.first_group * g_.group_out(), (slice.first_group + slice.groups) * g_.group_out()};
      if (of_slice.end <= outs.begin || outs.end <= of_slice.begin) continue;
      sampler_.StartSlice(slice, space.sampler);
      for (int64_t block = 0; block < tap_blocks_.count(); ++block) {
        sampler_.Visit(slice, tap_blocks_[block], visited, space.sampler);
        products_.Output(slice, block, outs, space.sampler.tile->pixels, space.samples, shared.weight, space.sums);
      }
    }
    StoreTile(*space.sampler.tile, outs, space.sums);
  }

  void StoreTile(const Tile<Real>& tile, Range channels, Real* sums) const {
    if (arrays_.bias) {
      const T* bias = static_cast<const T*>(arrays_.bias.data);
      for (int p = 0; p < tile.pixels; ++p) {
        for (int64_t c = channels.begin; c < channels.end; ++c) sums[p * g_.c_out + c] += ToReal(bias[c]);
      }
    }
    sums += channels.begin;
    for (int row = 0; row < tile.height; ++row, sums += tile.width * g_.c_out) {
      T* y = RowStart(g_, static_cast<T*>(arrays_.y.data), tile, row, g_.c_out, arrays_.format);
      if (!nchw_) {
        for (int p = 0; p < tile.width; ++p) {
          CopyRow<Real>(sums + p * g_.c_out, static_cast<int>(channels.size()), y + p * g_.c_out + channels.begin);
        }
      } else {
        Transpose<Real>(sums, g_.c_out, tile.width, channels.size(), y + channels.begin * g_.image_out(),
                        g_.image_out());
      }
    }
  }

  const Geometry& g_;
  const ForwardArrays& arrays_;
  const bool nchw_;
  const Slices slices_;
  const TapBlocks tap_blocks_;
  const TileGrid tiles_;
  const Sampler<T> sampler_;
  const Products products_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
