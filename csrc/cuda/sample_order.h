// The order in which the forward kernel goes through its samples.

#pragma once

#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// The order of k, the taps and channels of a bundle of weight groups, in the forward product. Samples are located
// before they are made, in a table with a column for each tap and unit (a run of channels that share a deform group).
// Tables take so many columns, so the channels come in segments, the taps of a segment in windows, and a segment and a
// window fill one table. In these, chunks of up to a stage's channels come outside and taps inside: what a block reads
// meanwhile, a chunk's 128 bytes of some rows of the image, stays in the L1 cache. All lengths of channels are in
// vectors. Between the end of a window and that of its last stage there are zeros.
struct SampleOrder {
  int vectors, unit, taps;  // of a bundle, of a unit, of the kernel
  int segment, segments;    // of one unit, or of several that fit a stage
  int window, windows;      // taps
  int segment_stages;       // of a whole segment
  int stages;               // of all

  SampleOrder(const Problem& p, int vector, int table_columns)
      : vectors(p.bundle_in / vector), unit(p.bundle_unit / vector), taps(p.taps), stages(0) {
    // The fewest stages, then the fewest tables.
    const int most = kRowVectors < vectors ? kRowVectors : vectors;
    for (int units = 1; units == 1 || (units <= table_columns && units * unit <= most); ++units) {
      if (p.bundle > 1 && units * unit != vectors) continue;  // their stages are taps
      for (int length = 1; length <= taps && length * units <= table_columns; ++length) {
        const SampleOrder order(*this, units * unit, length);
        const bool better = order.stages < stages || (order.stages == stages && order.tables() <= tables());
        if (stages == 0 || better) *this = order;
      }
    }
  }

  int tables() const { return segments * windows; }
  JAX_DCN_INLINE int units() const { return segment / unit; }
  int table_columns() const { return units() * window; }

  // Where a vector of a stage comes from.
  struct Place {
    int table;
    int first_tap, taps;  // of the window
    int first_vector;     // of the segment, in the bundle
    int vector, width;    // the first of the chunk, in the segment, and how many it has
    int position;         // in the chunk's taps and vectors

    JAX_DCN_INLINE bool there() const { return position < taps * width; }
    JAX_DCN_INLINE int tap() const { return width == kRowVectors ? position / kRowVectors : position / width; }
    // In the segment.
    JAX_DCN_INLINE int segment_vector() const { return vector + position - tap() * width; }
  };

  JAX_DCN_INLINE Place At(int stage, int lane) const {
    Place at;
    const int in_segments = Min(stage / segment_stages, segments - 1);
    stage -= in_segments * segment_stages;
    at.first_vector = in_segments * segment;
    const int length = Min(segment, vectors - at.first_vector);
    const int window_stages = CeilDivide(length * window, kRowVectors);
    const int in_windows = Min(stage / window_stages, windows - 1);
    stage -= in_windows * window_stages;
    at.table = in_segments * windows + in_windows;
    at.first_tap = in_windows * window;
    at.taps = Min(window, taps - at.first_tap);
    at.position = stage * kRowVectors + lane;
    const int chunk = Min(at.position / (at.taps * kRowVectors), CeilDivide(length, kRowVectors) - 1);
    at.position -= chunk * at.taps * kRowVectors;
    at.vector = chunk * kRowVectors;
    at.width = Min(kRowVectors, length - at.vector);
    return at;
  }

 private:
  SampleOrder(const SampleOrder& of, int segment, int window)
      : vectors(of.vectors),
        unit(of.unit),
        taps(of.taps),
        segment(segment),
        segments(CeilDivide(vectors, segment)),
        window(window),
        windows(CeilDivide(taps, window)),
        segment_stages(Stages(segment)),
        stages((segments - 1) * segment_stages + Stages(vectors - (segments - 1) * segment)) {}

  // Of a segment of so many vectors.
  int Stages(int length) const {
    const int last = taps - (windows - 1) * window;
    return (windows - 1) * CeilDivide(length * window, kRowVectors) + CeilDivide(length * last, kRowVectors);
  }
  static JAX_DCN_INLINE int CeilDivide(int a, int b) { return (a + b - 1) / b; }
  static JAX_DCN_INLINE int Min(int a, int b) { return a < b ? a : b; }
};

}  // namespace cuda
}  // namespace jax_dcn
