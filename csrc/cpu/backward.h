// The backward kernel.
//
// Threads share slices of the input channels: a slice owns its channels of grad_x and of grad_weight, so nothing is
// added to by two threads and the order of every sum is fixed. Tile by tile, a slice multiplies grad_y with the
// transposed weight, which gives the gradients of its samples; one pass over the samples adds to grad_x, sums what
// the gradients of offset and mask need, and samples again; and the product of these samples with grad_y is added to
// grad_weight. The first slice of a group also sums grad_y for grad_bias. Products is a class of products.h.
//
// The gradients of offset and mask are sums over all slices. They are taken band of tiles by band of tiles, in the
// order of the slices, so that what the slices leave for one another stays small. Where there are few slices the
// images are shared out too, each chunk of them with its own sums of grad_weight and grad_bias, which are added up at
// the end.

#pragma once

#include "arrays.h"
#include "sampler.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

template <class Products>
class Backward {
 public:
  using T = typename Products::Element;
  using Operand = typename Products::Operand;
  using Real = Accumulation<T>;

  Backward(const Geometry& g, const BackwardArrays& arrays)
      : g_(g),
        arrays_(arrays),
        nchw_(arrays.format == DataFormat::kNCHW),
        want_sums_(arrays.grad_offset || arrays.grad_mask),
        want_grad_samples_(want_sums_ || arrays.grad_x),
        want_samples_(want_grad_samples_ || arrays.grad_weight),
        slices_(g, kSliceChannels, kLanes<Real>),
        tap_blocks_(g, slices_.max_channels()),
        chunks_(ChunkCount()),
        tiles_(ChunkTiles(chunks_ - 1).count()),  // the last chunk is the largest
        sampler_(g, arrays.format, arrays.offset, arrays.mask, slices_),
        products_(g, arrays.format, arrays.weight, slices_, tap_blocks_),
        band_(BandTiles()) {}

