// The kernels of calls without a weight, in which each channel is the sum of its own samples over the taps.
//
// A block takes some pairs of an output pixel and a deform group, which lie one after another in all arrays. It locates
// their samples, at all taps or as many as there is room for, in shared memory, once for all channels of the group.
// Then, forward, each thread sums a vector of channels over the taps in registers; backward, the threads of a pair go
// through the taps, add to grad_x with atomics, and sum over the channels what the gradients of offset and mask need,
// which they alone write. Where the order of the sums must not change from run to run, GradXInOrderSums adds to grad_x
// instead.

#pragma once

#include <algorithm>

#include "located.h"
#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// Samples that a block locates at a time: 128 pairs at nine taps, which with what else it keeps is less than 48 KB.
template <class Real>
inline constexpr int kSamples = sizeof(Real) == 8 ? 512 : 1152;

// A call without a weight as the kernels see it, in which the runs of channels are the deform groups. What only these
// kernels know of is not in Problem, as the others' registers are just enough.
struct SumsProblem : Problem {
  // As in Geometry.
  int kernel_h;
  bool x_first;
  Levels levels;

  SumsProblem(const Geometry& g, int vector)
      : Problem(InOneGroup(g), vector), kernel_h(static_cast<int>(g.kernel_h)), x_first(g.x_first), levels(g.levels) {}

 private:
  static Geometry InOneGroup(Geometry g) {
    g.groups = 1;
    return g;
  }
};

// An output pixel and a deform group.
template <class Real>
struct Pair {
  int64_t index;  // of all pairs
  int64_t image;  // index of the first input pixel of its image
  Real y, x;      // where a tap at (0, 0) samples with no offset
};

// How a block goes through the taps of its pairs: so many at a time. A pair's samples have an odd number of places, as
// the threads of a warp read those of several pairs at one tap, which then are in different banks.
struct Windows {
  int pairs, taps, pitch, count;

  Windows(const SumsProblem& p, int pairs, int samples) : pairs(pairs) {
    const int most = (samples / pairs - 1) | 1;
    count = static_cast<int>(CeilDiv(p.taps, most));
    taps = static_cast<int>(CeilDiv(p.taps, count));
    pitch = taps | 1;
  }
};

// The pairs and the samples of a block, in shared memory.
template <class T>
class PairSamples {
 public:
  using Real = Accumulation<T>;
  using Located = LocatedSamples<Real, kSamples<Real>>;
  static constexpr int kPairBytes = kThreads * int{sizeof(Pair<Real>)};
  static constexpr int kBytes = kPairBytes + Located::kBytes;
  static constexpr int kBytesForGradients = kBytes + 3 * kSamples<Real> * int{sizeof(Real)};

  JAX_DCN_DEVICE PairSamples(const SumsProblem& p, const Windows& windows, const Samples<T>& from)
      : located(kPairBytes),
        p_(p),
        windows_(windows),
        from_(from),
        pairs_(SharedMemory<Pair<Real>>(0)),
        real_(SharedMemory<Real>(kBytes)) {}

  // The thread's pair, -1 if there is none. A barrier must follow.
  JAX_DCN_DEVICE void SetPair(int64_t index) {
    if (ThreadIndex() >= windows_.pairs) return;
    Pair<Real> pair{index, 0, 0, 0};
    if (index >= 0) {
      const OutputPixel pixel(p_, index / p_.deform_groups);
      pair.image = pixel.image;
      pair.y = static_cast<Real>(pixel.row * p_.stride_h - p_.padding_h);
      pair.x = static_cast<Real>(pixel.column * p_.stride_w - p_.padding_w);
    }
    pairs_[ThreadIndex()] = pair;
  }
  JAX_DCN_DEVICE int64_t Index(int pair) const { return static_cast<Pair<Real>>(pairs_[pair]).index; }

