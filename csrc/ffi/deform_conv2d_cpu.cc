// The CPU handlers: from XLA's buffers and attributes to the kernels' arrays and geometry. Python has checked the
// operands and told the user; here is checked again what protects memory.

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "handlers.h"
#include "xla/ffi/api/ffi.h"
#include "xla_workers.h"

namespace jax_dcn {
namespace {

namespace ffi = xla::ffi;

using Pair = ffi::Span<const int64_t>;

std::optional<DType> ToDType(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32: return DType::kFloat32;
    case ffi::DataType::F64: return DType::kFloat64;
    case ffi::DataType::BF16: return DType::kBFloat16;
    case ffi::DataType::F16: return DType::kFloat16;
    default: return std::nullopt;
  }
}

struct Attributes {
  Pair stride, padding, dilation;
  int64_t groups, deform_groups;
  bool nchw;
};

using Shape = std::vector<int64_t>;

// The shape in either format of an array of images with the given channels.
Shape ImageShape(bool nchw, int64_t batch, int64_t height, int64_t width, int64_t channels) {
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

// The first error of a handler's checks, and how arrays that passed come out of its buffers.
class Checker {
 public:
  void Fail(const std::string& message) {
    if (error_.success()) error_ = ffi::Error::InvalidArgument("jax_dcn: " + message);
  }
  const ffi::Error& error() const { return error_; }
  bool ok() const { return error_.success(); }

  // Sizes from x and weight, both of rank 4, and the attributes.
  Geometry ToGeometry(ffi::AnyBuffer x, ffi::AnyBuffer weight, const Attributes& a) {
    Geometry g{};
    const auto image = x.dimensions();
    const auto kernel = weight.dimensions();
    if (image.size() != 4 || kernel.size() != 4) return Fail("x and weight must have rank 4"), g;
    if (a.stride.size() != 2 || a.padding.size() != 2 || a.dilation.size() != 2) {
      return Fail("stride, padding and dilation must be pairs"), g;
    }
    const int pixels = a.nchw ? 2 : 1;
    g.batch = image[0], g.height = image[pixels], g.width = image[pixels + 1], g.c_in = image[a.nchw ? 1 : 3];
    const int taps = a.nchw ? 2 : 0;
    g.kernel_h = kernel[taps], g.kernel_w = kernel[taps + 1], g.c_out = kernel[a.nchw ? 0 : 3];
    g.stride_h = a.stride[0], g.stride_w = a.stride[1];
    g.padding_h = a.padding[0], g.padding_w = a.padding[1];
    g.dilation_h = a.dilation[0], g.dilation_w = a.dilation[1];
    g.groups = a.groups, g.deform_groups = a.deform_groups;
    const int64_t positive[] = {g.height,   g.width,    g.c_in,       g.kernel_h,   g.kernel_w, g.c_out,
                                g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.groups,   g.deform_groups};
    for (const int64_t size : positive) {
      if (size < 1) return Fail("sizes, strides, dilations and groups must be positive"), g;
    }
    if (g.c_in % g.groups != 0 || g.c_out % g.groups != 0 || g.c_in % g.deform_groups != 0) {
      return Fail("channels must be multiples of the groups"), g;
    }
    if (kernel[a.nchw ? 1 : 2] != g.group_in()) return Fail("weight must have C_in / groups input channels"), g;
    // Pixels are counted, and regular coordinates computed, in 32 bits.
    if (!FitsImage(g)) return Fail("an image and its padding must be smaller than 2^31 pixels"), g;
    g.h_out = OutputSize(g.height, g.kernel_h, g.stride_h, g.padding_h, g.dilation_h);
    g.w_out = OutputSize(g.width, g.kernel_w, g.stride_w, g.padding_w, g.dilation_w);
    if (g.h_out < 1 || g.w_out < 1) Fail("the output has no pixels");
    return g;
  }

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

 private:
  static constexpr int64_t kMax = std::numeric_limits<int32_t>::max();

  static bool FitsImage(const Geometry& g) {
    for (const int64_t size : {g.height, g.width, g.kernel_h, g.kernel_w, g.padding_h, g.padding_w, g.dilation_h,
                               g.dilation_w, g.stride_h, g.stride_w}) {
      if (size < 0 || size > kMax) return false;
    }
    // One row more than the image, as plain XLA counts corners before it knows whether they are inside.
    return g.image() + g.width < kMax && g.height + 2 * g.padding_h <= kMax && g.width + 2 * g.padding_w <= kMax;
  }

  static int64_t OutputSize(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t span = size + 2 * padding - (dilation * (kernel - 1) + 1);
    return span < 0 ? 0 : span / stride + 1;
  }

  ffi::Error error_ = ffi::Error::Success();
};

// Runs a kernel of the chosen instruction set, on one thread if the work is too little to share.
template <class Arrays>
ffi::Error Run(bool (*Kernels::*kernel)(const Geometry&, const Arrays&, Workers&), const Geometry& g,
               const Arrays& arrays, const ffi::ThreadPool& pool) {
  const Kernels* kernels = ChosenKernels();
  if (kernels == nullptr) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "jax_dcn: JAX_DCN_CPU_ISA names an instruction set that was not built or does not run here; "
                      "jax_dcn.show_config() lists those built");
  }
  SerialWorkers serial;
  XlaWorkers shared(pool);
  // Some 10 microseconds of work; waking another thread takes about as long. A sample costs about 8 multiply-adds.
  constexpr double kSharedMultiplyAdds = 200000;
  const double pixel_work = static_cast<double>(g.weights()) + 8.0 * static_cast<double>(g.taps() * g.c_in);
  const bool small = static_cast<double>(g.pixels()) * pixel_work < kSharedMultiplyAdds;
  if (!(kernels->*kernel)(g, arrays, small ? static_cast<Workers&>(serial) : shared)) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_dcn: no memory for the work space");
  }
  return ffi::Error::Success();
}

