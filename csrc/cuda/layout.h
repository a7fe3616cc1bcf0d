// Operands in the order in which the kernels read them.

#pragma once

#include "launcher.h"
#include "problem.h"
#include "product.h"

namespace jax_dcn {
namespace cuda {

// The weight as right operands of products, each (stage, column, k of the stage), with zeros for what is not there:
//  - forward: (group, tile of output channels); k are taps and channels, columns are output channels;
//  - by tap: (tap, group, tile of channels); k are output channels, columns are channels.
struct PackedWeight {
  bool by_tap;
  int columns, tiles, stages;
  int64_t vectors;  // of the whole

  PackedWeight(const Problem& p, bool by_tap, int columns, int stage)
      : by_tap(by_tap),
        columns(columns),
        tiles(static_cast<int>(CeilDiv(by_tap ? p.group_in : p.group_out, columns))),
        stages(static_cast<int>(CeilDiv(by_tap ? p.padded_group_out : p.taps * p.group_in, stage))),
        vectors(int64_t{by_tap ? p.taps : 1} * p.groups * tiles * stages * columns * kStageVectors) {}
};

// Behind the packed weight it writes `zeros` vectors of zeros.
template <class T, class Tag>
JAX_DCN_GLOBAL void PackWeightKernel(Problem p, PackedWeight packed, const T* weight, int zeros, Vector16* to) {
  int64_t i = GlobalThread();
  if (i >= packed.vectors + zeros) return;
  if (i >= packed.vectors) {
    to[i] = Vector16{};
    return;
  }
  // Threads side by side take columns side by side: in the forward order those are what lies together in the weight.
  const int column = static_cast<int>(i % packed.columns);
  i /= packed.columns;
  const int vector = static_cast<int>(i % kStageVectors);
  i /= kStageVectors;
  const int64_t stage = i;  // of all
  const int first_k = static_cast<int>(i % packed.stages) * kStage<T> + vector * kVector<T>;
  i /= packed.stages;
  const int in_tile = static_cast<int>(i % packed.tiles) * packed.columns + column;
  i /= packed.tiles;
  const int group = static_cast<int>(i % p.groups);
  const int64_t group_in = p.group_in / p.padded_unit * p.unit;
  const int64_t c_out = int64_t{p.groups} * p.group_out;

  Accumulation<T> values[kVector<T>];
  for (int e = 0; e < kVector<T>; ++e) {
    const int k = first_k + e;
    const int tap = packed.by_tap ? static_cast<int>(i / p.groups) : k / p.group_in;
    const int padded = packed.by_tap ? in_tile : k % p.group_in;
    const int channel = p.Unpadded(padded);
    const int out = packed.by_tap ? k : in_tile;
    const bool there = tap < p.taps && padded < p.group_in && channel >= 0 && out < p.group_out;
    values[e] = 0;
    if (there) values[e] = ToReal(weight[(tap * group_in + channel) * c_out + group * p.group_out + out]);
  }
  to[(stage * packed.columns + column) * kStageVectors + vector] = Pack<T, Tag>(values);
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
