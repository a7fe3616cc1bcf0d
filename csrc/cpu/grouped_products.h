// Products of matrices, one for each weight group.

#pragma once

#include "arrays.h"
#include "gemm.h"
#include "memory.h"
#include "slices.h"
#include "tile.h"
#include "weights.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// The factors are of the type of the sums, or bfloat16 where the processor multiplies that in pairs, which rounds the
// samples; grad_y and the weight are such numbers already.
template <class T, class Factor>
class GroupedProducts {
 public:
  using Element = T;
  using Operand = Factor;
  using Real = Accumulation<T>;

  GroupedProducts(const Geometry& g, DataFormat format, const Array& weight, const Slices& slices,
                  const TapBlocks& tap_blocks)
      : g_(g),
        format_(format),
        weight_(weight),
        slices_(slices),
        tap_blocks_(tap_blocks),
        width_(PanelWidth<Real>(g.group_out())),
        panels_(CeilDiv(g.group_out(), width_)),
        backward_block_(BackwardBlock()) {}

  // --- forward ---

  int64_t ForwardWeightSize() const { return g_.c_in * g_.taps() * panels_ * width_; }

  void PackForwardWeight(Workers& workers, Operand* packed) const {
    const auto pack = [&](int, int64_t i) { PackPanel(slices_[i / panels_], i % panels_, packed); };
    ParallelFor(workers, slices_.count() * panels_, pack);
  }

  int64_t out_parts() const { return g_.groups * panels_; }

  // Whole panels, which are counted through all groups.
  Range Outs(int64_t parts, int64_t i) const {
    const Range panels = Range::Piece(out_parts(), parts, i);
    return {FirstOut(panels.begin), FirstOut(panels.end)};
  }

  void Output(const Slice& slice, int64_t block, Range outs, int64_t pixels, const Operand* samples,
              const Operand* packed, Real* sums) const {
    const Range taps = tap_blocks_[block];
    const int64_t depth = taps.size() * slice.group_channels;
    for (int64_t group = 0; group < slice.groups; ++group) {
      const int64_t first_out = (slice.first_group + group) * g_.group_out();
      const Range own{Max<int64_t>(0, outs.begin - first_out), Min(g_.group_out(), outs.end - first_out)};
      if (own.size() <= 0) continue;
      Left<Operand> left;
      left.data = samples + group * slice.group_channels;
      left.stride = taps.size() * slice.channels();
      left.run = slice.group_channels;
      left.run_stride = slice.channels();
      Multiply<false>(left, pixels, depth, packed + ForwardWeightAt(slice, taps, group) + own.begin * depth, width_,
                      own.size(), sums + first_out + own.begin, g_.c_out, slice.group_begin > 0 || block > 0);
    }
  }

  // --- backward ---

  struct Scratch {
    Scratch(const GroupedProducts& p, Carver& carver)
        : grad_y_rows(carver.Take<Operand>(p.GradYSize())),
          grad_y(kStep == 1 ? grad_y_rows : carver.Take<Operand>(p.GradYSize())),
          samples(kStep == 1 ? nullptr : carver.Take<Operand>(p.SamplesSize() + kPanel<Real>)) {}

    Operand* grad_y_rows;  // (group of a slice): pixels by group_out, in panels
    // Where the products take pairs, those of two pixels each.
    Operand* grad_y;
    Operand* samples;  // and room for a vector that ends beyond
  };

  int64_t BackwardWeightSize() const { return slices_.count() * tap_blocks_.count() * backward_block_; }

  void PackBackwardWeight(Workers& workers, Operand* packed) const {
    const auto pack = [&](int, int64_t i) {
      PackBlock(slices_[i / tap_blocks_.count()], i % tap_blocks_.count(), packed + i * backward_block_);
    };
    ParallelFor(workers, slices_.count() * tap_blocks_.count(), pack);
  }

