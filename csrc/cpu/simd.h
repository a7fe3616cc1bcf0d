// Vectors of the instruction set that this copy is compiled for, by the compilers' vector extensions; intrinsics
// only for what these cannot say: partial and converting loads and stores, products of pairs, and sums across lanes.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define JAX_DCN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define JAX_DCN_UNROLL JAX_DCN_PRAGMA(clang loop unroll(full))
#define JAX_DCN_INDEPENDENT
#else
#define JAX_DCN_UNROLL JAX_DCN_PRAGMA(GCC unroll 64)
#define JAX_DCN_INDEPENDENT JAX_DCN_PRAGMA(GCC ivdep)
#endif

namespace jax_dcn {
namespace JAX_DCN_TARGET {

#define JAX_DCN_ALWAYS_INLINE __attribute__((always_inline))
#define JAX_DCN_SIMD inline JAX_DCN_ALWAYS_INLINE
// Not inlined: the compiler contracts products and sums into one instruction as it sees fit, copy by copy, and
// different copies would give different bits.
#define JAX_DCN_ONE_COPY __attribute__((noinline))

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

// Whether this copy multiplies pairs of bfloat16 numbers in one instruction.
#if defined(__AVX512BF16__) || defined(JAX_DCN_EMULATE_BF16)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

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

// A vector of `kBytes`. Vectors of half the width serve rows of half a vector.
template <class Real, int kBytes = kVectorBytes>
struct VectorOf {
  typedef Real Type __attribute__((vector_size(kBytes)));
  typedef Real Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(Real)), may_alias));
};
template <class Real>
using Vector = typename VectorOf<Real>::Type;

// Of half the width.
template <class Real>
using Half = typename VectorOf<Real, kVectorBytes / 2>::Type;

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

#if defined(__AVX2__) && !defined(__AVX512F__)
JAX_DCN_SIMD __m256i FirstLanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// --- whole vectors, of any width; V may be a scalar, which is a vector of one lane ---

template <class V, class Real>
inline constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(Real));

template <class V, class Real>
JAX_DCN_SIMD V Broadcast(Real v) {
  return v - V{};  // exact for -0, as adding would not be, so the compiler drops the subtraction
}

template <class V, class T>
JAX_DCN_SIMD V LoadEach(const T* p, int count) {
  using Real = std::decay_t<decltype(V{}[0])>;
  alignas(kVectorBytes) Real buffer[kLanesOf<V, Real>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = static_cast<Real>(ToReal(p[i]));
  V v;
  std::memcpy(&v, buffer, sizeof(v));
  return v;
}

// The elements from p on, converted to V's.
template <class V, class T>
JAX_DCN_SIMD V LoadAs(const T* p) {
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<V>(ToReal(*p));
  } else {
    using Real = std::decay_t<decltype(V{}[0])>;
    constexpr int lanes = kLanesOf<V, Real>;
    if constexpr (std::is_same_v<T, Real>) {
      return *reinterpret_cast<const typename VectorOf<Real, sizeof(V)>::Unaligned*>(p);
    } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<Real, float>) {
      typename VectorOf<uint16_t, lanes * 2>::Type half;
      std::memcpy(&half, p, sizeof(half));
      return reinterpret_cast<V>(__builtin_convertvector(half, typename VectorOf<uint32_t, lanes * 4>::Type) << 16);
#if defined(__AVX512F__)
    } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Real, float> && lanes == 16) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
#if defined(__AVX2__)
    } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Real, float> && lanes == 8) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
    } else {
      return LoadEach<V>(p, lanes);
    }
  }
}

template <class T>
JAX_DCN_SIMD Vector<Accumulation<T>> Load(const T* p) {
  return LoadAs<Vector<Accumulation<T>>>(p);
}

// --- pairs of bfloat16 numbers, the first in the low half of a lane ---

using Pairs = Vector<uint32_t>;

template <class P, class V>
JAX_DCN_SIMD V MultiplyAddPairs(P a, P b, V sum) {
  const auto first = [](P v) { return reinterpret_cast<V>(v << 16); };
  const auto second = [](P v) { return reinterpret_cast<V>(v & 0xffff0000); };
  return first(a) * first(b) + (second(a) * second(b) + sum);
}
JAX_DCN_SIMD Vector<float> MultiplyAdd(Pairs a, Pairs b, Vector<float> sum) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, BitCast<__m512bh>(a), BitCast<__m512bh>(b));
#else
  return MultiplyAddPairs(a, b, sum);