ffi::Error DeformConv2d(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer offset, ffi::AnyBuffer weight,
                        ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> y, Pair stride, Pair padding,
                        Pair dilation, int64_t groups, int64_t deform_groups, bool nchw, bool has_mask) {
  Checker check;
  const Geometry g = check.ToGeometry(x, weight, {stride, padding, dilation, groups, deform_groups, nchw});
  if (!check.ok()) return check.error();
  const Shapes shapes(g, nchw);
  ForwardArrays arrays;
  arrays.format = nchw ? DataFormat::kNCHW : DataFormat::kNHWC;
  arrays.x = check.ToArray("x", x, shapes.x);
  const DType dtype = arrays.x.dtype;
  arrays.offset = check.ToArray("offset", offset, shapes.offset);
  arrays.weight = check.ToArray("weight", weight, shapes.weight, dtype);
  if (has_mask) {
    const ffi::AnyBuffer mask = check.Value(optional.get<ffi::AnyBuffer>(0), x);
    arrays.mask = check.ToArray("mask", mask, shapes.mask);
  }
  if (optional.size() > (has_mask ? 1u : 0u)) {
    const ffi::AnyBuffer bias = check.Value(optional.get<ffi::AnyBuffer>(has_mask ? 1 : 0), x);
    arrays.bias = check.ToArray("bias", bias, {g.c_out}, dtype);
  }
  if (optional.size() != (has_mask ? 1u : 0u) + (arrays.bias ? 1u : 0u)) check.Fail("there are too many operands");
  arrays.y = check.ToArray("y", *y, shapes.y, dtype);
  return check.ok() ? Run(&Kernels::forward, g, arrays, pool) : check.error();
}

ffi::Error DeformConv2dBackward(ffi::ThreadPool pool, ffi::AnyBuffer grad_y, ffi::AnyBuffer x, ffi::AnyBuffer offset,
                                ffi::AnyBuffer weight, ffi::RemainingArgs optional, ffi::RemainingRets gradients,
                                Pair stride, Pair padding, Pair dilation, int64_t groups, int64_t deform_groups,
                                bool nchw, bool has_mask, bool grad_x, bool grad_offset, bool grad_mask,
                                bool grad_weight, bool grad_bias) {
  Checker check;
  const Geometry g = check.ToGeometry(x, weight, {stride, padding, dilation, groups, deform_groups, nchw});
  if (!check.ok()) return check.error();
  const Shapes shapes(g, nchw);
  BackwardArrays arrays;
  arrays.format = nchw ? DataFormat::kNCHW : DataFormat::kNHWC;
  arrays.x = check.ToArray("x", x, shapes.x);
  const DType dtype = arrays.x.dtype;
  const DType sum_dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  arrays.grad_y = check.ToArray("grad_y", grad_y, shapes.y, dtype);
  arrays.offset = check.ToArray("offset", offset, shapes.offset);
  arrays.weight = check.ToArray("weight", weight, shapes.weight, dtype);
  if (has_mask) {
    arrays.mask = check.ToArray("mask", check.Value(optional.get<ffi::AnyBuffer>(0), x), shapes.mask);
  }
  size_t next = 0;
  const auto result = [&](const char* name, const Shape& shape, DType type) {
    auto gradient = gradients.get<ffi::AnyBuffer>(next++);
    if (gradient.has_value()) return check.ToArray(name, **gradient, shape, type);
    check.Fail(gradient.error().message());
    return Array{};
  };
  // In the order of the primitive's `wanted`.
  if (grad_x) arrays.grad_x = result("grad_x", shapes.x, sum_dtype);
  if (grad_offset) arrays.grad_offset = result("grad_offset", shapes.offset, arrays.offset.dtype);
  if (grad_mask) arrays.grad_mask = result("grad_mask", shapes.mask, arrays.mask.dtype);
  if (grad_weight) arrays.grad_weight = result("grad_weight", shapes.weight, sum_dtype);
  if (grad_bias) arrays.grad_bias = result("grad_bias", {g.c_out}, sum_dtype);
  if (optional.size() != (has_mask ? 1u : 0u) || gradients.size() != next || (grad_mask && !has_mask)) {
    check.Fail("the operands or results are not those of the attributes");
  }
  return check.ok() ? Run(&Kernels::backward, g, arrays, pool) : check.error();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dCpu, DeformConv2d,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // offset
                                  .Arg<ffi::AnyBuffer>()  // weight
                                  .RemainingArgs()        // [mask], [bias]
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Attr<Pair>("stride")
                                  .Attr<Pair>("padding")
                                  .Attr<Pair>("dilation")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("deform_groups")
                                  .Attr<bool>("nchw")
                                  .Attr<bool>("has_mask"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeformConv2dBackwardCpu, DeformConv2dBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // grad_y
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // offset
                                  .Arg<ffi::AnyBuffer>()  // weight
                                  .RemainingArgs()        // [mask]
                                  .RemainingRets()        // the gradients wanted
                                  .Attr<Pair>("stride")
                                  .Attr<Pair>("padding")
                                  .Attr<Pair>("dilation")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("deform_groups")
                                  .Attr<bool>("nchw")
                                  .Attr<bool>("has_mask")
                                  .Attr<bool>("grad_x")
                                  .Attr<bool>("grad_offset")
                                  .Attr<bool>("grad_mask")
                                  .Attr<bool>("grad_weight")
                                  .Attr<bool>("grad_bias"));

}  // namespace jax_dcn
