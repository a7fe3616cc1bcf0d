// A deformable convolution as the kernels see it.
//
// They read channels in vectors that lie in one weight group and one deform group. Where the channels do not divide so,
// they work on copies in the work space: each run of channels that share both groups is padded with zeros.

#pragma once

#include "../geometry.h"
#include "elements.h"

#include "../sampling.h"  // in the namespace that device.h names

namespace jax_dcn {
namespace cuda {

JAX_DCN_INLINE int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
JAX_DCN_INLINE int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Channels that are read together: at least four, which are what AtomicAdd4 adds to.
template <class T>
inline constexpr int kChannelVector = kVector<T> < 4 ? 4 : kVector<T>;

struct Problem {
  int height, width, h_out, w_out, kernel_w, taps;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups, deform_groups;
  int unit, padded_unit;            // channels of a run, without and with padding
  int c_in, group_in, deform_in;    // padded
  int group_out, padded_group_out;  // of grad_y, whose runs are the groups
  // Blocks take so many groups together, whose input channels are `bundle_in`, and runs of `bundle_unit` of these share
  // a deform group.
  int bundle = 1, bundle_in, bundle_unit;
  int64_t image_out, pixels;

  Problem(const Geometry& g, int vector)
      : height(Int(g.height)),
        width(Int(g.width)),
        h_out(Int(g.h_out)),
        w_out(Int(g.w_out)),
        kernel_w(Int(g.kernel_w)),
        taps(Int(g.taps())),
        stride_h(Int(g.stride_h)),
        stride_w(Int(g.stride_w)),
        padding_h(Int(g.padding_h)),
        padding_w(Int(g.padding_w)),
        dilation_h(Int(g.dilation_h)),
        dilation_w(Int(g.dilation_w)),
        groups(Int(g.groups)),
        deform_groups(Int(g.deform_groups)),
        unit(GreatestCommonDivisor(Int(g.group_in()), Int(g.deform_in()))),
        padded_unit(Int(RoundUp(unit, vector))),
        c_in(Pad(Int(g.c_in))),
        group_in(Pad(Int(g.group_in()))),
        deform_in(Pad(Int(g.deform_in()))),
        group_out(Int(g.group_out())),
        padded_group_out(Int(RoundUp(group_out, vector))),
        bundle_in(group_in),
        bundle_unit(padded_unit),
        image_out(g.image_out()),
        pixels(g.pixels()) {}

  // The channels of a run of so many groups together that shares a deform group.
  int UnitOf(int count) const {
    return deform_groups == 1 ? count * group_in : GreatestCommonDivisor(count * group_in, deform_in);
  }
  // Takes several groups together.
  void Bundle(int count) {
    bundle = count;
    bundle_in = count * group_in;
    bundle_unit = UnitOf(count);
  }
  JAX_DCN_INLINE int bundles() const { return (groups + bundle - 1) / bundle; }
  // Channels of grad_y of a bundle, and of all.
  JAX_DCN_INLINE int bundle_out() const { return bundle * padded_group_out; }
  JAX_DCN_INLINE int c_out() const { return groups * padded_group_out; }

  bool pads_in() const { return unit != padded_unit; }
  bool pads_out() const { return group_out != padded_group_out; }

  // The padded channel that stands for one of the first group, and the inverse: of what is only padding, -1.
  JAX_DCN_INLINE int Padded(int channel) const { return channel / unit * padded_unit + channel % unit; }
  JAX_DCN_INLINE int Unpadded(int channel) const {
    const int in_unit = channel % padded_unit;
    return in_unit < unit ? channel / padded_unit * unit + in_unit : -1;
  }

 private:
  static int Int(int64_t size) { return static_cast<int>(size); }
  static int GreatestCommonDivisor(int a, int b) { return b == 0 ? a : GreatestCommonDivisor(b, a % b); }
  int Pad(int channels) const { return channels / unit * padded_unit; }
};

// Where samples come from.
template <class T>
struct Samples {
  const T* x;  // (images, height, width, c_in), padded
  Array offset, mask;
  const T* zeros;  // one pixel, which stands for all outside the image
};

// An output pixel.
struct OutputPixel {
  int64_t index;  // of all output pixels
  int64_t image;  // index of the first input pixel of its image
  int row, column;