#endif
}
JAX_DCN_SIMD Half<float> MultiplyAdd(Half<uint32_t> a, Half<uint32_t> b, Half<float> sum) {
#if defined(__AVX512BF16__)
  return _mm256_dpbf16_ps(sum, BitCast<__m256bh>(a), BitCast<__m256bh>(b));
#else
  return MultiplyAddPairs(a, b, sum);
#endif
}
template <class V>
JAX_DCN_SIMD V MultiplyAdd(V a, V b, V sum) {
  return a * b + sum;
}

// Pairs of floats that are bfloat16 numbers.
template <class V>
JAX_DCN_SIMD auto MakePairs(V first, V second) {
  using P = typename VectorOf<uint32_t, sizeof(V)>::Type;
  return (reinterpret_cast<P>(first) >> 16) | reinterpret_cast<P>(second);
}

template <class T, class V>
JAX_DCN_SIMD void StoreEach(T* p, V v, int count) {
  for (int i = 0; i < count; ++i) p[i] = FromReal<T>::Convert(v[i]);
}

template <class T, class V>
JAX_DCN_SIMD void Store(T* p, V v) {
  if constexpr (std::is_arithmetic_v<V>) {
    *p = FromReal<T>::Convert(v);
  } else {
    using Real = std::decay_t<decltype(V{}[0])>;
    if constexpr (std::is_same_v<T, Real>) {
      *reinterpret_cast<typename VectorOf<Real, sizeof(V)>::Unaligned*>(p) = v;
#if defined(__AVX512BF16__)
    } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<V, Vector<float>>) {
      const auto half = _mm512_cvtneps_pbh(v);
      std::memcpy(p, &half, sizeof(half));
    } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<V, Half<float>>) {
      const auto half = _mm256_cvtneps_pbh(v);
      std::memcpy(p, &half, sizeof(half));
#endif
    } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<Real, float>) {
      using Bits = typename VectorOf<uint32_t, sizeof(V)>::Type;
      const Bits bits = reinterpret_cast<Bits>(v);
      const Bits rounded = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;  // as FromReal does
      const auto half = __builtin_convertvector(rounded >> 16, typename VectorOf<uint16_t, sizeof(V) / 2>::Type);
      std::memcpy(p, &half, sizeof(half));
#if defined(__AVX512F__)
    } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<V, Vector<float>>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<V, Vector<float>>) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
    } else {
      alignas(kVectorBytes) Real buffer[kLanesOf<V, Real>];
      std::memcpy(buffer, &v, sizeof(v));
      StoreEach(p, buffer, kLanesOf<V, Real>);
    }
  }
}

// --- the first `count` lanes of a full vector, fewer than all; the others load as 0 ---

template <class V, class T>
JAX_DCN_SIMD V LoadPartAs(const T* p, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<V, Vector<float>>) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<V, Half<float>>) {
    return _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1), p);
  } else if constexpr (std::is_same_v<T, double> && std::is_same_v<V, Vector<double>>) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  } else if constexpr (sizeof(T) == 2 && std::is_same_v<V, Vector<float>>) {
    const __m256i part = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
    return LoadAs<V>(reinterpret_cast<const T*>(&part));
  } else {
    return LoadEach<V>(p, count);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<V, Vector<float>>) {
    return _mm256_maskload_ps(p, FirstLanes(count));
  } else {
    return LoadEach<V>(p, count);
  }
#else
  return LoadEach<V>(p, count);
#endif
}

template <class T>
JAX_DCN_SIMD Vector<Accumulation<T>> LoadPart(const T* p, int count) {
  return LoadPartAs<Vector<Accumulation<T>>>(p, count);
}

template <class T, class V>
JAX_DCN_SIMD void StorePart(T* p, V v, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<V, Vector<float>>) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<V, Half<float>>) {
    return _mm256_mask_storeu_ps(p, static_cast<__mmask8>((1u << count) - 1), v);
  } else if constexpr (std::is_same_v<T, double> && std::is_same_v<V, Vector<double>>) {
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), v);
  } else if constexpr (sizeof(T) == 2 && std::is_same_v<V, Vector<float>>) {
    __m256i whole;
    Store(reinterpret_cast<T*>(&whole), v);
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), whole);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<V, Vector<float>>) {
    return _mm256_maskstore_ps(p, FirstLanes(count), v);
  }
#endif
  StoreEach(p, v, count);
}

