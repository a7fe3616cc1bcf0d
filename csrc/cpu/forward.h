// The forward kernel.
//
// Threads share the tiles of output pixels. Of each tile a block of (channels x taps) is sampled into a work space
// that stays in the L2 cache and multiplied with the packed weight, block after block, into sums of
// (pixels x c_out), which are rounded and stored at the end.

#pragma once

#include "sampler.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class T>
class Forward {
 public:
  using Real = Accumulation<T>;

  Forward(const Geometry& g, const ForwardArrays& arrays)
      : g_(g),
        arrays_(arrays),
        slices_(g, kSliceChannels, kLanes<Real>),
        tap_blocks_(TapBlocks(g, slices_.max_channels())),
        padded_out_(PackedSize<Real>(1, g.group_out())),
        sampler_(g, arrays.x, arrays.offset, arrays.mask, slices_) {}

  bool Run(Workers& workers) const {
    if (g_.pixels() == 0) return true;
    const Memory packed(g_.c_in * g_.taps() * padded_out_ * static_cast<int64_t>(sizeof(Real)));
    Carver counter;
    Scratch(*this, counter);
    const Memory scratch(counter.used() * workers.count());
    if (!packed || !scratch) return false;
    Real* weights = reinterpret_cast<Real*>(packed.data());

    const auto pack = [&](int, int64_t i) { PackBlock(slices_[i / tap_blocks_], TapBlock(i % tap_blocks_), weights); };
    ParallelFor(workers, slices_.count() * tap_blocks_, pack);

    const int64_t tiles = TileCount();
    const auto compute = [&](int worker, int64_t i) {
      Carver carver(scratch.data() + worker * counter.used());
      ComputeTile(Range::Piece(g_.pixels(), tiles, i), weights, Scratch(*this, carver));
    };
    ParallelFor(workers, tiles, compute);
    return true;
  }

 private:
  // At most kMaxDepth; with 128 channels three taps make a block of it.
  static constexpr int64_t kSliceChannels = 128;

  // A thread's work space.
  struct Scratch {
    Scratch(const Forward& f, Carver& carver)
        : sampler(f.sampler_, carver),
          samples(carver.Take<Real>(kTileRows * kMaxDepth)),
          sums(carver.Take<Real>(kTileRows * f.g_.c_out)) {}

    typename Sampler<T>::Scratch sampler;
    Real* samples;  // (pixels, taps of a block, channels of a slice)
    Real* sums;     // (pixels, c_out)
  };

  Range TapBlock(int64_t i) const { return Range::Piece(g_.taps(), tap_blocks_, i); }

  // Full tiles, unless eight threads would share fewer than eight of them and smaller ones are worth a thread each.
  int64_t TileCount() const {
    const int64_t pixel_flops = 2 * g_.taps() * g_.group_in() * g_.c_out;
    const int64_t least = Max<int64_t>(2 * kMaxRows, CeilDiv(kTaskFlops, pixel_flops));
    return Max(CeilDiv(g_.pixels(), kTileRows), Min<int64_t>(8, g_.pixels() / least));
  }

  // The packed weights are (slice, block of taps, group of the slice), each packed by itself.
  int64_t PackedAt(const Slice& slice, Range taps, int64_t group) const {
    return (slice.begin * g_.taps() + slice.channels() * taps.begin + group * slice.group_channels * taps.size()) *
           padded_out_;
  }

  void PackBlock(const Slice& slice, Range taps, Real* weights) const {
    const T* weight = static_cast<const T*>(arrays_.weight.data);
    for (int64_t group = 0; group < slice.groups; ++group) {
      const int64_t depth = taps.size() * slice.group_channels;
      Real* packed = weights + PackedAt(slice, taps, group);
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const T* rows =
            weight + (t * g_.group_in() + slice.group_begin) * g_.c_out + (slice.first_group + group) * g_.group_out();
        PackRows(rows, g_.c_out, slice.group_channels, g_.group_out(), depth, (t - taps.begin) * slice.group_channels,
                 packed);
      }
    }
  }

  void ComputeTile(Range pixels, const Real* weights, const Scratch& space) const {
    sampler_.StartTile(pixels, space.sampler);
    for (int64_t i = 0; i < slices_.count(); ++i) {
      const Slice slice = slices_[i];
      sampler_.StartSlice(slice, space.sampler);
      for (int64_t block = 0; block < tap_blocks_; ++block) {
        const Range taps = TapBlock(block);
        sampler_.template VisitBlock<true, false, false>(slice, taps, space.sampler, space.samples, nullptr, nullptr,
                                                         [](auto&&...) {});
        for (int64_t group = 0; group < slice.groups; ++group) {
          Left<Real> samples;
          samples.data = space.samples + group * slice.group_channels;
          samples.stride = taps.size() * slice.channels();
          samples.run = slice.group_channels;
          samples.run_stride = slice.channels();
          Multiply<false>(samples, pixels.size(), taps.size() * slice.group_channels,
                          weights + PackedAt(slice, taps, group), g_.group_out(),
                          space.sums + (slice.first_group + group) * g_.group_out(), g_.c_out,
                          slice.group_begin > 0 || block > 0);
        }
      }
    }
    StoreTile(pixels, space.sums);
  }

  void StoreTile(Range pixels, const Real* sums) const {
    const T* bias = static_cast<const T*>(arrays_.bias.data);
    T* y = static_cast<T*>(arrays_.y.data) + pixels.begin * g_.c_out;
    const int64_t whole = g_.c_out / kLanes<Real> * kLanes<Real>;
    const int rest = static_cast<int>(g_.c_out - whole);
    for (int64_t p = 0; p < pixels.size(); ++p, sums += g_.c_out, y += g_.c_out) {
      for (int64_t c = 0; c < whole; c += kLanes<Real>) {
        Store(y + c, bias == nullptr ? Load(sums + c) : Load(sums + c) + Load(bias + c));
      }
      if (rest != 0) {
        const Vector<Real> sum = LoadPart(sums + whole, rest);
        StorePart(y + whole, bias == nullptr ? sum : sum + LoadPart(bias + whole, rest), rest);
      }
    }
  }

  const Geometry& g_;
  const ForwardArrays& arrays_;
  const Slices slices_;
  const int64_t tap_blocks_;
  const int64_t padded_out_;  // columns of a group's packed weight
  const Sampler<T> sampler_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
