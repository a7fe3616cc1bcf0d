"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from jax_dcn import _checks
from jax_dcn._operator import differentiation

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
    """The operator, once all has been checked. Errors begin with `name`, that of a public function or layer."""
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
