// The kernels of the gradients of x, offset and mask.
//
// GradSamples: a block takes 128 output pixels and a tap. It multiplies grad_y, which stays in shared memory, with the
// weight, some channels at a time, which gives the gradients of its samples, and visits these: it adds to grad_x with
// atomics, and sums what the gradients of offset and mask need, which it alone writes. Where the order of the sums must
// not change from run to run, GradXInOrder adds to grad_x instead. Small groups make the gradients of their samples in
// a way of their own.

#pragma once

#include <algorithm>

#include "bundles.h"
#include "layout.h"
#include "located.h"
#include "problem.h"
#include "product.h"
#include "small_groups.h"

namespace jax_dcn {
namespace cuda {

// Of the products of GradSamples: as many as leave room for the rest in 64 KB of shared memory.
template <class T>
inline constexpr int kChannels = sizeof(T) == 8 ? 32 : 64;

// The parts that make all channels of a tap.
template <class T>
JAX_DCN_INLINE int ChannelParts(const Problem& p) {
  return p.bundles() * static_cast<int>(CeilDiv(p.bundle_in, kChannels<T>));
}

// The channels of a part, of one bundle of groups.
template <class T>
struct ChannelPart {
  int part, bundle, first, end;

  JAX_DCN_DEVICE ChannelPart(const Problem& p, int part) : part(part) {
    const int tiles = ChannelParts<T>(p) / p.bundles();
    bundle = part / tiles;
    first = bundle * p.bundle_in + part % tiles * kChannels<T>;
    const int bundle_end = (bundle + 1) * p.bundle_in < p.c_in ? (bundle + 1) * p.bundle_in : p.c_in;
    end = first + kChannels<T> < bundle_end ? first + kChannels<T> : bundle_end;
  }
};

// The gradients of a part's samples: (kRows, kChannels). Four rows' eight floats in a row are in different banks.
template <class Real>
inline constexpr int kGradPitch = kChannels<Real> + 8;

// A block's shared memory. It has `slots` stages of grad_y and as many of the weight: all of a group's, so that grad_y
// stays there for all products of the block's pixels, or else two that are filled in turn, or one; the first of these
// that leaves memory for a second block on the processor, or if none does that fits. The gradients come where the
// weight was, or where both were.
template <class T>
struct GradSamplesMemory {
  using Real = Accumulation<T>;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // doubles leave no registers for a second one
  static constexpr int kMostKept = 8;                     // 192 KB, and more fit no device
  int slots;
  bool keeps;
  int grads, located, sums, bytes;  // where they begin, and the end

  // Where a block may have `shared_bytes`: what a processor has, less 1 KB, which CUDA takes for each block.
  GradSamplesMemory(int stages, int shared_bytes) {
    for (int blocks = kBlocks; blocks > 0; --blocks) {
      const int most = (shared_bytes - (blocks - 1) * (1 << 10)) / blocks;
      *this = stages <= kMostKept ? GradSamplesMemory(stages, true) : GradSamplesMemory(2, false);
      for (int fewer = 2; bytes > most && fewer > 0; --fewer) *this = GradSamplesMemory(fewer, false);
      if (bytes <= most) return;
    }
  }

