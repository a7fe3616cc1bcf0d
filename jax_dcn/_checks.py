"""The checks of what a caller passes, and all of their errors.

Everything behind the public functions may assume operands that passed `check_operands`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jax_dcn._operator.geometry import MAX_PIXELS, MAX_WEIGHTS, Geometry, Pair

DATA_FORMATS = ("NCHW", "NHWC")
DTYPES = ("float32", "float64", "bfloat16", "float16")
IMPLEMENTATIONS = ("native", "xla")
PADDINGS = ("SAME", "SAME_LOWER", "VALID")

# As a caller gives it, and once checked: a name, or for each axis an int for both sides or (before, after).
PaddingLike = str | int | Sequence[int | Sequence[int]]
CheckedPadding = str | tuple[int | Pair, int | Pair]


def check_array(name: str, argument: str, value: Any) -> None:
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: {argument} must be an array, got {type(value).__name__}")


def to_array(name: str, argument: str, value: Any) -> jax.Array:
    """An array, of JAX or numpy, of one of the dtypes."""
    check_array(name, argument, value)
    if value.dtype.name not in DTYPES:
        raise TypeError(f"{name}: {argument} has dtype {value.dtype}, expected one of {', '.join(DTYPES)}")
    if not value.dtype.isnative:
        raise TypeError(f"{name}: {argument} has dtype {value.dtype}, expected this machine's byte order")
    # A copy of a traced array would be kept for the backward pass.
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def to_integer(name: str, argument: str, value: Any) -> int:
    """An int, of Python, numpy or JAX, but no bool."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: {argument} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {argument} must be an integer, got {value!r}") from None


def to_pair(name: str, argument: str, value: Any, minimum: int) -> Pair:
    """An int or a pair of ints as (height, width), each at least `minimum`."""
    values = tuple(value) if _is_sequence(value) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{name}: {argument} must be an integer or a pair (height, width), got {value!r}")
    height, width = (to_integer(name, argument, v) for v in values)
    pair = (height, width)
    if min(pair) < minimum:
        raise ValueError(f"{name}: {argument} must be at least {minimum}, got {value!r}")
    if max(pair) > MAX_PIXELS:
        raise ValueError(f"{name}: {argument} must be at most {MAX_PIXELS}, got {value!r}")
    return pair


def to_padding(name: str, value: Any) -> CheckedPadding:
    """One of PADDINGS, of any case, an int for both axes, or one entry for each, an int or a pair."""
    wrong = (
        f"{name}: padding must be an integer, a pair (height, width), pairs ((top, bottom), (left, right)), "
        f"'SAME', 'SAME_LOWER' or 'VALID', got {value!r}"
    )
    if isinstance(value, str):
        if value.upper() not in PADDINGS:
            raise ValueError(wrong)
        return value.upper()
    axes = tuple(value) if _is_sequence(value) else (value, value)
    if len(axes) != 2 or any(_is_sequence(axis) and len(axis) != 2 for axis in axes):
        raise ValueError(wrong)

    def to_sides(axis: Any) -> int | Pair:
        if not _is_sequence(axis):
            return to_integer(name, "padding", axis)
        before, after = (to_integer(name, "padding", side) for side in axis)
        return before, after

    try:
        height, width = map(to_sides, axes)
    except TypeError:
        raise TypeError(wrong) from None
    every = [side for axis in (height, width) for side in sides_of(axis)]
    if min(every) < 0:
        raise ValueError(f"{name}: padding must be at least 0, got {value!r}")
    if max(every) > MAX_PIXELS:
        raise ValueError(f"{name}: padding must be at most {MAX_PIXELS}, got {value!r}")
    return height, width


def padded(name: str, geometry: Geometry, padding: CheckedPadding, size: Sequence[int]) -> Geometry:
    """The geometry with the padding. A name means for an image of this size what JAX's convolutions have it mean."""
    if isinstance(padding, str):
        height, width = lax.padtype_to_pads(size, geometry.extent, geometry.stride, padding)
        if not all(isinstance(side, int) for side in (*height, *width)):
            raise ValueError(
                f"{name}: padding {padding!r} with stride {geometry.stride} depends on the image's size, which is "
                f"symbolic here, {size[0]} x {size[1]}: give pairs ((top, bottom), (left, right)), or a size that is a "
                "multiple of the stride"
            )
    else:
        height, width = map(sides_of, padding)
    return dataclasses.replace(geometry, padding=(height, width))


