// The forward kernel.
//
// A block computes 128 output pixels by up to 256 output channels of a weight group as one product: its left operand
// are the samples of these pixels, with all taps and channels of the group in a row, made stage by stage in shared
// memory, and its right operand is the packed weight. So a sample is computed once for all the output channels of a
// block, and never stored outside it. Where pixels are few, blocks share the stages too, and their sums are added up in
// order.

#pragma once

#include "bundles.h"
#include "layout.h"
#include "located.h"
#include "problem.h"
#include "product.h"
#include "sample_order.h"

namespace jax_dcn {
namespace cuda {

// The columns of a table: the taps of a 3 x 3 kernel, or fewer where a block may have no more memory.
inline constexpr int kTableColumns = 9;

// Located samples by columns, each of a tap and a unit of channels.
template <class T>
class SampleTable {
 public:
  using Real = Accumulation<T>;
  using Column = LocatedSamples<Real>;
  // From column to column. A vector more than all banks, so that eight threads may read different ones.
  static constexpr int kPitch = Column::kBytes + int{sizeof(Vector16)};

  // From a byte of shared memory on.
  JAX_DCN_DEVICE explicit SampleTable(int byte) : byte_(byte) {}

  JAX_DCN_DEVICE Column column(int i) const { return Column(byte_ + i * kPitch); }

  // Columns [0, columns) for a window of taps and a segment of channels: the thread's part of them. A barrier must
  // follow.
  JAX_DCN_DEVICE void Locate(const Problem& p, const Samples<T>& samples, int64_t first_pixel, int first_tap,
                             int first_channel, int units, int columns) const {
    constexpr int kTogether = kThreads / kRows;
    constexpr int kMost = (kTableColumns + kTogether - 1) / kTogether;
    const int row = ThreadIndex() % kRows;
    const OutputPixel pixel(p, first_pixel + row);
    Displacement<Real> displacement[kMost];
    // All are loaded before one is stored, as the compiler cannot know that they are apart.
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int at = ThreadIndex() / kRows + i * kTogether;
      const int channel = first_channel + at % units * p.bundle_unit;
      const bool there = at < columns && channel < p.c_in;  // the last segment or bundle may have fewer units
      const int tap = there ? first_tap + at / units : p.taps;
      displacement[i].Load(p, samples, pixel.index, p.pixels, tap, channel / p.deform_in);
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int at = ThreadIndex() / kRows + i * kTogether;
      if (at >= columns) break;
      const Sample<Real> sample = displacement[i].Locate(p, pixel, first_tap + at / units);
      column(at).Set(row, p, pixel.image, sample, displacement[i].mask);
    }
  }

 private:
  int byte_;
};

template <class T, int kColumns>
constexpr int ForwardSharedBytes(int table_columns) {
  return kProductSharedBytes<T, kColumns, false> + table_columns * SampleTable<T>::kPitch;
}

// The left operand. Eight threads, each with a vector of the stage, share a pixel: where these are a chunk of channels
// they read its corners by lines of 128 bytes.
template <class T, class Tag, int kRounds_>
class SampleRows {
 public:
  static constexpr int kRounds = kRounds_;

  // The table begins at a byte of shared memory.
  JAX_DCN_DEVICE SampleRows(const Problem& p, const Samples<T>& samples, const SampleOrder& order, int table,
                            int64_t first_pixel, int bundle)
      : p_(p),
        samples_(samples),
        order_(order),
        table_(table),
        first_pixel_(first_pixel),
        first_channel_(bundle * p.bundle_in) {}

  JAX_DCN_DEVICE void Next(int stage) {
    position_ += kRowVectors;
    if (position_ < end_) {
      FindColumn();
    } else {
      const SampleOrder::Place place = order_.At(stage, Lane());
      EnterChunk(place, end_ == 0 || place.table != order_.At(stage - 1, Lane()).table);
    }
  }

  JAX_DCN_DEVICE void Fetch(int round) {
    const int64_t row_stride = int64_t{p_.width} * p_.c_in;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t corner = column_ < 0 ? 0 : table_.column(column_).corner(Row(round, i));
      const T* at = samples_.x + ((corner >> Column::kFlags) + channel_);
      for (int k = 0; k < kCorners; ++k) {
        // Outside is where zeros are, not only a weight of 0, which would not do for an infinite pixel.
        const bool inside = Column::Inside(corner, k);
        corner_[i][k] =
            LoadGlobal16(inside ? at + ((k & 1) * p_.c_in + (k >> 1) * row_stride) : samples_.zeros + channel_);
      }
    }
  }

