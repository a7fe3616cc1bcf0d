// The forward kernel.
//
// A block computes 128 output pixels by up to 256 output channels of a weight group as one product: its left operand
// are the samples of these pixels, with all taps and channels of the group in a row, made stage by stage in shared
// memory, and its right operand is the packed weight. So a sample is computed once for all the output channels of a
// block, and never stored outside it.

#pragma once

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
      const int channel = first_channel + at % units * p.padded_unit;
      const bool there = at < columns && channel < p.c_in;  // the last segment may have fewer units
      const int tap = there ? first_tap + at / units : p.taps;
      displacement[i].Load(p, samples, pixel.index, p.pixels, tap, channel / p.deform_in);
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int at = ThreadIndex() / kRows + i * kTogether;
      if (at >= columns) break;
      const Sample<Real> sample = displacement[i].Locate(p, pixel, first_tap + at / units);
      column(at).Set(row, p, pixel, sample, displacement[i].mask);
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
template <class T, class Tag>
class SampleRows {
 public:
  static constexpr int kRounds = 2;

  // From a stage on, as Next() says. The table begins at a byte of shared memory.
  JAX_DCN_DEVICE SampleRows(const Problem& p, const Samples<T>& samples, const SampleOrder& order, int table,
                            int64_t first_pixel, int group, int stage)
      : p_(p),
        samples_(samples),
        order_(order),
        table_(table),
        first_pixel_(first_pixel),
        first_channel_(group * p.group_in),
        stage_(stage - 1) {}

  JAX_DCN_DEVICE void Next() {
    ++stage_;
    position_ += kRowVectors;
    if (position_ < end_) {
      Place();
    } else {
      const SampleOrder::Place place = order_.At(stage_, Lane());
      Place(place, end_ == 0 || place.table != order_.At(stage_ - 1, Lane()).table);
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
  JAX_DCN_DEVICE void Place(const SampleOrder::Place& place, bool locate) {
    position_ = place.position;
    width_ = place.width;
    end_ = place.taps * place.width;
    vector_ = place.vector;
    const int segment = first_channel_ + place.first_vector * kVector<T>;
    chunk_ = segment + place.vector * kVector<T>;
    if (locate) {
      table_.Locate(p_, samples_, first_pixel_, place.first_tap, segment, order_.units(), place.taps * order_.units());
      SyncThreads();
    }
    Place();
  }

  // The column and channel of the thread's vectors.
  JAX_DCN_DEVICE void Place() {
    const int tap = width_ == kRowVectors ? position_ / kRowVectors : position_ / width_;
    const int vector = position_ - tap * width_;
    channel_ = chunk_ + vector * kVector<T>;
    const int units = order_.units();
    column_ = units == 1 ? tap : tap * units + (vector_ + vector) / order_.unit;
    if (position_ >= end_) column_ = -1;
  }

  const Problem& p_;
  const Samples<T>& samples_;
  const SampleOrder& order_;
  SampleTable<T> table_;
  const int64_t first_pixel_;
  const int first_channel_;
  int stage_;

  // The chunk: its first channel and, in the segment, vector, its vectors, and those at all taps; and where in these
  // the thread is.
  int chunk_, vector_, width_, end_ = 0, position_ = 0;
  int column_, channel_;  // -1: nothing is there
  Vector16 corner_[kOwn][kCorners];
};

template <class T, class Tag, int kColumns>
JAX_DCN_GLOBAL void JAX_DCN_LAUNCH_BOUNDS(kThreads, 1)
    ForwardKernel(Problem p, Samples<T> samples, ForwardWeight<T> packed, const Vector16* weights, const T* bias,
                  T* y) {
  const int block = BlockIndex().x;
  const int tile = block % (packed.tiles * p.groups);  // blocks of the same pixels run at the same time
  const int64_t first_pixel = static_cast<int64_t>(block / (packed.tiles * p.groups)) * kRows;
  const int group = tile / packed.tiles;
  const int first_column = tile % packed.tiles * kColumns;

  constexpr int kTable = kProductSharedBytes<T, kColumns, false>;
  SampleRows<T, Tag> left(p, samples, packed.order, kTable, first_pixel, group, 0);
  Product<T, Tag, kColumns> product;
  const CopyPacked<kColumns> right{weights + int64_t{tile} * packed.stages * kColumns * kRowVectors};
  MultiplyStages<T, kColumns, false>(packed.stages, left, right, product);

  const int64_t c_out = int64_t{p.groups} * p.group_out;
  const bool wide = p.group_out % 2 == 0;
  product.ForEach([&](int row, int column, const auto& values) {
    constexpr int kRun = decltype(product)::kRun;
    column += first_column;
    if (first_pixel + row >= p.pixels || column >= p.group_out) return;
    Accumulation<T> sums[kRun];
    const int valid = p.group_out - column < kRun ? p.group_out - column : kRun;
    for (int i = 0; i < kRun; ++i) {
      sums[i] = values[i];
      if (bias != nullptr && i < valid) sums[i] += ToReal(bias[group * p.group_out + column + i]);
    }
    T* to = y + (first_pixel + row) * c_out + group * p.group_out + column;
    if (valid == kRun) {
      StoreRun(to, sums, wide);
    } else {
      FromReal(sums[0], to[0]);
    }
  });
}

}  // namespace cuda
}  // namespace jax_dcn
