// Vectors of the instruction set that this copy is compiled for, by the compilers' vector extensions; intrinsics
// only for what these cannot say: partial and converting loads and stores, and sums across lanes.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define JAX_DCN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define JAX_DCN_UNROLL JAX_DCN_PRAGMA(clang loop unroll(full))
#else
#define JAX_DCN_UNROLL JAX_DCN_PRAGMA(GCC unroll 64)
#endif

namespace jax_dcn {
namespace JAX_DCN_TARGET {

#define JAX_DCN_SIMD inline __attribute__((always_inline))

// kMaxRows x 2 accumulators, two vectors of the other operand and a broadcast fill the registers: 32 in AVX-512 and
// aarch64, 16 in AVX2 and SSE2.
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kMaxRows = 14;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kMaxRows = 6;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kMaxRows = 14;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kMaxRows = 6;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type of coordinates, interpolation weights and sums.
template <class T>
struct AccumulationOf {
  using Type = float;
};
template <>
struct AccumulationOf<double> {
  using Type = double;
};
template <class T>
using Accumulation = typename AccumulationOf<T>::Type;

template <class Real>
struct VectorOf {
  typedef Real Type __attribute__((vector_size(kVectorBytes)));
  typedef Real Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(Real)), may_alias));
};
template <class Real>
using Vector = typename VectorOf<Real>::Type;

template <class Real>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Real));

// --- scalars ---

template <class To, class From>
JAX_DCN_SIMD To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

JAX_DCN_SIMD double ToReal(double v) { return v; }
JAX_DCN_SIMD float ToReal(float v) { return v; }
JAX_DCN_SIMD float ToReal(BFloat16 v) { return BitCast<float>(static_cast<uint32_t>(v.bits) << 16); }
JAX_DCN_SIMD float ToReal(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7fff;
  uint32_t bits = (magnitude << 13) + 0x38000000;  // from float16's exponent bias to float's
  if (magnitude >= 0x7c00) bits += 0x38000000;     // infinite or NaN
  // Subnormal, a multiple of 2^-24. By way of an integer, because XLA's threads take subnormal floats for 0.
  if (magnitude < 0x0400) bits = BitCast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return BitCast<float>(sign | bits);
}

template <class T>
struct FromReal;
template <>
struct FromReal<double> {
  JAX_DCN_SIMD static double Convert(double v) { return v; }
};
template <>
struct FromReal<float> {
  JAX_DCN_SIMD static float Convert(double v) { return static_cast<float>(v); }
};
template <>
struct FromReal<BFloat16> {
  JAX_DCN_SIMD static BFloat16 Convert(float v) {
    const uint32_t bits = BitCast<uint32_t>(v);
    if (v != v) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
  }
};
template <>
struct FromReal<Float16> {
  JAX_DCN_SIMD static Float16 Convert(float v) {
    const uint32_t bits = BitCast<uint32_t>(v);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 2^16 or more
    if (magnitude < 0x38800000) {
      // Below 2^-14 the result is subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to even.
      const uint32_t shifted = BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f);
      return {static_cast<uint16_t>(sign | (shifted - 0x3f000000))};
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
  }
};

// --- vectors: whole ---

template <class Real>
JAX_DCN_SIMD Vector<Real> Broadcast(Real v) {
  return v - Vector<Real>{};  // exact for -0, as adding would not be, so the compiler drops the subtraction
}

JAX_DCN_SIMD Vector<double> Load(const double* p) { return *reinterpret_cast<const VectorOf<double>::Unaligned*>(p); }
JAX_DCN_SIMD Vector<float> Load(const float* p) { return *reinterpret_cast<const VectorOf<float>::Unaligned*>(p); }

template <class T>
JAX_DCN_SIMD Vector<Accumulation<T>> LoadEach(const T* p, int count) {
  alignas(kVectorBytes) Accumulation<T> buffer[kLanes<Accumulation<T>>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = ToReal(p[i]);
  return Load(buffer);
}

JAX_DCN_SIMD Vector<float> Load(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Whole __attribute__((vector_size(kVectorBytes)));
  Half half;
  std::memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(half, Whole) << 16);
}

JAX_DCN_SIMD Vector<float> Load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return LoadEach(p, kLanes<float>);
#endif
}

JAX_DCN_SIMD void Store(double* p, Vector<double> v) { *reinterpret_cast<VectorOf<double>::Unaligned*>(p) = v; }
JAX_DCN_SIMD void Store(float* p, Vector<float> v) { *reinterpret_cast<VectorOf<float>::Unaligned*>(p) = v; }

template <class T>
JAX_DCN_SIMD void StoreEach(T* p, Vector<Accumulation<T>> v, int count) {
  alignas(kVectorBytes) Accumulation<T> buffer[kLanes<Accumulation<T>>];
  Store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = FromReal<T>::Convert(buffer[i]);
}

JAX_DCN_SIMD void Store(BFloat16* p, Vector<float> v) { StoreEach(p, v, kLanes<float>); }

JAX_DCN_SIMD void Store(Float16* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  StoreEach(p, v, kLanes<float>);
#endif
}

// --- vectors: the first `count` lanes, fewer than all; the others load as 0 ---

template <class T>
JAX_DCN_SIMD Vector<Accumulation<T>> LoadPart(const T* p, int count) {
  return LoadEach(p, count);
}
template <class T>
JAX_DCN_SIMD void StorePart(T* p, Vector<Accumulation<T>> v, int count) {
  StoreEach(p, v, count);
}

#if defined(__AVX512F__)
JAX_DCN_SIMD Vector<float> LoadPart(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
JAX_DCN_SIMD Vector<double> LoadPart(const double* p, int count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
}
JAX_DCN_SIMD void StorePart(float* p, Vector<float> v, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
JAX_DCN_SIMD void StorePart(double* p, Vector<double> v, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), v);
}
#elif defined(__AVX2__)
JAX_DCN_SIMD __m256i FirstLanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
JAX_DCN_SIMD Vector<float> LoadPart(const float* p, int count) { return _mm256_maskload_ps(p, FirstLanes(count)); }
JAX_DCN_SIMD void StorePart(float* p, Vector<float> v, int count) { _mm256_maskstore_ps(p, FirstLanes(count), v); }
#endif

// --- sums across lanes ---

// out[i] = the sum of v[i]'s lanes, for four vectors.
template <class Real>
JAX_DCN_SIMD void SumLanes(const Vector<Real> (&v)[4], Real (&out)[4]) {
  for (int i = 0; i < 4; ++i) {
    alignas(kVectorBytes) Real lanes[kLanes<Real>];
    Store(lanes, v[i]);
    out[i] = lanes[0];
    for (int j = 1; j < kLanes<Real>; ++j) out[i] += lanes[j];
  }
}

#if defined(__AVX2__)
// Transposes within 128 bits while adding, so that four sums cost little more than one.
JAX_DCN_SIMD __m256 AddTransposed(__m256 a, __m256 b, __m256 c, __m256 d) {
  return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
}
JAX_DCN_SIMD __m256 AddHalves(Vector<float> v) {
#if defined(__AVX512F__)
  const __m512 w = v;
  return _mm256_add_ps(_mm512_castps512_ps256(w), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(w), 1)));
#else
  return v;
#endif
}
JAX_DCN_SIMD void SumLanes(const Vector<float> (&v)[4], float (&out)[4]) {
  const __m256 s = AddTransposed(AddHalves(v[0]), AddHalves(v[1]), AddHalves(v[2]), AddHalves(v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
#endif

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
