// The forward kernel.
//
// Threads share the tiles of output pixels. Of each tile a block of (channels x taps) is sampled into a work space
// that stays in the L2 cache and multiplied with the packed weight, block after block, into sums of
// (pixels x c_out), which are rounded and stored at the end. Where there are fewer tiles than threads, several threads
// sample the same tile, each for a part of the output channels. Depthwise convolutions multiply channel by channel.

#pragma once

#include "arrays.h"
#include "sampler.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// Samples and weights are multiplied as of type Operand: that of the sums, or bfloat16 where the processor multiplies
// that in pairs, which rounds the samples.
template <class T, class Operand>
class Forward {
 public:
  using Real = Accumulation<T>;

  Forward(const Geometry& g, const ForwardArrays& arrays)
      : g_(g),
        arrays_(arrays),
        nchw_(arrays.format == DataFormat::kNCHW),
        slices_(g, SliceChannels(g), kLanes<Real>),
        tap_blocks_(g, slices_.max_channels()),
        width_(PanelWidth<Real>(g.group_out())),
        panels_(CeilDiv(g.group_out(), width_)),
        tiles_(g, {0, g.batch * g.h_out}, TilePixels()),
        sampler_(g, arrays.format, arrays.offset, arrays.mask, slices_) {}

  bool Run(Workers& workers) const {
    if (g_.pixels() == 0) return true;
    const WorkSpace<Shared, Forward> shared_space(*this, 1);
    const WorkSpace<Scratch, Forward> scratch(*this, workers.count());
    if (!shared_space || !scratch) return false;
    const Shared shared = shared_space[0];

    const auto pack = [&](int, int64_t i) { PackPanel(slices_[i / panels_], i % panels_, shared.weight); };
    if (g_.depthwise()) {
      PackDepthwise<T>(g_, arrays_.format, arrays_.weight, shared.weight);
    } else {
      ParallelFor(workers, slices_.count() * panels_, pack);
    }
    if (nchw_) TransposeImages(workers, g_.batch, g_.c_in, g_.image(), static_cast<const T*>(arrays_.x.data), shared.x);

    const int64_t parts = Min(CeilDiv(workers.count(), tiles_.count()), g_.groups * panels_);
    const auto compute = [&](int worker, int64_t i) {
      ComputeTile(tiles_[i / parts], Range::Piece(g_.groups * panels_, parts, i % parts), shared, scratch[worker]);
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

  // Memory that all threads see. In NCHW x is worked on in NHWC.
  struct Shared {
    Shared(const Forward& f, Carver& carver)
        : x(carver.Take<T>(f.nchw_ ? f.g_.batch * f.g_.image() * f.g_.c_in : 0)),
          weight(carver.Take<Operand>(f.g_.c_in * f.g_.taps() * (f.g_.depthwise() ? 1 : f.panels_ * f.width_))) {
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

  // The packed weights are (slice, block of taps, group of the slice, panel), of a depthwise convolution
  // (taps, channels).
  int64_t PackedAt(const Slice& slice, Range taps, int64_t group) const {
    return (slice.begin * g_.taps() + slice.channels() * taps.begin + group * slice.group_channels * taps.size()) *
           panels_ * width_;
  }

  void PackPanel(const Slice& slice, int64_t panel, Operand* weights) const {
    const Range outs{panel * width_, Min((panel + 1) * width_, g_.group_out())};
    const Range channels{slice.group_begin, slice.group_begin + slice.group_channels};
    for (int64_t group = 0; group < slice.groups; ++group) {
      const WeightView<T> weight(g_, arrays_.format, arrays_.weight, slice.first_group + group);
      for (int64_t block = 0; block < tap_blocks_.count(); ++block) {
        const Range taps = tap_blocks_[block];
        PackWeight(weight, taps, channels, outs, width_,
                   weights + PackedAt(slice, taps, group) + panel * taps.size() * slice.group_channels * width_);
      }
    }
  }

  // Computes the output channels of `panels`, which are counted through all groups.
  void ComputeTile(const Rectangle& rectangle, Range panels, const Shared& shared, const Scratch& space) const {
    sampler_.StartTile(rectangle, space.sampler);
    const int64_t pixels = space.sampler.tile->pixels;
    Visited<T, Operand> visited;
    visited.x = shared.x;
    visited.samples = space.samples;
    for (int64_t i = 0; i < slices_.count(); ++i) {
      const Slice slice = slices_[i];
      const Range groups{Max(slice.first_group, panels.begin / panels_),
                         Min(slice.first_group + slice.groups, CeilDiv(panels.end, panels_))};
      if (groups.size() <= 0) continue;
      sampler_.StartSlice(slice, space.sampler);
      for (int64_t block = 0; block < tap_blocks_.count(); ++block) {
        const Range taps = tap_blocks_[block];
        sampler_.Visit(slice, taps, visited, space.sampler);
        if (g_.depthwise()) {
          MultiplyDepthwise(slice, taps, pixels, shared.weight, space);
          continue;
        }
        for (int64_t group = groups.begin; group < groups.end; ++group) {
          const int64_t in_slice = group - slice.first_group;
          const Range own{Max<int64_t>(0, panels.begin - group * panels_), Min(panels_, panels.end - group * panels_)};
          const int64_t first = own.begin * width_;
          const int64_t depth = taps.size() * slice.group_channels;
          Left<Operand> samples;
          samples.data = space.samples + in_slice * slice.group_channels;
          samples.stride = taps.size() * slice.channels();
          samples.run = slice.group_channels;
          samples.run_stride = slice.channels();
          Multiply<false>(samples, pixels, depth, shared.weight + PackedAt(slice, taps, in_slice) + first * depth,
                          width_, Min(own.end * width_, g_.group_out()) - first,
                          space.sums + group * g_.group_out() + first, g_.c_out, slice.group_begin > 0 || block > 0);
        }
      }
    }
    StoreTile(*space.sampler.tile, {FirstChannel(panels.begin), FirstChannel(panels.end)}, space.sums);
  }

  // sums (+)= samples * weight, channel by channel
  void MultiplyDepthwise(const Slice& slice, Range taps, int64_t pixels, const Operand* weights,
                         const Scratch& space) const {
    const Operand* samples = space.samples;
    for (int64_t p = 0; p < pixels; ++p, samples += taps.size() * slice.channels()) {
      Real* sums = space.sums + p * g_.c_out + slice.begin;
      ForVectors<Vector<Real>>(slice.channels(), [&](int64_t c, auto load, auto store) {
        Vector<Real> sum = taps.begin == 0 ? Vector<Real>{} : load(sums + c);
        for (int64_t t = taps.begin; t < taps.end; ++t) {
          sum +=
              load(samples + (t - taps.begin) * slice.channels() + c) * load(weights + t * g_.c_out + slice.begin + c);
        }
        store(sums + c, sum);
      });
    }
  }

  // The first output channel of a panel.
  int64_t FirstChannel(int64_t panel) const { return panel / panels_ * g_.group_out() + panel % panels_ * width_; }

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
  const int64_t width_, panels_;  // of a group's packed weight
  const TileGrid tiles_;
  const Sampler<T> sampler_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