 private:
  GradSamplesMemory(int slots, bool keeps) : slots(slots), keeps(keeps) {
    constexpr int kVectorBytes = sizeof(Vector16);
    const int left = slots * kStageSize<T, kRows, false> * kVectorBytes;
    const int right = slots * kStageSize<T, kChannels<T>, false> * kVectorBytes;
    grads = keeps ? left : 0;
    located = std::max(left + right, grads + kRows * kGradPitch<Real> * int{sizeof(Real)});
    sums = located + LocatedSamples<Real>::kBytes + 3 * kRows * int{sizeof(Real)};
    bytes = sums + kRows * kCorners * int{sizeof(Real)};
  }
};

// Copies what a stage has of grad_y, a row for each pixel: the thread's vector of all its rows, from a channel of a
// group on.
template <class T>
JAX_DCN_DEVICE void CopyGradY(const Problem& p, const T* grad_y, int64_t first_pixel, int group, int channel,
                              Shared<Vector16> to) {
#pragma unroll 1
  for (int row = ThreadIndex() / kRowVectors; row < kRows; row += kThreads / kRowVectors) {
    const int64_t pixel = first_pixel + row;
    const bool there = pixel < p.pixels && group < p.groups && channel < p.padded_group_out;
    const T* from = there ? grad_y + (pixel * p.c_out() + group * p.padded_group_out + channel) : grad_y;
    CopyAsync16(to + RowVector(row, ThreadIndex() % kRowVectors), from, there);
  }
}

// Stores a run of a product's results.
template <class T, int kRun>
JAX_DCN_DEVICE void StoreGrads(Shared<Accumulation<T>> grads, int row, int column,
                               const Accumulation<T> (&values)[kRun]) {
  const int at = row * kGradPitch<Accumulation<T>> + column;
  if constexpr (kRun == 2) {
    SharedCast<Vector8>(grads)[at / 2] = {{FloatBits(values[0]), FloatBits(values[1])}};
  } else {
    grads[at] = values[0];
  }
}

// The packed weight, a batch for each tap: columns are channels, k are output channels.
template <class T>
struct TapWeight : PackedWeight {
  explicit TapWeight(const Problem& p)
      : PackedWeight(p, p.taps, p.group_in, kChannels<T>, static_cast<int>(CeilDiv(p.padded_group_out, kStage<T>)),
                     kRowVectors) {}

  JAX_DCN_INLINE Element At(int tap, int group, int column, int stage, int vector, int element) const {
    return {group, tap, column, (stage * kRowVectors + vector) * kVector<T> + element};
  }
};

// That of bundles.
template <class T>
struct TapBundleWeight : PackedWeight {
  BundleShape shape;

  explicit TapBundleWeight(const Problem& p)
      : PackedWeight(p, p.taps, kBundleColumns, kBundleColumns, 1, p.group_in / kVector<T>), shape{row_vectors} {}

  JAX_DCN_INLINE Element At(int tap, int bundle, int column, int, int vector, int element) const {
    return {bundle * shape.groups() + column / shape.columns(), tap, column % shape.columns(),
            vector * kVector<T> + element};
  }
};

// What makes the gradients of a part's samples, in shared memory, by products. A barrier must follow a call, and one
// stand before the next.
template <class T_, class Tag>
struct ProductGrads {
  using T = T_;
  static constexpr int kVisited = kOnTensorCores<Tag> ? 2 : 1;  // rows at a time, as registers allow

  const T* grad_y;
  const Vector16* weights;
  int stages;
  int64_t kept = -1;  // the pixels and the group whose grad_y is in shared memory

  JAX_DCN_DEVICE void Make(const Problem& p, const GradSamplesMemory<T>& memory, int64_t first_pixel, int tap,
                           const ChannelPart<T>& channels, Shared<Accumulation<T>> grads) {
    constexpr int kLeftSize = kStageSize<T, kRows, false>;
    constexpr int kRightSize = kStageSize<T, kChannels<T>, false>;
    const int group = channels.bundle;
    const int64_t rows = first_pixel * p.groups + group;
    const Shared<Vector16> left = SharedMemory<Vector16>(0);
    const Shared<Vector16> right = left + memory.slots * kLeftSize;
    const CopyPacked<kChannels<T>> copy_right{weights + (int64_t{tap} * ChannelParts<T>(p) + channels.part) * stages *
                                                            kChannels<T> * kRowVectors};
    const bool there = memory.keeps && kept == rows;
    kept = rows;
    const auto copy = [&](int stage, int slot) {
      const int channel = (stage * kRowVectors + ThreadIndex() % kRowVectors) * kVector<T>;
      if (!there) CopyGradY(p, grad_y, first_pixel, group, channel, left + slot * kLeftSize);
      copy_right(stage, right + slot * kRightSize);
      CopyCommit();
    };

    Product<T, Tag, kChannels<T>, false, std::is_same_v<Tag, TF32>> product;
    for (int stage = 0; stage < (memory.keeps ? stages : 1); ++stage) copy(stage, stage);
    int slot = 0;
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      if (stage == 0 || !memory.keeps) {
        CopyWait<0>();
        SyncThreads();
      }
      const int next = slot + 1 < memory.slots ? slot + 1 : 0;
      const bool more = !memory.keeps && stage + 1 < stages;
      if (more && next != slot) copy(stage + 1, next);
      SyncWarp();  // a copy may branch, and the product is of whole warps
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        product.template Add<2>(left + slot * kLeftSize, right + slot * kRightSize, half);
      }
      if (more && next == slot) {
        SyncThreads();
        copy(stage + 1, next);
      }
      slot = next;
    }
    SyncThreads();
    product.ForEach([&](int row, int column, const auto& values) { StoreGrads<T>(grads, row, column, values); });
  }
};

