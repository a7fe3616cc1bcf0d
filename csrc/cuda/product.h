// A block's product of two matrices, stage by stage of their common dimension k, from shared memory into registers.
//
// Either the operands lie row by row, each row's elements of a stage side by side, or transposed, the elements of a k
// side by side. Both are laid out so that no access of a warp has bank conflicts.

#pragma once

#include "elements.h"

namespace jax_dcn {
namespace cuda {

inline constexpr int kThreads = 256;  // of a block
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kRows = 128;  // of the left operand

// Of kernels that give each thread an item.
JAX_DCN_DEVICE int64_t GlobalThread() { return int64_t{BlockIndex().x} * kThreads + ThreadIndex(); }

// A row of a stage is 128 bytes of k, which is as wide as all banks. Its vectors change places by an exclusive or with
// the row's number: so eight rows' same vector and a row's eight vectors are in different banks.
inline constexpr int kRowVectors = 8;
template <class T>
inline constexpr int kStage = kRowVectors * kVector<T>;  // elements of k
JAX_DCN_DEVICE int RowVector(int row, int vector) { return row * kRowVectors + (vector ^ (row & (kRowVectors - 1))); }

// A transposed stage is so many k, a pitch apart, in vectors. Those of TF32 are read by words: eight of each of four k,
// which a pitch of 8 words more than all banks separates.
template <class T>
inline constexpr int kTransposedStage = 64 / sizeof(T);
template <class T, int kColumns>
inline constexpr int kTransposedPitch = kColumns / kVector<T> + (sizeof(T) == 2 ? 1 : 2);

// The vectors of a stage of an operand of kColumns rows, or columns if transposed.
template <class T, int kColumns, bool kTransposed>
inline constexpr int kStageSize =
    kTransposed ? kTransposedStage<T> * kTransposedPitch<T, kColumns> : kColumns * kRowVectors;

// On tensor cores. Warps share the result as a grid of rectangles. The left operand may come as the caller has it, not
// yet rounded, which transposed right ones always do.
template <class T, class Tag, int kColumns, bool kTransposed, bool kRoundLeft>
class TensorProduct {
 public:
  static constexpr int kRun = 2;               // adjacent columns that a thread holds
  static constexpr bool kPartsDiffer = false;  // in the registers that they add to

  JAX_DCN_DEVICE TensorProduct() {
    for (auto& row : sums_) {
      for (auto& tile : row) {
        for (float& sum : tile) sum = 0;
      }
    }
  }

  // Adds the product of a part of a stage.
  template <int kParts>
  JAX_DCN_DEVICE void Add(Shared<const Vector16> left, Shared<const Vector16> right, int part) {
    constexpr int kSteps = (kTransposed ? 2 : 4) / kParts;  // of 32 bytes of k
    const int lane = ThreadIndex() % kWarp;
#pragma unroll(kTilesDown* kTilesAcross == 32 ? 1 : kTightUnroll)
    for (int i = 0; i < kSteps; ++i) {
      const int step = part * kSteps + i;
      uint32_t a[kTilesDown][4];
      for (int i = 0; i < kTilesDown; ++i) LoadLeft(left, step, FirstRow() + i * 16, lane, a[i]);
#pragma unroll
      for (int j = 0; j < kTilesAcross; j += 2) {
        uint32_t b[4];
        LoadRight(right, step, FirstColumn() + j * 8, lane, b);
        const uint32_t b0[2] = {b[0], b[1]};
        const uint32_t b1[2] = {b[2], b[3]};
        for (int i = 0; i < kTilesDown; ++i) {
          MultiplyAccumulate(sums_[i][j], a[i], b0, Tag{});
          MultiplyAccumulate(sums_[i][j + 1], a[i], b1, Tag{});
        }
      }
    }
  }

