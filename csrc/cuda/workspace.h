// The work space of a call.

#pragma once

#include "../workspace.h"

#include <algorithm>
#include <limits>

#include "kernels.h"

namespace jax_dcn {
namespace cuda {

// Hands out the arrays of a work space, and sums up its size as a formula. Without a work space it does only that.
class WorkspaceCarver {
 public:
  WorkspaceCarver(void* workspace, int64_t input_pixels, int64_t output_pixels)
      : carver_(workspace), input_pixels_(input_pixels), output_pixels_(output_pixels) {}

  template <class T>
  T* Take(int64_t count) {
    size_.constant += (count * int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    return carver_.Take<T>(count);
  }
  template <class T>
  T* TakePerInputPixel(int64_t count) {
    return TakePerPixel<T>(count, input_pixels_, size_.per_input_pixel);
  }
  template <class T>
  T* TakePerOutputPixel(int64_t count) {
    return TakePerPixel<T>(count, output_pixels_, size_.per_output_pixel);
  }

  const WorkspaceSize& size() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 128;  // a line of the L2 cache

  template <class T>
  T* TakePerPixel(int64_t count, int64_t pixels, int64_t& bytes_per_pixel) {
    bytes_per_pixel += count * int64_t{sizeof(T)};
    if (count > 0) size_.constant += kAlignment;  // what the rounding up of the whole may take
    return carver_.Take<T>(count * pixels);
  }

  AlignedCarver<kAlignment> carver_;
  int64_t input_pixels_, output_pixels_;
  WorkspaceSize size_;
};

// The larger of what function(shared memory of a block) gives for the devices that have the least and the most.
template <class Function>
WorkspaceSize OnAnyDevice(const Function& function) {
  constexpr int kLeast = 64 << 10;
  const WorkspaceSize least = function(kLeast);
  const WorkspaceSize most = function(std::numeric_limits<int>::max());
  return {std::max(least.constant, most.constant), std::max(least.per_input_pixel, most.per_input_pixel),
          std::max(least.per_output_pixel, most.per_output_pixel)};
}

}  // namespace cuda
}  // namespace jax_dcn