// Calls function(first, load, store) for vector after vector of `count` elements; load and store take the last of these
// in part where there are too few.
template <class V, class Function>
JAX_DCN_SIMD void ForVectors(int64_t count, const Function& function) {
  constexpr int lanes = static_cast<int>(sizeof(V) / sizeof(V{}[0]));
  const int64_t whole = count / lanes * lanes;
  const int rest = static_cast<int>(count - whole);
  for (int64_t i = 0; i < whole; i += lanes) {
    function(i, [](const auto* from) { return LoadAs<V>(from); }, [](auto* to, V v) { Store(to, v); });
  }
  if (rest != 0) {
    function(
        whole, [rest](const auto* from) { return LoadPartAs<V>(from, rest); },
        [rest](auto* to, V v) { StorePart(to, v, rest); });
  }
}

// --- across lanes ---

// out[i] = the sum of v[i]'s lanes, for four vectors.
template <class V, class Real>
JAX_DCN_SIMD void SumLanes(const V (&v)[4], Real (&out)[4]) {
  if constexpr (std::is_arithmetic_v<V>) {
    for (int i = 0; i < 4; ++i) out[i] = v[i];
  } else {
    for (int i = 0; i < 4; ++i) {
      out[i] = v[i][0];
      for (int j = 1; j < kLanesOf<V, Real>; ++j) out[i] += v[i][j];
    }
  }
}

#if defined(__AVX2__)
// Transposes while adding, so that four sums cost little more than one; of two ways to move a lane the one that is not
// bound to a single execution port is taken where there is a choice.
JAX_DCN_SIMD __m256 AddPairs(__m256 a, __m256 b) {  // a0 + a1, b0 + b1, a2 + a3, b2 + b3 in each half
  return _mm256_add_ps(_mm256_blend_ps(a, b, 0xaa), _mm256_permute_ps(_mm256_blend_ps(b, a, 0xaa), 0xb1));
}
typedef VectorOf<float, 32>::Type EightFloats;
JAX_DCN_SIMD void SumLanes(const EightFloats (&v)[4], float (&out)[4]) {
  const __m256 a = AddPairs(v[0], v[1]);
  const __m256 b = AddPairs(v[2], v[3]);
  const __m256 s = _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 3, 2)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
#endif
#if defined(__AVX512F__)
JAX_DCN_SIMD __m256 AddHalves(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
JAX_DCN_SIMD void SumLanes(const Vector<float> (&v)[4], float (&out)[4]) {
  const EightFloats halves[4] = {AddHalves(v[0]), AddHalves(v[1]), AddHalves(v[2]), AddHalves(v[3])};
  SumLanes(halves, out);
}
#endif

// The lane of (a, b), counted on from a's into b's, that a step of a transposition puts into lane i: blocks of `step`
// lanes change places between a's odd ones and b's even ones.
constexpr int SwappedLane(int i, int step, int lanes, bool second) {
  const bool odd = (i & step) != 0;
  return second ? (odd ? lanes + i : i + step) : (odd ? lanes + i - step : i);
}

template <class V, int kStep, bool kSecond, int... kIndex>
JAX_DCN_SIMD V SwapLanes(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int lanes = sizeof...(kIndex);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, SwappedLane(kIndex, kStep, lanes, kSecond)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Indices{SwappedLane(kIndex, kStep, lanes, kSecond)...});
#endif
}

// The lane of (a, b) that half of a sum takes into lane i: from each period of lanes a's blocks of `unit` of them that
// are even, or odd, and then b's.
constexpr int HalvedLane(int i, int unit, int period, int lanes, bool odd) {
  const int half = period / unit / 2;
  const int block = i % period / unit;
  const int from = i / period * period + (block % half * 2 + (odd ? 1 : 0)) * unit + i % unit;
  return block < half ? from : lanes + from;
}

template <class V, int kUnit, int kPeriod, bool kOdd, int... kIndex>
JAX_DCN_SIMD V HalveLanes(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int lanes = sizeof...(kIndex);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, HalvedLane(kIndex, kUnit, kPeriod, lanes, kOdd)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Indices{HalvedLane(kIndex, kUnit, kPeriod, lanes, kOdd)...});
#endif
}

