// Arrays set to zero, summed and transposed.

#pragma once

#include "integers.h"
#include "simd.h"
#include "workers.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class Real>
JAX_DCN_SIMD void Zero(Real* array, int64_t count) {
  for (int64_t i = 0; i < count; ++i) array[i] = 0;
}

// out (+)= the sum of `rows` rows, `stride` apart.
template <class Operand>
void SumRows(const Operand* matrix, int64_t stride, int64_t rows, int64_t columns, bool accumulate,
             Accumulation<Operand>* out) {
  using V = Vector<Accumulation<Operand>>;
  ForVectors<V>(columns, [&](int64_t i, auto load, auto store) {
    V sum{};
    for (int64_t row = 0; row < rows; ++row) sum += load(matrix + row * stride + i);
    store(out + i, accumulate ? load(out + i) + sum : sum);
  });
}

// Of `rows` by `columns` elements each: to[n][j][i] = from[n][i][j].
template <class T>
void TransposeImages(Workers& workers, int64_t images, int64_t rows, int64_t columns, const T* from, T* to) {
  constexpr int64_t kBlock = 256;  // 1 KB of a float plane
  const int64_t down = CeilDiv(rows, kBlock);
  const int64_t across = CeilDiv(columns, kBlock);
  const auto transpose = [&](int, int64_t task) {
    const int64_t image = task / (down * across) * rows * columns;
    const Range i_range = Range::Piece(rows, down, task / across % down);
    const Range j_range = Range::Piece(columns, across, task % across);
    const T* source = from + image + i_range.begin * columns + j_range.begin;
    T* target = to + image + j_range.begin * rows + i_range.begin;
    Transpose<Accumulation<T>>(source, columns, i_range.size(), j_range.size(), target, rows);
  };
  ParallelFor(workers, images * down * across, transpose);
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
