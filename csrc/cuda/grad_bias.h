// The kernel of the gradient of the bias: sums of parts of grad_y.

#pragma once

#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

inline constexpr int kBiasColumns = 32;
inline constexpr int kBiasPixels = 512;  // of a block

// A block sums a tile of columns of a part of grad_y, eight rows at a time.
template <class T>
JAX_DCN_GLOBAL void GradBiasKernel(int64_t pixels, int c_out, const T* grad_y, Accumulation<T>* sums) {
  using Real = Accumulation<T>;
  constexpr int kThreadRows = kThreads / kBiasColumns;
  const Shared<Real> shared = SharedMemory<Real>(0);
  const int tiles = static_cast<int>(CeilDiv(c_out, kBiasColumns));
  const int part = BlockIndex().x / tiles;
  const int column = BlockIndex().x % tiles * kBiasColumns + ThreadIndex() % kBiasColumns;
  const int row = ThreadIndex() / kBiasColumns;
  const int64_t first = int64_t{part} * kBiasPixels;
  Real sum = 0;
  if (column < c_out) {
    for (int64_t i = first + row; i < first + kBiasPixels && i < pixels; i += kThreadRows) {
      sum += ToReal(grad_y[i * c_out + column]);
    }
  }
  shared[ThreadIndex()] = sum;
  SyncThreads();
  if (row == 0 && column < c_out) {
    for (int i = 1; i < kThreadRows; ++i) sum += shared[i * kBiasColumns + ThreadIndex()];
    sums[int64_t{part} * c_out + column] = sum;
  }
}

}  // namespace cuda
}  // namespace jax_dcn
