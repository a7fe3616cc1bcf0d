// Kernels for weight groups so small that a product of theirs would be mostly padding: depthwise convolutions, for one.
//
// A block takes 32 pixels and as many groups as make up to 64 channels, samples these channels tap by tap into shared
// memory, by vectors that pay no heed to where a group ends, and multiplies there what belongs together, without tensor
// cores and without rounding. Samples and groups meet in shared memory only, so that a number that is not finite stays
// in its group.
//
// To the rest of the code such a convolution is one of a single group: Problem and ChannelPart see it as that.

#pragma once

#include "parts.h"
#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// Of a block.
inline constexpr int kTilePixels = 32;
inline constexpr int kTileChannels = 64;

inline constexpr int kTileThreads = kThreads / kTilePixels;    // that share a pixel
inline constexpr int kOutputs = kTileChannels / kTileThreads;  // of a thread: every kTileThreads-th from its own on

// The largest group whose kernels these are: below it the other kernels would pad its channels, if they take tensor
// cores, or compute four columns and more for each of its output channels. Every tile has the outputs of a group.
template <class A>
bool IsSmallGroup(const Geometry& g) {
  constexpr int kMost = 16;
  static_assert(kMost <= kTileChannels);
  return g.group_in() <= (A::kPlain ? kMost : kVector<typename A::T> - 1) && g.group_out() <= kMost;
}

// Groups, and how blocks share them.
struct SmallGroups {
  int group_in, group_out;
  int groups, tile_groups;

  explicit SmallGroups(const Geometry& g)
      : group_in(static_cast<int>(g.group_in())),
        group_out(static_cast<int>(g.group_out())),
        groups(static_cast<int>(g.groups)),
        tile_groups(kTileChannels / (group_in > group_out ? group_in : group_out)) {}

  JAX_DCN_INLINE int c_out() const { return groups * group_out; }
  JAX_DCN_INLINE int tiles() const { return (groups + tile_groups - 1) / tile_groups; }
  // Groups of a tile.
  JAX_DCN_INLINE int Count(int tile) const {
    const int left = groups - tile * tile_groups;
    return left < tile_groups ? left : tile_groups;
  }
  // The position in the weight of an output channel's weight for a tap and an input channel of the group.
  JAX_DCN_INLINE int64_t Weight(int tap, int channel, int out) const {
    return (int64_t{tap} * group_in + channel) * c_out() + out;
  }
};

// Samples of a block in shared memory: (kTilePixels, channels of a tile). There are two such tiles, used in turn, so
// that a barrier after each is enough.
template <class Real>
class SampleTiles {
 public:
  // Threads of four adjacent pixels, eight channels each, access all banks.
  static constexpr int kPitch = kTileChannels + 8;
  static constexpr int kSize = kTilePixels * kPitch;
  static constexpr int kBytes = 2 * kSize * int{sizeof(Real)};

  JAX_DCN_DEVICE SampleTiles() : memory_(SharedMemory<Real>(0)) {}

  // The tile in use: (pixel, channel).
  JAX_DCN_DEVICE Real At(int pixel, int channel) const { return memory_[in_use_ + pixel * kPitch + channel]; }

  // Fills the other one with the samples at a tap of the thread's pixel, from channel `first` on; pixels from `end` on
  // are 0. Ends with a barrier.
  template <class T>
  JAX_DCN_DEVICE void Next(const Problem& p, const Samples<T>& samples, const OutputPixel& pixel, int64_t end, int tap,
                           int first, int count) {
    in_use_ = kSize - in_use_;
    const Shared<Real> to = memory_ + (in_use_ + ThreadIndex() / kTileThreads * kPitch);
    const int last = p.Padded(first + count - 1);
    int vector = p.Padded(first) / kVector<T> + ThreadIndex() % kTileThreads;
    for (; vector * kVector<T> <= last; vector += kTileThreads) {
      const int padded = vector * kVector<T>;
      const int deform_group = padded / p.deform_in;
      Displacement<Real> displacement;
      displacement.Load(p, samples, pixel.index, end, tap, deform_group);
      Corners<T> corners;
      corners.Locate(p, samples, pixel, tap, displacement);
      SampleVector<T> loaded;
      loaded.Load(corners, padded);
      Real values[kVector<T>];
      Interpolate<T>(loaded.corner, loaded.weight, values);
      for (int i = 0; i < kVector<T>; ++i) {
        const int channel = p.Unpadded(padded + i) - first;
        if (channel >= 0 && channel < count) to[channel] = values[i];
      }
    }
    SyncThreads();
  }

 private:
  Shared<Real> memory_;
  int in_use_ = 0;
};