  // Locates the samples of all pairs at the taps of a window, and for gradients keeps more of them. Ends with a
  // barrier.
  template <bool kForGradients>
  JAX_DCN_DEVICE void Locate(int window) {
    first_ = window * windows_.taps;
    count_ = p_.taps - first_ < windows_.taps ? p_.taps - first_ : windows_.taps;
    for (int i = ThreadIndex(); i < windows_.pairs * count_; i += kThreads) {
      const Pair<Real> pair = pairs_[i / count_];
      if (pair.index < 0) continue;
      const int tap = first_ + i % count_;
      const int to = At(i / count_, tap);
      const Place<Real> place = PlaceOf<Real>(p_, tap);
      const int64_t at = pair.index * p_.taps + tap;
      const Real dy = LoadElement<Real>(from_.offset, 2 * at + (p_.x_first ? 1 : 0));
      const Real dx = LoadElement<Real>(from_.offset, 2 * at + (p_.x_first ? 0 : 1));
      const Real mask = from_.mask.data != nullptr ? LoadElement<Real>(from_.mask, at) : Real(1);
      const Sample<Real> s = cuda::Locate(place, pair.y, pair.x, dy, dx);
      located.Set(to, p_, pair.image + place.first, s, mask);
      if constexpr (kForGradients) {
        real_[to] = s.ly;
        real_[kSamples<Real> + to] = s.lx;
        real_[2 * kSamples<Real> + to] = mask;
      }
    }
    SyncThreads();
  }

  // The taps of the window.
  JAX_DCN_DEVICE int first_tap() const { return first_; }
  JAX_DCN_DEVICE int end_tap() const { return first_ + count_; }
  // Where a pair's sample is.
  JAX_DCN_DEVICE int At(int pair, int tap) const { return pair * windows_.pitch + tap - first_; }
  JAX_DCN_DEVICE Real ly(int at) const { return real_[at]; }
  JAX_DCN_DEVICE Real lx(int at) const { return real_[kSamples<Real> + at]; }
  JAX_DCN_DEVICE Real mask(int at) const { return real_[2 * kSamples<Real> + at]; }

  Located located;

 private:
  const SumsProblem& p_;
  const Windows& windows_;
  const Samples<T>& from_;
  Shared<Pair<Real>> pairs_;
  Shared<Real> real_;
  int first_ = 0, count_ = 0;
};

// Goes through taps in their order, and knows what those of an image have in common.
template <class Real>
class TapImages {
 public:
  JAX_DCN_DEVICE explicit TapImages(const SumsProblem& p) : p_(p) {}

  JAX_DCN_DEVICE void GoTo(int tap) {
    if (tap >= first_ && tap < end_) return;
    const int taps = p_.levels.count == 0 ? p_.taps : p_.taps / p_.levels.count;
    first_ = tap / taps * taps;
    end_ = first_ + taps;
    const Place<Real> place = PlaceOf<Real>(p_, tap);
    row_stride = int64_t{place.width} * p_.c_in;
    scale_y = place.scale_y;
    scale_x = place.scale_x;
  }

  int64_t row_stride = 0;
  Real scale_y = 1, scale_x = 1;

 private:
  const SumsProblem& p_;
  int first_ = 0, end_ = 0;
};

// Where corner `k` of a sample is, counted from corner 0.
template <class Real>
JAX_DCN_DEVICE int64_t CornerAt(const SumsProblem& p, const TapImages<Real>& image, int k) {
  return (k & 1) * p.c_in + (k >> 1) * image.row_stride;
}

// --- forward ---

template <class T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 2)
    ForwardSumsKernel(SumsProblem p, Windows windows, Samples<T> samples, int64_t pairs, T* y) {
  using Real = Accumulation<T>;
  using Located = typename PairSamples<T>::Located;
  const int vectors = p.deform_in / kVector<T>;  // of a pair
  const int64_t first_pair = int64_t{BlockIndex().x} * windows.pairs;
  PairSamples<T> table(p, windows, samples);
  table.SetPair(first_pair + ThreadIndex() < pairs ? first_pair + ThreadIndex() : -1);
  SyncThreads();
  // One item for each thread, unless a pair alone has more.
#pragma unroll 1
  for (int first = 0; first < windows.pairs * vectors; first += kThreads) {
    const int item = first + ThreadIndex();
    const int pair = item / vectors;
    const int64_t index = pair < windows.pairs ? table.Index(pair) : -1;
    const int vector = item % vectors;
    const T* x = samples.x + (index % p.deform_groups * p.deform_in + vector * kVector<T>);
    Real sum[kVector<T>] = {};
    TapImages<Real> image(p);
#pragma unroll 1
    for (int window = 0; window < windows.count; ++window) {
      if (first == 0 || windows.count > 1) {
        SyncThreads();
        table.template Locate<false>(window);
      }
      if (index < 0) continue;
#pragma unroll 1
      for (int tap = table.first_tap(); tap < table.end_tap(); ++tap) {
        image.GoTo(tap);
        const int at = table.At(pair, tap);
        const int64_t corner = table.located.corner(at);
        const T* from = x + (corner >> Located::kFlags);
        Vector16 loaded[kCorners] = {};
        for (int k = 0; k < kCorners; ++k) {
          if (Located::Inside(corner, k)) loaded[k] = LoadGlobal16(from + CornerAt(p, image, k));
        }
        Real weight[kCorners];
        table.located.Weights(at, weight);
        for (int k = 0; k < kCorners; ++k) {
          Real value[kVector<T>];
          Unpack<T>(loaded[k], value);
          for (int i = 0; i < kVector<T>; ++i) sum[i] += value[i] * weight[k];
        }
      }
    }
    if (index < 0) continue;
    T* to = y + (index * p.unit + vector * kVector<T>);
    if (p.unit == p.padded_unit) {
      *reinterpret_cast<Vector16*>(to) = Pack<T, T>(sum);
    } else {
      for (int i = 0; i < kVector<T> && vector * kVector<T> + i < p.unit; ++i) FromReal(sum[i], to[i]);
    }
  }
}