// The same for bundles.
template <class T_, class Tag>
struct BundleGrads {
  using T = T_;
  static constexpr int kVisited = kOnTensorCores<Tag> ? 2 : 1;

  const T* grad_y;
  const Vector16* weights;
  BundleShape shape;

  JAX_DCN_DEVICE void Make(const Problem& p, const GradSamplesMemory<T>&, int64_t first_pixel, int tap,
                           const ChannelPart<T>& channels, Shared<Accumulation<T>> grads) const {
    const Shared<Vector16> left = SharedMemory<Vector16>(0);
    const Shared<Vector16> right = left + kStageSize<T, kRows, false>;
    const int vector = ThreadIndex() % kRowVectors;
    CopyGradY(p, grad_y, first_pixel, channels.bundle * shape.groups() + vector / shape.vectors,
              vector % shape.vectors * kVector<T>, left);
    CopyBundle{weights, shape}(tap * p.bundles() + channels.bundle, right);
    CopyCommit();
    CopyWait<0>();
    SyncThreads();
    BundleProduct<T, Tag, std::is_same_v<Tag, TF32>> product(shape);
    product.template Add<1>(left, right, 0);
    SyncThreads();
    product.ForEach([&](int row, int column, const auto& values) {
      const int channel = column % shape.columns();
      if (channel < p.group_in) StoreGrads<T>(grads, row, column / shape.columns() * p.group_in + channel, values);
    });
  }
};

// The same for small groups. Each thread makes those of a channel of every so many pixels.
template <class T_>
struct SmallGroupsGrads {
  using T = T_;
  static constexpr int kVisited = sizeof(T) == 8 ? 1 : 2;

  SmallGroups groups;
  const T* grad_y;
  const T* weight;

  JAX_DCN_DEVICE void Make(const Problem& p, const GradSamplesMemory<T>&, int64_t first_pixel, int tap,
                           const ChannelPart<T>& channels, Shared<Accumulation<T>> grads) const {
    using Real = Accumulation<T>;
    constexpr int kApart = kThreads / kChannels<T>;
    const int column = ThreadIndex() % kChannels<T>;
    const int padded = channels.first + column;
    const int channel = padded < p.c_in ? p.Unpadded(padded) : -1;
    for (int row = ThreadIndex() / kChannels<T>; row < kRows; row += kApart) {
      const int64_t pixel = first_pixel + row;
      Real sum = 0;
      if (channel >= 0 && pixel < p.pixels) {
        const int first_out = channel / groups.group_in * groups.group_out;
        const T* grad = grad_y + pixel * groups.c_out() + first_out;
        const T* by = weight + groups.Weight(tap, channel % groups.group_in, first_out);
        for (int out = 0; out < groups.group_out; ++out) sum += ToReal(grad[out]) * ToReal(by[out]);
      }
      grads[row * kGradPitch<Real> + column] = sum;
    }
  }
};

// Four channels.
template <class T>
JAX_DCN_DEVICE void LoadChannels(const T* from, Accumulation<T> (&to)[4]) {
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < 2; ++i) {
      double pair[2];
      Unpack<T>(LoadGlobal16(from + 2 * i), pair);
      to[2 * i] = pair[0];
      to[2 * i + 1] = pair[1];
    }
  } else if constexpr (std::is_same_v<T, float>) {
    Unpack<T>(LoadGlobal16(from), to);
  } else {
    const Vector8 words = LoadGlobal8(from);
    for (int i = 0; i < 2; ++i) {
      float pair[2];
      UnpackWord<T>(words.word[i], pair);
      to[2 * i] = pair[0];
      to[2 * i + 1] = pair[1];
    }
  }
}

// Samples of a block's pixels, located for all that GradSamples needs.
template <class T>
class LocatedGrads {
 public:
  using Real = Accumulation<T>;
  using Located = LocatedSamples<Real>;

  // From a byte of shared memory on.
  JAX_DCN_DEVICE explicit LocatedGrads(int byte) : samples(byte), real_(SharedMemory<Real>(byte + Located::kBytes)) {}