def sides_of(padding: int | Pair) -> Pair:
    """Of an axis, from an entry of a checked padding."""
    return padding if isinstance(padding, tuple) else (padding, padding)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def to_count(name: str, argument: str, value: Any) -> int:
    """A positive int."""
    count = to_integer(name, argument, value)
    if count < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {value!r}")
    return count


def to_precision(name: str, precision: Any) -> Any:
    """A precision, in any of the forms that `jax.lax.conv_general_dilated` takes, as a hashable one.

    None means what `jax.default_matmul_precision` says, if anything, when the function is traced.
    """
    if precision is None:
        precision = jax.config.jax_default_matmul_precision
    if isinstance(precision, (tuple, list)) and len(precision) == 2:
        return tuple(to_precision(name, p) for p in precision)
    if precision is None or isinstance(precision, (lax.Precision, lax.DotAlgorithm, lax.DotAlgorithmPreset)):
        return precision
    if not isinstance(precision, str):
        raise TypeError(f"{name}: precision must be None, a string or a jax.lax.Precision, got {precision!r}")
    if precision in lax.DotAlgorithmPreset.__members__:
        return lax.DotAlgorithmPreset[precision]
    try:
        return lax.Precision(precision)
    except ValueError:
        raise ValueError(f"{name}: precision must be one that jax.lax.Precision names, got {precision!r}") from None


def implementation() -> str:
    """What the environment asks for when a function is traced: the kernels, or plain XLA everywhere."""
    asked = os.environ.get("JAX_DCN_IMPLEMENTATION", "native")
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"JAX_DCN_IMPLEMENTATION must be one of {IMPLEMENTATIONS}, got {asked!r}")
    return asked