// --- backward ---

// Channels that a thread takes together.
template <class T>
inline constexpr int kRun = kChannelVector<T>;

template <class T>
JAX_DCN_DEVICE void LoadRun(const T* from, Accumulation<T> (&to)[kRun<T>]) {
  for (int v = 0; v < kRun<T>; v += kVector<T>) {
    Accumulation<T> part[kVector<T>];
    Unpack<T>(LoadGlobal16(from + v), part);
    for (int i = 0; i < kVector<T>; ++i) to[v + i] = part[i];
  }
}

// `threads`, a power of two within a warp, share a pair. grad_y and grad_x are padded; grad_x is null, like the data of
// grad_offset and grad_mask, if not wanted.
template <class T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 2)
    GradSumsKernel(SumsProblem p, Windows windows, Samples<T> samples, int64_t pairs, int threads, const T* grad_y,
                   Accumulation<T>* grad_x, Array grad_offset, Array grad_mask) {
  using Real = Accumulation<T>;
  using Located = typename PairSamples<T>::Located;
  const bool want_sums = grad_offset.data != nullptr || grad_mask.data != nullptr;
  const int64_t first_pair = int64_t{BlockIndex().x} * windows.pairs;
  PairSamples<T> table(p, windows, samples);
  table.SetPair(first_pair + ThreadIndex() < pairs ? first_pair + ThreadIndex() : -1);
  SyncThreads();
  const int pair = ThreadIndex() / threads;
  const int lane = ThreadIndex() % threads;
  const int64_t index = table.Index(pair);
  const int first = static_cast<int>(index % p.deform_groups) * p.deform_in;
  const T* grads = grad_y + index * p.deform_in;
  TapImages<Real> image(p);
#pragma unroll 1
  for (int window = 0; window < windows.count; ++window) {
    SyncThreads();
    table.template Locate<true>(window);
#pragma unroll 1
    for (int tap = table.first_tap(); tap < table.end_tap(); ++tap) {
      image.GoTo(tap);
      const int at = table.At(pair, tap);
      const int64_t corner = index < 0 ? 0 : table.located.corner(at);
      // An invalid sample has no gradient, not even where grad_y is infinite.
      const bool valid = Located::Valid(corner);
      Real sum[kCorners] = {};
#pragma unroll 1
      for (int c = lane * kRun<T>; valid && c < p.deform_in; c += threads * kRun<T>) {
        const int64_t channel = (corner >> Located::kFlags) + first + c;
        Real grad[kRun<T>];
        LoadRun<T>(grads + c, grad);
        // All corners are loaded before the first addition, which the compiler cannot move them across.
        for (int k = 0; k < kCorners; ++k) {
          if (!want_sums || !Located::Inside(corner, k)) continue;
          Real value[kRun<T>];
          LoadRun<T>(samples.x + (channel + CornerAt(p, image, k)), value);
          for (int i = 0; i < kRun<T>; ++i) sum[k] += grad[i] * value[i];
        }
        if (grad_x == nullptr) continue;
        Real weight[kCorners];
        table.located.Weights(at, weight);
        for (int k = 0; k < kCorners; ++k) {
          if (!Located::Inside(corner, k)) continue;
          Real* to = grad_x + (channel + CornerAt(p, image, k));
          for (int i = 0; i < kRun<T>; i += 4) {
            const Real add[4] = {grad[i] * weight[k], grad[i + 1] * weight[k], grad[i + 2] * weight[k],
                                 grad[i + 3] * weight[k]};
            AtomicAdd4(to + i, add);
          }
        }
      }
      if (!want_sums) continue;
      // Linear in the sums, so that three numbers go from thread to thread and not four.
      Real gradient[3] = {};
      if (valid) {
        const Real ly = table.ly(at), lx = table.lx(at), mask = table.mask(at);
        gradient[0] = image.scale_y * (mask * DerivativeY(sum, lx));
        gradient[1] = image.scale_x * (mask * DerivativeX(sum, ly));
        gradient[2] = Interpolate(sum, ly, lx);
      }
      for (int other = threads / 2; other > 0; other /= 2) {
        for (Real& number : gradient) number += ShuffleXor(number, other);
      }
      if (lane != 0 || index < 0) continue;
      const int64_t i = index * p.taps + tap;
      if (grad_offset.data != nullptr) {
        StoreElement(grad_offset, 2 * i + (p.x_first ? 1 : 0), gradient[0]);
        StoreElement(grad_offset, 2 * i + (p.x_first ? 0 : 1), gradient[1]);
      }
      if (grad_mask.data != nullptr) StoreElement(grad_mask, i, gradient[2]);
    }
  }
}