  // Locates one, at a tap of a deform group; pixels from `end` on sample nothing. A barrier must follow.
  JAX_DCN_DEVICE void Locate(int row, const Problem& p, const Samples<T>& from, int64_t index, int64_t end, int tap,
                             int deform_group) {
    const OutputPixel pixel(p, index);
    Displacement<Real> displacement;
    displacement.Load(p, from, pixel.index, end, tap, deform_group);
    const Sample<Real> s = displacement.Locate(p, pixel, tap);
    samples.Set(row, p, pixel.image, s, displacement.mask);
    real_[row] = s.ly;
    real_[kRows + row] = s.lx;
    real_[2 * kRows + row] = displacement.mask;
  }

  JAX_DCN_DEVICE Real ly(int row) const { return real_[row]; }
  JAX_DCN_DEVICE Real lx(int row) const { return real_[kRows + row]; }
  JAX_DCN_DEVICE Real mask(int row) const { return real_[2 * kRows + row]; }

  Located samples;

 private:
  Shared<Real> real_;
};

// The sums over a deform group's channels of gradient times corner value, so far, in shared memory: (row, corner). A
// warp's rows are its own.
template <class Real>
class CornerSums {
 public:
  // From a byte of shared memory on. `threads`, two or more, share a row.
  JAX_DCN_DEVICE CornerSums(int byte, int threads) : byte_(byte), threads_(threads) {}

  JAX_DCN_DEVICE void Clear(int row) const {
    for (int v = 0; v < kVectors; ++v) Row(row)[v] = Vector16{};
  }

  JAX_DCN_DEVICE void Get(int row, Real (&sum)[kCorners]) const {
    for (int v = 0; v < kVectors; ++v) {
      Real part[kVector<Real>];
      Unpack<Real>(Row(row)[v], part);
      for (int i = 0; i < kVector<Real>; ++i) sum[v * kVector<Real> + i] = part[i];
    }
  }

  // Adds what the threads of a row have. In each step of the sum over them a thread gives away half of its corners, so
  // that it takes few shuffles.
  JAX_DCN_DEVICE void Add(int row, const Real (&own)[kCorners]) const {
    const int lane = ThreadIndex() % threads_;
    const int half = threads_ / 2, quarter = threads_ / 4;
    const bool lower = (lane & half) != 0;  // has corners 2 and 3 from now on
    const Shared<Real> sums = SharedCast<Real>(Row(row)) + (lower ? 2 : 0);
    const Real left = (lower ? own[2] : own[0]) + ShuffleXor(lower ? own[0] : own[2], half);
    const Real right = (lower ? own[3] : own[1]) + ShuffleXor(lower ? own[1] : own[3], half);
    if (quarter == 0) {
      sums[0] = sums[0] + left;
      sums[1] = sums[1] + right;
      return;
    }
    const bool is_right = (lane & quarter) != 0;
    Real sum = (is_right ? right : left) + ShuffleXor(is_right ? left : right, quarter);
    for (int lanes = quarter / 2; lanes > 0; lanes /= 2) sum += ShuffleXor(sum, lanes);
    if (lane % quarter == 0) sums[is_right] = sums[is_right] + sum;
  }

 private:
  static constexpr int kVectors = kCorners * sizeof(Real) / sizeof(Vector16);
  JAX_DCN_DEVICE Shared<Vector16> Row(int row) const {
    return SharedMemory<Vector16>(byte_ + row * kVectors * int{sizeof(Vector16)});
  }

  int byte_, threads_;
};

