// Register-blocked multiplication of small tiles: C (rows x columns) (+)= A (rows x depth) * B (depth x columns).
//
// B is packed in panels: panel j holds columns [j*width, (j+1)*width) of all rows of B, row after row, filled up
// with zeros. A is read as it lies, in one of two ways, and by broadcast, so it needs no packing.
//
// A and B are of the type of C, or of bfloat16 numbers, of which two depths make a step: a row of B's panel then holds
// the pairs of two rows, column by column, and so does a row of A if A is transposed; the depth is even, and so are A's
// runs.

#pragma once

#include "integers.h"
#include "simd.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class Real>
inline constexpr int kPanel = 2 * kLanes<Real>;  // columns of a wide panel

// Whether there are panels of half a vector. Some processors with AVX-512 multiply two of these as fast as one whole.
inline constexpr bool kHasNarrow = kVectorBytes == 64;

// The panel width for a matrix of `columns`: half a vector or one where that is enough, else two.
template <class Real>
JAX_DCN_SIMD int64_t PanelWidth(int64_t columns) {
  if (kHasNarrow && columns <= kLanes<Real> / 2) return kLanes<Real> / 2;
  return columns <= kLanes<Real> ? kLanes<Real> : kPanel<Real>;
}

// Columns of a packed matrix, with those that fill the last panel.
template <class Real>
JAX_DCN_SIMD int64_t PackedColumns(int64_t columns) {
  const int64_t width = PanelWidth<Real>(columns);
  return CeilDiv(columns, width) * width;
}

// What a step of a product takes of each row of A and of each column of B.
template <class Operand>
struct Step {
  static constexpr int kDepth = 1;
  using Lane = Operand;
};
template <>
struct Step<BFloat16> {
  static constexpr int kDepth = 2;
  using Lane = uint32_t;
};

// Packs `rows` rows, `stride` apart, as the rows from `at` on of a packed matrix of `depth` rows, in panels of `width`;
// two by two as pairs if kStep is 2. V is a vector that a row is made of.
template <int kStep, class V, class T, class Operand>
void PackRowsAs(const T* matrix, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth,
                int64_t at, Operand* packed) {
  constexpr int lanes = kLanesOf<V, Accumulation<T>>;
  for (int64_t j = 0; j < columns; j += width, packed += depth * width) {
    for (int64_t i = 0; i < rows; i += kStep) {
      for (int64_t v = 0; v < width; v += lanes) {
        const int64_t valid = columns - j - v;
        const auto load = [&](int64_t row) {
          const T* from = matrix + row * stride + j + v;
          return valid >= lanes ? LoadAs<V>(from) : valid > 0 ? LoadPartAs<V>(from, static_cast<int>(valid)) : V{};
        };
        Operand* to = packed + (at + i) * width + v * kStep;
        if constexpr (kStep == 2) {
          const auto pairs = MakePairs(load(i), load(i + 1));
          std::memcpy(to, &pairs, sizeof(pairs));
        } else {
          Store(to, load(i));
        }
      }
    }
  }
}

template <int kStep, class T, class Operand>
void PackRows(const T* matrix, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth, int64_t at,
              Operand* packed) {
  using Real = Accumulation<T>;
  if constexpr (kHasNarrow) {
    if (width < kLanes<Real>) {
      return PackRowsAs<kStep, Half<Real>>(matrix, stride, rows, columns, width, depth, at, packed);
    }
  }
  PackRowsAs<kStep, Vector<Real>>(matrix, stride, rows, columns, width, depth, at, packed);
}

// How A lies in memory.
template <class Operand>
struct Left {
  const Operand* data;
  int64_t stride;  // between rows; between depths if transposed
  // The depth is cut into runs of `run`, `run_stride` apart; within a run the elements of a row are adjacent (the
  // depths are `stride` apart if transposed, and then one run is all).
  int64_t run, run_stride;
};