// Adds lanes of as many vectors as there are lanes, so that lane i of the first one is the sum of vector i: first
// within 16 bytes, where a shuffle costs least, then across.
template <class V, int kLanes, int kCount = kLanes>
JAX_DCN_SIMD void AddLanes(V* v) {
  if constexpr (kCount > 1) {
    constexpr int in_block = 16 / static_cast<int>(sizeof(V{}[0]));
    constexpr bool within = kLanes / kCount < in_block;
    constexpr int unit = within ? 1 : in_block;
    constexpr int period = within ? in_block : kLanes;
    using Lanes = std::make_integer_sequence<int, kLanes>;
    JAX_DCN_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      v[i] = HalveLanes<V, unit, period, false>(v[2 * i], v[2 * i + 1], Lanes()) +
             HalveLanes<V, unit, period, true>(v[2 * i], v[2 * i + 1], Lanes());
    }
    AddLanes<V, kLanes, kCount / 2>(v);
  }
}

// to[i] = the sum of v[i]'s lanes.
template <class V, int kCount, class Real>
JAX_DCN_SIMD void StoreSums(V (&v)[kCount], Real* to) {
  if constexpr (std::is_arithmetic_v<V>) {
    for (int i = 0; i < kCount; ++i) to[i] = v[i];
  } else if constexpr (kLanesOf<V, Real> == kCount) {
    AddLanes<V, kCount>(v);
    Store(to, v[0]);
  } else {
    for (int i = 0; i < kCount; ++i) {
      Real sum = 0;
      for (int j = 0; j < kLanesOf<V, Real>; ++j) sum += v[i][j];
      to[i] = sum;
    }
  }
}

// Transposes a square of lanes in registers.
template <class Real, int kStep = 1>
JAX_DCN_SIMD void TransposeLanes(Vector<Real> (&v)[kLanes<Real>]) {
  if constexpr (kStep < kLanes<Real>) {
    using Lanes = std::make_integer_sequence<int, kLanes<Real>>;
    JAX_DCN_UNROLL
    for (int i = 0; i < kLanes<Real>; ++i) {
      if ((i & kStep) != 0) continue;
      const Vector<Real> a = v[i], b = v[i + kStep];
      v[i] = SwapLanes<Vector<Real>, kStep, false>(a, b, Lanes());
      v[i + kStep] = SwapLanes<Vector<Real>, kStep, true>(a, b, Lanes());
    }
    TransposeLanes<Real, kStep * 2>(v);
  }
}

// to[j][i] = from[i][j], for rows and columns within a square of lanes.
template <class Real, class From, class To>
JAX_DCN_SIMD void TransposeSquare(const From* from, int64_t from_stride, int rows, int columns, To* to,
                                  int64_t to_stride) {
  constexpr int lanes = kLanes<Real>;
  Vector<Real> v[lanes];
  JAX_DCN_UNROLL
  for (int i = 0; i < lanes; ++i) {
    v[i] = Vector<Real>{};
    if (i >= rows) continue;
    const From* row = from + i * from_stride;
    v[i] = columns == lanes ? Load(row) : LoadPart(row, columns);
  }
  TransposeLanes<Real>(v);
  JAX_DCN_UNROLL
  for (int j = 0; j < lanes; ++j) {
    if (j >= columns) break;
    To* row = to + j * to_stride;
    if (rows == lanes) {
      Store(row, v[j]);
    } else {
      StorePart(row, v[j], rows);
    }
  }
}

// to[j][i] = from[i][j], for i < rows and j < columns, converted by way of Real.
template <class Real, class From, class To>
void Transpose(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride) {
  if constexpr (std::is_same_v<Accumulation<From>, Real> && std::is_same_v<Accumulation<To>, Real>) {
    constexpr int lanes = kLanes<Real>;
    for (int64_t i = 0; i < rows; i += lanes) {
      const int height = static_cast<int>(rows - i < lanes ? rows - i : lanes);
      for (int64_t j = 0; j < columns; j += lanes) {
        const int width = static_cast<int>(columns - j < lanes ? columns - j : lanes);
        const From* square = from + i * from_stride + j;
        To* out = to + j * to_stride + i;
        // A whole square by itself, so that the compiler drops the conditions.
        if (width == lanes && height == lanes) {
          TransposeSquare<Real>(square, from_stride, lanes, lanes, out, to_stride);
        } else {
          TransposeSquare<Real>(square, from_stride, height, width, out, to_stride);
        }
      }
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        to[j * to_stride + i] = FromReal<To>::Convert(static_cast<Real>(ToReal(from[i * from_stride + j])));
      }
    }
  }
}

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
