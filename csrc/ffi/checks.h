// From XLA's buffers and attributes to the kernels' geometry and arrays, for the handlers of every platform. Python has
// checked the operands and told the user; here is checked again what protects memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../geometry.h"
#include "../operands.h"
#include "attributes.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dcn {

// What every handler binds between its context and its attributes.
template <class Binding>
auto BindForward(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // offset
      .template Arg<ffi::AnyBuffer>()   // weight
      .RemainingArgs()                  // [mask], [bias]
      .template Ret<ffi::AnyBuffer>();  // y
}

template <class Binding>
auto BindBackward(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()  // grad_y
      .template Arg<ffi::AnyBuffer>()  // x
      .template Arg<ffi::AnyBuffer>()  // offset
      .template Arg<ffi::AnyBuffer>()  // weight
      .RemainingArgs()                 // [mask]
      .RemainingRets();                // the gradients wanted
}

inline std::optional<DType> ToDType(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32: return DType::kFloat32;
    case ffi::DataType::F64: return DType::kFloat64;
    case ffi::DataType::BF16: return DType::kBFloat16;
    case ffi::DataType::F16: return DType::kFloat16;
    default: return std::nullopt;
  }
}

inline bool IsPair(Sizes sizes) { return sizes.size() == 2; }

using Shape = std::vector<int64_t>;

// The shape in either format of an array of images with the given channels.
inline Shape ImageShape(bool nchw, int64_t batch, int64_t height, int64_t width, int64_t channels) {
  return nchw ? Shape{batch, channels, height, width} : Shape{batch, height, width, channels};
}

// The shapes of a geometry's arrays.
struct Shapes {
  Shapes(const Geometry& g, bool nchw)
      : x(ImageShape(nchw, g.batch, g.height, g.width, g.c_in)),
        offset(ImageShape(nchw, g.batch, g.h_out, g.w_out, g.mask_channels() * 2)),
        mask(ImageShape(nchw, g.batch, g.h_out, g.w_out, g.mask_channels())),
        weight(nchw ? Shape{g.c_out, g.group_in(), g.kernel_h, g.kernel_w}
                    : Shape{g.kernel_h, g.kernel_w, g.group_in(), g.c_out}),
        y(ImageShape(nchw, g.batch, g.h_out, g.w_out, g.c_out)) {}

  Shape x, offset, mask, weight, y;
};

// A call whose operands have been checked, if the Checker is ok.
template <class Arrays>
struct Call {
  Geometry geometry{};
  Arrays arrays;
};

// The first error of a handler's checks, and how what passed comes out of its buffers.
class Checker {
 public:
  void Fail(const std::string& message) {
    if (error_.success()) error_ = ffi::Error::InvalidArgument("jax_dcn: " + message);
  }
  const ffi::Error& error() const { return error_; }
  bool ok() const { return error_.success(); }

  // Sizes from the shapes of x and weight and the attributes.
  Geometry ToGeometry(Sizes image, Sizes kernel, const Attributes& a) {
    Geometry g{};
    if (image.size() != 4 || kernel.size() != 4) return Fail("x and weight must have rank 4"), g;
    if (!IsPair(a.stride) || !IsPair(a.dilation)) return Fail("stride and dilation must be pairs"), g;
    if (a.padding.size() != 4) {
      return Fail("padding must be four numbers; was the program exported by another version of jax_dcn?"), g;
    }
    const int pixels = a.nchw ? 2 : 1;
    g.batch = image[0], g.height = image[pixels], g.width = image[pixels + 1], g.c_in = image[a.nchw ? 1 : 3];
    const int taps = a.nchw ? 2 : 0;
    g.kernel_h = kernel[taps], g.kernel_w = kernel[taps + 1], g.c_out = kernel[a.nchw ? 0 : 3];
    g.stride_h = a.stride[0], g.stride_w = a.stride[1];
    g.padding_h = a.padding[0], g.padding_w = a.padding[2];
    g.dilation_h = a.dilation[0], g.dilation_w = a.dilation[1];
    g.groups = a.groups, g.deform_groups = a.deform_groups;
    const int64_t positive[] = {g.height,   g.width,    g.c_in,       g.kernel_h,   g.kernel_w, g.c_out,
                                g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.groups,   g.deform_groups};
    for (const int64_t size : positive) {
      if (size < 1) return Fail("sizes, strides, dilations and groups must be positive"), g;
    }
    if (g.batch < 0) return Fail("the batch must not be negative"), g;
    if (g.c_in % g.groups != 0 || g.c_out % g.groups != 0 || g.c_in % g.deform_groups != 0) {
      return Fail("channels must be multiples of the groups"), g;
    }
    if (kernel[a.nchw ? 1 : 2] != g.group_in()) return Fail("weight must have C_in / groups input channels"), g;
    // Pixels are counted, and regular coordinates computed, in 32 bits.
    if (!FitsImage(g, a.padding)) return Fail("an image and its padding must be smaller than 2^31 pixels"), g;
    // The CUDA kernels count a kernel's taps of all channels in 32 bits, padded to vectors of up to eight.
    if (g.taps() > kMostWeights || std::max(g.c_in, g.c_out) > kMostWeights / g.taps()) {
      return Fail("taps times channels must be less than 2^27"), g;
    }
    g.h_out = OutputSize(g.height + a.padding[0] + a.padding[1], g.kernel_h, g.stride_h, g.dilation_h);
    g.w_out = OutputSize(g.width + a.padding[2] + a.padding[3], g.kernel_w, g.stride_w, g.dilation_w);
    if (g.h_out < 1 || g.w_out < 1) Fail("the output has no pixels");
    return g;
  }

