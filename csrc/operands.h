// The arrays that the kernels of every platform work on. They are dense, with the channels last or in front of the
// pixels:
//
//           NHWC                                             NCHW
//   x       (batch, height, width, c_in)                     (batch, c_in, height, width)
//   offset  (batch, h_out, w_out, deform_groups * taps * 2)  (batch, deform_groups * taps * 2, h_out, w_out)
//   mask    (batch, h_out, w_out, deform_groups * taps)      (batch, deform_groups * taps, h_out, w_out)
//   weight  (kernel_h, kernel_w, c_in / groups, c_out)       (c_out, c_in / groups, kernel_h, kernel_w)
//   bias    (c_out)                                          (c_out)
//   y       (batch, h_out, w_out, c_out)                     (batch, c_out, h_out, w_out)
//
// x, weight, bias and y are of one type, offset and mask of any. Coordinates and sums are float, double for double.

#pragma once

namespace jax_dcn {

enum class DataFormat { kNHWC, kNCHW };
enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Array {
  void* data = nullptr;  // null: the array is not given, or not wanted
  DType dtype = DType::kFloat32;

  explicit operator bool() const { return data != nullptr; }
};

struct ForwardArrays {
  DataFormat format = DataFormat::kNHWC;
  Array x, offset, mask, weight, bias;
  Array y;
  bool round_samples = false;  // to x's type, before they are multiplied, where that is faster
};

// Which gradients are wanted, in the order of the primitive's `wanted`.
struct WantedGradients {
  bool x, offset, mask, weight, bias;
};

// grad_x, grad_weight and grad_bias are of the type of the sums, grad_offset and grad_mask of offset's and mask's.
struct BackwardArrays {
  DataFormat format = DataFormat::kNHWC;
  Array grad_y, x, offset, mask, weight;
  Array grad_x, grad_offset, grad_mask, grad_weight, grad_bias;
  bool round_samples = false;  // as in ForwardArrays
};

}  // namespace jax_dcn
