// The backward kernel.
//
// Threads share slices of the input channels: a slice owns its channels of grad_x and of grad_weight, so nothing is
// added to by two threads and the order of every sum is fixed. Tile by tile, a slice multiplies grad_y with the
// transposed weight, which gives the gradients of its samples; one pass over the samples adds to grad_x, sums what
// the gradients of offset and mask need, and samples again; and the product of these samples with grad_y is added to
// grad_weight. The first slice of a group also sums grad_y for grad_bias.
//
// The gradients of offset and mask are sums over all slices. They are taken band of tiles by band of tiles, in the
// order of the slices, so that what the slices leave for one another stays small. Where there are few slices the
// images are shared out too, each chunk of them with its own sums of grad_weight and grad_bias, which are added up at
// the end.

#pragma once

#include "sampler.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class T>
class Backward {
 public:
  using Real = Accumulation<T>;

  Backward(const Geometry& g, const BackwardArrays& arrays)
      : g_(g),
        arrays_(arrays),
        want_sums_(arrays.grad_offset || arrays.grad_mask),
        want_grad_samples_(want_sums_ || arrays.grad_x),
        slices_(g, kSliceChannels, kLanes<Real>),
        tap_blocks_(TapBlocks(g, slices_.max_channels())),
        max_taps_(CeilDiv(g.taps(), tap_blocks_)),
        padded_out_(PackedSize<Real>(1, g.group_out())),
        packed_block_(PackedBlock()),
        chunks_(ChunkCount()),
        tiles_(CeilDiv(CeilDiv(g.batch, chunks_) * g.image_out(), kTileRows)),
        sampler_(g, arrays.x, arrays.offset, arrays.mask, slices_),
        band_(BandTiles()) {}

  bool Run(Workers& workers) const {
    if (g_.pixels() == 0) {
      if (arrays_.grad_weight) Zero(static_cast<Real*>(arrays_.grad_weight.data), g_.weights());
      if (arrays_.grad_bias) Zero(static_cast<Real*>(arrays_.grad_bias.data), g_.c_out);
      return true;
    }
    Carver counter;
    Shared(*this, counter);
    const Memory shared_memory(counter.used());
    Carver scratch_counter;
    Scratch(*this, scratch_counter);
    const Memory scratch(scratch_counter.used() * workers.count());
    if (!shared_memory || !scratch) return false;
    Carver carver(shared_memory.data());
    const Shared shared(*this, carver);

    if (want_grad_samples_) {
      const auto pack = [&](int, int64_t i) { PackBlock(i / tap_blocks_, i % tap_blocks_, shared.weights); };
      ParallelFor(workers, slices_.count() * tap_blocks_, pack);
    }
    for (int64_t first = 0; first < tiles_; first += band_) {
      const Range band{first, Min(first + band_, tiles_)};
      const auto compute = [&](int worker, int64_t i) {
        Carver own(scratch.data() + worker * scratch_counter.used());
        ComputeBand(i / slices_.count(), i % slices_.count(), band, shared, Scratch(*this, own));
      };
      ParallelFor(workers, chunks_ * slices_.count(), compute);
      if (want_sums_) {
        const auto reduce = [&](int worker, int64_t i) {
          Carver own(scratch.data() + worker * scratch_counter.used());
          ReduceTile(i / band.size(), band, i % band.size(), shared, Scratch(*this, own));
        };
        ParallelFor(workers, chunks_ * band.size(), reduce);
      }
    }
    if (chunks_ > 1) {
      const auto add = [&](int, int64_t i) {
        if (arrays_.grad_weight) {
          AddChunks(shared.grad_weights, g_.weights(), Range::Piece(g_.weights(), kAddTasks, i), arrays_.grad_weight);
        }
        if (arrays_.grad_bias) {
          AddChunks(shared.grad_biases, g_.c_out, Range::Piece(g_.c_out, kAddTasks, i), arrays_.grad_bias);
        }
      };
      ParallelFor(workers, kAddTasks, add);
    }
    return true;
  }

