// Located samples in shared memory.

#pragma once

#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// kCount of them.
template <class Real, int kCount = kRows>
class LocatedSamples {
 public:
  static constexpr int kWeightVectors = kCorners * sizeof(Real) / sizeof(Vector16);
  static constexpr int kBytes = kCount * (int{sizeof(int64_t)} + kWeightVectors * int{sizeof(Vector16)});
  static constexpr int kFlags = kCorners + 1;

  // From a byte of shared memory on.
  JAX_DCN_DEVICE explicit LocatedSamples(int byte)
      : corner_(SharedMemory<int64_t>(byte)), weight_(SharedMemory<Vector16>(byte + kCount * int{sizeof(int64_t)})) {}

  // `image` is the pixel of x where the sample's image begins.
  JAX_DCN_DEVICE void Set(int row, const Problem& p, int64_t image, const Sample<Real>& sample, Real mask) {
    int64_t corner = (image + sample.index) * p.c_in * (1 << kFlags);
    if (sample.valid) corner |= 1 << kCorners;
    Real weight[kCorners];
    for (int k = 0; k < kCorners; ++k) {
      if (sample.inside[k]) corner |= 1 << k;
      weight[k] = sample.inside[k] ? sample.weight[k] * mask : Real(0);
    }
    corner_[row] = corner;
    for (int v = 0; v < kWeightVectors; ++v) {
      Real part[kVector<Real>];
      for (int i = 0; i < kVector<Real>; ++i) part[i] = weight[v * kVector<Real> + i];
      weight_[v * kCount + row] = Pack<Real, Real>(part);
    }
  }

  // Where in x channel 0 of corner 0 is, and in the kFlags lowest bits what Inside and Valid tell.
  JAX_DCN_DEVICE int64_t corner(int row) const { return corner_[row]; }
  static JAX_DCN_DEVICE bool Inside(int64_t corner, int k) { return (corner >> k & 1) != 0; }
  static JAX_DCN_DEVICE bool Valid(int64_t corner) { return (corner >> kCorners & 1) != 0; }

  // The weights of the corners, times the mask; outside the image 0.
  JAX_DCN_DEVICE void Weights(int row, Real (&weight)[kCorners]) const {
    for (int v = 0; v < kWeightVectors; ++v) {
      Real part[kVector<Real>];
      Unpack<Real>(weight_[v * kCount + row], part);
      for (int i = 0; i < kVector<Real>; ++i) weight[v * kVector<Real> + i] = part[i];
    }
  }

 private:
  Shared<int64_t> corner_;
  Shared<Vector16> weight_;
};

}  // namespace cuda
}  // namespace jax_dcn
