"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from jax_dcn import _checks
from jax_dcn._operator import differentiation, unweighted

Array = jax.Array | np.ndarray


def deform_conv2d(
    x: Array,
    offset: Array,
    weight: Array,
    stride: int | Sequence[int] = 1,
    padding: _checks.PaddingLike = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: Array | Literal[False] | None = None,
    im2col_step: int = 32,
    *,
    mask: Array | None = None,
    data_format: str = "NCHW",
    precision: lax.PrecisionLike = None,
    forward_mode: bool = False,
) -> jax.Array:
    """Deformable convolution (DCNv1, Dai et al. 2017, https://arxiv.org/abs/1703.06211).

    The operator of `mmcv.ops.deform_conv2d`, with its positional arguments. Output pixel (ho, wo) reads tap
    (i, j) of deform group g at

        y = ho*stride_h - top + i*dilation_h + offset[n, ((g*kh + i)*kw + j)*2, ho, wo]
        x = wo*stride_w - left + j*dilation_w + offset[n, ((g*kh + i)*kw + j)*2 + 1, ho, wo]

    by bilinear interpolation, in pixels, pixels outside the image counting as 0; top and left are the padding there. A
    sample is 0 unless -1 < y < H and -1 < x < W, so a coordinate that is NaN, infinite or huge contributes nothing. The
    gradient with respect to a coordinate is the right-hand derivative on lattice points, and 0 where the sample is 0 by
    that rule.

    Shapes for data_format="NCHW", and for "NHWC":
      x       (N, C_in, H, W)                                (N, H, W, C_in)
      offset  (N, deform_groups*kh*kw*2, H_out, W_out)       (N, H_out, W_out, deform_groups*kh*kw*2)
      mask    (N, deform_groups*kh*kw, H_out, W_out)         (N, H_out, W_out, deform_groups*kh*kw)
      weight  (C_out, C_in/groups, kh, kw)                   (kh, kw, C_in/groups, C_out)
      result  (N, C_out, H_out, W_out)                       (N, H_out, W_out, C_out)

    with H_out = (H + top + bottom - (dilation_h*(kh - 1) + 1)) // stride_h + 1, and W_out likewise.

    Args:
      x: the image, float32, float64, bfloat16 or float16.
      offset: the displacement (dy, dx) of every tap, in pixels, of any of these dtypes.
      weight: the kernel, of x's dtype.
      stride, dilation: an int or a pair (height, width).
      padding: in pixels, an int or a pair (height, width), each for both sides or a pair (before, after), as in
        ((top, bottom), (left, right)); or "SAME", "SAME_LOWER" or "VALID", of any case, as in
        `jax.lax.conv_general_dilated`.
      groups: weight groups. C_in and C_out must be multiples.
      deform_groups: groups of input channels with offsets of their own. C_in must be a multiple.
      bias: None or False, or (C_out,) of x's dtype.
      im2col_step: accepted for mmcv's sake. There is no column buffer for it to bound, so it changes neither
        the numbers nor the batch sizes allowed.
      mask: None, or a factor for every sample, of any of these dtypes, which makes it DCNv2.
      data_format: "NCHW" or "NHWC".
      forward_mode: differentiates by JVP and transpose rules, so that `jax.jvp`, `jacfwd` and `linearize` work, and
        reverse mode too. JAX refuses these of a custom_vjp function, which it is otherwise.
      precision: as in `jax.lax.conv_general_dilated`, and by default what `jax.default_matmul_precision` says. Unless
        it is "highest", the CUDA kernels multiply float32 as TF32, from compute capability 8.0 on, and the CPU's
        kernels bfloat16 with samples rounded to bfloat16 where the processor has AVX512-BF16.

    Returns:
      The result, of x's dtype. Coordinates, interpolation and sums are in float32, in float64 for float64.

    Raises:
      TypeError: a dtype or an argument of the wrong type.
      ValueError: shapes that do not fit one another.
    """
    del im2col_step
    return checked_deform_conv2d(
        "deform_conv2d",
        *(x, offset, mask, weight, bias),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=deform_groups,
        data_format=data_format,
        precision=precision,
        forward_mode=forward_mode,
    )