  JAX_DCN_DEVICE OutputPixel(const Problem& p, int64_t i) : index(i) {
    const int64_t image_index = i / p.image_out;
    const int64_t in_image = i - image_index * p.image_out;
    image = image_index * p.height * p.width;
    row = static_cast<int>(in_image / p.w_out);
    column = static_cast<int>(in_image - int64_t{row} * p.w_out);
  }

  // Goes on by a few pixels.
  JAX_DCN_DEVICE void Advance(const Problem& p, int pixels) {
    index += pixels;
    column += pixels;
    while (column >= p.w_out) {
      column -= p.w_out;
      if (++row == p.h_out) {
        row = 0;
        image += int64_t{p.height} * p.width;
      }
    }
  }
};

// The offset and the mask of one sample.
template <class Real>
struct Displacement {
  Real dy, dx, mask;

  // Loads those of a tap of a deform group. Pixels from `end` on and taps that are not there sample far outside.
  template <class T>
  JAX_DCN_DEVICE void Load(const Problem& p, const Samples<T>& samples, int64_t pixel, int64_t end, int tap,
                           int deform_group) {
    dy = dx = Real(-1e30);
    mask = Real(1);
    if (pixel >= end || tap >= p.taps) return;
    const int64_t i = (pixel * p.deform_groups + deform_group) * p.taps + tap;
    dy = LoadElement<Real>(samples.offset, 2 * i);
    dx = LoadElement<Real>(samples.offset, 2 * i + 1);
    if (samples.mask.data != nullptr) mask = LoadElement<Real>(samples.mask, i);
  }

  JAX_DCN_DEVICE Sample<Real> Locate(const Problem& p, const OutputPixel& pixel, int tap) const {
    // The regular part is a whole number, so that the coordinate is rounded once.
    const int i = tap / p.kernel_w;
    const int j = tap - i * p.kernel_w;
    const int y = pixel.row * p.stride_h - p.padding_h + i * p.dilation_h;
    const int x = pixel.column * p.stride_w - p.padding_w + j * p.dilation_w;
    return cuda::Locate(static_cast<Real>(y) + dy, static_cast<Real>(x) + dx, p.height, p.width);
  }
};

// The corners of one sample: addresses of channel 0 and weights.
template <class T>
struct Corners {
  using Real = Accumulation<T>;
  const T* at[kCorners];
  Real weight[kCorners];

  JAX_DCN_DEVICE void Locate(const Problem& p, const Samples<T>& samples, const OutputPixel& pixel, int tap,
                             const Displacement<Real>& displacement) {
    const Sample<Real> s = displacement.Locate(p, pixel, tap);
    const T* corner = samples.x + (pixel.image + s.index) * p.c_in;
    const int64_t row = int64_t{p.width} * p.c_in;
    for (int k = 0; k < kCorners; ++k) {
      // Outside is where zeros are, not only a weight of 0, which would not do for an infinite pixel.
      at[k] = s.inside[k] ? corner + ((k & 1) * p.c_in + (k >> 1) * row) : samples.zeros;
      weight[k] = s.inside[k] ? s.weight[k] * displacement.mask : Real(0);
    }
  }
};

// A vector of channels of a sample, from the corners as loaded.
template <class T>
JAX_DCN_DEVICE void Interpolate(const Vector16 (&corner)[kCorners], const Accumulation<T> (&weight)[kCorners],
                                Accumulation<T> (&sum)[kVector<T>]) {
  for (int k = 0; k < kCorners; ++k) {
    Accumulation<T> value[kVector<T>];
    Unpack<T>(corner[k], value);
    for (int i = 0; i < kVector<T>; ++i) sum[i] = k == 0 ? value[i] * weight[k] : sum[i] + value[i] * weight[k];
  }
}
template <class T, class Tag>
JAX_DCN_DEVICE Vector16 Interpolate(const Vector16 (&corner)[kCorners], const Accumulation<T> (&weight)[kCorners]) {
  Accumulation<T> sum[kVector<T>];
  Interpolate<T>(corner, weight, sum);
  return Pack<T, Tag>(sum);
}

// The corners of a vector of channels of a sample, and their weights.
template <class T>
struct SampleVector {
  using Real = Accumulation<T>;
  Vector16 corner[kCorners];
  Real weight[kCorners];

  JAX_DCN_DEVICE void Load(const Corners<T>& corners, int channel) {
    for (int k = 0; k < kCorners; ++k) {
      corner[k] = LoadGlobal16(corners.at[k] + channel);
      weight[k] = corners.weight[k];
    }
  }
};

}  // namespace cuda
}  // namespace jax_dcn
