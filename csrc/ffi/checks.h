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
      .RemainingArgs()                  // [weight], [mask], [bias]
      .template Ret<ffi::AnyBuffer>();  // y
}

template <class Binding>
auto BindBackward(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()  // grad_y
      .template Arg<ffi::AnyBuffer>()  // x
      .template Arg<ffi::AnyBuffer>()  // offset
      .RemainingArgs()                 // [weight], [mask]
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

  // Sizes from the shapes of x, offset and, if there is one, weight, and the attributes.
  Geometry ToGeometry(Sizes x, Sizes offset, Sizes weight, const Attributes& a) {
    Geometry g{};
    if (x.size() != 4 || offset.size() != 4) return Fail("x and offset must have rank 4"), g;
    if (weight.size() != (a.has_weight ? 4 : 0)) return Fail("weight must have rank 4"), g;
    if (a.kernel.size() != 2 || a.stride.size() != 2 || a.padding.size() != 2 || a.dilation.size() != 2) {
      return Fail("kernel, stride, padding and dilation must be pairs"), g;
    }
    const int pixels = a.nchw ? 2 : 1;
    g.batch = x[0], g.height = x[pixels], g.width = x[pixels + 1], g.c_in = x[a.nchw ? 1 : 3];
    g.h_out = offset[pixels], g.w_out = offset[pixels + 1];
    g.c_out = a.has_weight ? weight[a.nchw ? 0 : 3] : g.c_in;
    g.kernel_h = a.kernel[0], g.kernel_w = a.kernel[1];
    g.stride_h = a.stride[0], g.stride_w = a.stride[1];
    g.padding_h = a.padding[0], g.padding_w = a.padding[1];
    g.dilation_h = a.dilation[0], g.dilation_w = a.dilation[1];
    g.groups = a.groups, g.deform_groups = a.deform_groups;
    g.weighted = a.has_weight, g.x_first = a.x_first;
    for (const int64_t size : {g.height, g.width, g.c_in, g.c_out, g.kernel_h, g.kernel_w, g.groups, g.deform_groups}) {
      if (size < 1) return Fail("sizes and groups must be positive"), g;
    }
    for (const int64_t size :
         {g.batch, g.h_out, g.w_out, g.stride_h, g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w}) {
      if (size < 0) return Fail("the batch, the output, strides, paddings and dilations must not be negative"), g;
    }
    if (g.weighted && (g.h_out == 0 || g.w_out == 0)) return Fail("the output has no pixels"), g;
    if (g.c_in % g.groups != 0 || g.c_out % g.groups != 0 || g.c_in % g.deform_groups != 0) {
      return Fail("channels must be multiples of the groups"), g;
    }
    if (g.weighted && weight[a.nchw ? 1 : 2] != g.group_in()) {
      return Fail("weight must have C_in / groups input channels"), g;
    }
    if (g.weighted && (g.x_first || a.levels.size() != 0))
      return Fail("x_first and levels are for calls without a weight"), g;
    if (!g.weighted && (a.nchw || g.groups != g.c_in)) return Fail("without a weight each NHWC channel is a group"), g;
    // Pixels are counted, and regular coordinates computed, in 32 bits.
    if (!FitsImage(g)) return Fail("an image and the grid on it must be smaller than 2^31 pixels"), g;
    // The CUDA kernels count a kernel's taps of all channels in 32 bits, padded to vectors of up to eight.
    if (g.taps() > kMostWeights || std::max(g.c_in, g.c_out) > kMostWeights / g.taps()) {
      return Fail("taps times channels must be less than 2^27"), g;
    }
    ToLevels(a.levels, g);
    return g;
  }

  Call<ForwardArrays> Forward(ffi::AnyBuffer x, ffi::AnyBuffer offset, ffi::RemainingArgs optional,
                              ffi::Result<ffi::AnyBuffer> y, const Attributes& a) {
    Call<ForwardArrays> call;
    Geometry& g = call.geometry;
    ForwardArrays& arrays = call.arrays;
    const size_t mask = a.has_weight ? 1 : 0, bias = mask + (a.has_mask ? 1 : 0);  // their positions
    if (optional.size() < bias || optional.size() > bias + (a.has_weight ? 1 : 0))
      Fail("the operands are not those of the attributes");
    g = ToGeometry(x.dimensions(), offset.dimensions(), WeightSizes(optional, a), a);
    if (!ok()) return call;
    const Shapes shapes(g, a.nchw);
    arrays.format = a.nchw ? DataFormat::kNCHW : DataFormat::kNHWC;
    arrays.round_samples = !a.highest_precision;
    arrays.x = ToArray("x", x, shapes.x);
    const DType dtype = arrays.x.dtype;
    arrays.offset = ToArray("offset", offset, shapes.offset);
    if (a.has_weight) arrays.weight = ToArray("weight", *optional.get<ffi::AnyBuffer>(0), shapes.weight, dtype);
    if (a.has_mask) arrays.mask = ToArray("mask", *optional.get<ffi::AnyBuffer>(mask), shapes.mask);
    if (optional.size() > bias) {
      arrays.bias = ToArray("bias", *optional.get<ffi::AnyBuffer>(bias), {g.c_out}, dtype);
    }
    arrays.y = ToArray("y", *y, shapes.y, dtype);
    return call;
  }

  // `results` may hold `more_results` behind the gradients.
  Call<BackwardArrays> Backward(ffi::AnyBuffer grad_y, ffi::AnyBuffer x, ffi::AnyBuffer offset,
                                ffi::RemainingArgs optional, ffi::RemainingRets results, const BackwardAttributes& a,
                                size_t more_results = 0) {
    Call<BackwardArrays> call;
    Geometry& g = call.geometry;
    BackwardArrays& arrays = call.arrays;
    const size_t mask = a.has_weight ? 1 : 0;  // its position
    if (optional.size() != mask + (a.has_mask ? 1 : 0) || (a.wanted.mask && !a.has_mask) ||
        ((a.wanted.weight || a.wanted.bias) && !a.has_weight)) {
      Fail("the operands are not those of the attributes");
    }
    g = ToGeometry(x.dimensions(), offset.dimensions(), WeightSizes(optional, a), a);
    if (!ok()) return call;
    const Shapes shapes(g, a.nchw);
    arrays.format = a.nchw ? DataFormat::kNCHW : DataFormat::kNHWC;
    arrays.round_samples = !a.highest_precision;
    arrays.x = ToArray("x", x, shapes.x);
    const DType dtype = arrays.x.dtype;
    const DType sum_dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    arrays.grad_y = ToArray("grad_y", grad_y, shapes.y, dtype);
    arrays.offset = ToArray("offset", offset, shapes.offset);
    if (a.has_weight) arrays.weight = ToArray("weight", *optional.get<ffi::AnyBuffer>(0), shapes.weight, dtype);
    if (a.has_mask) arrays.mask = ToArray("mask", *optional.get<ffi::AnyBuffer>(mask), shapes.mask);
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
    if (results.size() != next + more_results) Fail("the results are not those of the attributes");
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

  // The dimensions of the weight, which comes first.
  static Sizes WeightSizes(ffi::RemainingArgs optional, const Attributes& a) {
    if (!a.has_weight || optional.size() == 0) return {};
    return optional.get<ffi::AnyBuffer>(0)->dimensions();
  }

  static bool FitsImage(const Geometry& g) {
    for (const int64_t size : {g.height, g.width, g.h_out, g.w_out, g.kernel_h, g.kernel_w, g.stride_h, g.stride_w,
                               g.padding_h, g.padding_w, g.dilation_h, g.dilation_w}) {
      if (size > kMax) return false;
    }
    // One row more than the image, as plain XLA counts corners before it knows whether they are inside; of levels,
    // which make a single row, it counts those of each.
    return g.image() + (g.height == 1 ? 0 : g.width) <= kMax &&
           (g.h_out - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h <= kMax &&
           (g.w_out - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w <= kMax;
  }

  // The levels fill x.
  void ToLevels(Sizes sizes, Geometry& g) {
    g.levels.count = static_cast<int>(sizes.size() / 2);
    if (sizes.size() % 2 != 0 || g.levels.count > kMaxLevels) return Fail("there may be 8 levels, each a pair");
    if (g.levels.count == 0) return;
    for (const int64_t size : {g.stride_h, g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w}) {
      if (size != 0) return Fail("levels have no grid");
    }
    int64_t first = 0;
    for (int i = 0; i < g.levels.count; ++i) {
      const int64_t height = sizes[2 * i], width = sizes[2 * i + 1];
      if (height < 1 || width < 1 || height > g.width || width > g.width / height) return Fail("levels must be in x");
      g.levels.height[i] = static_cast<int32_t>(height);
      g.levels.width[i] = static_cast<int32_t>(width);
      g.levels.first[i] = static_cast<int32_t>(first);
      first += height * width;
    }
    if (g.height != 1 || first != g.width || g.taps() % g.levels.count != 0) Fail("levels must fill x and have taps");
  }

  ffi::Error error_ = ffi::Error::Success();
};

}  // namespace jax_dcn