  JAX_DCN_DEVICE void Store(int round, Shared<Vector16> to) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      Vector16 sample{};
      if (column_ >= 0) {
        Accumulation<T> weight[kCorners];
        table_.column(column_).Weights(Row(round, i), weight);
        sample = Interpolate<T, Tag>(corner_[i], weight);
      }
      to[RowVector(Row(round, i), Lane())] = sample;
    }
  }

 private:
  using Column = typename SampleTable<T>::Column;
  static constexpr int kApart = kThreads / kRowVectors;
  static constexpr int kOwn = kRows / kApart / kRounds;

  static JAX_DCN_DEVICE int Lane() { return ThreadIndex() % kRowVectors; }
  static JAX_DCN_DEVICE int Row(int round, int i) { return ThreadIndex() / kRowVectors + (round * kOwn + i) * kApart; }

  // Goes on in another chunk, perhaps of a table that is to be filled.
  JAX_DCN_DEVICE void EnterChunk(const SampleOrder::Place& place, bool locate) {
    position_ = place.position;
    width_ = place.width;
    end_ = place.taps * place.width;
    const int segment = first_channel_ + place.first_vector * kVector<T>;
    chunk_ = segment + place.vector * kVector<T>;
    if (locate) {
      table_.Locate(p_, samples_, first_pixel_, place.first_tap, segment, order_.units(), place.taps * order_.units());
      SyncThreads();
    }
    FindColumn();
  }

  // The column and channel of the thread's vectors.
  JAX_DCN_DEVICE void FindColumn() {
    const int tap = width_ == kRowVectors ? position_ / kRowVectors : position_ / width_;
    const int vector = position_ - tap * width_;
    channel_ = chunk_ + vector * kVector<T>;
    const int units = order_.units();
    column_ = units == 1 ? tap : tap * units + vector / order_.unit;  // several are of one chunk
    if (position_ >= end_ || channel_ >= p_.c_in) {                   // the last bundle may have fewer groups
      column_ = -1;
      channel_ = 0;
    }
  }

  const Problem& p_;
  const Samples<T>& samples_;
  const SampleOrder& order_;
  SampleTable<T> table_;
  const int64_t first_pixel_;
  const int first_channel_;

  // The chunk: its first channel, its vectors, and those at all taps; and where in these the thread is.
  int chunk_, width_, end_ = 0, position_ = 0;
  int column_, channel_;  // -1: nothing is there
  Vector16 corner_[kOwn][kCorners];
};

// The packed weight: columns are output channels, k are taps and channels in a SampleOrder.
template <class T>
struct ForwardWeight : PackedWeight {
  SampleOrder order;

  ForwardWeight(const Problem& p, const SampleOrder& order, int columns)
      : PackedWeight(p, 1, p.group_out, columns, order.stages, kRowVectors), order(order) {}

  JAX_DCN_INLINE Element At(int, int group, int column, int stage, int vector, int element) const {
    const SampleOrder::Place place = order.At(stage, vector);
    const int channel = (place.first_vector + place.segment_vector()) * kVector<T> + element;
    return {group, place.there() ? place.first_tap + place.tap() : order.taps, channel, column};
  }
};

// That of bundles, whose stages are taps.
template <class T>
struct ForwardBundleWeight : PackedWeight {
  BundleShape shape;
  SampleOrder order;

  ForwardBundleWeight(const Problem& p, const SampleOrder& order)
      : PackedWeight(p, 1, kBundleColumns, kBundleColumns, order.stages, p.group_in / kVector<T>),
        shape{row_vectors},
        order(order) {}

  JAX_DCN_INLINE Element At(int, int bundle, int column, int stage, int vector, int element) const {
    return {bundle * shape.groups() + column / shape.columns(), stage, vector * kVector<T> + element,
            column % shape.columns()};
  }
};

// How blocks share the stages.
struct StageParts {
  int parts, part_stages;  // of each but the last
};

// The narrowest tiles leave registers for a second block on a processor, if samples are made in more rounds.
template <class Tag, int kColumns>
inline constexpr int kForwardBlocks = kOnTensorCores<Tag> && kColumns == 64 ? 2 : 1;
template <class Tag, int kColumns>
inline constexpr int kForwardRounds = 2 * kForwardBlocks<Tag, kColumns>;

// Which part of the work a block has.
struct ForwardBlock {
  int tile, part;  // of all bundles' tiles; of the stages
  int64_t first_pixel;
  int first_stage, end_stage;

  // Blocks of the same pixels run at the same time.
  JAX_DCN_DEVICE ForwardBlock(int block, int tiles, int stages, StageParts parts)
      : tile(block % tiles), part(block / tiles % parts.parts) {
    first_pixel = int64_t{block / tiles / parts.parts} * kRows;
    first_stage = part * parts.part_stages;
    end_stage = first_stage + parts.part_stages < stages ? first_stage + parts.part_stages : stages;
  }
};