 private:
  // 32 channels leave four tasks for an image of 128; fewer would visit the offsets and grad_y more often.
  static constexpr int64_t kSliceChannels = 32;
  // How many tasks to aim at by sharing out the images too.
  static constexpr int64_t kTasks = 8;
  static constexpr int64_t kAddTasks = 8;
  // Bounds on what is shared between the threads.
  static constexpr int64_t kBandBytes = 2 << 20;
  static constexpr int64_t kChunkBytes = 4 << 20;

  // The gradients of a tap, of which the slices leave their parts: offset y, offset x, mask.
  static constexpr int64_t kParts = 3;

  // Memory that all threads see.
  struct Shared {
    Shared(const Backward& b, Carver& carver)
        : weights(carver.Take<Real>(b.want_grad_samples_ ? b.slices_.count() * b.tap_blocks_ * b.packed_block_ : 0)),
          parts(carver.Take<Real>(b.want_sums_ ? b.chunks_ * b.slices_.count() * b.SlicePart() * b.band_ : 0)),
          grad_weights(carver.Take<Real>(b.arrays_.grad_weight ? (b.chunks_ - 1) * b.g_.weights() : 0)),
          grad_biases(carver.Take<Real>(b.arrays_.grad_bias ? (b.chunks_ - 1) * b.g_.c_out : 0)) {}

    Real* weights;       // (slice, block of taps): the transposed weights, packed
    Real* parts;         // (chunk, slice, tile of the band, deform group, tap, kParts, kTileRows)
    Real* grad_weights;  // (chunk but the first, weights)
    Real* grad_biases;   // (chunk but the first, c_out)
  };

  // A thread's work space.
  struct Scratch {
    Scratch(const Backward& b, Carver& carver)
        : sampler(b.sampler_, carver),
          grad_y(carver.Take<Real>(b.slices_.max_groups() * kTileRows * b.padded_out_)),
          samples(carver.Take<Real>(b.BlockSize())),
          grad_samples(carver.Take<Real>(b.BlockSize())),
          total(carver.Take<Real>(b.g_.taps() * kParts * kTileRows)) {}

    typename Sampler<T>::Scratch sampler;
    Real* grad_y;        // (group of a slice): pixels by group_out, packed
    Real* samples;       // (pixels, taps of a block, channels of a slice)
    Real* grad_samples;  // likewise
    Real* total;         // (taps, kParts, kTileRows)
  };

  static void Zero(Real* array, int64_t count) {
    for (int64_t i = 0; i < count; ++i) array[i] = 0;
  }

  Range TapBlock(int64_t i) const { return Range::Piece(g_.taps(), tap_blocks_, i); }
  Range Images(int64_t chunk) const { return Range::Piece(g_.batch, chunks_, chunk); }
  int64_t BlockSize() const { return kTileRows * max_taps_ * slices_.max_channels(); }
  int64_t SlicePart() const { return sampler_.max_deform_groups() * g_.taps() * kParts * kTileRows; }

  // The pixels of a chunk's tile; none if the chunk has fewer tiles than the largest one.
  Range TilePixels(int64_t chunk, int64_t tile) const {
    const Range images = Images(chunk);
    const int64_t begin = images.begin * g_.image_out();
    const int64_t end = images.end * g_.image_out();
    const int64_t first = Min(begin + tile * kTileRows, end);
    return {first, Min(first + kTileRows, end)};
  }

  int64_t ChunkCount() const {
    int64_t chunks = Min(g_.batch, CeilDiv(kTasks, slices_.count()));
    if (arrays_.grad_weight) {
      chunks = Min(chunks, 1 + kChunkBytes / (g_.weights() * static_cast<int64_t>(sizeof(Real))));
    }
    return Max<int64_t>(chunks, 1);
  }

  int64_t BandTiles() const {
    if (!want_sums_) return tiles_;
    const int64_t tile = chunks_ * slices_.count() * SlicePart() * static_cast<int64_t>(sizeof(Real));
    return Min(tiles_, Max<int64_t>(1, kBandBytes / tile));
  }

  // --- the transposed weights ---

  // A slice within a group has adjacent columns for all taps of a block, which makes one product; of a slice of
  // several groups each tap and group makes its own.
  static bool Joined(const Slice& slice) { return slice.groups == 1; }

