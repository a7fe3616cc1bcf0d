"""torch's convolutions and linear layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike
from jax import lax
from jax.typing import DTypeLike

from jax_dcn._checks import (
    PaddingLike,
    check_bool,
    check_data_format,
    check_images,
    check_output,
    less,
    sides_of,
    to_count,
    to_padding,
    to_pair,
)
from jax_dcn._layers.arguments import MmcvArguments
from jax_dcn.mmcv.nn.formats import channels_last
from jax_dcn.mmcv.nn.parameters import torchs_bias_init, torchs_kernel_init

_PADDING_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # jax.numpy.pad's names


class Conv2d(MmcvArguments, nnx.Conv):
    """torch's Conv2d, as `nnx.Conv`, of images (N, H, W, in_channels) or (H, W, in_channels).

    Args:
      in_channels, out_channels: channels of the input and of the output, multiples of groups.
      kernel_size, stride (default 1), dilation (1): an int, which is for both axes, or a pair (height, width).
      padding: an int (default 0), a pair, pairs ((top, bottom), (left, right)), or torch's "same" and "valid", of any
        case. "same" takes no stride, as in torch: what XLA would make of it has torch's shape, but other numbers.
      groups: default 1.
      bias: whether there is one (default True).
      padding_mode: "zeros" (default), "reflect", "replicate" or "circular".
      data_format: "NHWC" (default), or "NCHW" for images (N, in_channels, H, W).
      dtype, param_dtype, precision, kernel_init, bias_init, rngs: as in `nnx.Conv`.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: PaddingLike = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        data_format: str = "NHWC",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        check_bool(name, "bias", bias)
        check_data_format(name, data_format)
        counts = _counts(name, in_channels, out_channels, groups)
        sizes = _pairs(name, kernel_size=kernel_size, stride=stride, dilation=dilation)
        pads = to_padding(name, padding)
        if isinstance(pads, str) and pads != "VALID" and sizes["stride"] != (1, 1):
            raise ValueError(
                f"{name}: padding={padding!r} with stride {sizes['stride']} is not torch's: give the padding in pixels"
            )
        if not isinstance(padding_mode, str) or (
            padding_mode != "zeros" and (padding_mode not in _PADDING_MODES or isinstance(pads, str))
        ):
            raise ValueError(
                f"{name}: padding_mode must be one of {('zeros', *_PADDING_MODES)}, the last three with a padding in "
                f"pixels, got {padding_mode!r} with padding={padding!r}"
            )
        in_channels, out_channels, groups = counts
        fan_in = math.prod(sizes["kernel_size"]) * in_channels // groups
        super().__init__(
            in_channels,
            out_channels,
            sizes["kernel_size"],
            strides=sizes["stride"],
            padding=pads if padding_mode == "zeros" else 0,
            kernel_dilation=sizes["dilation"],
            feature_group_count=groups,
            use_bias=bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init or torchs_kernel_init,
            bias_init=bias_init or torchs_bias_init(fan_in),
            rngs=rngs,
        )
        self.data_format, self.padding_mode = data_format, padding_mode
        self._sides = () if isinstance(pads, str) else tuple(map(sides_of, pads))

    # torch's names, for ports that read them.

    @property
    def in_channels(self) -> int:
        return self.in_features

    @property
    def out_channels(self) -> int:
        return self.out_features

    @property
    def stride(self) -> Any:
        return self.strides

    @property
    def dilation(self) -> Any:
        return self.kernel_dilation

    @property
    def groups(self) -> int:
        return self.feature_group_count

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # torch's has no other arguments
        """Applies the layer to images, of any number of batch axes."""
        check_images(type(self).__name__, x, self.data_format, self.in_channels, "in_channels")
        return channels_last(self._convolve, x, self.data_format)

    def _convolve(self, x: jax.Array) -> jax.Array:
        size = x.shape[-3:-1]
        if self.padding_mode != "zeros":
            if self.padding_mode != "replicate":
                # jax.numpy.pad goes back and forth as often as it takes, torch refuses.
                most = [n - (self.padding_mode == "reflect") for n in size]
                if any(less(n, max(sides)) for sides, n in zip(self._sides, most, strict=True)):
                    raise ValueError(
                        f"{type(self).__name__}: padding {self._sides} is too large for padding_mode "
                        f"{self.padding_mode!r} and an image of {size[0]} x {size[1]}"
                    )
            widths = ((0, 0),) * (x.ndim - 3) + self._sides + ((0, 0),)
            x = jnp.pad(x, widths, mode=_PADDING_MODES[self.padding_mode])
        y = super().__call__(x)
        check_output(type(self).__name__, size, y.shape[-3:-1])
        return y


