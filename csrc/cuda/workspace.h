// The work space of a call.

#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "problem.h"

#include "../workspace.h"  // in the namespace that device.h names

namespace jax_dcn {
namespace cuda {

// Hands out the arrays of a work space, and sums up its size. Without a work space it does only that.
class WorkspaceCarver {
 public:
  WorkspaceCarver(void* workspace, int64_t input_pixels, int64_t output_pixels)
      : carver_(workspace), input_pixels_(input_pixels), output_pixels_(output_pixels) {}

  template <class T>
  T* Take(int64_t count) {
    return TakePerPixel<T>(count, 1, 1, size_.constant);
  }
  // A count that depends on the sizes, but is never more than `most`.
  template <class T>
  T* TakeUpTo(int64_t most, int64_t count) {
    if (most > 0) size_.constant += most * int64_t{sizeof(T)} + kAlignment;
    T* array = carver_.Take<T>(count);
    size_.bytes = carver_.used();
    return array;
  }
  template <class T>
  T* TakePerInputPixel(int64_t count) {
    return TakePerPixel<T>(count, input_pixels_, 1, size_.per_input_pixel);
  }
  // For every `pixels` output pixels, and for what is left of them.
  template <class T>
  T* TakePerOutputPixels(int64_t count, int64_t pixels = 1) {
    return TakePerPixel<T>(count, output_pixels_, pixels, size_.per_output_pixel);
  }

  WorkspaceSize size() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 128;  // a line of the L2 cache

  template <class T>
  T* TakePerPixel(int64_t count, int64_t all_pixels, int64_t pixels, int64_t& bytes_per_pixel) {
    const int64_t bytes = count * int64_t{sizeof(T)};
    bytes_per_pixel += CeilDiv(bytes, pixels);
    // What is left of the pixels, and the rounding up of the whole.
    if (count > 0) size_.constant += (pixels > 1 ? bytes : 0) + kAlignment;
    T* array = carver_.Take<T>(count * CeilDiv(all_pixels, pixels));
    size_.bytes = carver_.used();
    return array;
  }

  AlignedCarver<kAlignment> carver_;
  int64_t input_pixels_, output_pixels_;
  WorkspaceSize size_;
};

// What a block may have on the devices that have the least, those of 7.5.
inline constexpr int kLeastSharedBytes = 64 << 10;

// The larger of what function(shared memory of a block) gives for the devices that have the least and the most.
template <class Function>
WorkspaceSize OnAnyDevice(const Function& function) {
  const WorkspaceSize least = function(kLeastSharedBytes);
  const WorkspaceSize most = function(std::numeric_limits<int>::max());
  return {std::max(least.bytes, most.bytes), std::max(least.constant, most.constant),
          std::max(least.per_input_pixel, most.per_input_pixel),
          std::max(least.per_output_pixel, most.per_output_pixel)};
}

}  // namespace cuda
}  // namespace jax_dcn