  int64_t PackedBlock() const {
    const int64_t joined = PackedSize<Real>(g_.group_out(), max_taps_ * slices_.max_channels());
    const int64_t apart =
        slices_.max_groups() * max_taps_ * PackedSize<Real>(g_.group_out(), Min(g_.group_in(), slices_.max_channels()));
    return Max(joined, apart);
  }

  // Transposes a block of `channels` by group_out weights into the columns from `column` on.
  void PackTransposed(const T* weight, int64_t channels, int64_t columns, int64_t column, Real* packed) const {
    const int64_t width = PanelWidth<Real>(columns);
    for (int64_t c = 0; c < channels; ++c, ++column) {
      Real* out = packed + column / width * g_.group_out() * width + column % width;
      for (int64_t o = 0; o < g_.group_out(); ++o) out[o * width] = ToReal(weight[c * g_.c_out + o]);
    }
  }

  void PackBlock(int64_t slice_index, int64_t block, Real* weights) const {
    const Slice slice = slices_[slice_index];
    const Range taps = TapBlock(block);
    Real* packed = weights + (slice_index * tap_blocks_ + block) * packed_block_;
    Zero(packed, packed_block_);
    for (int64_t group = 0; group < slice.groups; ++group) {
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const T* from = static_cast<const T*>(arrays_.weight.data) +
                        (t * g_.group_in() + slice.group_begin) * g_.c_out +
                        (slice.first_group + group) * g_.group_out();
        if (Joined(slice)) {
          PackTransposed(from, slice.channels(), taps.size() * slice.channels(), (t - taps.begin) * slice.channels(),
                         packed);
        } else {
          PackTransposed(from, slice.group_channels, slice.group_channels, 0, packed);
          packed += PackedSize<Real>(g_.group_out(), slice.group_channels);
        }
      }
    }
  }

  // --- a slice ---

  void ComputeBand(int64_t chunk, int64_t slice_index, Range band, const Shared& shared, const Scratch& space) const {
    const Slice slice = slices_[slice_index];
    if (band.begin == 0 && arrays_.grad_x) ZeroGradX(Images(chunk), slice);
    for (int64_t tile = band.begin; tile < band.end; ++tile) {
      const Range pixels = TilePixels(chunk, tile);
      if (pixels.size() == 0) break;
      PackGradY(slice, pixels, space);
      if (arrays_.grad_bias && slice.group_begin == 0) {
        SumGradY(slice, pixels.size(), tile > 0, Sums(chunk, arrays_.grad_bias, shared.grad_biases, g_.c_out), space);
      }
      if (!want_grad_samples_ && !arrays_.grad_weight) continue;
      sampler_.StartTile(pixels, space.sampler);
      sampler_.StartSlice(slice, space.sampler);
      Real* parts = nullptr;
      if (want_sums_) {
        parts = shared.parts + ((chunk * slices_.count() + slice_index) * band_ + tile - band.begin) * SlicePart();
      }
      for (int64_t block = 0; block < tap_blocks_; ++block) {
        const Range taps = TapBlock(block);
        if (want_grad_samples_) {
          MultiplyWeight(slice, taps, pixels.size(),
                         shared.weights + (slice_index * tap_blocks_ + block) * packed_block_, space);
        }
        VisitBlock(slice, taps, parts, space);
        if (arrays_.grad_weight) {
          MultiplySamples(slice, taps, pixels.size(), tile > 0,
                          Sums(chunk, arrays_.grad_weight, shared.grad_weights, g_.weights()), space);
        }
      }
    }
  }

  void ZeroGradX(Range images, const Slice& slice) const {
    Real* pixel = static_cast<Real*>(arrays_.grad_x.data) + images.begin * g_.image() * g_.c_in + slice.begin;
    for (int64_t i = 0; i < images.size() * g_.image(); ++i, pixel += g_.c_in) Zero(pixel, slice.channels());
  }

  void PackGradY(const Slice& slice, Range pixels, const Scratch& space) const {
    for (int64_t group = 0; group < slice.groups; ++group) {
      const T* from = static_cast<const T*>(arrays_.grad_y.data) + pixels.begin * g_.c_out +
                      (slice.first_group + group) * g_.group_out();
      PackRows(from, g_.c_out, pixels.size(), g_.group_out(), pixels.size(), 0,
               space.grad_y + group * kTileRows * padded_out_);
    }
  }

  // Where a chunk adds up its part of a gradient of `size`.
  static Real* Sums(int64_t chunk, const Array& result, Real* others, int64_t size) {
    return chunk == 0 ? static_cast<Real*>(result.data) : others + (chunk - 1) * size;
  }

  // grad_bias (+)= the sum of grad_y's rows
  void SumGradY(const Slice& slice, int64_t rows, bool accumulate, Real* grad_bias, const Scratch& space) const {
    const int64_t width = PanelWidth<Real>(g_.group_out());
    for (int64_t group = 0; group < slice.groups; ++group) {
      const Real* panel = space.grad_y + group * kTileRows * padded_out_;
      Real* out = grad_bias + (slice.first_group + group) * g_.group_out();
      for (int64_t o = 0; o < g_.group_out(); ++o) {
        const Real* column = panel + o / width * rows * width + o % width;
        Real sum = 0;
        for (int64_t p = 0; p < rows; ++p) sum += column[p * width];
        out[o] = accumulate ? out[o] + sum : sum;
      }
    }
  }

  // grad_samples = grad_y * transposed weight
  void MultiplyWeight(const Slice& slice, Range taps, int64_t rows, const Real* packed, const Scratch& space) const {
    const int64_t row_stride = taps.size() * slice.channels();
    const int64_t width = PanelWidth<Real>(g_.group_out());
    const int64_t products = Joined(slice) ? 1 : taps.size();
    const int64_t columns = Joined(slice) ? row_stride : slice.group_channels;
    for (int64_t group = 0; group < slice.groups; ++group) {
      Left<Real> grad_y;
      grad_y.data = space.grad_y + group * kTileRows * padded_out_;
      grad_y.stride = width;
      grad_y.run = width;
      grad_y.run_stride = rows * width;
      for (int64_t t = 0; t < products; ++t) {
        Multiply<false>(grad_y, rows, g_.group_out(), packed, columns,
                        space.grad_samples + t * slice.channels() + group * slice.group_channels, row_stride, false);
        packed += PackedSize<Real>(g_.group_out(), columns);
      }
    }
  }

  // grad_weight (+)= transposed samples * grad_y
  void MultiplySamples(const Slice& slice, Range taps, int64_t rows, bool accumulate, Real* grad_weight,
                       const Scratch& space) const {
    for (int64_t group = 0; group < slice.groups; ++group) {
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        Left<Real> samples;
        samples.data = space.samples + (t - taps.begin) * slice.channels() + group * slice.group_channels;
        samples.stride = taps.size() * slice.channels();
        samples.run = rows;
        samples.run_stride = 0;
        Multiply<true>(samples, slice.group_channels, rows, space.grad_y + group * kTileRows * padded_out_,
                       g_.group_out(),
                       grad_weight + (t * g_.group_in() + slice.group_begin) * g_.c_out +
                           (slice.first_group + group) * g_.group_out(),
                       g_.c_out, accumulate);
      }
    }
  }

  // --- the pass over the samples ---

  void VisitBlock(const Slice& slice, Range taps, Real* parts, const Scratch& space) const {
    switch ((arrays_.grad_weight ? 4 : 0) + (want_sums_ ? 2 : 0) + (arrays_.grad_x ? 1 : 0)) {
      case 1: return VisitBlock<false, false, true>(slice, taps, parts, space);
      case 2: return VisitBlock<false, true, false>(slice, taps, parts, space);
      case 3: return VisitBlock<false, true, true>(slice, taps, parts, space);
      case 4: return VisitBlock<true, false, false>(slice, taps, parts, space);
      case 5: return VisitBlock<true, false, true>(slice, taps, parts, space);
      case 6: return VisitBlock<true, true, false>(slice, taps, parts, space);
      case 7: return VisitBlock<true, true, true>(slice, taps, parts, space);
    }
  }

  template <bool kSamples, bool kSums, bool kGradX>
  void VisitBlock(const Slice& slice, Range taps, Real* parts, const Scratch& space) const {
    const int64_t first_group = sampler_.DeformGroups(slice).begin;
    sampler_.template VisitBlock<kSamples, kSums, kGradX>(
        slice, taps, space.sampler, space.samples, space.grad_samples, static_cast<Real*>(arrays_.grad_x.data),
        [&](int64_t t, int64_t d, const Tap<Real>& tap) {
          if constexpr (kSums) {
            FinishSums(tap, space.sampler, parts + ((d - first_group) * g_.taps() + t) * kParts * kTileRows);
          }
        });
  }

  // From the sums per corner to the gradients of one tap's offset and mask.
  static void FinishSums(const Tap<Real>& tap, const typename Sampler<T>::Scratch& space, Real* part) {
    for (int p = 0; p < space.tile->rows; ++p) {
      const Real value[kCorners] = {space.sums[0][p], space.sums[1][p], space.sums[2][p], space.sums[3][p]};
      part[p] = tap.mask[p] * DerivativeY(value, tap.lx[p]);
      part[kTileRows + p] = tap.mask[p] * DerivativeX(value, tap.ly[p]);
      part[2 * kTileRows + p] = (value[0] * tap.weight[0][p] + value[1] * tap.weight[1][p]) +
                                (value[2] * tap.weight[2][p] + value[3] * tap.weight[3][p]);
    }
  }

  // --- sums over the slices, and over the chunks ---

  void ReduceTile(int64_t chunk, Range band, int64_t tile, const Shared& shared, const Scratch& space) const {
    const Range pixels = TilePixels(chunk, band.begin + tile);
    if (pixels.size() == 0) return;
    const int rows = static_cast<int>(pixels.size());
    const int64_t channels = g_.mask_channels();
    for (int64_t d = 0; d < g_.deform_groups; ++d) {
      Zero(space.total, g_.taps() * kParts * kTileRows);
      for (int64_t i = 0; i < slices_.count(); ++i) {
        const Range groups = sampler_.DeformGroups(slices_[i]);
        if (d < groups.begin || d >= groups.end) continue;
        const Real* part = shared.parts + ((chunk * slices_.count() + i) * band_ + tile) * SlicePart() +
                           (d - groups.begin) * g_.taps() * kParts * kTileRows;
        for (int64_t j = 0; j < g_.taps() * kParts; ++j) {
          for (int p = 0; p < rows; ++p) space.total[j * kTileRows + p] += part[j * kTileRows + p];
        }
      }
      for (int64_t t = 0; t < g_.taps(); ++t) {
        const Real* total = space.total + t * kParts * kTileRows;
        const int64_t channel = d * g_.taps() + t;
        if (arrays_.grad_offset) {
          StoreChannels(total, pixels.begin, rows, channels * 2, channel * 2, 2, arrays_.grad_offset);
        }
        if (arrays_.grad_mask) {
          StoreChannels(total + 2 * kTileRows, pixels.begin, rows, channels, channel, 1, arrays_.grad_mask);
        }
      }
    }
  }

  void AddChunks(const Real* others, int64_t size, Range range, const Array& result) const {
    Real* total = static_cast<Real*>(result.data);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk, others += size) {
      for (int64_t i = range.begin; i < range.end; ++i) total[i] += others[i];
    }
  }

  const Geometry& g_;
  const BackwardArrays& arrays_;
  const bool want_sums_;          // for the gradients of offset and mask
  const bool want_grad_samples_;  // for these and grad_x
  const Slices slices_;
  const int64_t tap_blocks_;
  const int64_t max_taps_;      // of a block
  const int64_t padded_out_;    // columns of a group's packed grad_y
  const int64_t packed_block_;  // packed weights of a slice and block of taps
  const int64_t chunks_;        // of images
  const int64_t tiles_;         // of the largest chunk
  const Sampler<T> sampler_;
  const int64_t band_;  // tiles of a band
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