def modulated_deform_conv2d(
    x: Array,
    offset: Array,
    mask: Array,
    weight: Array,
    bias: Array | Literal[False] | None = None,
    stride: int | Sequence[int] = 1,
    padding: _checks.PaddingLike = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    *,
    data_format: str = "NCHW",
    precision: lax.PrecisionLike = None,
    forward_mode: bool = False,
) -> jax.Array:
    """Modulated deformable convolution (DCNv2, Zhu et al. 2018, https://arxiv.org/abs/1811.11168).

    The operator of `mmcv.ops.modulated_deform_conv2d`, with its positional arguments: `deform_conv2d` with every
    sample multiplied by its mask. The mask is linear and unbounded; a sigmoid, if any, is the caller's. Shapes,
    dtypes, the other arguments and errors are those of `deform_conv2d`.
    """
    if mask is None:
        raise TypeError("modulated_deform_conv2d: mask must be an array, got None")
    return checked_deform_conv2d(
        "modulated_deform_conv2d",
        *(x, offset, mask, weight, bias),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=deform_groups,
        data_format=data_format,
        precision=precision,
        forward_mode=forward_mode,
    )


def dcnv3(
    x: Array,
    offset: Array,
    mask: Array,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: _checks.PaddingLike = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    forward_mode: bool = False,
) -> jax.Array:
    """The operator of DCNv3 (InternImage, Wang et al. 2022, https://arxiv.org/abs/2211.05778), without its projections.

    `modulated_deform_conv2d` without a weight: every channel is the sum over the taps of its own samples times their
    mask. The taps run along the width first, so tap (i, j) of a kernel (kh, kw) is number i*kh + j, i along the width.
    It reads output pixel (ho, wo) at

        x = half_w - left + wo*stride_w + offset_scale * (i*dilation_w - half_w + dx)      half_w = dilation_w*(kw-1)//2
        y = half_h - top + ho*stride_h + offset_scale * (j*dilation_h - half_h + dy)       half_h = dilation_h*(kh-1)//2

    so that offset_scale stretches the grid too; top and left are the padding there. Which samples count, what they are,
    and their gradients are as in `deform_conv2d`.

    Args:
      x: (N, H, W, C), float32, float64, bfloat16 or float16, channels last as in the original.
      offset: (N, H_out, W_out, groups*K*2), the displacement (dx, dy), not (dy, dx), of every tap, of any of these
        dtypes. K is kh*kw, or one less with remove_center.
      mask: (N, H_out, W_out, groups*K), a factor for every sample, used as it is, of any of these dtypes.
      kernel_size, stride, dilation: an int or a pair (height, width).
      padding: as in `deform_conv2d`.
      groups: groups of channels with offsets and masks of their own. C must be a multiple.
      offset_scale: a number.
      remove_center: a bool, leaves the middle tap of an odd, square kernel out.
      forward_mode: as in `deform_conv2d`.

    Returns:
      (N, H_out, W_out, C), of x's dtype, with `deform_conv2d`'s H_out and W_out. Coordinates, interpolation and sums
      are in float32, in float64 for float64.

    Raises:
      TypeError: a dtype or an argument of the wrong type.
      ValueError: shapes that do not fit one another.
    """
    return checked_dcnv3(
        "dcnv3",
        *(x, offset, mask),
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_scale=offset_scale,
        remove_center=remove_center,
        forward_mode=forward_mode,
    )


def dcnv4(
    x: Array,
    offset_mask: Array,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: _checks.PaddingLike = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    forward_mode: bool = False,
) -> jax.Array:
    """The operator of DCNv4 (Xiong et al. 2024, https://arxiv.org/abs/2401.06197): `dcnv3` of one array of both.

    Args:
      offset_mask: (N, H_out, W_out, groups*K*3 rounded up to a multiple of 8), for each group its 2*K offsets and then
        its K masks, in `dcnv3`'s order. What follows the last group is ignored. The other arguments, the result and
        the errors are those of `dcnv3`.
    """
    return checked_dcnv4(
        "dcnv4",
        *(x, offset_mask),
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_scale=offset_scale,
        remove_center=remove_center,
        forward_mode=forward_mode,
    )