  // Calls function(row, column, values of kRun columns).
  template <class Function>
  JAX_DCN_DEVICE void ForEach(const Function& function) const {
    const int lane = ThreadIndex() % kWarp;
#pragma unroll
    for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j) {
          const float values[kRun] = {sums_[i][j][half * 2], sums_[i][j][half * 2 + 1]};
          function(FirstRow() + i * 16 + half * 8 + lane / 4, FirstColumn() + j * 8 + lane % 4 * 2, values);
        }
      }
    }
  }

 private:
  static constexpr int kWarpsDown = kColumns == 256 ? 2 : 4;
  static constexpr int kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kTilesDown = kRows / kWarpsDown / 16;
  static constexpr int kTilesAcross = kColumns / kWarpsAcross / 8;

  static JAX_DCN_DEVICE int FirstRow() { return ThreadIndex() / kWarp / kWarpsAcross * (kTilesDown * 16); }
  static JAX_DCN_DEVICE int FirstColumn() { return ThreadIndex() / kWarp % kWarpsAcross * (kTilesAcross * 8); }

  // The fragment of 16 rows and the step's 32 bytes of k.
  static JAX_DCN_DEVICE void LoadLeft(Shared<const Vector16> left, int step, int row, int lane, uint32_t (&a)[4]) {
    if constexpr (!kTransposed) {
      LoadMatrix4(a, left + RowVector(row + lane % 16, step * 2 + lane / 16));
      if constexpr (kRoundLeft) {
        for (uint32_t& word : a) word = RoundWord<Tag>(word);
      }
    } else if constexpr (sizeof(T) == 2) {
      const int k = step * 16 + lane / 16 * 8 + lane % 8;
      LoadMatrix4Transposed(a, left + (k * kTransposedPitch<T, kRows> + (row + lane / 8 % 2 * 8) / 8));
    } else {
      for (int i = 0; i < 4; ++i) {
        a[i] = Word(left, kTransposedPitch<T, kRows>, step * 8 + i / 2 * 4 + lane % 4, row + i % 2 * 8 + lane / 4);
      }
    }
  }

  // Those of 16 columns, the first eight in b[0] and b[1].
  static JAX_DCN_DEVICE void LoadRight(Shared<const Vector16> right, int step, int column, int lane, uint32_t (&b)[4]) {
    if constexpr (!kTransposed) {
      LoadMatrix4(b, right + RowVector(column + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
    } else if constexpr (sizeof(T) == 2) {
      const int k = step * 16 + lane % 16;
      LoadMatrix4Transposed(b, right + (k * kTransposedPitch<T, kColumns> + (column + lane / 16 * 8) / 8));
    } else {
      for (int i = 0; i < 4; ++i) {
        const uint32_t word =
            Word(right, kTransposedPitch<T, kColumns>, step * 8 + i % 2 * 4 + lane % 4, column + i / 2 * 8 + lane / 4);
        b[i] = RoundWord<Tag>(word);
      }
    }
  }

  static JAX_DCN_DEVICE uint32_t Word(Shared<const Vector16> from, int pitch, int k, int i) {
    return SharedCast<const uint32_t>(from)[k * pitch * 4 + i];
  }

  float sums_[kTilesDown][kTilesAcross][4];
};

// By multiplications and additions of Accumulation<T>. Thread (i, j) of 16 x 16 holds every 16th row from i on and
// every 16th column from j on.
template <class T, int kColumns, bool kTransposed>
class PlainProduct {
 public:
  using Real = Accumulation<T>;
  static constexpr int kRun = 1;
  static constexpr bool kPartsDiffer = false;

  JAX_DCN_DEVICE PlainProduct() {
    for (auto& row : sums_) {
      for (Real& sum : row) sum = 0;
    }
  }

  template <int kParts>
  JAX_DCN_DEVICE void Add(Shared<const Vector16> left, Shared<const Vector16> right, int part) {
    const int row = ThreadIndex() / kSide;
    const int column = ThreadIndex() % kSide;
    if constexpr (kTransposed) {
      static_assert(kParts == 1);
#pragma unroll 4
      for (int k = 0; k < kTransposedStage<T>; ++k) {
        Real a[kDown];
        for (int i = 0; i < kDown; ++i) {
          a[i] = Element(left, k * kTransposedPitch<T, kRows> * kVector<T> + row + i * kSide);
        }
        for (int j = 0; j < kAcross; ++j) {
          const Real b = Element(right, k * kTransposedPitch<T, kColumns> * kVector<T> + column + j * kSide);
          for (int i = 0; i < kDown; ++i) sums_[i][j] += a[i] * b;
        }
      }
    } else {
      constexpr int kVectors = kRowVectors / kParts;
#pragma unroll 1
      for (int v = part * kVectors; v < (part + 1) * kVectors; ++v) {
        Real a[kDown][kVector<T>];
        for (int i = 0; i < kDown; ++i) Unpack<T>(left[RowVector(row + i * kSide, v)], a[i]);
        for (int j = 0; j < kAcross; ++j) {
          Real b[kVector<T>];
          Unpack<T>(right[RowVector(column + j * kSide, v)], b);
          for (int i = 0; i < kDown; ++i) {
            for (int k = 0; k < kVector<T>; ++k) sums_[i][j] += a[i][k] * b[k];
          }
        }
      }
    }
  }

  template <class Function>
  JAX_DCN_DEVICE void ForEach(const Function& function) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const Real values[kRun] = {sums_[i][j]};
        function(ThreadIndex() / kSide + i * kSide, ThreadIndex() % kSide + j * kSide, values);
      }
    }
  }

 protected:
  static constexpr int kSide = 16;
  static constexpr int kDown = kRows / kSide;
  static constexpr int kAcross = kColumns / kSide;

  static JAX_DCN_DEVICE Real Element(Shared<const Vector16> from, int i) {
    return ToReal(static_cast<T>(SharedCast<const T>(from)[i]));
  }

  Real sums_[kDown][kAcross];
};