// grad_x is padded; null, like the data of grad_offset and grad_mask, if not wanted.
template <class Grads, class T = typename Grads::T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, GradSamplesMemory<T>::kBlocks)
    GradSamplesKernel(Problem p, GradSamplesMemory<T> memory, Samples<T> samples, Grads make_grads,
                      Accumulation<T>* grad_x, Array grad_offset, Array grad_mask) {
  using Real = Accumulation<T>;
  using Located = LocatedSamples<Real>;
  // As many threads visit a pixel, each with four channels, as a deform group has channels for, up to a part's. A
  // warp's accesses are then of up to 256 bytes in a row.
  int pixel_threads = 2;
  while (pixel_threads * 4 < kChannels<T> && pixel_threads * 4 < p.deform_in) pixel_threads *= 2;

  const int thread = ThreadIndex(), lane = thread % kWarp;
  const int tap = BlockIndex().x % p.taps;
  const int64_t first_pixel = static_cast<int64_t>(BlockIndex().x / p.taps) * kRows;
  const bool want_sums = grad_offset.data != nullptr || grad_mask.data != nullptr;
  const int parts = ChannelParts<T>(p);
  const int64_t row_stride = int64_t{p.width} * p.c_in;
  LocatedGrads<T> located(memory.located);
  const CornerSums<Real> sums(memory.sums, pixel_threads);
  const Shared<Real> grads = SharedMemory<Real>(memory.grads);

  // A warp has so many rows, which it visits some at a time; each of its first lanes owns one.
  constexpr int kWarpRows = kRows / kWarps;
  const int warp_row = thread / kWarp * kWarpRows;
  const int round_rows = kWarp / pixel_threads;
  const int own_row = warp_row + lane;
  const bool owns_row = lane < kWarpRows;
  if (owns_row) sums.Clear(own_row);

  // Channels [begin, end) lie in one deform group; `first` is that of column 0 of the product.
  const auto visit = [&](int begin, int end, int first) {
    constexpr int kTogether = Grads::kVisited;
    const int c = begin + thread % pixel_threads * 4;
#pragma unroll 1
    for (int first_row = 0; first_row < kWarpRows; first_row += kTogether * round_rows) {
      int64_t corner[kTogether];
      Real grad[kTogether][4], own[kTogether][kCorners] = {};
      // All values are loaded before the first addition, which the compiler cannot move them across.
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int in_warp = first_row + r * round_rows + lane / pixel_threads;
        const int row = warp_row + in_warp;
        corner[r] = c < end && in_warp < kWarpRows ? located.samples.corner(row) : 0;
        if (!Located::Valid(corner[r])) continue;
        for (int v = 0; v < 4; v += kVector<Real>) {
          Real part[kVector<Real>];
          Unpack<Real>(SharedCast<Vector16>(grads)[(row * kGradPitch<Real> + c - first + v) / kVector<Real>], part);
          for (int i = 0; i < kVector<Real>; ++i) grad[r][v + i] = part[i];
        }
        if (!want_sums) continue;
        const T* from = samples.x + ((corner[r] >> Located::kFlags) + c);
        for (int k = 0; k < kCorners; ++k) {
          const bool inside = Located::Inside(corner[r], k);
          Real value[4];
          LoadChannels(inside ? from + ((k & 1) * p.c_in + (k >> 1) * row_stride) : samples.zeros + c, value);
          for (int i = 0; i < 4; ++i) own[r][k] += grad[r][i] * value[i];
        }
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int in_warp = first_row + r * round_rows + lane / pixel_threads;
        const int row = warp_row + in_warp;
        if (grad_x != nullptr && Located::Valid(corner[r])) {
          Real weight[kCorners];
          located.samples.Weights(row, weight);
          Real* to = grad_x + ((corner[r] >> Located::kFlags) + c);
          for (int k = 0; k < kCorners; ++k) {
            if (!Located::Inside(corner[r], k)) continue;
            const Real add[4] = {grad[r][0] * weight[k], grad[r][1] * weight[k], grad[r][2] * weight[k],
                                 grad[r][3] * weight[k]};
            AtomicAdd4(to + ((k & 1) * p.c_in + (k >> 1) * row_stride), add);
          }
        }
        if (want_sums && in_warp < kWarpRows) sums.Add(row, own[r]);
      }
    }
  };

  // Writes the gradients of a deform group's offset and mask, and begins the sums of the next. A barrier must follow.
  const auto finish = [&](int deform_group) {
    SyncWarp();
    if (owns_row && first_pixel + own_row < p.pixels) {
      // An invalid sample has no gradient, not even where grad_y is infinite.
      const bool valid = Located::Valid(located.samples.corner(own_row));
      const Real ly = located.ly(own_row), lx = located.lx(own_row), mask = located.mask(own_row);
      Real corners[kCorners];
      sums.Get(own_row, corners);
      const int64_t i = ((first_pixel + own_row) * p.deform_groups + deform_group) * p.taps + tap;
      if (grad_offset.data != nullptr) {
        StoreElement(grad_offset, 2 * i, valid ? mask * DerivativeY(corners, lx) : Real(0));
        StoreElement(grad_offset, 2 * i + 1, valid ? mask * DerivativeX(corners, ly) : Real(0));
      }
      if (grad_mask.data != nullptr) StoreElement(grad_mask, i, valid ? Interpolate(corners, ly, lx) : Real(0));
    }
    if (owns_row) sums.Clear(own_row);
  };

  int located_group = -1;
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    const ChannelPart<T> channels(p, part);
    const int first = channels.first, end = channels.end;
    make_grads.Make(p, memory, first_pixel, tap, channels, grads);
    for (int begin = first; begin < end;) {
      const int deform_group = begin / p.deform_in;
      const int deform_end = (deform_group + 1) * p.deform_in;
      const int run_end = deform_end < end ? deform_end : end;
      if (deform_group != located_group) {
        if (begin != first) SyncThreads();
        if (thread < kRows) located.Locate(thread, p, samples, first_pixel + thread, p.pixels, tap, deform_group);
        located_group = deform_group;
      }
      SyncThreads();
      visit(begin, run_end, first);
      if (run_end == deform_end && want_sums) finish(deform_group);
      begin = run_end;
    }
    SyncThreads();
  }
}