// kRows x kVectors accumulators stay in registers over the whole depth.
template <class Operand, class V, int kRows, int kVectors, bool kTransposed>
void Block(const Left<Operand>& left, int64_t depth, const Operand* b, int64_t b_stride, Accumulation<Operand>* c,
           int64_t c_stride, int columns, bool accumulate) {
  using Real = Accumulation<Operand>;
  using Lane = typename Step<Operand>::Lane;
  using Lanes = typename VectorOf<Lane, sizeof(V)>::Type;
  constexpr int step = Step<Operand>::kDepth;
  constexpr int lanes = kLanesOf<V, Real>;
  V sum[kRows][kVectors];
  const int last = columns - (kVectors - 1) * lanes;  // valid columns of the last vector
  if (accumulate) {
    JAX_DCN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_DCN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Real* p = c + i * c_stride + v * lanes;
        sum[i][v] = (v + 1 < kVectors || last == lanes) ? LoadAs<V>(p) : LoadPartAs<V>(p, last);
      }
    }
  } else {
    JAX_DCN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_DCN_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[i][v] = V{};
    }
  }

  const Operand* run_start = left.data;
  for (int64_t begin = 0; begin < depth; begin += left.run, run_start += left.run_stride) {
    const int64_t run = Min(left.run, depth - begin);
    // Three rows share a pointer: an address takes a base and one or two strides, and there are too few registers
    // for a pointer each.
    constexpr int kPointers = kTransposed ? 1 : (kRows + 2) / 3;
    const Operand* a[kPointers];
    JAX_DCN_UNROLL
    for (int i = 0; i < kPointers; ++i) a[i] = run_start + 3 * i * left.stride;
    for (int64_t k = 0; k < run; k += step) {
      Lanes right[kVectors];
      JAX_DCN_UNROLL
      for (int v = 0; v < kVectors; ++v) std::memcpy(&right[v], b + v * lanes * step, sizeof(right[v]));
      JAX_DCN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        Lane lane;
        std::memcpy(&lane, kTransposed ? a[0] + i * step : a[i / 3] + (i % 3) * left.stride, sizeof(lane));
        const auto value = Broadcast<Lanes>(lane);
        JAX_DCN_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[i][v] = MultiplyAdd(value, right[v], sum[i][v]);
      }
      JAX_DCN_UNROLL
      for (int i = 0; i < kPointers; ++i) a[i] += kTransposed ? left.stride * step : step;
      b += b_stride * step;
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

template <class Operand>
using BlockFunction = void (*)(const Left<Operand>&, int64_t, const Operand*, int64_t, Accumulation<Operand>*, int64_t,
                               int, bool);

// The instantiations by rows - 1 and vectors, of which 0 stands for half a one.
template <class Operand, bool kTransposed, int... kRowsLessOne>
struct BlockTable {
  using V = Vector<Accumulation<Operand>>;
  using Narrow = std::conditional_t<kHasNarrow, Half<Accumulation<Operand>>, V>;
  static constexpr BlockFunction<Operand> kTable[][3] = {{Block<Operand, Narrow, kRowsLessOne + 1, 1, kTransposed>,
                                                          Block<Operand, V, kRowsLessOne + 1, 1, kTransposed>,
                                                          Block<Operand, V, kRowsLessOne + 1, 2, kTransposed>}...};
};
template <class Operand, bool kTransposed, int kLeft, int... kRest>
struct MakeBlockTable : MakeBlockTable<Operand, kTransposed, kLeft - 1, kLeft - 1, kRest...> {};
template <class Operand, bool kTransposed, int... kRest>
struct MakeBlockTable<Operand, kTransposed, 0, kRest...> : BlockTable<Operand, kTransposed, kRest...> {};

// B is packed in panels of `width`.
template <bool kTransposed, class Operand>
void Multiply(const Left<Operand>& left, int64_t rows, int64_t depth, const Operand* packed, int64_t width,
              int64_t columns, Accumulation<Operand>* c, int64_t c_stride, bool accumulate) {
  const auto& table = MakeBlockTable<Operand, kTransposed, kMaxRows>::kTable;
  const int64_t blocks = CeilDiv(rows, kMaxRows);  // of equal height but for one row
  for (int64_t j = 0; j < columns; j += width, packed += depth * width) {
    const int valid = static_cast<int>(Min(width, columns - j));
    constexpr int lanes = kLanes<Accumulation<Operand>>;
    const int vectors = width < lanes ? 0 : static_cast<int>(CeilDiv(valid, lanes));
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t end = rows * (block + 1) / blocks;
      Left<Operand> part = left;
      part.data += kTransposed ? i * Step<Operand>::kDepth : i * left.stride;
      table[end - i - 1][vectors](part, depth, packed, width, c + i * c_stride + j, c_stride, valid, accumulate);
      i = end;
    }
  }
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