def multi_scale_deformable_attention(
    value: Array,
    spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: Array,
    attention_weights: Array,
    *,
    forward_mode: bool = False,
) -> jax.Array:
    """Multi-scale deformable attention (Deformable DETR, Zhu et al. 2020, https://arxiv.org/abs/2010.04159).

    The operator of `mmcv.ops.MultiScaleDeformableAttention`, without its projections: every query and head sums some
    samples, of all levels, times their weights. A location u in [0, 1] of a level of h by w pixels is the coordinate
    u*w - 0.5, or u*h - 0.5, in pixels; any other location is allowed. Which samples count, what they are, and their
    gradients are as in `deform_conv2d`.

    Args:
      value: (N, S, heads, D), the pixels of all levels one after another, in rows, S the sum of h*w over the levels;
        float32, float64, bfloat16 or float16.
      spatial_shapes: the size (h, w) of every level, static: integers, not traced arrays.
      sampling_locations: (N, Q, heads, levels, points, 2), each (x, y), of any of these dtypes.
      attention_weights: (N, Q, heads, levels, points), used as they are, of any of these dtypes.
      forward_mode: as in `deform_conv2d`.

    Returns:
      (N, Q, heads*D), of value's dtype. Coordinates, interpolation and sums, those over the levels too, are in float32,
      in float64 for float64.

    Raises:
      TypeError: a dtype or an argument of the wrong type.
      ValueError: shapes that do not fit one another.
    """
    return checked_attention(
        "multi_scale_deformable_attention",
        *(value, spatial_shapes, sampling_locations, attention_weights),
        forward_mode=forward_mode,
    )


# --- for the layers, whose own names their errors begin with ---


def checked_deform_conv2d(
    name: str,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    *,
    data_format: str,
    precision: lax.PrecisionLike,
    forward_mode: bool,
    **sizes: Any,
) -> jax.Array:
    """`deform_conv2d`, once all has been checked. Errors begin with `name`."""
    _checks.check_bool(name, "forward_mode", forward_mode)
    x, offset, weight = (
        _checks.to_array(name, argument, value)
        for argument, value in (("x", x), ("offset", offset), ("weight", weight))
    )
    mask = None if mask is None else _checks.to_array(name, "mask", mask)
    no_bias = bias is None or (isinstance(bias, (bool, np.bool_)) and not bias)
    bias = None if no_bias else _checks.to_array(name, "bias", bias)
    geometry = _checks.check_operands(name, x, offset, mask, weight, bias, data_format=data_format, **sizes)
    return differentiation.deform_conv2d(
        *(x, offset, mask, weight, bias),
        forward_mode=forward_mode,
        geometry=geometry,
        precision=_checks.to_precision(name, precision),
        implementation=_checks.implementation(),
    )


def checked_dcnv3(
    name: str, x: Any, offset: Any, mask: Any, *, offset_scale: Any, forward_mode: Any, **sizes: Any
) -> jax.Array:
    """`dcnv3`, once all has been checked. Errors begin with `name`."""
    _checks.check_bool(name, "forward_mode", forward_mode)
    scale = _checks.to_scale(name, "offset_scale", offset_scale)
    x = _checks.to_array(name, "x", x)
    offset = _checks.to_array(name, "offset", offset)
    mask = _checks.to_array(name, "mask", mask)
    geometry, taps = _checks.check_dcnv3(name, x, {"offset": (offset, 2), "mask": (mask, 1)}, **sizes)
    return unweighted.dcnv3(
        *(x, offset, mask),
        taps=taps,
        offset_scale=scale,
        geometry=geometry,
        forward_mode=forward_mode,
        implementation=_checks.implementation(),
    )


def checked_dcnv4(
    name: str, x: Any, offset_mask: Any, *, offset_scale: Any, forward_mode: Any, **sizes: Any
) -> jax.Array:
    """`dcnv4`, once all has been checked. Errors begin with `name`."""
    _checks.check_bool(name, "forward_mode", forward_mode)
    scale = _checks.to_scale(name, "offset_scale", offset_scale)
    x = _checks.to_array(name, "x", x)
    offset_mask = _checks.to_array(name, "offset_mask", offset_mask)
    geometry, taps = _checks.check_dcnv3(name, x, {"offset_mask": (offset_mask, 3)}, **sizes)
    return unweighted.dcnv4(
        *(x, offset_mask),
        taps=taps,
        offset_scale=scale,
        geometry=geometry,
        forward_mode=forward_mode,
        implementation=_checks.implementation(),
    )


def checked_attention(
    name: str, value: Any, spatial_shapes: Any, sampling_locations: Any, attention_weights: Any, *, forward_mode: Any
) -> jax.Array:
    """`multi_scale_deformable_attention`, once all has been checked. Errors begin with `name`."""
    _checks.check_bool(name, "forward_mode", forward_mode)
    value = _checks.to_array(name, "value", value)
    locations = _checks.to_array(name, "sampling_locations", sampling_locations)
    weights = _checks.to_array(name, "attention_weights", attention_weights)
    shapes = _checks.check_attention(name, value, spatial_shapes, locations, weights)
    return unweighted.multi_scale_deformable_attention(
        *(value, locations, weights),
        spatial_shapes=shapes,
        forward_mode=forward_mode,
        implementation=_checks.implementation(),
    )
