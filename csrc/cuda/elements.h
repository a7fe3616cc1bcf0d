// Elements of arrays, one by one and as vectors of 16 bytes.

#pragma once

#include <type_traits>

#include "../operands.h"
#include "device.h"

namespace jax_dcn {
namespace cuda {

// The type of coordinates and of sums.
template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of a vector.
template <class T>
inline constexpr int kVector = sizeof(Vector16) / sizeof(T);

JAX_DCN_DEVICE float ToReal(float value) { return value; }
JAX_DCN_DEVICE double ToReal(double value) { return value; }
JAX_DCN_DEVICE float ToReal(BFloat16 value) { return ToFloat(value); }
JAX_DCN_DEVICE float ToReal(Float16 value) { return ToFloat(value); }

template <class Real, class T>
JAX_DCN_DEVICE void FromReal(Real value, T& to) {
  if constexpr (sizeof(T) == 2) {
    FromFloat(static_cast<float>(value), to);
  } else {
    to = static_cast<T>(value);
  }
}

// Element `i` of an array of any type.
template <class Real>
JAX_DCN_DEVICE Real LoadElement(const Array& array, int64_t i) {
  switch (array.dtype) {
    case DType::kFloat32: return static_cast<Real>(static_cast<const float*>(array.data)[i]);
    case DType::kFloat64: return static_cast<Real>(static_cast<const double*>(array.data)[i]);
    case DType::kBFloat16: return static_cast<Real>(ToFloat(static_cast<const BFloat16*>(array.data)[i]));
    case DType::kFloat16: return static_cast<Real>(ToFloat(static_cast<const Float16*>(array.data)[i]));
  }
  return Real(0);
}

template <class Real>
JAX_DCN_DEVICE void StoreElement(const Array& array, int64_t i, Real value) {
  switch (array.dtype) {
    case DType::kFloat32: return FromReal(value, static_cast<float*>(array.data)[i]);
    case DType::kFloat64: return FromReal(value, static_cast<double*>(array.data)[i]);
    case DType::kBFloat16: return FromReal(value, static_cast<BFloat16*>(array.data)[i]);
    case DType::kFloat16: return FromReal(value, static_cast<Float16*>(array.data)[i]);
  }
}

// --- vectors ---

template <class T>
JAX_DCN_DEVICE void UnpackWord(uint32_t word, float (&to)[2]) {
  to[0] = ToFloat(T{static_cast<uint16_t>(word & 0xffff)});
  to[1] = ToFloat(T{static_cast<uint16_t>(word >> 16)});
}

template <class T>
JAX_DCN_DEVICE void Unpack(const Vector16& vector, Accumulation<T> (&to)[kVector<T>]) {
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < 2; ++i) {
      to[i] = BitsDouble(static_cast<uint64_t>(vector.word[2 * i + 1]) << 32 | vector.word[2 * i]);
    }
  } else if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < 4; ++i) to[i] = BitsFloat(vector.word[i]);
  } else {
    for (int i = 0; i < 4; ++i) {
      float pair[2];
      UnpackWord<T>(vector.word[i], pair);
      to[2 * i] = pair[0];
      to[2 * i + 1] = pair[1];
    }
  }
}

// Rounds to the operand type of products of kind Tag: T itself, or TF32.
template <class T, class Tag>
JAX_DCN_DEVICE Vector16 Pack(const Accumulation<T> (&from)[kVector<T>]) {
  Vector16 vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      vector.word[i] = static_cast<uint32_t>(DoubleBits(from[i / 2]) >> (i % 2 * 32));
    } else if constexpr (std::is_same_v<Tag, TF32>) {
      vector.word[i] = FloatBits(RoundToTF32(from[i]));
    } else if constexpr (std::is_same_v<T, float>) {
      vector.word[i] = FloatBits(from[i]);
    } else {
      vector.word[i] = PackPair(from[2 * i], from[2 * i + 1], T{});
    }
  }
  return vector;
}

// An operand of products of kind Tag from a word of elements.
template <class Tag>
JAX_DCN_DEVICE uint32_t RoundWord(uint32_t word) {
  return std::is_same_v<Tag, TF32> ? FloatBits(RoundToTF32(BitsFloat(word))) : word;
}

// Stores adjacent elements, at once if `wide` says that they are aligned.
template <class T, class Real>
JAX_DCN_DEVICE void StoreRun(T* to, const Real (&values)[1], bool) {
  FromReal(values[0], to[0]);
}
template <class T>
JAX_DCN_DEVICE void StoreRun(T* to, const float (&values)[2], bool wide) {
  if (wide) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(to) = PackPair(values[0], values[1], T{});
    } else {
      *reinterpret_cast<Vector8*>(to) = {{FloatBits(values[0]), FloatBits(values[1])}};
    }
  } else {
    FromReal(values[0], to[0]);
    FromReal(values[1], to[1]);
  }
}

}  // namespace cuda
}  // namespace jax_dcn