// grad_x alone, in the same order in every run: a block owns the channels of a part of an image, and each of its
// threads a channel, to which it adds sample after sample. So few threads that wait for memory are slow, about ten
// times slower than atomics.
template <class Grads, class T = typename Grads::T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 2)
    GradXInOrderKernel(Problem p, GradSamplesMemory<T> memory, Samples<T> samples, Grads make_grads,
                       Accumulation<T>* grad_x) {
  using Real = Accumulation<T>;
  const int parts = ChannelParts<T>(p);
  const int part = BlockIndex().x % parts;
  const int64_t first_pixel = BlockIndex().x / parts * p.image_out;
  const int64_t end_pixel = first_pixel + p.image_out;
  const ChannelPart<T> channels(p, part);
  const int thread = ThreadIndex();
  const int channel = channels.first + thread;
  const int64_t row_stride = int64_t{p.width} * p.c_in;
  // The deform groups of the part; located together, they leave room for so many pixels.
  const int first_group = channels.first / p.deform_in;
  const int groups = (channels.end - 1) / p.deform_in - first_group + 1;
  const int located_pixels = kRows / groups;
  LocatedGrads<T> located(memory.located);
  const Shared<Real> grads = SharedMemory<Real>(memory.grads);

#pragma unroll 1
  for (int64_t pixel = first_pixel; pixel < end_pixel; pixel += kRows) {
#pragma unroll 1
    for (int tap = 0; tap < p.taps; ++tap) {
      make_grads.Make(p, memory, pixel, tap, channels, grads);
#pragma unroll 1
      for (int first_row = 0; first_row < kRows; first_row += located_pixels) {
        const int end_row = first_row + located_pixels < kRows ? first_row + located_pixels : kRows;
        if (thread < (end_row - first_row) * groups) {
          located.Locate(thread, p, samples, pixel + first_row + thread / groups, end_pixel, tap,
                         first_group + thread % groups);
        }
        SyncThreads();
        for (int row = first_row; row < end_row && channel < channels.end; ++row) {
          const int at = (row - first_row) * groups + channel / p.deform_in - first_group;
          const int64_t corner = located.samples.corner(at);
          Real weight[kCorners];
          located.samples.Weights(at, weight);
          const Real grad = grads[row * kGradPitch<Real> + thread];
          Real* to = grad_x + ((corner >> LocatedSamples<Real>::kFlags) + channel);
          // All four are loaded before one is stored, as the compiler cannot know that they are apart.
          Real sum[kCorners];
          for (int k = 0; k < kCorners; ++k) {
            if (LocatedSamples<Real>::Inside(corner, k)) sum[k] = to[(k & 1) * p.c_in + (k >> 1) * row_stride];
          }
          for (int k = 0; k < kCorners; ++k) {
            if (LocatedSamples<Real>::Inside(corner, k)) {
              to[(k & 1) * p.c_in + (k >> 1) * row_stride] = sum[k] + grad * weight[k];
            }
          }
        }
        SyncThreads();
      }
    }
  }
}

}  // namespace cuda
}  // namespace jax_dcn
