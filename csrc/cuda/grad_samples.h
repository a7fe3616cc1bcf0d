// The kernels of the gradients of x, offset and mask.
//
// GradSamples: a block takes 128 output pixels and a tap. It multiplies grad_y with the weight, some channels at a
// time, which gives the gradients of its samples, and visits these: it adds to grad_x with atomics, and sums what the
// gradients of offset and mask need, which it alone writes. Where the order of the sums must not change from run to
// run, GradXInOrder adds to grad_x instead. Small groups make the gradients of their samples in a way of their own.

#pragma once

#include "problem.h"
#include "product.h"
#include "small_groups.h"

namespace jax_dcn {
namespace cuda {

// Of the products of GradSamples: as many as leave room for the rest in 64 KB of shared memory.
template <class T>
inline constexpr int kChannels = sizeof(T) == 8 ? 32 : 64;

// The left operand: the rows of grad_y and the output channels of a group. Eight threads share a row.
template <class T, class Tag>
class GradRows {
 public:
  static constexpr int kRounds = 2;

  JAX_DCN_DEVICE GradRows(const Problem& p, const T* grad_y, int64_t first_pixel, int group)
      : p_(p), first_pixel_(first_pixel), at_(grad_y + group * p.padded_group_out) {
    at_ += (first_pixel + ThreadIndex() / kRowVectors) * c_out() + channel_;
  }

  JAX_DCN_DEVICE void Next() {
    channel_ += kStage<T>;
    at_ += kStage<T>;
  }

  JAX_DCN_DEVICE void Fetch(int round) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = Row(round, i);
      const bool there = channel_ < p_.padded_group_out && first_pixel_ + row < p_.pixels;
      vector_[i] = there ? LoadGlobal16(at_ + (round * kOwn + i) * kApart * c_out()) : Vector16{};
    }
  }

  JAX_DCN_DEVICE void Store(int round, Shared<Vector16> to) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      to[RowVector(Row(round, i), ThreadIndex() % kRowVectors)] = RoundVector<T, Tag>(vector_[i]);
    }
  }

 private:
  static constexpr int kApart = kThreads / kRowVectors;
  static constexpr int kOwn = kRows / kApart / kRounds;

  static JAX_DCN_DEVICE int Row(int round, int i) { return ThreadIndex() / kRowVectors + (round * kOwn + i) * kApart; }
  JAX_DCN_DEVICE int64_t c_out() const { return int64_t{p_.groups} * p_.padded_group_out; }

  const Problem& p_;
  const int64_t first_pixel_;
  int channel_ = ThreadIndex() % kRowVectors * kVector<T> - kStage<T>;  // in the group; Next() comes first
  const T* at_;
  Vector16 vector_[kOwn];
};

// kRows located samples, in shared memory, field by field.
template <class Real>
class LocatedSamples {
 public:
  static constexpr int kBytes = kRows * (7 * int{sizeof(Real)} + 8 + 4);

  JAX_DCN_DEVICE explicit LocatedSamples(int byte)
      : corner_(SharedMemory<int64_t>(byte)),
        real_(SharedMemory<Real>(byte + kRows * 8)),
        flags_(SharedMemory<int>(byte + kRows * (8 + 7 * int{sizeof(Real)}))) {}

  // Locates one, at a tap of a deform group; pixels from `end` on sample nothing. A barrier must follow.
  template <class T>
  JAX_DCN_DEVICE void Locate(int row, const Problem& p, const Samples<T>& samples, int64_t index, int64_t end, int tap,
                             int deform_group) {
    const OutputPixel pixel(p, index);
    Displacement<Real> displacement;
    displacement.Load(p, samples, pixel.index, end, tap, deform_group);
    const Sample<Real> s = displacement.Locate(p, pixel, tap);
    const Real mask = displacement.mask;
    corner_[row] = pixel.image + s.index;
    int flags = s.valid ? kValid : 0;
    for (int k = 0; k < kCorners; ++k) {
      real_[k * kRows + row] = s.weight[k] * mask;
      flags |= s.inside[k] ? 1 << k : 0;
    }
    real_[4 * kRows + row] = s.ly;
    real_[5 * kRows + row] = s.lx;
    real_[6 * kRows + row] = mask;
    flags_[row] = flags;
  }

  JAX_DCN_DEVICE int64_t corner(int row) const { return corner_[row]; }
  JAX_DCN_DEVICE Real weight(int k, int row) const { return real_[k * kRows + row]; }  // times the mask
  JAX_DCN_DEVICE Real ly(int row) const { return real_[4 * kRows + row]; }
  JAX_DCN_DEVICE Real lx(int row) const { return real_[5 * kRows + row]; }
  JAX_DCN_DEVICE Real mask(int row) const { return real_[6 * kRows + row]; }
  JAX_DCN_DEVICE int flags(int row) const { return flags_[row]; }  // bit k: corner k is inside
  static constexpr int kValid = 1 << kCorners;

