// Weights as their formats lay them out, and packed for products of matrices.

#pragma once

#include "../geometry.h"
#include "../operands.h"
#include "gemm.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// The weight as its format lays it out, for one weight group.
template <class T>
struct WeightView {
  const T* data;
  int64_t tap, channel, out;  // strides

  WeightView(const Geometry& g, DataFormat format, const Array& weight, int64_t group) {
    const bool nhwc = format == DataFormat::kNHWC;
    tap = nhwc ? g.group_in() * g.c_out : 1;
    channel = nhwc ? g.c_out : g.taps();
    out = nhwc ? 1 : g.group_in() * g.taps();
    data = static_cast<const T*>(weight.data) + group * g.group_out() * out;
  }
};

// The matrix of `taps` and `channels` (rows) by `outs` (columns), packed as the panels that hold those columns.
template <class T, class Operand>
void PackWeight(const WeightView<T>& weight, Range taps, Range channels, Range outs, int64_t width, Operand* packed) {
  constexpr int step = Step<Operand>::kDepth;
  const int64_t depth = taps.size() * channels.size();
  if (weight.out == 1) {
    for (int64_t t = taps.begin; t < taps.end; ++t) {
      PackRows<step>(weight.data + t * weight.tap + channels.begin * weight.channel + outs.begin, weight.channel,
                     channels.size(), outs.size(), width, depth, (t - taps.begin) * channels.size(), packed);
    }
    return;
  }
  // All taps of a few channels lie together, output channel by output channel.
  constexpr int64_t kChannels = 16;
  for (int64_t o = outs.begin; o < outs.end; o += width, packed += depth * width) {
    const int64_t valid = Min(width, outs.end - o);
    if (valid < width) std::memset(packed, 0, depth * width * sizeof(Operand));
    for (int64_t c0 = channels.begin; c0 < channels.end; c0 += kChannels) {
      const int64_t c1 = Min(c0 + kChannels, channels.end);
      for (int64_t i = 0; i < valid; ++i) {
        for (int64_t c = c0; c < c1; ++c) {
          const T* from = weight.data + (o + i) * weight.out + c * weight.channel;
          const int64_t row = c - channels.begin;
          Operand* to = packed + row / step * step * width + i * step + row % step;
          for (int64_t t = taps.begin; t < taps.end; ++t, to += channels.size() * width) {
            *to = FromReal<Operand>::Convert(ToReal(from[t]));
          }
        }
      }
    }
  }
}

// The matrix of all output channels (rows) by `channels` of tap `tap` (columns), packed as the columns from `column` on
// of panels of `width`.
template <class T, class Operand>
void PackWeightTransposed(const WeightView<T>& weight, int64_t group_out, int64_t tap, Range channels, int64_t column,
                          int64_t width, Operand* packed) {
  using Real = Accumulation<T>;
  constexpr int step = Step<Operand>::kDepth;
  for (int64_t c = channels.begin; c < channels.end;) {
    const int64_t count = Min(channels.end - c, width - column % width);
    const T* from = weight.data + tap * weight.tap + c * weight.channel;
    Operand* to = packed + column / width * group_out * width + column % width * step;
    if (weight.out != 1) {
      for (int64_t o = 0; o < group_out; ++o) {
        Operand* row = to + o / step * step * width + o % step;
        for (int64_t i = 0; i < count; ++i) {
          row[i * step] = FromReal<Operand>::Convert(ToReal(from[o * weight.out + i * weight.channel]));
        }
      }
    } else if constexpr (step == 2) {
      // Two output channels lie together as a pair does, in the size of a float.
      Transpose<float>(reinterpret_cast<const float*>(from), weight.channel / 2, count, group_out / 2,
                       reinterpret_cast<float*>(to), width);
    } else {
      Transpose<Real>(from, weight.channel, count, group_out, to, width);
    }
    c += count;
    column += count;
  }
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