def check_bool(name: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a bool, got {value!r}")


def check_images(name: str, x: Any, data_format: str, channels: int, argument: str, least: int = 3) -> None:
    """Checks a layer's input: images of at least so many dimensions, and of so many channels as the argument says."""
    check_array(name, "x", x)
    least = 3 if data_format == "NCHW" else least
    if x.ndim < least:
        raise ValueError(f"{name}: x has {x.ndim} dimensions, expected {least} or more, in shape {x.shape}")
    actual = x.shape[data_format.index("C") - 4]
    if actual != channels:
        hint = "" if x.ndim < 3 else _other_format("x", x.shape, data_format, channels)
        raise ValueError(f"{name}: x has {actual} channels, expected {channels} = {argument}{hint}")


def check_output(name: str, size: Sequence[Any], out: Sequence[Any]) -> None:
    """Checks that the output, of a convolution or pooling, has pixels."""
    if any(less(n, 1) for n in size):
        raise ValueError(f"{name}: x has no pixels, its spatial size is {size[0]} x {size[1]}")
    if any(less(n, 1) for n in out):
        raise ValueError(
            f"{name}: the output would have no pixels, its size would be {out[0]} x {out[1]} for an input of "
            f"{size[0]} x {size[1]}"
        )


def _other_format(argument: str, shape: Sequence[Any], data_format: str, *channels: Any) -> str:
    """What an error about channels adds where the other data format would have one of the numbers expected."""
    (other,) = set(DATA_FORMATS) - {data_format}
    fits = shape[other.index("C") - 4] in channels
    return f"; {argument}'s shape {tuple(shape)} would fit with data_format={other!r}" if fits else ""


def check_data_format(name: str, data_format: Any) -> None:
    if not isinstance(data_format, str) or data_format not in DATA_FORMATS:
        raise ValueError(f"{name}: data_format must be one of {DATA_FORMATS}, got {data_format!r}")


def _check_dtypes(name: str, operands: dict[str, Any]) -> None:
    x = operands["x"]
    for argument, operand in operands.items():
        if argument in ("weight", "bias") and operand.dtype != x.dtype:
            raise TypeError(f"{name}: {argument} has dtype {operand.dtype}, expected x's, {x.dtype}")


def _check_rank(name: str, argument: str, operand: Any, rank: int) -> None:
    if operand.ndim != rank:
        raise ValueError(f"{name}: {argument} has {operand.ndim} dimensions, expected {rank}, in shape {operand.shape}")


def _check_weight(name: str, x: Any, weight: Any, bias: Any, geometry: Geometry, data_format: str) -> None:
    c_in = x.shape[data_format.index("C")]
    if not all(isinstance(size, int) for size in (*weight.shape, c_in)):
        raise ValueError(
            f"{name}: only batch, height and width may be symbolic, got C_in ({c_in}) and weight {weight.shape}"
        )
    groups = geometry.groups
    if data_format == "NCHW":
        c_out, group_in = weight.shape[:2]
        order = "(C_out, C_in/groups, kh, kw)"
    else:
        group_in, c_out = weight.shape[2:]
        order = "(kh, kw, C_in/groups, C_out)"
    # The weight's input channels as either format has them.
    hint = _other_format("x", x.shape, data_format, weight.shape[1] * groups, weight.shape[2] * groups)
    for argument, size, more in (("C_in", c_in, hint), ("C_out", c_out, "")):
        if size < 1 or size % groups:
            raise ValueError(f"{name}: {argument} ({size}) must be a positive multiple of groups ({groups}){more}")
    if c_in % geometry.deform_groups:
        raise ValueError(f"{name}: C_in ({c_in}) must be a multiple of deform_groups ({geometry.deform_groups}){hint}")
    if group_in != c_in // groups:
        raise ValueError(
            f"{name}: weight has {group_in} input channels, expected {c_in // groups} = C_in ({c_in}) / "
            f"groups ({groups}), in shape {weight.shape} as {order}{hint}"
        )
    if geometry.taps == 0:
        raise ValueError(f"{name}: weight has an empty kernel, in shape {weight.shape} as {order}")
    if geometry.taps * max(c_in, c_out) > MAX_WEIGHTS:
        raise ValueError(
            f"{name}: the taps of all channels, kernel {geometry.kernel_size} times C_in ({c_in}) or C_out ({c_out}), "
            f"must be fewer than 2^27, in shape {weight.shape} as {order}"
        )
    if bias is not None and bias.shape != (c_out,):
        raise ValueError(f"{name}: bias has shape {bias.shape}, expected ({c_out},) = (C_out,)")


def _check_per_pixel(
    name: str,
    argument: str,
    array: Any,
    channels: int,
    formula: str,
    batch: int,
    out: Pair,
    data_format: str,
    hint: str,
) -> None:
    """Checks offset or mask: one value per image, channel and output pixel."""
    n, *rest = array.shape
    c, spatial = (rest[0], tuple(rest[1:])) if data_format == "NCHW" else (rest[2], tuple(rest[:2]))
    if n != batch:
        raise ValueError(f"{name}: {argument} has batch size {n}, expected x's, {batch}")
    if c != channels:
        other = _other_format(argument, array.shape, data_format, channels)
        raise ValueError(f"{name}: {argument} has {c} channels, expected {channels} = {formula}{other}")
    _check_spatial_size(name, argument, spatial, out, hint)


def _check_spatial_size(name: str, argument: str, size: Sequence[Any], out: Pair, hint: str = "") -> None:
    # JAX's own convolutions, such as a Pack's, do not exclude an output without pixels where sizes are symbolic.
    if any(n not in (pixels, jax.core.max_dim(pixels, 0)) for n, pixels in zip(size, out, strict=True)):
        raise ValueError(
            f"{name}: {argument} has spatial size {size[0]} x {size[1]}, expected that of the output, "
            f"{out[0]} x {out[1]}{hint}"
        )


def less(size: int, bound: int) -> bool:
    """Whether size < bound, whatever symbolic sizes there are. The kernels check again what protects memory."""
    try:
        return size < bound
    except core.InconclusiveDimensionOperation:
        return False


def _on_image(name: str, geometry: Geometry, padding: CheckedPadding, size: Sequence[Any]) -> tuple[Geometry, Pair]:
    """The geometry with the padding for an image of this size, and the size of the output."""
    height, width = size
    if less(height, 1) or less(width, 1):
        raise ValueError(f"{name}: x has no pixels, its spatial size is {height} x {width}")
    geometry = padded(name, geometry, padding, size)
    sides = [n + sum(p) for n, p in zip(size, geometry.padding, strict=True)]
    if any(less(MAX_PIXELS - 1, n) for n in ((height + 1) * width, *sides)):
        raise ValueError(
            f"{name}: an image, its padded height and its padded width must have fewer than 2^31 pixels, got "
            f"{height} x {width} with padding {geometry.padding}"
        )
    out = geometry.output_size(height, width)
    if any(less(n, 1) for n in out):
        raise ValueError(
            f"{name}: the output would have no pixels, its size would be {out[0]} x {out[1]} for an input of "
            f"{height} x {width}, kernel {geometry.kernel_size}, stride {geometry.stride}, "
            f"padding {geometry.padding}, dilation {geometry.dilation}"
        )
    return geometry, out


def check_operands(
    name: str,
    x: Any,
    offset: Any,
    mask: Any | None,
    weight: Any,
    bias: Any | None,
    *,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    deform_groups: Any,
    data_format: str,
) -> Geometry:
    """Checks the operands of the public function `name` against one another and returns their geometry.

    Raises:
      TypeError: a dtype that is not supported or does not match, or a size that is not an integer.
      ValueError: a shape or a size that does not fit. The message gives what was expected and what came.
    """
    check_data_format(name, data_format)
    operands = {"x": x, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
    operands = {argument: operand for argument, operand in operands.items() if operand is not None}
    for argument, operand in operands.items():
        _check_rank(name, argument, operand, 1 if argument == "bias" else 4)
    _check_dtypes(name, operands)

    nchw = data_format == "NCHW"
    checked = to_padding(name, padding)
    geometry = Geometry(
        kernel_size=tuple(weight.shape[2:] if nchw else weight.shape[:2]),
        stride=to_pair(name, "stride", stride, 1),
        dilation=to_pair(name, "dilation", dilation, 1),
        groups=to_count(name, "groups", groups),
        deform_groups=to_count(name, "deform_groups", deform_groups),
        data_format=data_format,
    )
    batch = x.shape[0]
    height, width = x.shape[2:] if nchw else x.shape[1:3]
    _check_weight(name, x, weight, bias, geometry, data_format)

    geometry, out = _on_image(name, geometry, checked, (height, width))
    kh, kw = geometry.kernel_size
    formula = f"deform_groups ({geometry.deform_groups}) * kernel {kh} * {kw}"
    hint = "; mmcv's version 2 does not check it: jax_dcn.mmcv.nn.reread gives what it reads of larger ones"
    common = (batch, out, data_format, "" if mask is None else hint)
    _check_per_pixel(name, "offset", offset, geometry.offset_channels, f"{formula} * 2", *common)
    if mask is not None:
        _check_per_pixel(name, "mask", mask, geometry.mask_channels, formula, *common)
    return geometry


def to_scale(name: str, argument: str, value: Any) -> float:
    """A finite number, of Python or numpy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: {argument} must be a number, got {value!r}")
    try:
        scale = float(value)
    except OverflowError:
        scale = math.inf
    if not math.isfinite(scale):
        raise ValueError(f"{name}: {argument} must be finite, got {value!r}")
    return scale


def _check_groups(name: str, channels: Any, formula: str, argument: str, groups: int, taps: int) -> None:
    """Checks the channels of an operator without a weight."""
    if not isinstance(channels, int):
        raise ValueError(f"{name}: only batch, height, width and queries may be symbolic, got {formula} ({channels})")
    if channels < 1 or channels % groups:
        raise ValueError(f"{name}: {formula} ({channels}) must be a positive multiple of {argument} ({groups})")
    if taps * channels > MAX_WEIGHTS:
        raise ValueError(f"{name}: {taps} taps times {formula} ({channels}) must be fewer than 2^27")


def check_remove_center(name: str, value: Any, kernel_size: Pair) -> None:
    """Checks remove_center, which needs a middle and other taps."""
    check_bool(name, "remove_center", value)
    kh, kw = kernel_size
    if value and (kh != kw or kh % 2 == 0 or kh == 1):
        raise ValueError(f"{name}: remove_center needs an odd, square kernel_size above 1, got ({kh}, {kw})")


def check_dcnv3(
    name: str,
    x: Any,
    others: Mapping[str, tuple[Any, int]],  # by their names, and how many values of a tap each holds
    *,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    remove_center: Any,
) -> tuple[Geometry, int]:
    """Checks the operands of DCNv3 and DCNv4, and returns their geometry and the number of taps.

    Channels that hold all 3 values of a tap are rounded up to a multiple of 8.
    """
    for argument, operand in {"x": x, **{argument: operand for argument, (operand, _) in others.items()}}.items():
        _check_rank(name, argument, operand, 4)
    batch, height, width, channels = x.shape
    checked = to_padding(name, padding)
    geometry = Geometry(
        kernel_size=to_pair(name, "kernel_size", kernel_size, 1),
        stride=to_pair(name, "stride", stride, 1),
        dilation=to_pair(name, "dilation", dilation, 1),
        groups=channels,
        deform_groups=to_count(name, "groups", groups),
        x_first=True,
    )
    check_remove_center(name, remove_center, geometry.kernel_size)
    _check_groups(name, channels, "C", "groups", geometry.deform_groups, geometry.taps)
    geometry, out = _on_image(name, geometry, checked, (height, width))
    taps = geometry.taps - remove_center
    for argument, (operand, values) in others.items():
        n, *size, actual = operand.shape
        expected = geometry.deform_groups * taps * values
        formula = f"groups ({geometry.deform_groups}) * {taps} taps" + (f" * {values}" if values > 1 else "")
        if values == 3:
            expected, formula = -(-expected // 8) * 8, f"{formula}, rounded up to a multiple of 8"
        if n != batch:
            raise ValueError(f"{name}: {argument} has batch size {n}, expected x's, {batch}")
        if actual != expected:
            raise ValueError(
                f"{name}: {argument} has {actual} channels, expected {expected} = {formula}, in shape {operand.shape} "
                "as (N, H_out, W_out, channels)"
            )
        _check_spatial_size(name, argument, size, out)
    return geometry, taps


def to_spatial_shapes(name: str, value: Any) -> tuple[Pair, ...]:
    """The sizes (height, width) of levels, which are static: of Python, numpy or JAX, or symbolic."""
    wrong = (
        f"{name}: spatial_shapes must be a sequence of pairs (height, width), known while tracing (static "
        f"arguments, or of a closure), got {value!r}"
    )

    def plain(value: Any) -> Any:
        if isinstance(value, jax.core.Tracer):
            raise TypeError(wrong)
        # What is taken from JAX's arrays while tracing is traced.
        return np.asarray(value).tolist() if isinstance(value, (np.ndarray, jax.Array)) else value

    def to_size(size: Any) -> Any:
        size = plain(size)
        return size if jax.export.is_symbolic_dim(size) else to_integer(name, "spatial_shapes", size)

    levels = plain(value)
    if not isinstance(levels, (tuple, list)) or not levels:
        raise ValueError(wrong)
    levels = [plain(level) for level in levels]
    if not all(isinstance(level, (tuple, list)) and len(level) == 2 for level in levels):
        raise ValueError(wrong)
    shapes = tuple((to_size(height), to_size(width)) for height, width in levels)
    for height, width in shapes:
        if less(height, 1) or less(width, 1):
            raise ValueError(f"{name}: spatial_shapes must be at least 1, got {shapes}")
        if less(MAX_PIXELS - 1, (height + 1) * width):
            raise ValueError(f"{name}: a level must have fewer than 2^31 pixels, got spatial_shapes {shapes}")
    if less(MAX_PIXELS, sum(height * width for height, width in shapes)):
        raise ValueError(f"{name}: all levels must have fewer than 2^31 pixels, got spatial_shapes {shapes}")
    return shapes


def check_attention(
    name: str, value: Any, spatial_shapes: Any, sampling_locations: Any, attention_weights: Any
) -> tuple[Pair, ...]:
    """Checks the operands of the multi-scale deformable attention, and returns the sizes of its levels."""
    _check_rank(name, "value", value, 4)
    _check_rank(name, "sampling_locations", sampling_locations, 6)
    _check_rank(name, "attention_weights", attention_weights, 5)
    shapes = to_spatial_shapes(name, spatial_shapes)
    n, pixels, heads, depth = value.shape
    if pixels != sum(height * width for height, width in shapes):
        raise ValueError(
            f"{name}: value has {pixels} pixels, expected {sum(height * width for height, width in shapes)} = the sum "
            f"of height * width over spatial_shapes {shapes}"
        )
    _, queries, _, _, points, _ = sampling_locations.shape
    if less(points, 1):
        raise ValueError(f"{name}: sampling_locations has no points, in shape {sampling_locations.shape}")
    _check_groups(name, heads * depth, "heads * D", "heads", heads, points * len(shapes))
    weights_shape = (n, queries, heads, len(shapes), points)
    for argument, operand, shape, order in (
        ("sampling_locations", sampling_locations, (*weights_shape, 2), "(N, Q, heads, levels, points, 2)"),
        ("attention_weights", attention_weights, weights_shape, "(N, Q, heads, levels, points)"),
    ):
        if operand.shape != shape:
            raise ValueError(f"{name}: {argument} has shape {operand.shape}, expected {shape} = {order}")
    return shapes
