"""torch's functions of images. The channels come last unless data_format says "NCHW"; batch axes may be any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_dcn._checks import check_array, check_bool, check_data_format, check_output, to_array, to_pair


def interpolate(
    x: jax.Array,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    *,
    data_format: str = "NHWC",
) -> jax.Array:
    """torch's interpolate: images of another size, with torch's coordinates, which are not `jax.image.resize`'s.

    Args:
      x: (N, H, W, C), or (N, C, H, W) for NCHW.
      size: an int, which is for both axes, or a pair (height, width).
      scale_factor: in place of size, a number or a pair: the size is rounded down, and the distance of two samples is
        1 / scale_factor, even where that is not quite H / size.
      mode: "nearest" (default), the neighbour up and left, or "bilinear".
      align_corners: of "bilinear": whether the centres of the corner pixels stay where they are (default False: the
        corners of the corner pixels).
      data_format: "NHWC" (default) or "NCHW".

    Returns:
      Images of the new size, of x's dtype. 16-bit ones are interpolated in float32.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """
    name = "interpolate"
    height, width = _axes(name, x, data_format)
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"{name}: mode must be 'nearest' or 'bilinear', got {mode!r}")
    x = jnp.asarray(x) if mode == "nearest" else to_array(name, "x", x)  # labels have neighbours too
    if mode == "nearest" and align_corners is not None:
        raise ValueError(f"{name}: align_corners belongs to mode='bilinear'")
    if (size is None) == (scale_factor is None):
        raise ValueError(f"{name}: give either size or scale_factor")
    before = x.shape[height], x.shape[width]
    steps: Sequence[float | None] = (None, None)
    if scale_factor is None:
        after = _to_size(name, "size", size)
    else:
        factors = tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
        if len(factors) != 2 or not all(_is_number(factor) and 0 < factor < math.inf for factor in factors):
            raise ValueError(f"{name}: scale_factor must be a positive number or a pair, got {scale_factor!r}")
        after = _to_size(name, "the size", [_scaled(n, factor) for n, factor in zip(before, factors, strict=True)])
        steps = [1 / factor for factor in factors]
    check_output(name, before, after)
    result_dtype, dtype = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    if mode == "bilinear":
        x = x.astype(dtype)
    for axis, target, step in zip((height, width), after, steps, strict=True):
        x = _resized(x, axis, target, step, mode, bool(align_corners), np.dtype(dtype))
    return x.astype(result_dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _scaled(size: Any, factor: float) -> Any:
    """Rounded down."""
    if float(factor).is_integer():
        return size * int(factor)
    if jax.export.is_symbolic_dim(size):
        raise ValueError(f"interpolate: a symbolic size, {size}, can only be multiplied by an integer, got {factor}")
    return math.floor(size * factor)


def _to_size(name: str, argument: str, size: Any) -> tuple[Any, Any]:
    """A pair, of ints or symbolic sizes."""
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) == 2 and any(map(jax.export.is_symbolic_dim, sizes)):
        return sizes
    return to_pair(name, argument, size, 1)


