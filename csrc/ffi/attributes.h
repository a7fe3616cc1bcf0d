// The attributes of the calls: the only list of them here. In Python they are made by `attributes` of
// jax_dcn/_operator/native.py.

#pragma once

#include <cstdint>

#include "../operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dcn {

namespace ffi = xla::ffi;

using Sizes = ffi::Span<const int64_t>;

struct Attributes {
  Sizes kernel, stride, padding, dilation;  // padding: before the first row, and column
  Sizes levels;                             // height and width of each
  int64_t groups, deform_groups;
  bool nchw, x_first, has_weight, has_mask;
  bool highest_precision, deterministic;
};

struct BackwardAttributes : Attributes {
  WantedGradients wanted;
};

}  // namespace jax_dcn

// By name, in the order of the members.
#define JAX_DCN_ATTRIBUTES                                                                                             \
  StructMember<jax_dcn::Sizes>("kernel"), StructMember<jax_dcn::Sizes>("stride"),                                      \
      StructMember<jax_dcn::Sizes>("padding"), StructMember<jax_dcn::Sizes>("dilation"),                               \
      StructMember<jax_dcn::Sizes>("levels"), StructMember<int64_t>("groups"), StructMember<int64_t>("deform_groups"), \
      StructMember<bool>("nchw"), StructMember<bool>("x_first"), StructMember<bool>("has_weight"),                     \
      StructMember<bool>("has_mask"), StructMember<bool>("highest_precision"), StructMember<bool>("deterministic")

#define JAX_DCN_BACKWARD_ATTRIBUTES                                                    \
  JAX_DCN_ATTRIBUTES, StructMember<bool>("grad_x"), StructMember<bool>("grad_offset"), \
      StructMember<bool>("grad_mask"), StructMember<bool>("grad_weight"), StructMember<bool>("grad_bias")

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_dcn::Attributes, JAX_DCN_ATTRIBUTES);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_dcn::BackwardAttributes, JAX_DCN_BACKWARD_ATTRIBUTES);
