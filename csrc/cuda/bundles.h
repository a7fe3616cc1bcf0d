// Products of weight groups of few channels, several at a time.
//
// Groups of one, two or four vectors of channels, and no more output channels, make up bundles of eight vectors, which
// is a row of a stage: so samples are made, and corners read, as if they were of one group. A stage is a tap. What is
// multiplied are blocks of the diagonal, each group's samples with its own weights, so that a number that is not finite
// stays in its group. Columns are the bundle's, eight for each vector of its channels.

#pragma once

#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

inline constexpr int kBundleColumns = 8 * kRowVectors;

// The vectors of a group's row, and where a column lies.
struct BundleShape {
  int vectors;  // 1, 2 or 4

  JAX_DCN_INLINE int groups() const { return kRowVectors / vectors; }
  JAX_DCN_INLINE int columns() const { return 8 * vectors; }  // of a group
};

// On tensor cores. A warp has 16 rows and all columns. Rows of the left operand are (group, vector of the group), those
// of the right one the vectors of a column's group.
template <class T, class Tag, bool kRoundLeft>
class TensorBundleProduct {
 public:
  static constexpr int kRun = 2;  // adjacent columns that a thread holds
  static constexpr bool kPartsDiffer = true;

  JAX_DCN_DEVICE explicit TensorBundleProduct(BundleShape shape) : shape_(shape) {
    for (auto& tile : sums_) {
      for (float& sum : tile) sum = 0;
    }
  }

  // Adds the product of a part of a stage: some of the columns.
  template <int kParts>
  JAX_DCN_DEVICE void Add(Shared<const Vector16> left, Shared<const Vector16> right, int part) {
    const int lane = ThreadIndex() % kWarp;
    const int row = FirstRow() + lane % 16;
#pragma unroll
    for (int i = 0; i < kTiles / kParts; i += 2) {
      const int tile = part * (kTiles / kParts) + i;
      const int column = tile * 8 + lane / 16 * 8 + lane % 8;
      float (&first)[4] = sums_[tile];
      float (&second)[4] = sums_[tile + 1];
      const bool single = shape_.vectors == 1;          // two groups, each with half of the depth
      const int group_vector = tile & -shape_.vectors;  // as they are a power of two
#pragma unroll 1
      for (int v = 0; v < shape_.vectors; v += 2) {
        uint32_t a[4], b[4];
        LoadLeft(left + RowVector(row, group_vector + v + lane / 16), a);
        LoadMatrix4(b, right + RowVector(column, single ? 0 : v + lane / 8 % 2));
        if (single) {
          MultiplyAccumulate(first, {a[0], a[1], 0, 0}, {b[0], 0}, Tag{});
          MultiplyAccumulate(second, {a[2], a[3], 0, 0}, {b[2], 0}, Tag{});
        } else {
          MultiplyAccumulate(first, a, {b[0], b[1]}, Tag{});
          MultiplyAccumulate(second, a, {b[2], b[3]}, Tag{});
        }
      }
    }
  }

  // Calls function(row, column, values of kRun columns).
  template <class Function>
  JAX_DCN_DEVICE void ForEach(const Function& function) const {
    const int lane = ThreadIndex() % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float values[kRun] = {sums_[tile][half * 2], sums_[tile][half * 2 + 1]};
        function(FirstRow() + half * 8 + lane / 4, tile * 8 + lane % 4 * 2, values);
      }
    }
  }

 private:
  static constexpr int kTiles = kBundleColumns / 8;
  static_assert(kRows == kWarps * 16);

  static JAX_DCN_DEVICE int FirstRow() { return ThreadIndex() / kWarp * 16; }
  static JAX_DCN_DEVICE void LoadLeft(Shared<const Vector16> row, uint32_t (&a)[4]) {
    LoadMatrix4(a, row);
    if constexpr (kRoundLeft) {
      for (uint32_t& word : a) word = RoundWord<Tag>(word);
    }
  }

  BundleShape shape_;
  float sums_[kTiles][4];
};

// By multiplications and additions of float.
template <class T>
class PlainBundleProduct : public PlainProduct<T, kBundleColumns, false> {
  using Base = PlainProduct<T, kBundleColumns, false>;
  using Base::kAcross, Base::kDown, Base::kSide, Base::sums_;

 public:
  static constexpr bool kPartsDiffer = true;

  JAX_DCN_DEVICE explicit PlainBundleProduct(BundleShape shape) : shape_(shape) {}

  template <int kParts>
  JAX_DCN_DEVICE void Add(Shared<const Vector16> left, Shared<const Vector16> right, int part) {
#pragma unroll
    for (int j = part * (kAcross / kParts); j < (part + 1) * (kAcross / kParts); ++j) {
      const int column = ThreadIndex() % kSide + j * kSide;
      const int group_vector = column / shape_.columns() * shape_.vectors;
#pragma unroll 1
      for (int v = 0; v < shape_.vectors; ++v) {
        float b[kVector<T>];
        Unpack<T>(right[RowVector(column, v)], b);
        for (int i = 0; i < kDown; ++i) {
          float a[kVector<T>];
          Unpack<T>(left[RowVector(ThreadIndex() / kSide + i * kSide, group_vector + v)], a);
          for (int k = 0; k < kVector<T>; ++k) sums_[i][j] += a[k] * b[k];
        }
      }
    }
  }

 private:
  BundleShape shape_;
};

template <class T, class Tag, bool kRoundLeft = false>
using BundleProduct =
    std::conditional_t<kOnTensorCores<Tag>, TensorBundleProduct<T, Tag, kRoundLeft>, PlainBundleProduct<T>>;

// The right operand packed stage after stage, each (vector, column).
struct CopyBundle {
  const Vector16* packed;
  BundleShape shape;

  JAX_DCN_DEVICE void operator()(int stage, Shared<Vector16> to) const {
    const int i = ThreadIndex();
    static_assert(kThreads == 4 * kBundleColumns);
    if (i >= shape.vectors * kBundleColumns) return;
    const Vector16* from = packed + (int64_t{stage} * shape.vectors * kBundleColumns + i);
    CopyAsync16(to + RowVector(i % kBundleColumns, i / kBundleColumns), from, true);
  }
};

}  // namespace cuda
}  // namespace jax_dcn