  // Packs grad_y of the tile's pixels (rows) and of each of the slice's groups (columns).
  void PackGradY(const Slice& slice, const Tile<Real>& tile, const Array& grad_y, const Scratch& space) const {
    const bool nhwc = format_ == DataFormat::kNHWC;
    const int64_t rows = Rows(tile.pixels);
    for (int64_t group = 0; group < slice.groups; ++group) {
      const int64_t first = (slice.first_group + group) * g_.group_out();
      Operand* packed = space.grad_y_rows + group * GroupGradYSize();
      if ((!nhwc && panels_ * width_ > g_.group_out()) || rows > tile.pixels) {
        std::memset(packed, 0, rows * panels_ * width_ * sizeof(Operand));
      }
      for (int row = 0; row < tile.height; ++row) {
        const T* from = RowStart(g_, static_cast<const T*>(grad_y.data), tile, row, g_.c_out, format_);
        if (nhwc) {
          PackRows<1>(from + first, g_.c_out, tile.width, g_.group_out(), width_, rows, row * tile.width, packed);
          continue;
        }
        for (int64_t o = 0; o < g_.group_out(); o += width_) {
          Transpose<Real>(from + (first + o) * g_.image_out(), g_.image_out(), Min(width_, g_.group_out() - o),
                          tile.width, packed + o * rows + row * tile.width * width_, width_);
        }
      }
      if constexpr (kStep == 2) {
        // The panels lie one below another, and none has an odd number of rows.
        const int64_t all = rows * panels_;
        PackRows<2>(packed, width_, all, width_, width_, all, 0, space.grad_y + group * GroupGradYSize());
      }
    }
  }

  void SumGradY(const Slice& slice, int64_t pixels, bool accumulate, const Scratch& space, Real* grad_bias) const {
    for (int64_t group = 0; group < slice.groups; ++group) {
      const Operand* panel = space.grad_y_rows + group * GroupGradYSize();
      Real* out = grad_bias + (slice.first_group + group) * g_.group_out();
      for (int64_t o = 0; o < g_.group_out(); o += width_, panel += Rows(pixels) * width_) {
        SumRows(panel, width_, pixels, Min(width_, g_.group_out() - o), accumulate, out + o);
      }
    }
  }

  void GradSamples(const Slice& slice, int64_t block, int64_t pixels, const Operand* packed, const Scratch& space,
                   Real* grad_samples) const {
    const Range taps = tap_blocks_[block];
    const int64_t columns = Columns(slice, taps);
    packed += (slice.index * tap_blocks_.count() + block) * backward_block_;
    for (int64_t group = 0; group < slice.groups; ++group) {
      Left<Operand> grad_y;
      grad_y.data = space.grad_y_rows + group * GroupGradYSize();
      grad_y.stride = width_;
      grad_y.run = width_;
      grad_y.run_stride = Rows(pixels) * width_;
      for (int64_t t = 0; t < (Joined(slice) ? 1 : taps.size()); ++t) {
        Multiply<false>(grad_y, pixels, g_.group_out(), packed, PanelWidth<Real>(columns), columns,
                        grad_samples + t * slice.channels() + group * slice.group_channels,
                        taps.size() * slice.channels(), false);
        packed += PackedColumns<Real>(columns) * g_.group_out();
      }
    }
  }

