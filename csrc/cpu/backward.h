// The backward kernel.
//
// Threads share slices of the input channels: a slice owns its channels of grad_x and of grad_weight, so nothing is
// added to by two threads and the order of every sum is fixed. Tile by tile, a slice multiplies grad_y with the
// transposed weight, which gives the gradients of its samples; one pass over the samples adds to grad_x, sums what
// the gradients of offset and mask need, and samples again; and the product of these samples with grad_y is added to
// grad_weight. The first slice of a group also sums grad_y for grad_bias.
//
// A depthwise convolution has no products of matrices: each channel of grad_y is multiplied with its own weight and its
// own samples.
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

// Where pairs of bfloat16 numbers are multiplied in one instruction, Operand is BFloat16, which rounds the samples;
// grad_y and the weight are such numbers already.
template <class T, class Operand>
class Backward {
 public:
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
        out_width_(PanelWidth<Real>(g.group_out())),
        padded_out_(PackedColumns<Real>(g.group_out())),
        packed_block_(PackedBlock()),
        chunks_(ChunkCount()),
        tiles_(ChunkTiles(chunks_ - 1).count()),  // the last chunk is the largest
        sampler_(g, arrays.format, arrays.offset, arrays.mask, slices_),
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
    if (want_grad_samples_) {
      const auto pack = [&](int, int64_t i) {
        PackBlock(i / tap_blocks_.count(), i % tap_blocks_.count(), shared.weights);
      };
      if (g_.depthwise()) {
        PackDepthwise<T>(g_, arrays_.format, arrays_.weight, shared.weights);
      } else {
        ParallelFor(workers, slices_.count() * tap_blocks_.count(), pack);
      }
    }
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
  static constexpr int kStep = Step<Operand>::kDepth;
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
          weights(carver.Take<Operand>(
              b.want_grad_samples_ ? b.slices_.count() * b.tap_blocks_.count() * b.packed_block_ : 0)),
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
    Operand* weights;    // (slice, block of taps): the transposed weights, packed; depthwise: (taps, channels)
    Real* parts;         // (chunk, slice, tile of the band, deform group, Sampler<T>::kParts * taps, kTileRows)
    Real* grad_weights;  // (chunk, weights); in NHWC the first chunk's is the result
    Real* grad_biases;   // (chunk but the first, c_out)
  };

  // A thread's work space.
  struct Scratch {
    Scratch(const Backward& b, Carver& carver)
        : sampler(b.sampler_, carver),
          grad_y(carver.Take<Operand>(b.GradYSize())),
          samples(carver.Take<Operand>(b.BlockSize() + kPanel<Real>)),
          grad_y_rows(kStep == 1 ? grad_y : carver.Take<Operand>(b.GradYSize())),
          sample_rows(kStep == 1 ? samples : carver.Take<Operand>(b.BlockSize())),
          grad_samples(carver.Take<Real>(b.BlockSize())),
          total(carver.Take<Real>(Sampler<T>::kParts * b.g_.taps() * kTileRows)) {}

    typename Sampler<T>::Scratch sampler;
    Operand* grad_y;   // (group of a slice): pixels by group_out, packed; depthwise: (pixels, channels of a slice)
    Operand* samples;  // (pixels, taps of a block, channels of a slice), and room for a vector that ends beyond
    // The same before two pixels each were made pairs, where the products take pairs.
    Operand* grad_y_rows;
    Operand* sample_rows;
    Real* grad_samples;  // (pixels, taps of a block, channels of a slice)
    Real* total;         // (Sampler<T>::kParts * taps, kTileRows)
  };

  Range Images(int64_t chunk) const { return Range::Piece(g_.batch, chunks_, chunk); }
  int64_t GradYSize() const { return slices_.max_groups() * kTileRows * padded_out_; }
  int64_t BlockSize() const { return kTileRows * tap_blocks_.max_taps() * slices_.max_channels(); }

  // Rows that `pixels` take in a product over them.
  static int64_t Rows(int64_t pixels) { return CeilDiv(pixels, kStep) * kStep; }

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

  // --- the transposed weights ---

  // A slice within a group has adjacent columns for all taps of a block, which makes one product; of a slice of
  // several groups each tap and group makes its own.
  static bool Joined(const Slice& slice) { return slice.groups == 1; }

  // Columns of a product.
  int64_t Columns(const Slice& slice, Range taps) const {
    return Joined(slice) ? taps.size() * slice.channels() : slice.group_channels;
  }

  int64_t PackedBlock() const {
    const int64_t joined = PackedColumns<Real>(tap_blocks_.max_taps() * slices_.max_channels());
    const int64_t apart =
        slices_.max_groups() * tap_blocks_.max_taps() * PackedColumns<Real>(Min(g_.group_in(), slices_.max_channels()));
    return Max(joined, apart) * g_.group_out();
  }

  void PackBlock(int64_t slice_index, int64_t block, Operand* weights) const {
    const Slice slice = slices_[slice_index];
    const Range taps = tap_blocks_[block];
    const Range channels{slice.group_begin, slice.group_begin + slice.group_channels};
    const int64_t columns = Columns(slice, taps);
    Operand* packed = weights + (slice_index * tap_blocks_.count() + block) * packed_block_;
    std::memset(packed, 0, packed_block_ * sizeof(Operand));
    for (int64_t group = 0; group < slice.groups; ++group) {
      const WeightView<T> weight(g_, arrays_.format, arrays_.weight, slice.first_group + group);
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const int64_t column = Joined(slice) ? (t - taps.begin) * slice.channels() : 0;
        PackWeightTransposed(weight, g_.group_out(), t, channels, column, PanelWidth<Real>(columns), packed);
        if (!Joined(slice)) packed += PackedColumns<Real>(columns) * g_.group_out();
      }
    }
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
      PackGradY(slice, space);
      if (sum_grad_y) {
        Real* sums =
            chunk == 0 ? static_cast<Real*>(arrays_.grad_bias.data) : shared.grad_biases + (chunk - 1) * g_.c_out;
        SumGradY(slice, pixels, tile > 0, sums, space);
      }
      if (!want_samples_) continue;
      sampler_.StartSlice(slice, space.sampler);
      Visited<T, Operand> visited;
      visited.x = shared.x;
      visited.grad_samples = space.grad_samples;
      if (arrays_.grad_weight) visited.samples = space.sample_rows;
      if (want_sums_) visited.parts = Parts(chunk, slice_index, tile - band.begin, shared);
      if (arrays_.grad_x) visited.grad_x = shared.grad_x;
      for (int64_t block = 0; block < tap_blocks_.count(); ++block) {
        const Range taps = tap_blocks_[block];
        if (want_grad_samples_ && g_.depthwise()) {
          MultiplyWeightDepthwise(slice, taps, pixels, shared.weights, space);
        } else if (want_grad_samples_) {
          MultiplyWeight(slice, taps, pixels,
                         shared.weights + (slice_index * tap_blocks_.count() + block) * packed_block_, space);
        }
        sampler_.Visit(slice, taps, visited, space.sampler);
        if (arrays_.grad_weight && g_.depthwise()) {
          MultiplySamplesDepthwise(slice, taps, pixels, tile > 0, GradWeight(chunk, shared), space);
        } else if (arrays_.grad_weight) {
          MultiplySamples(slice, taps, pixels, tile > 0, GradWeight(chunk, shared), space);
        }
      }
    }
  }

  void ZeroGradX(Range images, const Slice& slice, Real* grad_x) const {
    Real* pixel = grad_x + images.begin * g_.image() * g_.c_in + slice.begin;
    for (int64_t i = 0; i < images.size() * g_.image(); ++i, pixel += g_.c_in) Zero(pixel, slice.channels());
  }

  // Packs grad_y of the tile's pixels (rows) and of each of the slice's groups (columns); of a depthwise convolution
  // all of the slice's channels as one matrix.
  void PackGradY(const Slice& slice, const Scratch& space) const {
    const Tile<Real>& tile = *space.sampler.tile;
    for (int row = 0; g_.depthwise() && row < tile.height; ++row) {
      const T* from = RowStart(g_, static_cast<const T*>(arrays_.grad_y.data), tile, row, g_.c_out, arrays_.format);
      Operand* to = space.grad_y + row * tile.width * slice.channels();
      if (nchw_) {
        Transpose<Real>(from + slice.begin * g_.image_out(), g_.image_out(), slice.channels(), tile.width, to,
                        slice.channels());
      }
      for (int p = 0; !nchw_ && p < tile.width; ++p) {
        CopyRow<Real>(from + p * g_.c_out + slice.begin, static_cast<int>(slice.channels()), to + p * slice.channels());
      }
    }
    if (g_.depthwise()) return;
    const int64_t rows = Rows(tile.pixels);
    for (int64_t group = 0; group < slice.groups; ++group) {
      const int64_t first = (slice.first_group + group) * g_.group_out();
      Operand* packed = space.grad_y_rows + group * kTileRows * padded_out_;
      if ((nchw_ && padded_out_ > g_.group_out()) || rows > tile.pixels) {
        std::memset(packed, 0, rows * padded_out_ * sizeof(Operand));
      }
      for (int row = 0; row < tile.height; ++row) {
        const T* from = RowStart(g_, static_cast<const T*>(arrays_.grad_y.data), tile, row, g_.c_out, arrays_.format);
        if (!nchw_) {
          PackRows<1>(from + first, g_.c_out, tile.width, g_.group_out(), out_width_, rows, row * tile.width, packed);
          continue;
        }
        for (int64_t o = 0; o < g_.group_out(); o += out_width_) {
          Transpose<Real>(from + (first + o) * g_.image_out(), g_.image_out(), Min(out_width_, g_.group_out() - o),
                          tile.width, packed + o * rows + row * tile.width * out_width_, out_width_);
        }
      }
      if constexpr (kStep == 2) {
        // The panels lie one below another, and none has an odd number of rows.
        const int64_t all = rows * padded_out_ / out_width_;
        PackRows<2>(packed, out_width_, all, out_width_, out_width_, all, 0,
                    space.grad_y + group * kTileRows * padded_out_);
      }
    }
  }

  // Where a chunk adds up its part of grad_weight, in the order of NHWC.
  Real* GradWeight(int64_t chunk, const Shared& shared) const {
    if (nchw_) return shared.grad_weights + chunk * g_.weights();
    return chunk == 0 ? static_cast<Real*>(arrays_.grad_weight.data) : shared.grad_weights + (chunk - 1) * g_.weights();
  }

  // grad_bias (+)= the sum of grad_y's rows
  void SumGradY(const Slice& slice, int64_t pixels, bool accumulate, Real* grad_bias, const Scratch& space) const {
    const auto add = [&](const auto& load, const auto& store, const Operand* column, int64_t stride, Real* out) {
      Vector<Real> sum{};
      for (int64_t p = 0; p < pixels; ++p) sum += load(column + p * stride);
      store(out, accumulate ? load(out) + sum : sum);
    };
    if (g_.depthwise()) {
      ForVectors<Vector<Real>>(slice.channels(), [&](int64_t c, auto load, auto store) {
        add(load, store, space.grad_y + c, slice.channels(), grad_bias + slice.begin + c);
      });
      return;
    }
    for (int64_t group = 0; group < slice.groups; ++group) {
      const Operand* panels = space.grad_y_rows + group * kTileRows * padded_out_;
      Real* out = grad_bias + (slice.first_group + group) * g_.group_out();
      ForVectors<Vector<Real>>(g_.group_out(), [&](int64_t o, auto load, auto store) {
        const int64_t panel = o / out_width_ * Rows(pixels) * out_width_;
        add(load, store, panels + panel + o % out_width_, out_width_, out + o);
      });
    }
  }

  // grad_samples = grad_y * transposed weight
  void MultiplyWeight(const Slice& slice, Range taps, int64_t pixels, const Operand* packed,
                      const Scratch& space) const {
    const int64_t row_stride = taps.size() * slice.channels();
    const int64_t columns = Columns(slice, taps);
    for (int64_t group = 0; group < slice.groups; ++group) {
      Left<Operand> grad_y;
      grad_y.data = space.grad_y_rows + group * kTileRows * padded_out_;
      grad_y.stride = out_width_;
      grad_y.run = out_width_;
      grad_y.run_stride = Rows(pixels) * out_width_;
      for (int64_t t = 0; t < (Joined(slice) ? 1 : taps.size()); ++t) {
        Multiply<false>(grad_y, pixels, g_.group_out(), packed, PanelWidth<Real>(columns), columns,
                        space.grad_samples + t * slice.channels() + group * slice.group_channels, row_stride, false);
        packed += PackedColumns<Real>(columns) * g_.group_out();
      }
    }
  }

  // grad_weight (+)= transposed samples * grad_y
  void MultiplySamples(const Slice& slice, Range taps, int64_t pixels, bool accumulate, Real* grad_weight,
                       const Scratch& space) const {
    const int64_t rows = Rows(pixels);
    const int64_t columns = taps.size() * slice.channels();
    if constexpr (kStep == 2) {
      if (rows > pixels) std::memset(space.sample_rows + pixels * columns, 0, columns * sizeof(Operand));
      PackRows<2>(space.sample_rows, columns, rows, columns, columns, rows, 0, space.samples);
    }
    for (int64_t group = 0; group < slice.groups; ++group) {
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const int64_t column = (t - taps.begin) * slice.channels() + group * slice.group_channels;
        Left<Operand> samples;
        samples.data = space.samples + column * kStep;
        samples.stride = columns;
        samples.run = rows;
        samples.run_stride = 0;
        Multiply<true>(samples, slice.group_channels, rows, space.grad_y + group * kTileRows * padded_out_, out_width_,
                       g_.group_out(),
                       grad_weight + (t * g_.group_in() + slice.group_begin) * g_.c_out +
                           (slice.first_group + group) * g_.group_out(),
                       g_.c_out, accumulate);
      }
    }
  }

  // The two products of a depthwise convolution, channel by channel.
  void MultiplyWeightDepthwise(const Slice& slice, Range taps, int64_t rows, const Operand* weights,
                               const Scratch& space) const {
    Real* grad_samples = space.grad_samples;
    for (int64_t p = 0; p < rows; ++p, grad_samples += taps.size() * slice.channels()) {
      ForVectors<Vector<Real>>(slice.channels(), [&](int64_t c, auto load, auto store) {
        const Vector<Real> grad_y = load(space.grad_y + p * slice.channels() + c);
        for (int64_t t = taps.begin; t < taps.end; ++t) {
          store(grad_samples + (t - taps.begin) * slice.channels() + c,
                grad_y * load(weights + t * g_.c_out + slice.begin + c));
        }
      });
    }
  }

  void MultiplySamplesDepthwise(const Slice& slice, Range taps, int64_t rows, bool accumulate, Real* grad_weight,
                                const Scratch& space) const {
    for (int64_t t = taps.begin; t < taps.end; ++t) {
      const Operand* samples = space.samples + (t - taps.begin) * slice.channels();
      Real* out = grad_weight + t * g_.c_out + slice.begin;
      ForVectors<Vector<Real>>(slice.channels(), [&](int64_t c, auto load, auto store) {
        Vector<Real> sum = accumulate ? load(out + c) : Vector<Real>{};
        for (int64_t p = 0; p < rows; ++p) {
          sum += load(samples + p * taps.size() * slice.channels() + c) * load(space.grad_y + p * slice.channels() + c);
        }
        store(out + c, sum);
      });
    }
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
  const int64_t out_width_;     // of the panels of a group's packed grad_y
  const int64_t padded_out_;    // its columns
  const int64_t packed_block_;  // packed weights of a slice and block of taps
  const int64_t chunks_;        // of images
  const int64_t tiles_;         // of the largest chunk
  const Sampler<T> sampler_;
  const int64_t band_;  // tiles of a band
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