// Stores a block's results: to y, or with several parts, block by block (row, column), to sums. place(column) sets the
// group of a column and where in it the column is.
template <class T, int kColumns, class Product, class Place>
JAX_DCN_DEVICE void StoreForward(const Problem& p, StageParts parts, const Product& product, int64_t first_pixel,
                                 const Place& place, const T* bias, T* y, Accumulation<T>* sums) {
  if (parts.parts > 1) {
    Accumulation<T>* to = sums + int64_t{BlockIndex().x} * (kRows * kColumns);
    product.ForEach(
        [&](int row, int column, const auto& values) { StoreRun(to + row * kColumns + column, values, true); });
    return;
  }
  const int64_t c_out = int64_t{p.groups} * p.group_out;
  const bool wide = p.group_out % 2 == 0;
  product.ForEach([&](int row, int column, const auto& values) {
    constexpr int kRun = Product::kRun;
    int group;
    place(column, group);
    if (first_pixel + row >= p.pixels || group >= p.groups || column >= p.group_out) return;
    Accumulation<T> run[kRun];
    const int valid = p.group_out - column < kRun ? p.group_out - column : kRun;
    for (int i = 0; i < kRun; ++i) {
      run[i] = values[i];
      if (bias != nullptr && i < valid) run[i] += ToReal(bias[group * p.group_out + column + i]);
    }
    T* to = y + (first_pixel + row) * c_out + group * p.group_out + column;
    if (valid == kRun) {
      StoreRun(to, run, wide);
    } else {
      FromReal(run[0], to[0]);
    }
  });
}

template <class T, class Tag, int kColumns>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, (kForwardBlocks<Tag, kColumns>))
    ForwardKernel(Problem p, Samples<T> samples, ForwardWeight<T> packed, StageParts parts, const Vector16* weights,
                  const T* bias, T* y, Accumulation<T>* sums) {
  const ForwardBlock block(BlockIndex().x, packed.tiles * p.groups, packed.stages, parts);
  const int group = block.tile / packed.tiles;
  const int first_column = block.tile % packed.tiles * kColumns;

  constexpr int kTable = kProductSharedBytes<T, kColumns, false>;
  SampleRows<T, Tag, kForwardRounds<Tag, kColumns>> left(p, samples, packed.order, kTable, block.first_pixel, group);
  Product<T, Tag, kColumns> product;
  const CopyPacked<kColumns> right{weights + int64_t{block.tile} * packed.stages * kColumns * kRowVectors};
  MultiplyStages<T, kColumns, false>(block.first_stage, block.end_stage, left, right, product);

  const auto place = [&](int& column, int& column_group) {
    column_group = group;
    column += first_column;
  };
  StoreForward<T, kColumns>(p, parts, product, block.first_pixel, place, bias, y, sums);
}

// The same for bundles of groups.
template <class T, class Tag>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, (kForwardBlocks<Tag, kBundleColumns>))
    ForwardBundleKernel(Problem p, Samples<T> samples, ForwardBundleWeight<T> packed, StageParts parts,
                        const Vector16* weights, const T* bias, T* y, Accumulation<T>* sums) {
  constexpr int kColumns = kBundleColumns;
  const ForwardBlock block(BlockIndex().x, p.bundles(), packed.stages, parts);
  const BundleShape shape = packed.shape;

  constexpr int kTable = kProductSharedBytes<T, kColumns, false>;
  SampleRows<T, Tag, kForwardRounds<Tag, kColumns>> left(p, samples, packed.order, kTable, block.first_pixel,
                                                         block.tile);
  BundleProduct<T, Tag> product(shape);
  const CopyBundle right{weights + int64_t{block.tile} * packed.stages * kColumns * shape.vectors, shape};
  MultiplyStages<T, kColumns, false>(block.first_stage, block.end_stage, left, right, product);

  const auto place = [&](int& column, int& group) {
    group = block.tile * shape.groups() + column / shape.columns();
    column %= shape.columns();
  };
  StoreForward<T, kColumns>(p, parts, product, block.first_pixel, place, bias, y, sums);
}

// A thread adds up an element of y.
template <class T>
JAX_DCN_GLOBAL void ReduceYKernel(Problem p, PackedWeight packed, int parts, const Accumulation<T>* sums, const T* bias,
                                  T* y) {
  const int64_t i = GlobalThread();
  const int c_out = p.groups * p.group_out;
  if (i >= p.pixels * c_out) return;
  const int64_t pixel = i / c_out;
  const int out = static_cast<int>(i % c_out);
  const int group = out / p.group_out;
  const int column = group % p.bundle * (packed.columns / p.bundle) + out % p.group_out;
  const int tile = group / p.bundle * packed.tiles + column / packed.columns;
  const int tiles = p.bundles() * packed.tiles;
  const int64_t block = pixel / kRows * parts * tiles + tile;
  const Accumulation<T>* from = sums + (block * kRows + pixel % kRows) * packed.columns + column % packed.columns;
  Accumulation<T> sum = bias != nullptr ? ToReal(bias[out]) : Accumulation<T>(0);
  for (int part = 0; part < parts; ++part) sum += from[int64_t{part} * tiles * kRows * packed.columns];
  FromReal(sum, y[i]);
}

}  // namespace cuda
}  // namespace jax_dcn
