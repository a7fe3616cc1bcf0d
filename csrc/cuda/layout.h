// Operands in the order in which the kernels read them.

#pragma once

#include "launcher.h"
#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// The weight as right operands of products, (batch, bundle of groups, tile of columns, stage, column, k of the stage),
// or with several groups in a bundle (..., stage, vector of k, column); with zeros for what is not there.
struct PackedWeight {
  int columns, tiles, stages;
  int row_vectors;  // of a column's k in a stage
  int64_t vectors;  // of the whole

  PackedWeight(const Problem& p, int batches, int all_columns, int columns, int stages, int row_vectors)
      : columns(columns),
        tiles(static_cast<int>(CeilDiv(all_columns, columns))),
        stages(stages),
        row_vectors(row_vectors),
        vectors(int64_t{batches} * p.bundles() * tiles * stages * columns * row_vectors) {}

  // An element of the weight, in its group.
  struct Element {
    int group, tap, channel, out;  // the channel with padding
  };
};

// Behind the packed weight it writes `zeros` vectors of zeros.
template <class T, class Tag, class Packed>
JAX_DCN_GLOBAL void PackWeightKernel(Problem p, Packed packed, const T* weight, int zeros, Vector16* to) {
  int64_t i = GlobalThread();
  if (i >= packed.vectors + zeros) return;
  if (i >= packed.vectors) {
    to[i] = Vector16{};
    return;
  }
  // Threads side by side take columns side by side: in the forward order those are what lies together in the weight.
  const int column = static_cast<int>(i % packed.columns);
  i /= packed.columns;
  const int vector = static_cast<int>(i % packed.row_vectors);
  i /= packed.row_vectors;
  const int64_t all_stages = i;
  const int stage = static_cast<int>(i % packed.stages);
  i /= packed.stages;
  const int in_tile = static_cast<int>(i % packed.tiles) * packed.columns + column;
  i /= packed.tiles;
  const int bundle = static_cast<int>(i % p.bundles());
  const int batch = static_cast<int>(i / p.bundles());
  const int64_t group_in = p.group_in / p.padded_unit * p.unit;
  const int64_t c_out = int64_t{p.groups} * p.group_out;

  Accumulation<T> values[kVector<T>];
  for (int e = 0; e < kVector<T>; ++e) {
    const PackedWeight::Element at = packed.At(batch, bundle, in_tile, stage, vector, e);
    const int channel = p.Unpadded(at.channel);
    const bool there =
        at.group < p.groups && at.tap < p.taps && at.channel < p.group_in && channel >= 0 && at.out < p.group_out;
    values[e] = 0;
    if (there) values[e] = ToReal(weight[(at.tap * group_in + channel) * c_out + at.group * p.group_out + at.out]);
  }
  const int64_t in_stage = p.bundle > 1 ? vector * packed.columns + column : column * packed.row_vectors + vector;
  to[all_stages * packed.columns * packed.row_vectors + in_stage] = Pack<T, Tag>(values);
}

// Pads runs of `unit` channels to runs of `padded`.
template <class T>
JAX_DCN_GLOBAL void PadKernel(const T* from, int64_t runs, int unit, int padded, Vector16* to) {
  const int64_t i = GlobalThread();
  const int vectors = padded / kVector<T>;
  if (i >= runs * vectors) return;
  const int first = static_cast<int>(i % vectors) * kVector<T>;
  Accumulation<T> values[kVector<T>];
  for (int e = 0; e < kVector<T>; ++e) {
    values[e] = 0;
    if (first + e < unit) values[e] = ToReal(from[i / vectors * unit + first + e]);
  }
  to[i] = Pack<T, T>(values);
}

template <class T>
void Pad(Launcher& launcher, const T* from, int64_t runs, int unit, int padded, T* to) {
  launcher.RunForEach("Pad", PadKernel<T>, runs * (padded / kVector<T>), from, runs, unit, padded,
                      reinterpret_cast<Vector16*>(to));
}

// The inverse.
template <class T>
JAX_DCN_GLOBAL void UnpadKernel(const T* from, int64_t runs, int unit, int padded, T* to) {
  const int64_t i = GlobalThread();
  if (i < runs * unit) to[i] = from[i / unit * padded + i % unit];
}

}  // namespace cuda
}  // namespace jax_dcn