 private:
  Shared<int64_t> corner_;
  Shared<Real> real_;
  Shared<int> flags_;
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

// The gradients of the samples of a product: (kRows, kChannels), after the product in the memory of its operands.
template <class Real>
inline constexpr int kGradPitch = kChannels<Real> + kVector<Real>;

template <class T>
struct GradSamplesMemory {
  using Real = Accumulation<T>;
  static constexpr int kProduct = kProductSharedBytes<T, kChannels<T>, false>;
  static constexpr int kGrads = kRows * kGradPitch<Real> * int{sizeof(Real)};
  static constexpr int kLocated = kProduct > kGrads ? kProduct : kGrads;  // where they begin
  static constexpr int kSums = kLocated + LocatedSamples<Real>::kBytes;
  static constexpr int kBytes = kSums + kCorners * kRows * int{sizeof(Real)};
};

// The parts that make all channels of a tap.
template <class T>
JAX_DCN_INLINE int ChannelParts(const Problem& p) {
  return p.groups * static_cast<int>(CeilDiv(p.group_in, kChannels<T>));
}

// The channels of a part.
template <class T>
struct ChannelPart {
  int group, first, end;

  JAX_DCN_DEVICE ChannelPart(const Problem& p, int part) {
    const int tiles = ChannelParts<T>(p) / p.groups;
    group = part / tiles;
    first = group * p.group_in + part % tiles * kChannels<T>;
    const int group_end = (group + 1) * p.group_in;
    end = first + kChannels<T> < group_end ? first + kChannels<T> : group_end;
  }
};

// What makes the gradients of a part's samples, in shared memory, by products. A barrier must follow a call, and one
// stand before the next. The packed weight is (tap, group, tile of kChannels channels, stage, channel of the tile, k of
// the stage).
template <class T_, class Tag>
struct ProductGrads {
  using T = T_;
  const T* grad_y;
  const Vector16* weights;
  int stages;

  JAX_DCN_DEVICE void Make(const Problem& p, int64_t first_pixel, int tap, int part,
                           Shared<Accumulation<T>> grads) const {
    const int64_t parts = ChannelParts<T>(p);
    GradRows<T, Tag> left(p, grad_y, first_pixel, ChannelPart<T>(p, part).group);
    const CopyPacked<kChannels<T>> right{weights + (tap * parts + part) * stages * kChannels<T> * kRowVectors};
    Product<T, Tag, kChannels<T>> product;
    MultiplyStages<T, kChannels<T>, false>(stages, left, right, product);
    SyncThreads();
    product.ForEach([&](int row, int column, const auto& values) {
      for (int i = 0; i < decltype(product)::kRun; ++i) {
        grads[row * kGradPitch<Accumulation<T>> + column + i] = values[i];
      }
    });
  }
};

// The same for small groups. Each thread makes those of a channel of every so many pixels.
template <class T_>
struct SmallGroupsGrads {
  using T = T_;
  SmallGroups groups;
  const T* grad_y;
  const T* weight;

