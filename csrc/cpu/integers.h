// Arithmetic of whole numbers.
//
// The standard library's functions are left alone: the linker could take one instruction set's copy of them for
// another's.

#pragma once

#include <cstdint>

#include "simd.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

JAX_DCN_SIMD int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class Int>
JAX_DCN_SIMD constexpr Int Min(Int a, Int b) {
  return a < b ? a : b;
}
template <class Int>
JAX_DCN_SIMD constexpr Int Max(Int a, Int b) {
  return a < b ? b : a;
}

// [begin, end), or the i-th of `pieces` nearly equal ranges of [0, total).
struct Range {
  int64_t begin, end;

  static Range Piece(int64_t total, int64_t pieces, int64_t i) {
    return {total * i / pieces, total * (i + 1) / pieces};
  }
  int64_t size() const { return end - begin; }
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