  Call<ForwardArrays> Forward(ffi::AnyBuffer x, ffi::AnyBuffer offset, ffi::AnyBuffer weight,
                              ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> y, const Attributes& a) {
    Call<ForwardArrays> call;
    Geometry& g = call.geometry;
    ForwardArrays& arrays = call.arrays;
    g = ToGeometry(x.dimensions(), weight.dimensions(), a);
    if (!ok()) return call;
    const Shapes shapes(g, a.nchw);
    arrays.format = a.nchw ? DataFormat::kNCHW : DataFormat::kNHWC;
    arrays.round_samples = !a.highest_precision;
    arrays.x = ToArray("x", x, shapes.x);
    const DType dtype = arrays.x.dtype;
    arrays.offset = ToArray("offset", offset, shapes.offset);
    arrays.weight = ToArray("weight", weight, shapes.weight, dtype);
    const size_t bias = a.has_mask ? 1 : 0;  // its position, if there is one
    if (a.has_mask) arrays.mask = ToArray("mask", Value(optional.get<ffi::AnyBuffer>(0), x), shapes.mask);
    if (optional.size() > bias) {
      arrays.bias = ToArray("bias", Value(optional.get<ffi::AnyBuffer>(bias), x), {g.c_out}, dtype);
    }
    if (optional.size() > bias + 1) Fail("there are too many operands");
    arrays.y = ToArray("y", *y, shapes.y, dtype);
    return call;
  }

  // `results` may hold `more_results` behind the gradients.
  Call<BackwardArrays> Backward(ffi::AnyBuffer grad_y, ffi::AnyBuffer x, ffi::AnyBuffer offset, ffi::AnyBuffer weight,
                                ffi::RemainingArgs optional, ffi::RemainingRets results, const BackwardAttributes& a,
                                size_t more_results = 0) {
    Call<BackwardArrays> call;
    Geometry& g = call.geometry;
    BackwardArrays& arrays = call.arrays;
    g = ToGeometry(x.dimensions(), weight.dimensions(), a);
    if (!ok()) return call;
    const Shapes shapes(g, a.nchw);
    arrays.format = a.nchw ? DataFormat::kNCHW : DataFormat::kNHWC;
    arrays.round_samples = !a.highest_precision;
    arrays.x = ToArray("x", x, shapes.x);
    const DType dtype = arrays.x.dtype;
    const DType sum_dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    arrays.grad_y = ToArray("grad_y", grad_y, shapes.y, dtype);
    arrays.offset = ToArray("offset", offset, shapes.offset);
    arrays.weight = ToArray("weight", weight, shapes.weight, dtype);
    if (a.has_mask) arrays.mask = ToArray("mask", Value(optional.get<ffi::AnyBuffer>(0), x), shapes.mask);
    size_t next = 0;
    const auto result = [&](const char* name, const Shape& shape, DType type) {
      auto gradient = results.get<ffi::AnyBuffer>(next++);
      if (gradient.has_value()) return ToArray(name, **gradient, shape, type);
      Fail(gradient.error().message());
      return Array{};
    };
    if (a.wanted.x) arrays.grad_x = result("grad_x", shapes.x, sum_dtype);
    if (a.wanted.offset) arrays.grad_offset = result("grad_offset", shapes.offset, arrays.offset.dtype);
    if (a.wanted.mask) arrays.grad_mask = result("grad_mask", shapes.mask, arrays.mask.dtype);
    if (a.wanted.weight) arrays.grad_weight = result("grad_weight", shapes.weight, sum_dtype);
    if (a.wanted.bias) arrays.grad_bias = result("grad_bias", {g.c_out}, sum_dtype);
    if (optional.size() != (a.has_mask ? 1u : 0u) || results.size() != next + more_results ||
        (a.wanted.mask && !a.has_mask)) {
      Fail("the operands or results are not those of the attributes");
    }
    return call;
  }

 private:
  static constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  static constexpr int64_t kMostWeights = (int64_t{1} << 27) - 1;

  Array ToArray(const char* name, ffi::AnyBuffer buffer, const Shape& shape) {
    const auto dimensions = buffer.dimensions();
    bool same = dimensions.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = dimensions[i] == shape[i];
    if (!same) Fail(std::string(name) + " has a wrong shape");
    const std::optional<DType> dtype = ToDType(buffer.element_type());
    if (!dtype) Fail(std::string(name) + " has an unsupported type");
    return {buffer.untyped_data(), dtype.value_or(DType::kFloat32)};
  }

  Array ToArray(const char* name, ffi::AnyBuffer buffer, const Shape& shape, DType dtype) {
    const Array array = ToArray(name, buffer, shape);
    if (array.dtype != dtype) Fail(std::string(name) + " has a wrong type");
    return array;
  }

  template <class Buffer>
  Buffer Value(ffi::ErrorOr<Buffer> buffer, Buffer otherwise) {
    if (buffer.has_value()) return buffer.value();
    Fail(buffer.error().message());
    return otherwise;
  }

  static bool FitsImage(const Geometry& g, Sizes padding) {
    for (const int64_t size : {g.height, g.width, g.kernel_h, g.kernel_w, padding[0], padding[1], padding[2],
                               padding[3], g.dilation_h, g.dilation_w, g.stride_h, g.stride_w}) {
      if (size < 0 || size > kMax) return false;
    }
    // One row more than the image, as plain XLA counts corners before it knows whether they are inside.
    return g.image() + g.width < kMax && g.height + padding[0] + padding[1] <= kMax &&
           g.width + padding[2] + padding[3] <= kMax;
  }

  static int64_t OutputSize(int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t span = padded - (dilation * (kernel - 1) + 1);
    return span < 0 ? 0 : span / stride + 1;
  }

  ffi::Error error_ = ffi::Error::Success();
};

}  // namespace jax_dcn
