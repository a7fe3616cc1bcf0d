// What the host chooses of a call: the arithmetic of its kernels, and the widths of their tiles.

#pragma once

#include "kernels.h"
#include "problem.h"
#include "product.h"
#include "small_groups.h"

namespace jax_dcn {
namespace cuda {

// An element type and the kind of its products.
template <class T_, class Tag_>
struct Arithmetic {
  using T = T_;
  using Tag = Tag_;
  // The widest tiles whose sums leave registers for the rest. What is plain on every device holds operands in registers
  // too, doubles take two each, and products of TF32, transposed, load their operands word by word.
  static constexpr bool kPlain = sizeof(T) > 2 && std::is_same_v<T, Tag>;
  static constexpr int kColumns = sizeof(T) == 8 ? 64 : kPlain ? 128 : 256;
  static constexpr int kTransposedColumns = sizeof(T) == 8 ? 64 : sizeof(T) > 2 ? 128 : 256;
  static constexpr bool kSmallGroups = false;
  static constexpr bool kBundles = false;
};

// By the kernels of small_groups.h.
template <class A>
struct InSmallGroups : A {
  static constexpr bool kSmallGroups = true;
};

// By the kernels of bundles.h.
template <class A>
struct InBundles : A {
  static constexpr bool kBundles = true;
};

// The groups of a bundle, or 1 where the other kernels do as well: for groups of other sizes, where there are too few
// to fill a bundle, and where deform groups are so small that a bundle's samples at a tap fill more columns of their
// table than any device has.
template <class T>
int BundledGroups(const Problem& p) {
  constexpr int kMostUnits = 4;
  const int vectors = p.group_in / kVector<T>;
  if ((vectors != 1 && vectors != 2 && vectors != 4) || p.group_out > p.group_in) return 1;
  const int count = kRowVectors / vectors;
  return p.groups >= count && count * p.group_in <= kMostUnits * p.UnitOf(count) ? count : 1;
}

// The problem as the kernels see it.
template <class A>
Problem ProblemOf(Geometry g) {
  using T = typename A::T;
  if (A::kSmallGroups) g.groups = 1;
  Problem p(g, kChannelVector<T>);
  if (A::kBundles) p.Bundle(BundledGroups<T>(p));
  return p;
}

// Calls function(Arithmetic of the type, perhaps InSmallGroups or InBundles).
template <class Function>
auto WithArithmetic(const Geometry& g, DType dtype, Precision precision, const Function& function) {
  const auto choose = [&](auto a) {
    using A = decltype(a);
    if (IsSmallGroup<A>(g)) return function(InSmallGroups<A>());
    if constexpr (!A::kPlain) {
      if (BundledGroups<typename A::T>(ProblemOf<A>(g)) > 1) return function(InBundles<A>());
    }
    return function(a);
  };
  switch (dtype) {
    case DType::kBFloat16: return choose(Arithmetic<BFloat16, BFloat16>());
    case DType::kFloat16: return choose(Arithmetic<Float16, Float16>());
    case DType::kFloat64: return choose(Arithmetic<double, double>());
    case DType::kFloat32: break;
  }
  return precision == Precision::kHighest ? choose(Arithmetic<float, float>()) : choose(Arithmetic<float, TF32>());
}

// The processors of an H100 and an H200, of which blocks should make use.
inline constexpr int64_t kProcessors = 132;

// Columns of the tiles that share `total` of them: the widest that have so many shared bytes, as they make the fewest
// samples or loads, and no wider than needed. bytes_of(columns as an std::integral_constant).
template <int kMost, class Function>
int TileColumns(int total, int shared_bytes, const Function& bytes_of) {
  if constexpr (kMost > 64) {
    if (total <= kMost / 2 || bytes_of(std::integral_constant<int, kMost>()) > shared_bytes) {
      return TileColumns<kMost / 2>(total, shared_bytes, bytes_of);
    }
  }
  return kMost;
}

// Calls function(the number of columns as an std::integral_constant).
template <int kMost, class Function>
void WithColumns(int columns, const Function& function) {
  if constexpr (kMost > 64) {
    if (columns < kMost) return WithColumns<kMost / 2>(columns, function);
  }
  function(std::integral_constant<int, kMost>());
}

}  // namespace cuda
}  // namespace jax_dcn