def _resized(
    x: jax.Array, axis: int, target: Any, step: float | None, mode: str, align_corners: bool, dtype: np.dtype[Any]
) -> jax.Array:
    source = x.shape[axis]
    if source == target:
        # torch does so too, but not everywhere with a scale_factor that is not quite 1.
        return x
    if jax.export.is_symbolic_dim(source) or jax.export.is_symbolic_dim(target):
        if mode != "nearest" or target % source != 0 or not isinstance(target // source, int):
            raise ValueError(
                f"interpolate: a symbolic size can only be multiplied by an integer, with mode='nearest', got {source} "
                f"to be made {target} with mode={mode!r}"
            )
        return jnp.repeat(x, target // source, axis=axis)
    # In x's dtype, as torch computes them: a neighbour may hang on the rounding.
    index, one_step = np.arange(target, dtype=dtype), dtype.type(source / target if step is None else step)
    if mode == "nearest":
        neighbours = np.minimum((index * one_step).astype(int), source - 1)
        if target % source == 0 and np.array_equal(neighbours, np.arange(target) // (target // source)):
            # A broadcast, whose gradient is a sum, and takes a fifth of the time of a gather's, a scatter.
            return jnp.repeat(x, target // source, axis=axis)
        # Of jnp.take, here and below, jax2onnx exports only the default mode.
        return jnp.take(x, neighbours, axis=axis)
    if align_corners:
        position = index * dtype.type((source - 1) / (target - 1) if target > 1 else 0)
    else:
        half = dtype.type(0.5)
        position = np.maximum(one_step * (index + half) - half, 0)
    first = np.minimum(position.astype(int), source - 1)
    weight = np.clip(position - first.astype(dtype), 0, 1)
    weight = np.expand_dims(weight, tuple(i for i in range(x.ndim) if i != axis % x.ndim))
    last = jnp.take(x, np.minimum(first + 1, source - 1), axis=axis)
    return jnp.take(x, first, axis=axis) * (1 - weight) + last * weight


def max_pool2d(
    x: jax.Array,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    ceil_mode: bool = False,
    data_format: str = "NHWC",
) -> jax.Array:
    """torch's max_pool2d, without dilation.

    Args:
      x: (N, H, W, C), or (N, C, H, W) for NCHW.
      kernel_size: an int, which is for both axes, or a pair (height, width).
      stride: likewise (default kernel_size).
      padding: an int (default 0) or a pair, at most half the kernel: pixels that count as minus infinity.
      ceil_mode: whether a last window that is only partly in the image counts too (default False).
      data_format: "NHWC" (default) or "NCHW".

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """
    name = "max_pool2d"
    axes = _axes(name, x, data_format)
    x = to_array(name, "x", x)
    check_bool(name, "ceil_mode", ceil_mode)
    kernel = to_pair(name, "kernel_size", kernel_size, 1)
    strides = kernel if stride is None else to_pair(name, "stride", stride, 1)
    pads = to_pair(name, "padding", padding, 0)
    if any(2 * p > k for p, k in zip(pads, kernel, strict=True)):
        raise ValueError(f"{name}: padding {pads} must be at most half of kernel_size {kernel}")
    size = [x.shape[axis] for axis in axes]
    # The width first: of equal pixels the first one in the order of rows has the gradient then, as in torch.
    for axis, k, s, p in reversed(list(zip(axes, kernel, strides, pads, strict=True))):
        x = _max_pool(x, axis % x.ndim, k, s, p, ceil_mode)
    check_output(name, size, [x.shape[axis] for axis in axes])
    return x


def _max_pool(x: jax.Array, axis: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> jax.Array:
    # Of Flax's max_pool jax2onnx leaves out the padding, and symbolic sizes of its result are those of its input. ONNX
    # Runtime pools over three axes at most.
    size, after = x.shape[axis], padding
    if ceil_mode:
        windows = -((kernel - size - 2 * padding) // stride) + 1
        windows -= (windows - 1) * stride >= size + padding  # it would begin behind the image
        after += max((windows - 1) * stride + kernel - size - 2 * padding, 0)
    before, behind = x.shape[:axis], x.shape[axis + 1 :]
    y = lax.reduce_window(
        x.reshape(math.prod(before), size, math.prod(behind)),
        -jnp.inf,
        lax.max,
        (1, kernel, 1),
        (1, stride, 1),
        ((0, 0), (padding, after), (0, 0)),
    )
    return y.reshape(*before, y.shape[1], *behind)


def adaptive_avg_pool2d(
    x: jax.Array, output_size: int | Sequence[int | None], *, data_format: str = "NHWC"
) -> jax.Array:
    """torch's adaptive_avg_pool2d: means over windows that divide the image into output_size parts.

    Args:
      x: (N, H, W, C), or (N, C, H, W) for NCHW.
      output_size: an int, which is for both axes, or a pair (height, width), None for the size that x has. Window i of
        n begins at pixel floor(i*H/n) and ends before ceil((i+1)*H/n).
      data_format: "NHWC" (default) or "NCHW".

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """
    name = "adaptive_avg_pool2d"
    axes = _axes(name, x, data_format)
    x = to_array(name, "x", x)
    sizes = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if len(sizes) != 2:
        raise ValueError(f"{name}: output_size must be an integer or a pair (height, width), got {output_size!r}")
    targets = [None if size is None else to_pair(name, "output_size", size, 1)[0] for size in sizes]
    means = [axis for axis, target in zip(axes, targets, strict=True) if target == 1]
    if means:
        x = jnp.mean(x, tuple(means), keepdims=True)
    for axis, target in zip(axes, targets, strict=True):
        if target not in (None, 1, x.shape[axis]):
            size = x.shape[axis]
            if jax.export.is_symbolic_dim(size):
                raise ValueError(f"{name}: a symbolic size, {size}, can only be averaged whole or kept, got {target}")
            starts, ends = (np.arange(target + 1) * size // target)[:-1], -(-np.arange(1, target + 1) * size // target)
            pixels = np.arange(size)
            inside = (pixels >= starts[:, None]) & (pixels < ends[:, None])
            weights = jnp.asarray(inside / (ends - starts)[:, None], jnp.promote_types(x.dtype, jnp.float32))
            y = jnp.tensordot(x, weights, (axis, 1), precision="highest", preferred_element_type=weights.dtype)
            x = jnp.moveaxis(y, -1, axis).astype(x.dtype)
    return x


def reread(maps: jax.Array, size: int | Sequence[int], *, data_format: str = "NHWC") -> jax.Array:
    """The numbers of every image, from its first one on, as maps of another size.

    This is what mmcv's version 2 makes of an offset and a mask that are larger than its output: it does not check
    their size, and reads the memory of an image (C, H, W) as if it were (C, height, width). Models that were trained
    so need it: DyHead computes a level's offsets once, and uses them on the next level too.

    Args:
      maps: an offset or a mask, each by itself: (N, H, W, C), or (N, C, H, W) for NCHW.
      size: an int, which is for both axes, or a pair (height, width) of no more pixels than there are.
      data_format: "NHWC" (default) or "NCHW".

    Returns:
      (N, height, width, C), or (N, C, height, width) for NCHW.

    Raises:
      ValueError: a size of more pixels: mmcv would read memory that is not the image's.
    """
    name = "reread"
    _axes(name, maps, data_format)
    height, width = to_pair(name, "size", size, 1)
    maps = jnp.asarray(maps)
    nchw = maps if data_format == "NCHW" else jnp.moveaxis(maps, -1, -3)
    *batch, channels, height_before, width_before = nchw.shape
    if any(map(jax.export.is_symbolic_dim, (height_before, width_before))):
        raise ValueError(f"{name}: height and width must not be symbolic, got {height_before} x {width_before}")
    if height * width > height_before * width_before:
        raise ValueError(
            f"{name}: size {height} x {width} has more pixels than the maps, {height_before} x {width_before}"
        )
    numbers = nchw.reshape(*batch, channels * height_before * width_before)[..., : channels * height * width]
    nchw = numbers.reshape(*batch, channels, height, width)
    return nchw if data_format == "NCHW" else jnp.moveaxis(nchw, -3, -1)


def _axes(name: str, x: Any, data_format: str) -> tuple[int, int]:
    """Those of the height and the width, from the end."""
    check_array(name, "x", x)
    check_data_format(name, data_format)
    if x.ndim < 3:
        raise ValueError(f"{name}: x has {x.ndim} dimensions, expected 3 or more, in shape {x.shape}")
    return data_format.index("H") - 4, data_format.index("W") - 4