template <class T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 2)
    ForwardSmallGroupsKernel(Problem p, SmallGroups groups, Samples<T> samples, const T* weight, const T* bias, T* y) {
  using Real = Accumulation<T>;
  const int tile = BlockIndex().x % groups.tiles();
  const int row = ThreadIndex() / kTileThreads;
  const int lane = ThreadIndex() % kTileThreads;
  const OutputPixel pixel(p, static_cast<int64_t>(BlockIndex().x / groups.tiles()) * kTilePixels + row);
  const int first_group = tile * groups.tile_groups;
  const int first_out = first_group * groups.group_out;
  const int outputs = groups.Count(tile) * groups.group_out;
  const int channels = groups.Count(tile) * groups.group_in;

  int group_channel[kOutputs];  // the first of each output's group, in the tile
  Real sums[kOutputs] = {};
  for (int i = 0; i < kOutputs; ++i) {
    group_channel[i] = (lane + i * kTileThreads) / groups.group_out * groups.group_in;
  }
  SampleTiles<Real> tiles;
#pragma unroll 1
  for (int tap = 0; tap < p.taps; ++tap) {
    tiles.Next(p, samples, pixel, p.pixels, tap, first_group * groups.group_in, channels);
#pragma unroll 1
    for (int channel = 0; channel < groups.group_in; ++channel) {
      const T* from = weight + groups.Weight(tap, channel, first_out);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        const int out = lane + i * kTileThreads;
        if (out < outputs) sums[i] += tiles.At(row, group_channel[i] + channel) * ToReal(from[out]);
      }
    }
  }
  if (pixel.index >= p.pixels) return;
  for (int i = 0; i < kOutputs; ++i) {
    const int out = lane + i * kTileThreads;
    if (out >= outputs) return;
    if (bias != nullptr) sums[i] += ToReal(bias[first_out + out]);
    FromReal(sums[i], y[pixel.index * groups.c_out() + first_out + out]);
  }
}

// --- the weight's gradient ---

// A block owns the weights of a tile's groups at a tap, and sums a part of the pixels. Where the weights are fewer than
// the threads, several threads share each, with every so many pixels.
template <class T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 2)
    GradWeightSmallGroupsKernel(Problem p, SmallGroups groups, Samples<T> samples, const T* grad_y, PixelParts parts,
                                Accumulation<T>* sums) {
  using Real = Accumulation<T>;
  constexpr int kOwn = 4;      // kTileChannels input channels by 16 output channels are four weights for each thread
  int block = BlockIndex().x;  // blocks of the same pixels run at the same time
  const int tile = block % groups.tiles();
  block /= groups.tiles();
  const int tap = block % p.taps;
  const int part = block / p.taps;
  const int first_group = tile * groups.tile_groups;
  const int first_out = first_group * groups.group_out;
  const int outputs = groups.Count(tile) * groups.group_out;
  const int channels = groups.Count(tile) * groups.group_in;
  const int weights = outputs * groups.group_in;
  const int sharers = weights < kThreads ? kThreads / weights : 1;
  const int own = sharers > 1 ? ThreadIndex() % weights : ThreadIndex();  // the thread's first weight
  const int sharer = sharers > 1 ? ThreadIndex() / weights : 0;

  // Weights side by side are of output channels side by side.
  const auto out_of = [&](int i) { return i % outputs; };
  const auto channel_of = [&](int i) { return i / outputs; };  // in the group
  Real own_sums[kOwn] = {};
  int tile_channel[kOwn];
  for (int i = 0; i < kOwn; ++i) {
    const int at = own + i * kThreads;
    tile_channel[i] = out_of(at) / groups.group_out * groups.group_in + channel_of(at);
  }
  const int64_t first = part * parts.part_pixels;
  const int64_t end = first + parts.part_pixels < p.pixels ? first + parts.part_pixels : p.pixels;
  OutputPixel pixel(p, first + ThreadIndex() / kTileThreads);
  SampleTiles<Real> tiles;
#pragma unroll 1
  for (int64_t at = first; at < end; at += kTilePixels) {
    tiles.Next(p, samples, pixel, end, tap, first_group * groups.group_in, channels);
    const int rows = end - at < kTilePixels ? static_cast<int>(end - at) : kTilePixels;
#pragma unroll 1
    for (int row = sharer; row < rows && sharer < sharers; row += sharers) {
      const T* from = grad_y + (at + row) * groups.c_out() + first_out;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int weight = own + i * kThreads;
        if (weight < weights) own_sums[i] += tiles.At(row, tile_channel[i]) * ToReal(from[out_of(weight)]);
      }
    }
    pixel.Advance(p, kTilePixels);
  }

  Real* to = sums + part * groups.Weight(p.taps, 0, 0);
  if (sharers == 1) {
    for (int i = 0; i < kOwn; ++i) {
      const int weight = own + i * kThreads;
      if (weight < weights) to[groups.Weight(tap, channel_of(weight), first_out + out_of(weight))] = own_sums[i];
    }
    return;
  }
  SyncThreads();
  const Shared<Real> shared = SharedMemory<Real>(0);
  shared[ThreadIndex()] = own_sums[0];
  SyncThreads();
  if (sharer != 0) return;
  for (int other = 1; other < sharers; ++other) own_sums[0] += shared[other * weights + own];
  to[groups.Weight(tap, channel_of(own), first_out + out_of(own))] = own_sums[0];
}

}  // namespace cuda
}  // namespace jax_dcn