// Whether tensor cores multiply operands of kind Tag.
template <class Tag>
inline constexpr bool kOnTensorCores =
    std::is_same_v<Tag, Float16> || (!kTuring && (std::is_same_v<Tag, BFloat16> || std::is_same_v<Tag, TF32>));

// The product of operands of type T, of kind Tag.
template <class T, class Tag, int kColumns, bool kTransposed = false, bool kRoundLeft = false>
using Product = std::conditional_t<kOnTensorCores<Tag>, TensorProduct<T, Tag, kColumns, kTransposed, kRoundLeft>,
                                   PlainProduct<T, kColumns, kTransposed>>;

// --- the loop over the stages ---

// Stages of the right operand in shared memory: one in use, and 128 bytes of k on their way.
template <bool kTransposed>
inline constexpr int kRightStages = kTransposed ? 3 : 2;

template <class T, int kColumns, bool kTransposed>
inline constexpr int kProductSharedBytes =
    (2 * kStageSize<T, kRows, kTransposed> +
     kRightStages<kTransposed> * kStageSize<T, kColumns, kTransposed>)*int{sizeof(Vector16)};

// Adds the product over stages [first, end). `left` makes the thread's part of a stage of the left operand in
// Left::kRounds rounds: Next(stage) goes on to it, Fetch(round) loads into registers, and Store(round, to) puts
// that into shared memory; the loads are on their way during a part of the product of the stage before.
// copy_right(stage, to) begins the copy of the thread's part of a stage of the right operand.
template <class T, int kColumns, bool kTransposed, class Product, class Left, class CopyRight>
JAX_DCN_DEVICE void MultiplyStages(int first, int end, Left& left, const CopyRight& copy_right, Product& product) {
  constexpr int kLeftSize = kStageSize<T, kRows, kTransposed>;
  constexpr int kRightSize = kStageSize<T, kColumns, kTransposed>;
  constexpr int kAhead = kRightStages<kTransposed> - 1;
  const Shared<Vector16> left_stages = SharedMemory<Vector16>(0);
  const Shared<Vector16> right_stages = left_stages + 2 * kLeftSize;
  for (int ahead = 0; ahead < kAhead - 1; ++ahead) {
    if (first + ahead < end) copy_right(first + ahead, right_stages + ahead * kRightSize);
    CopyCommit();
  }
  int use = kAhead;
#pragma unroll 1
  for (int next = first; next <= end; ++next) {  // the stage that is prepared while the one before is multiplied
    if (next > first) {
      // After the barrier all have stored the stage and are done with the one before, whose memory is used again.
      CopyWait<kAhead - 1>();
      SyncThreads();
    }
    const int done = use == 0 ? kAhead : use - 1;
    const int ahead = next + kAhead - 1;
    if (ahead < end) copy_right(ahead, right_stages + done * kRightSize);
    CopyCommit();
    if (next < end) left.Next(next);
#pragma unroll(Product::kPartsDiffer ? Left::kRounds : 1)
    for (int round = 0; round < Left::kRounds; ++round) {
      if (next < end) left.Fetch(round);
      SyncWarp();  // Fetch branches, and the product is of whole warps
      if (next > first) {
        product.template Add<Left::kRounds>(left_stages + (next + 1) % 2 * kLeftSize, right_stages + use * kRightSize,
                                            round);
      }
      if (next < end) left.Store(round, left_stages + next % 2 * kLeftSize);
    }
    use = use == kAhead ? 0 : use + 1;
  }
  CopyWait<0>();
}

// The right operand packed stage after stage, each of kColumns rows.
template <int kColumns>
struct CopyPacked {
  const Vector16* packed;

  JAX_DCN_DEVICE void operator()(int stage, Shared<Vector16> to) const {
    constexpr int kApart = kThreads / kRowVectors;
    static_assert(kColumns % kApart == 0);
    const int first = ThreadIndex() / kRowVectors;
    const Vector16* from = packed + (int64_t{stage} * kColumns * kRowVectors + ThreadIndex());
#pragma unroll
    for (int row = 0; row < kColumns; row += kApart) {
      CopyAsync16(to + RowVector(row + first, ThreadIndex() % kRowVectors), from + row * kRowVectors, true);
    }
  }
};

}  // namespace cuda
}  // namespace jax_dcn