  bool Run(Workers& workers) const {
    if (g_.pixels() == 0) {
      if (arrays_.grad_weight) Zero(static_cast<Real*>(arrays_.grad_weight.data), g_.weights());
      if (arrays_.grad_bias) Zero(static_cast<Real*>(arrays_.grad_bias.data), g_.c_out);
      return true;
    }
    const WorkSpace<Shared, Backward> shared_space(*this, 1);
    const WorkSpace<Scratch, Backward> scratch(*this, workers.count());
    if (!shared_space || !scratch) return false;
    const Shared shared = shared_space[0];

    if (nchw_ && want_samples_) {
      TransposeImages(workers, g_.batch, g_.c_in, g_.image(), static_cast<const T*>(arrays_.x.data), shared.x);
    }
    if (want_grad_samples_) products_.PackBackwardWeight(workers, shared.weight);
    for (int64_t first = 0; first < tiles_; first += band_) {
      const Range band{first, Min(first + band_, tiles_)};
      const auto compute = [&](int worker, int64_t i) {
        ComputeBand(i / slices_.count(), i % slices_.count(), band, shared, scratch[worker]);
      };
      ParallelFor(workers, chunks_ * slices_.count(), compute);
      if (want_sums_) {
        const auto reduce = [&](int worker, int64_t i) {
          ReduceTile(i / band.size(), band, i % band.size(), shared, scratch[worker]);
        };
        ParallelFor(workers, chunks_ * band.size(), reduce);
      }
    }
    if (arrays_.grad_weight && (nchw_ || chunks_ > 1)) {
      const auto add = [&](int, int64_t i) { AddGradWeights(shared, Range::Piece(g_.group_in(), kAddTasks, i)); };
      ParallelFor(workers, kAddTasks, add);
    }
    if (arrays_.grad_bias) {
      Real* total = static_cast<Real*>(arrays_.grad_bias.data);
      for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
        for (int64_t o = 0; o < g_.c_out; ++o) total[o] += shared.grad_biases[(chunk - 1) * g_.c_out + o];
      }
    }
    if (arrays_.grad_x && nchw_) {
      TransposeImages(workers, g_.batch, g_.image(), g_.c_in, shared.grad_x, static_cast<Real*>(arrays_.grad_x.data));
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

  // Memory that all threads see. In NCHW x, grad_x and grad_weight are worked on in NHWC.
  struct Shared {
    Shared(const Backward& b, Carver& carver)
        : x(carver.Take<T>(b.nchw_ && b.want_samples_ ? b.g_.batch * b.g_.image() * b.g_.c_in : 0)),
          grad_x(carver.Take<Real>(b.nchw_ && b.arrays_.grad_x ? b.g_.batch * b.g_.image() * b.g_.c_in : 0)),
          weight(carver.Take<Operand>(b.want_grad_samples_ ? b.products_.BackwardWeightSize() : 0)),
          parts(carver.Take<Real>(b.want_sums_ ? b.chunks_ * b.slices_.count() * b.sampler_.max_parts() * b.band_ : 0)),
          grad_weights(carver.Take<Real>(b.arrays_.grad_weight ? (b.chunks_ - (b.nchw_ ? 0 : 1)) * b.g_.weights() : 0)),
          grad_biases(carver.Take<Real>(b.arrays_.grad_bias ? (b.chunks_ - 1) * b.g_.c_out : 0)) {
      if (!b.nchw_) {
        x = static_cast<T*>(b.arrays_.x.data);
        grad_x = static_cast<Real*>(b.arrays_.grad_x.data);
      }
    }

    T* x;
    Real* grad_x;
    Operand* weight;     // packed
    Real* parts;         // (chunk, slice, tile of the band, deform group, Sampler<T>::kParts * taps, kTileRows)
    Real* grad_weights;  // (chunk, weights); in NHWC the first chunk's is the result
    Real* grad_biases;   // (chunk but the first, c_out)
  };

  // A thread's work space.
  struct Scratch {
    Scratch(const Backward& b, Carver& carver)
        : sampler(b.sampler_, carver),
          products(b.products_, carver),
          samples(carver.Take<Operand>(b.BlockSize())),
          grad_samples(carver.Take<Real>(b.BlockSize())),
          total(carver.Take<Real>(Sampler<T>::kParts * b.g_.taps() * kTileRows)) {}

    typename Sampler<T>::Scratch sampler;
    typename Products::Scratch products;
    Operand* samples;    // (pixels, taps of a block, channels of a slice)
    Real* grad_samples;  // (pixels, taps of a block, channels of a slice)
    Real* total;         // (Sampler<T>::kParts * taps, kTileRows)
  };

  Range Images(int64_t chunk) const { return Range::Piece(g_.batch, chunks_, chunk); }
  int64_t BlockSize() const { return kTileRows * tap_blocks_.max_taps() * slices_.max_channels(); }

  TileGrid ChunkTiles(int64_t chunk) const {
    const Range images = Images(chunk);
    return TileGrid(g_, {images.begin * g_.h_out, images.end * g_.h_out}, kTileRows);
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
    const int64_t tile = chunks_ * slices_.count() * sampler_.max_parts() * static_cast<int64_t>(sizeof(Real));
    return Min(tiles_, Max<int64_t>(1, kBandBytes / tile));
  }

  // --- a slice ---

  void ComputeBand(int64_t chunk, int64_t slice_index, Range band, const Shared& shared, const Scratch& space) const {
    const Slice slice = slices_[slice_index];
    if (band.begin == 0 && arrays_.grad_x) ZeroGradX(Images(chunk), slice, shared.grad_x);
    const TileGrid tiles = ChunkTiles(chunk);
    for (int64_t tile = band.begin; tile < Min(band.end, tiles.count()); ++tile) {
      const bool sum_grad_y = arrays_.grad_bias && slice.group_begin == 0;
      if (!want_samples_ && !sum_grad_y) break;
      sampler_.StartTile(tiles[tile], space.sampler);
      const int64_t pixels = space.sampler.tile->pixels;
      products_.PackGradY(slice, *space.sampler.tile, arrays_.grad_y, space.products);
      if (sum_grad_y) {
        Real* sums =
            chunk == 0 ? static_cast<Real*>(arrays_.grad_bias.data) : shared.grad_biases + (chunk - 1) * g_.c_out;
        products_.SumGradY(slice, pixels, tile > 0, space.products, sums);
      }
      if (!want_samples_) continue;
      sampler_.StartSlice(slice, space.sampler);
      Visited<T, Operand> visited;
      visited.x = shared.x;
      visited.grad_samples = space.grad_samples;
      if (arrays_.grad_weight) visited.samples = space.samples;
      if (want_sums_) visited.parts = Parts(chunk, slice.index, tile - band.begin, shared);
      if (arrays_.grad_x) visited.grad_x = shared.grad_x;
      for (int64_t block = 0; block < tap_blocks_.count(); ++block) {
        if (want_grad_samples_) {
          products_.GradSamples(slice, block, pixels, shared.weight, space.products, space.grad_samples);
        }
        sampler_.Visit(slice, tap_blocks_[block], visited, space.sampler);
        if (arrays_.grad_weight) {
          products_.GradWeight(slice, block, pixels, tile > 0, space.samples, space.products,
                               GradWeight(chunk, shared));
        }
      }
    }
  }

  void ZeroGradX(Range images, const Slice& slice, Real* grad_x) const {
    Real* pixel = grad_x + images.begin * g_.image() * g_.c_in + slice.begin;
    for (int64_t i = 0; i < images.size() * g_.image(); ++i, pixel += g_.c_in) Zero(pixel, slice.channels());
  }

  // Where a chunk adds up its part of grad_weight, in the order of NHWC.
  Real* GradWeight(int64_t chunk, const Shared& shared) const {
    if (nchw_) return shared.grad_weights + chunk * g_.weights();
    return chunk == 0 ? static_cast<Real*>(arrays_.grad_weight.data) : shared.grad_weights + (chunk - 1) * g_.weights();
  }

  // --- sums over the slices, and over the chunks ---

  // What a slice leaves for a tile of the band.
  Real* Parts(int64_t chunk, int64_t slice_index, int64_t tile, const Shared& shared) const {
    return shared.parts + ((chunk * slices_.count() + slice_index) * band_ + tile) * sampler_.max_parts();
  }

  void ReduceTile(int64_t chunk, Range band, int64_t tile, const Shared& shared, const Scratch& space) const {
    const TileGrid tiles = ChunkTiles(chunk);
    if (band.begin + tile >= tiles.count()) return;
    FillTile(g_, tiles[band.begin + tile], *space.sampler.tile);
    const int64_t taps = g_.taps();
    const int64_t size = Sampler<T>::kParts * taps * kTileRows;
    for (int64_t d = 0; d < g_.deform_groups; ++d) {
      Zero(space.total, size);
      for (int64_t i = 0; i < slices_.count(); ++i) {
        const Range groups = sampler_.DeformGroups(slices_[i]);
        if (d < groups.begin || d >= groups.end) continue;
        const Real* part = Parts(chunk, i, tile, shared) + (d - groups.begin) * size;
        for (int64_t j = 0; j < size; j += kTileRows) {
          for (int p = 0; p < space.sampler.tile->pixels; ++p) space.total[j + p] += part[j + p];
        }
      }
      if (arrays_.grad_offset) {
        StoreChannels(g_, space.total, *space.sampler.tile, g_.mask_channels() * 2, d * taps * 2, taps * 2,
                      arrays_.format, arrays_.grad_offset);
      }
      if (arrays_.grad_mask) {
        StoreChannels(g_, space.total + 2 * taps * kTileRows, *space.sampler.tile, g_.mask_channels(), d * taps, taps,
                      arrays_.format, arrays_.grad_mask);
      }
    }
  }

  // Adds the chunks' parts of `channels` of every group, in the order of the chunks, and lays them out.
  void AddGradWeights(const Shared& shared, Range channels) const {
    Real* total = static_cast<Real*>(arrays_.grad_weight.data);
    const auto sum = [&](int64_t at) {
      Real value = GradWeight(0, shared)[at];
      for (int64_t chunk = 1; chunk < chunks_; ++chunk) value += GradWeight(chunk, shared)[at];
      return value;
    };
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      for (int64_t t = 0; !nchw_ && t < g_.taps(); ++t) {
        const int64_t row = (t * g_.group_in() + c) * g_.c_out;
        for (int64_t at = row; at < row + g_.c_out; ++at) total[at] = sum(at);
      }
      for (int64_t o = 0; nchw_ && o < g_.c_out; ++o) {
        Real* out = total + (o * g_.group_in() + c) * g_.taps();
        for (int64_t t = 0; t < g_.taps(); ++t) out[t] = sum((t * g_.group_in() + c) * g_.c_out + o);
      }
    }
  }

  const Geometry& g_;
  const BackwardArrays& arrays_;
  const bool nchw_;
  const bool want_sums_;          // for the gradients of offset and mask
  const bool want_grad_samples_;  // for these and grad_x
  const bool want_samples_;       // these or the samples, for grad_weight: anything but grad_bias
  const Slices slices_;
  const TapBlocks tap_blocks_;
  const int64_t chunks_;  // of images
  const int64_t tiles_;   // of the largest chunk
  const Sampler<T> sampler_;
  const Products products_;
  const int64_t band_;  // tiles of a band
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
