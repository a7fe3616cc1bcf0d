// The arithmetic of sampling on which the kernels of all platforms must agree: which samples count, their four
// corners, weights and derivatives. The definition is that of mmcv's deformable convolution.
//
// The CPU kernels are compiled once per instruction set; JAX_DCN_TARGET names the namespace of each copy, so that
// the linker never takes one instruction set's copy of an inline function for another's. On CUDA it is `cuda`.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_DCN_INLINE __host__ __device__ __forceinline__
#else
#define JAX_DCN_INLINE inline __attribute__((always_inline))
#endif

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// Where a tap samples, and which image: at (y, x) from its pixel's own place on, plus its offset times the scale. The
// image begins at a pixel of x.
template <class Real>
struct Place {
  Real y, x;
  Real scale_y, scale_x;
  int32_t height, width, first;
};

// Sizes are those of a convolution, of any integers.
template <class Real, class Sizes>
JAX_DCN_INLINE Place<Real> PlaceOf(const Sizes& g, int tap) {
  const auto& levels = g.levels;
  if (levels.count == 0) {
    const int kh = static_cast<int>(g.kernel_h), kw = static_cast<int>(g.kernel_w);
    const int row = g.x_first ? tap % kh : tap / kw;
    const int column = g.x_first ? tap / kh : tap % kw;
    return {static_cast<Real>(row * g.dilation_h),
            static_cast<Real>(column * g.dilation_w),
            Real(1),
            Real(1),
            static_cast<int32_t>(g.height),
            static_cast<int32_t>(g.width),
            0};
  }
  // The fractions 0 and 1 are the borders of the image, half a pixel outside the middles of its first and last one.
  const int level = tap / (static_cast<int>(g.kernel_h * g.kernel_w) / levels.count);
  const int32_t height = levels.height[level], width = levels.width[level];
  return {Real(-0.5), Real(-0.5), static_cast<Real>(height), static_cast<Real>(width),
          height,     width,      levels.first[level]};
}

// The corners in the order of all arrays of four: (y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1).
inline constexpr int kCorners = 4;

template <class Real>
struct Sample {
  Real ly, lx;            // distance from corner 0, in [0, 1)
  Real weight[kCorners];  // bilinear
  int32_t index;          // of corner 0 in the image, inside or not; the others are 1, width and width + 1 further
  bool inside[kCorners];
  bool valid;  // an invalid sample is 0, with all corners outside
};

// The sample at (y, x) of an image of `height` by `width`. The range test stands before the conversion to integer,
// and is false for NaN, so that no coordinate can make an address.
template <class Real>
JAX_DCN_INLINE Sample<Real> Locate(Real y, Real x, int32_t height, int32_t width) {
  Sample<Real> s;
  s.valid = (y > Real(-1)) & (x > Real(-1)) & (y < static_cast<Real>(height)) & (x < static_cast<Real>(width));
  y = s.valid ? y : Real(0);
  x = s.valid ? x : Real(0);
  // Floor by truncation: the conversion vectorises on every instruction set, floor() does not.
  int32_t y0 = static_cast<int32_t>(y);
  int32_t x0 = static_cast<int32_t>(x);
  y0 -= static_cast<Real>(y0) > y;
  x0 -= static_cast<Real>(x0) > x;
  s.ly = y - static_cast<Real>(y0);
  s.lx = x - static_cast<Real>(x0);
  const Real hy = Real(1) - s.ly;
  const Real hx = Real(1) - s.lx;
  s.weight[0] = hy * hx;
  s.weight[1] = hy * s.lx;
  s.weight[2] = s.ly * hx;
  s.weight[3] = s.ly * s.lx;
  const bool top = s.valid & (y0 >= 0);
  const bool bottom = s.valid & (y0 < height - 1);
  const bool left = x0 >= 0;
  const bool right = x0 < width - 1;
  s.index = y0 * width + x0;
  s.inside[0] = top & left;
  s.inside[1] = top & right;
  s.inside[2] = bottom & left;
  s.inside[3] = bottom & right;
  return s;
}

// The sample of a tap of an output pixel, which samples at (y, x) with tap (0, 0) and no offset.
template <class Real>
JAX_DCN_INLINE Sample<Real> Locate(const Place<Real>& place, Real y, Real x, Real dy, Real dx) {
  // The sum of the first two is exact, a whole number, or -1/2 in levels.
  return Locate((y + place.y) + dy * place.scale_y, (x + place.x) + dx * place.scale_x, place.height, place.width);
}

// The interpolation of the corner values.
template <class Real>
JAX_DCN_INLINE Real Interpolate(const Real value[kCorners], Real ly, Real lx) {
  return (value[0] * (Real(1) - lx) + value[1] * lx) * (Real(1) - ly) +
         (value[2] * (Real(1) - lx) + value[3] * lx) * ly;
}

// The derivatives of the interpolation with respect to y and x, given the corner values, or any linear function of
// them. On lattice points they are the right-hand ones.
template <class Real>
JAX_DCN_INLINE Real DerivativeY(const Real value[kCorners], Real lx) {
  return (value[2] - value[0]) * (Real(1) - lx) + (value[3] - value[1]) * lx;
}

template <class Real>
JAX_DCN_INLINE Real DerivativeX(const Real value[kCorners], Real ly) {
  return (value[1] - value[0]) * (Real(1) - ly) + (value[3] - value[2]) * ly;
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