  void GradWeight(const Slice& slice, int64_t block, int64_t pixels, bool accumulate, Operand* samples,
                  const Scratch& space, Real* grad_weight) const {
    const Range taps = tap_blocks_[block];
    const int64_t rows = Rows(pixels);
    const int64_t columns = taps.size() * slice.channels();
    if constexpr (kStep == 2) {
      if (rows > pixels) std::memset(samples + pixels * columns, 0, columns * sizeof(Operand));
      PackRows<2>(samples, columns, rows, columns, columns, rows, 0, space.samples);
      samples = space.samples;
    }
    for (int64_t group = 0; group < slice.groups; ++group) {
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const int64_t column = (t - taps.begin) * slice.channels() + group * slice.group_channels;
        Left<Operand> left;
        left.data = samples + column * kStep;
        left.stride = columns;
        left.run = rows;
        left.run_stride = 0;
        Multiply<true>(left, slice.group_channels, rows, space.grad_y + group * GroupGradYSize(), width_,
                       g_.group_out(),
                       grad_weight + (t * g_.group_in() + slice.group_begin) * g_.c_out +
                           (slice.first_group + group) * g_.group_out(),
                       g_.c_out, accumulate);
      }
    }
  }

 private:
  static constexpr int kStep = Step<Operand>::kDepth;

  // The first output channel of a panel.
  int64_t FirstOut(int64_t panel) const { return panel / panels_ * g_.group_out() + panel % panels_ * width_; }

  // The packed weight is (slice, block of taps, group of the slice, panel).
  int64_t ForwardWeightAt(const Slice& slice, Range taps, int64_t group) const {
    return (slice.begin * g_.taps() + slice.channels() * taps.begin + group * slice.group_channels * taps.size()) *
           panels_ * width_;
  }

  void PackPanel(const Slice& slice, int64_t panel, Operand* packed) const {
    const Range outs{panel * width_, Min((panel + 1) * width_, g_.group_out())};
    for (int64_t group = 0; group < slice.groups; ++group) {
      const WeightView<T> weight(g_, format_, weight_, slice.first_group + group);
      for (int64_t block = 0; block < tap_blocks_.count(); ++block) {
        const Range taps = tap_blocks_[block];
        PackWeight(weight, taps, slice.of_group(), outs, width_,
                   packed + ForwardWeightAt(slice, taps, group) + panel * taps.size() * slice.group_channels * width_);
      }
    }
  }

  // A slice within a group has adjacent columns for all taps of a block, which makes one product; of a slice of
  // several groups each tap and group makes its own.
  static bool Joined(const Slice& slice) { return slice.groups == 1; }

  // Columns of a product with the transposed weight.
  int64_t Columns(const Slice& slice, Range taps) const {
    return Joined(slice) ? taps.size() * slice.channels() : slice.group_channels;
  }

  // The packed transposed weight of a slice and block of taps.
  int64_t BackwardBlock() const {
    const int64_t max_taps = tap_blocks_.max_taps();
    const int64_t joined = PackedColumns<Real>(max_taps * slices_.max_channels());
    const int64_t apart =
        slices_.max_groups() * max_taps * PackedColumns<Real>(Min(g_.group_in(), slices_.max_channels()));
    return Max(joined, apart) * g_.group_out();
  }

  void PackBlock(const Slice& slice, int64_t block, Operand* packed) const {
    const Range taps = tap_blocks_[block];
    const int64_t columns = Columns(slice, taps);
    std::memset(packed, 0, backward_block_ * sizeof(Operand));
    for (int64_t group = 0; group < slice.groups; ++group) {
      const WeightView<T> weight(g_, format_, weight_, slice.first_group + group);
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const int64_t column = Joined(slice) ? (t - taps.begin) * slice.channels() : 0;
        PackWeightTransposed(weight, g_.group_out(), t, slice.of_group(), column, PanelWidth<Real>(columns), packed);
        if (!Joined(slice)) packed += PackedColumns<Real>(columns) * g_.group_out();
      }
    }
  }

  // Rows that `pixels` take in a product over them.
  static int64_t Rows(int64_t pixels) { return CeilDiv(pixels, kStep) * kStep; }

  int64_t GroupGradYSize() const { return kTileRows * panels_ * width_; }
  int64_t GradYSize() const { return slices_.max_groups() * GroupGradYSize(); }
  int64_t SamplesSize() const { return kTileRows * tap_blocks_.max_taps() * slices_.max_channels(); }

  const Geometry& g_;
  const DataFormat format_;
  const Array& weight_;
  const Slices& slices_;
  const TapBlocks& tap_blocks_;
  const int64_t width_, panels_;  // of a group's output channels
  const int64_t backward_block_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