// The channels that a block of GradXInOrderSums owns, and their deform groups.
struct OwnedChannels {
  int first, first_group, groups;

  JAX_DCN_INLINE OwnedChannels(const SumsProblem& p, int part)
      : first(part * kThreads), first_group(first / p.deform_in) {
    const int end = first + kThreads < p.c_in ? first + kThreads : p.c_in;
    groups = (end - 1) / p.deform_in - first_group + 1;
  }
};

// grad_x alone, in the same order in every run: a block owns some channels of an image, and each of its threads a
// channel, to which it adds sample after sample. Pairs are of the pixels of the image and these channels' groups.
template <class T>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 2)
    GradXInOrderSumsKernel(SumsProblem p, Windows windows, Samples<T> samples, const T* grad_y,
                           Accumulation<T>* grad_x) {
  using Real = Accumulation<T>;
  using Located = typename PairSamples<T>::Located;
  const int parts = static_cast<int>(CeilDiv(p.c_in, kThreads));
  const OwnedChannels owned(p, BlockIndex().x % parts);
  const int channel = owned.first + ThreadIndex();
  const int group = channel / p.deform_in - owned.first_group;
  const int pixels = windows.pairs / owned.groups;  // at a time
  const int64_t first = BlockIndex().x / parts * p.image_out;
  PairSamples<T> table(p, windows, samples);
  TapImages<Real> image(p);
#pragma unroll 1
  for (int64_t pixel = first; pixel < first + p.image_out; pixel += pixels) {
    SyncThreads();
    const int64_t own = pixel + ThreadIndex() / owned.groups;
    const bool there = ThreadIndex() / owned.groups < pixels && own < first + p.image_out;
    table.SetPair(there ? own * p.deform_groups + owned.first_group + ThreadIndex() % owned.groups : -1);
#pragma unroll 1
    for (int window = 0; window < windows.count; ++window) {
      SyncThreads();
      table.template Locate<false>(window);
#pragma unroll 1
      for (int i = 0; i < pixels && channel < p.c_in; ++i) {
        const int pair = i * owned.groups + group;
        const int64_t index = table.Index(pair);
        if (index < 0) break;
        const Real grad = ToReal(grad_y[index * p.deform_in + channel % p.deform_in]);
#pragma unroll 1
        for (int tap = table.first_tap(); tap < table.end_tap(); ++tap) {
          image.GoTo(tap);
          const int64_t corner = table.located.corner(table.At(pair, tap));
          Real weight[kCorners];
          table.located.Weights(table.At(pair, tap), weight);
          Real* to = grad_x + ((corner >> Located::kFlags) + channel);
          // All four are loaded before one is stored, as the compiler cannot know that they are apart.
          Real sum[kCorners];
          for (int k = 0; k < kCorners; ++k) {
            if (Located::Inside(corner, k)) sum[k] = to[CornerAt(p, image, k)];
          }
          for (int k = 0; k < kCorners; ++k) {
            if (Located::Inside(corner, k)) to[CornerAt(p, image, k)] = sum[k] + grad * weight[k];
          }
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace jax_dcn
