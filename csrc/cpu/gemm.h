// Register-blocked multiplication of small tiles: C (rows x columns) (+)= A (rows x depth) * B (depth x columns).
//
// B is packed in panels: panel j holds columns [j*width, (j+1)*width) of all rows of B, row after row, filled up
// with zeros. A is read as it lies, in one of two ways, and by broadcast, so it needs no packing.

#pragma once

#include "simd.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class Real>
inline constexpr int kPanel = 2 * kLanes<Real>;  // columns of a wide panel

// The panel width for a matrix of `columns`: one vector where that is enough, else two.
template <class Real>
JAX_DCN_SIMD int64_t PanelWidth(int64_t columns) {
  return columns <= kLanes<Real> ? kLanes<Real> : kPanel<Real>;
}

JAX_DCN_SIMD int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class Int>
JAX_DCN_SIMD Int Min(Int a, Int b) {
  return a < b ? a : b;
}
template <class Int>
JAX_DCN_SIMD Int Max(Int a, Int b) {
  return a < b ? b : a;
}

// Columns of a packed matrix, with those that fill the last panel.
template <class Real>
JAX_DCN_SIMD int64_t PackedColumns(int64_t columns) {
  const int64_t width = PanelWidth<Real>(columns);
  return CeilDiv(columns, width) * width;
}

template <class Real>
JAX_DCN_SIMD void Zero(Real* array, int64_t count) {
  for (int64_t i = 0; i < count; ++i) array[i] = 0;
}

// Packs `rows` rows, `stride` apart, as the rows from `at` on of a packed matrix of `depth` rows, in panels of `width`.
template <class T>
void PackRows(const T* matrix, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth, int64_t at,
              Accumulation<T>* packed) {
  using Real = Accumulation<T>;
  constexpr int lanes = kLanes<Real>;
  for (int64_t j = 0; j < columns; j += width, packed += depth * width) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t v = 0; v < width; v += lanes) {
        const T* from = matrix + i * stride + j + v;
        const int64_t valid = columns - j - v;
        Real* to = packed + (at + i) * width + v;
        Store(to, valid >= lanes ? Load(from) : valid > 0 ? LoadPart(from, static_cast<int>(valid)) : Vector<Real>{});
      }
    }
  }
}

// How A lies in memory.
template <class Real>
struct Left {
  const Real* data;
  int64_t stride;  // between rows; between depths if transposed
  // The depth is cut into runs of `run`, `run_stride` apart; within a run the elements of a row are adjacent (the
  // depths are `stride` apart if transposed, and then one run is all).
  int64_t run, run_stride;
};

// kRows x kVectors accumulators stay in registers over the whole depth.
template <class Real, int kRows, int kVectors, bool kTransposed>
void Block(const Left<Real>& left, int64_t depth, const Real* b, int64_t b_stride, Real* c, int64_t c_stride,
           int columns, bool accumulate) {
  constexpr int lanes = kLanes<Real>;
  Vector<Real> sum[kRows][kVectors];
  const int last = columns - (kVectors - 1) * lanes;  // valid columns of the last vector
  if (accumulate) {
    JAX_DCN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_DCN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Real* p = c + i * c_stride + v * lanes;
        sum[i][v] = (v + 1 < kVectors || last == lanes) ? Load(p) : LoadPart(p, last);
      }
    }
  } else {
    JAX_DCN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_DCN_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<Real>{};
    }
  }

  const Real* run_start = left.data;
  for (int64_t begin = 0; begin < depth; begin += left.run, run_start += left.run_stride) {
    const int64_t run = Min(left.run, depth - begin);
    // Three rows share a pointer: an address takes a base and one or two strides, and there are too few registers
    // for a pointer each.
    constexpr int kPointers = kTransposed ? 1 : (kRows + 2) / 3;
    const Real* a[kPointers];
    JAX_DCN_UNROLL
    for (int i = 0; i < kPointers; ++i) a[i] = run_start + 3 * i * left.stride;
    for (int64_t k = 0; k < run; ++k) {
      Vector<Real> right[kVectors];
      JAX_DCN_UNROLL
      for (int v = 0; v < kVectors; ++v) right[v] = Load(b + v * lanes);
      JAX_DCN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const Vector<Real> value = Broadcast<Vector<Real>>(kTransposed ? a[0][i] : a[i / 3][(i % 3) * left.stride]);
        JAX_DCN_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[i][v] += value * right[v];
      }
      JAX_DCN_UNROLL
      for (int i = 0; i < kPointers; ++i) a[i] += kTransposed ? left.stride : 1;
      b += b_stride;
    }
  }

  JAX_DCN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    JAX_DCN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Real* p = c + i * c_stride + v * lanes;
      if (v + 1 < kVectors || last == lanes) {
        Store(p, sum[i][v]);
      } else {
        StorePart(p, sum[i][v], last);
      }
    }
  }
}

template <class Real>
using BlockFunction = void (*)(const Left<Real>&, int64_t, const Real*, int64_t, Real*, int64_t, int, bool);

// The instantiations by rows - 1 and vectors - 1.
template <class Real, bool kTransposed, int... kRowsLessOne>
struct BlockTable {
  static constexpr BlockFunction<Real> kTable[][2] = {
      {Block<Real, kRowsLessOne + 1, 1, kTransposed>, Block<Real, kRowsLessOne + 1, 2, kTransposed>}...};
};
template <class Real, bool kTransposed, int kLeft, int... kRest>
struct MakeBlockTable : MakeBlockTable<Real, kTransposed, kLeft - 1, kLeft - 1, kRest...> {};
template <class Real, bool kTransposed, int... kRest>
struct MakeBlockTable<Real, kTransposed, 0, kRest...> : BlockTable<Real, kTransposed, kRest...> {};

// B is packed in panels of `width`, one or two vectors.
template <bool kTransposed, class Real>
void Multiply(const Left<Real>& left, int64_t rows, int64_t depth, const Real* packed, int64_t width, int64_t columns,
              Real* c, int64_t c_stride, bool accumulate) {
  const auto& table = MakeBlockTable<Real, kTransposed, kMaxRows>::kTable;
  const int64_t blocks = CeilDiv(rows, kMaxRows);  // of equal height but for one row
  for (int64_t j = 0; j < columns; j += width, packed += depth * width) {
    const int valid = static_cast<int>(Min(width, columns - j));
    const int vectors = static_cast<int>(CeilDiv(valid, kLanes<Real>));
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t end = rows * (block + 1) / blocks;
      Left<Real> part = left;
      part.data += kTransposed ? i : i * left.stride;
      table[end - i - 1][vectors - 1](part, depth, packed, width, c + i * c_stride + j, c_stride, valid, accumulate);
      i = end;
    }
  }
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