  JAX_DCN_DEVICE void Make(const Problem& p, int64_t first_pixel, int tap, int part,
                           Shared<Accumulation<T>> grads) const {
    using Real = Accumulation<T>;
    constexpr int kApart = kThreads / kChannels<T>;
    const int column = ThreadIndex() % kChannels<T>;
    const int padded = ChannelPart<T>(p, part).first + column;
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

// grad_x is padded; null, like the data of grad_offset and grad_mask, if not wanted.
template <class Grads, class T = typename Grads::T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 2)
    GradSamplesKernel(Problem p, Samples<T> samples, Grads make_grads, Accumulation<T>* grad_x, Array grad_offset,
                      Array grad_mask) {
  using Real = Accumulation<T>;
  using Located = LocatedSamples<Real>;
  // Up to eight threads visit a pixel, each four channels at a time, so that a warp's accesses are of 128 bytes in a
  // row. They are fewer where that would be more channels than a deform group has.
  int pixel_threads = 8;
  while (pixel_threads > 1 && pixel_threads * 4 > p.deform_in) pixel_threads /= 2;
  const int round_pixels = kThreads / pixel_threads;

  const int thread = ThreadIndex();
  const int tap = BlockIndex().x % p.taps;
  const int64_t first_pixel = static_cast<int64_t>(BlockIndex().x / p.taps) * kRows;
  const bool want_sums = grad_offset.data != nullptr || grad_mask.data != nullptr;
  const int parts = ChannelParts<T>(p);
  const int64_t row_stride = int64_t{p.width} * p.c_in;
  Located located(GradSamplesMemory<T>::kLocated);
  const Shared<Real> grads = SharedMemory<Real>(0);

  // Of gradient times corner value over the channels of a deform group so far: (corner, row). The first thread of a
  // pixel keeps them, in shared memory, as it has no registers left during a product.
  const Shared<Real> sums = SharedMemory<Real>(GradSamplesMemory<T>::kSums);
  const bool keeps_sums = thread % pixel_threads == 0;
  const auto clear_sums = [&](int row) {
    for (int k = 0; k < kCorners; ++k) sums[k * kRows + row] = Real(0);
  };
  for (int row = thread / pixel_threads; row < kRows && keeps_sums; row += round_pixels) clear_sums(row);

  // Channels [begin, end) lie in one deform group; `first` is that of column 0 of the product.
  const auto visit = [&](int begin, int end, int first) {
    for (int row = thread / pixel_threads; row < kRows; row += round_pixels) {
      const int flags = located.flags(row);
      Real own[kCorners] = {};
      const int64_t corner = located.corner(row) * p.c_in;
      for (int c = begin + thread % pixel_threads * 4; c < end && flags != 0; c += pixel_threads * 4) {
        Real grad[4];
        for (int i = 0; i < 4; i += kVector<Real>) {
          Real part[kVector<Real>];
          Unpack<Real>(SharedCast<Vector16>(grads)[(row * kGradPitch<Real> + c - first + i) / kVector<Real>], part);
          for (int j = 0; j < kVector<Real>; ++j) grad[i + j] = part[j];
        }
        for (int k = 0; k < kCorners; ++k) {
          const int64_t at = corner + ((k & 1) * p.c_in + (k >> 1) * row_stride) + c;
          const bool inside = (flags >> k & 1) != 0;
          if (want_sums) {
            Real value[4];
            LoadChannels(inside ? samples.x + at : samples.zeros + c, value);
            for (int i = 0; i < 4; ++i) own[k] += grad[i] * value[i];
          }
          if (grad_x != nullptr && inside) {
            const Real weight = located.weight(k, row);
            const Real add[4] = {grad[0] * weight, grad[1] * weight, grad[2] * weight, grad[3] * weight};
            AtomicAdd4(grad_x + at, add);
          }
        }
      }
      if (want_sums) {
        for (int k = 0; k < kCorners; ++k) {
          for (int lanes = pixel_threads / 2; lanes > 0; lanes /= 2) own[k] += ShuffleXor(own[k], lanes);
          if (keeps_sums) sums[k * kRows + row] = sums[k * kRows + row] + own[k];
        }
      }
    }
  };

  // Writes the gradients of a deform group's offset and mask, and begins the sums of the next.
  const auto finish = [&](int deform_group) {
    for (int row = thread / pixel_threads; row < kRows && keeps_sums; row += round_pixels) {
      if (first_pixel + row >= p.pixels) break;
      // An invalid sample has no gradient, not even where grad_y is infinite.
      const bool valid = (located.flags(row) & Located::kValid) != 0;
      const Real ly = located.ly(row), lx = located.lx(row), mask = located.mask(row);
      Real corners[kCorners];
      for (int k = 0; k < kCorners; ++k) corners[k] = sums[k * kRows + row];
      const int64_t i = ((first_pixel + row) * p.deform_groups + deform_group) * p.taps + tap;
      if (grad_offset.data != nullptr) {
        StoreElement(grad_offset, 2 * i, valid ? mask * DerivativeY(corners, lx) : Real(0));
        StoreElement(grad_offset, 2 * i + 1, valid ? mask * DerivativeX(corners, ly) : Real(0));
      }
      if (grad_mask.data != nullptr) StoreElement(grad_mask, i, valid ? Interpolate(corners, ly, lx) : Real(0));
      clear_sums(row);
    }
  };

  int located_group = -1;
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    const int first = ChannelPart<T>(p, part).first;
    const int end = ChannelPart<T>(p, part).end;
    make_grads.Make(p, first_pixel, tap, part, grads);
    for (int begin = first; begin < end;) {
      const int deform_group = begin / p.deform_in;
      const int deform_end = (deform_group + 1) * p.deform_in;
      const int run_end = deform_end < end ? deform_end : end;
      if (deform_group != located_group) {
        SyncThreads();
        if (thread < kRows) located.Locate(thread, p, samples, first_pixel + thread, p.pixels, tap, deform_group);
        located_group = deform_group;
      }
      if (begin == first || deform_group * p.deform_in == begin) SyncThreads();
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
    GradXInOrderKernel(Problem p, Samples<T> samples, Grads make_grads, Accumulation<T>* grad_x) {
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
  LocatedSamples<Real> located(GradSamplesMemory<T>::kLocated);
  const Shared<Real> grads = SharedMemory<Real>(0);

#pragma unroll 1
  for (int64_t pixel = first_pixel; pixel < end_pixel; pixel += kRows) {
#pragma unroll 1
    for (int tap = 0; tap < p.taps; ++tap) {
      make_grads.Make(p, pixel, tap, part, grads);
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
          const int flags = located.flags(at);
          const Real grad = grads[row * kGradPitch<Real> + thread];
          Real* corner = grad_x + located.corner(at) * p.c_in + channel;
          // All four are loaded before one is stored, as the compiler cannot know that they are apart.
          Real sum[kCorners];
          for (int k = 0; k < kCorners; ++k) {
            if ((flags >> k & 1) != 0) sum[k] = corner[(k & 1) * p.c_in + (k >> 1) * row_stride];
          }
          for (int k = 0; k < kCorners; ++k) {
            if ((flags >> k & 1) != 0) {
              corner[(k & 1) * p.c_in + (k >> 1) * row_stride] = sum[k] + grad * located.weight(k, at);
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