class ConvTranspose2d(MmcvArguments, nnx.Module):
    """torch's ConvTranspose2d, of images (N, H, W, in_channels) or (H, W, in_channels).

    The output is (H - 1)*stride - 2*padding + dilation*(kernel_size - 1) + output_padding + 1 high. The parameter
    `kernel` is (kh, kw, out_channels/groups, in_channels), as torch's weight: `nnx.ConvTranspose` computes the same
    with transpose_kernel=True and the padding dilation*(kernel_size - 1) - padding, but knows no groups.

    Args:
      in_channels, out_channels: channels of the input and of the output, multiples of groups.
      kernel_size, stride (default 1), dilation (1): an int, which is for both axes, or a pair (height, width).
      padding: an int (default 0) or a pair (height, width): what the convolution that it transposes would have.
      output_padding: an int (default 0) or a pair, less than stride or dilation: rows and columns more at the end.
      groups: default 1.
      bias: whether there is one (default True).
      data_format: "NHWC" (default), or "NCHW" for images (N, in_channels, H, W).
      dtype, param_dtype, precision, kernel_init, bias_init, rngs: as in `nnx.Conv`.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        *,
        data_format: str = "NHWC",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        check_bool(name, "bias", bias)
        check_data_format(name, data_format)
        counts = _counts(name, in_channels, out_channels, groups)
        sizes = _pairs(name, kernel_size=kernel_size, stride=stride, dilation=dilation)
        pads, more = (
            to_pair(name, argument, value, 0)
            for argument, value in (("padding", padding), ("output_padding", output_padding))
        )
        self.kernel_size, self.stride, self.dilation = sizes["kernel_size"], sizes["stride"], sizes["dilation"]
        if any(m >= max(s, d) for m, s, d in zip(more, self.stride, self.dilation, strict=True)):
            raise ValueError(
                f"{name}: output_padding {more} must be less than stride {self.stride} or dilation {self.dilation}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups = counts
        self.padding, self.output_padding, self.data_format = pads, more, data_format
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        shape = (*self.kernel_size, out_channels // groups, in_channels)
        bias_init = bias_init or torchs_bias_init(math.prod(shape[:3]))
        self.kernel = nnx.Param((kernel_init or torchs_kernel_init)(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_channels,), param_dtype)) if bias else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to images, of any number of batch axes."""
        check_images(type(self).__name__, x, self.data_format, self.in_channels, "in_channels")
        return channels_last(self._convolve, x, self.data_format)

    def _convolve(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = nnx.nn.dtypes.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        # Of every group, (kh, kw, C_out, C_in) -> the convolution's (kh, kw, C_in, C_out), and back to front.
        grouped = kernel.reshape(*kernel.shape[:3], self.groups, -1)[::-1, ::-1]
        kernel = grouped.transpose(0, 1, 4, 3, 2).reshape(*self.kernel_size, -1, self.out_channels)
        size, out, padding = x.shape[-3:-1], [], []
        sizes = (self.kernel_size, self.stride, self.dilation, self.padding, self.output_padding)
        for n, k, s, d, p, more in zip(size, *sizes, strict=True):
            extent = d * (k - 1) + 1
            out.append((n - 1) * s - 2 * p + extent + more)
            padding.append((extent - 1 - p, extent - 1 - p + more))
        check_output(type(self).__name__, size, out)
        y = lax.conv_general_dilated(
            x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]),
            kernel,
            (1, 1),
            padding,
            lhs_dilation=self.stride,
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
            precision=self.precision,
        )
        y = y.reshape(*x.shape[:-3], *y.shape[1:])
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Linear(MmcvArguments, nnx.Linear):
    """torch's Linear, as `nnx.Linear`, of the last axis.

    Args:
      in_features, out_features: sizes of the last axis of the input and of the output.
      bias: whether there is one (default True).
      dtype, param_dtype, precision, kernel_init, bias_init, rngs: as in `nnx.Linear`.
    """

    _OTHER_NAMES: ClassVar[Mapping[str, str]] = {"features": "out_features", "use_bias": "bias"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        check_bool(name, "bias", bias)
        super().__init__(
            to_count(name, "in_features", in_features),
            to_count(name, "out_features", out_features),
            use_bias=bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init or torchs_kernel_init,
            bias_init=bias_init or torchs_bias_init(in_features),
            rngs=rngs,
        )


def _counts(name: str, in_channels: Any, out_channels: Any, groups: Any) -> tuple[int, int, int]:
    groups = to_count(name, "groups", groups)
    for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if to_count(name, argument, channels) % groups:
            raise ValueError(f"{name}: {argument} ({channels}) must be a multiple of groups ({groups})")
    return int(in_channels), int(out_channels), groups


def _pairs(name: str, **sizes: Any) -> dict[str, tuple[int, int]]:
    return {argument: to_pair(name, argument, value, 1) for argument, value in sizes.items()}
