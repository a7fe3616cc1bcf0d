"""The convolutions: the arguments of the layers, and all of their work that needs no Flax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jax.typing import DTypeLike

from jax_dcn._checks import (
    CheckedPadding,
    PaddingLike,
    check_bool,
    check_data_format,
    check_images,
    padded,
    to_array,
    to_count,
    to_padding,
    to_pair,
)
from jax_dcn._layers.arguments import MmcvArguments
from jax_dcn._operator.geometry import Geometry, Pair
from jax_dcn.functional import checked_deform_conv2d

Initializer = initializers.Initializer


# Flax's modules bring their own comparison and representation.
@dataclasses.dataclass(eq=False, repr=False)
class Layer(MmcvArguments):
    """The arguments of every layer, in mmcv's order, then those of Flax's Conv."""

    in_channels: int
    out_channels: int
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: PaddingLike = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    deform_groups: int = 1
    bias: Any = False  # a bool; in nnx the attribute is a parameter
    _: dataclasses.KW_ONLY
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: Initializer | None = None
    bias_init: Initializer = initializers.zeros
    data_format: str = "NCHW"
    forward_mode: bool = False

    @property
    def _name(self) -> str:
        """With which errors begin."""
        return type(self).__name__

    def _check_arguments(self, bias: Any) -> None:
        """Checks the arguments, and makes pairs of those that may be an int.

        nnx's layers take `bias` and keep a parameter of that name, so it is given.
        """
        name = self._name
        for argument in ("in_channels", "out_channels", "groups", "deform_groups"):
            setattr(self, argument, to_count(name, argument, getattr(self, argument)))
        for argument, minimum in (("kernel_size", 1), ("stride", 1), ("dilation", 1)):
            setattr(self, argument, to_pair(name, argument, getattr(self, argument), minimum))
        self.padding = to_padding(name, self.padding)
        for channels, groups in (
            ("in_channels", "groups"),
            ("out_channels", "groups"),
            ("in_channels", "deform_groups"),
        ):
            size, divisor = getattr(self, channels), getattr(self, groups)
            if size % divisor:
                raise ValueError(f"{name}: {channels} ({size}) must be a multiple of {groups} ({divisor})")
        check_bool(name, "bias", bias)
        check_bool(name, "forward_mode", self.forward_mode)
        check_data_format(name, self.data_format)

    @property
    def _geometry(self) -> Geometry:
        """All but the padding, which may depend on the image's size."""
        # Pairs since `_check_arguments`.
        kernel_size, stride, dilation = cast(tuple[Pair, Pair, Pair], (self.kernel_size, self.stride, self.dilation))
        return Geometry(
            kernel_size,
            stride,
            dilation=dilation,
            groups=self.groups,
            deform_groups=self.deform_groups,
            data_format=self.data_format,
        )

    @property
    def _kernel_shape(self) -> tuple[int, int, int, int]:
        return (*self._geometry.kernel_size, self.in_channels // self.groups, self.out_channels)

    @property
    def _default_kernel_init(self) -> Initializer:
        """mmcv's."""
        raise NotImplementedError

    @property
    def _conv_offset_channels(self) -> int:
        """What a Pack predicts."""
        raise NotImplementedError

    def _weight(self, kernel: jax.Array) -> jax.Array:
        """The parameter `kernel` in the order of the functions."""
        if kernel.shape != self._kernel_shape:
            raise ValueError(
                f"{self._name}: kernel has shape {kernel.shape}, expected {self._kernel_shape} = "
                "(kh, kw, in_channels/groups, out_channels)"
            )
        return kernel if self.data_format == "NHWC" else jnp.transpose(kernel, (3, 2, 0, 1))

    @property
    def _options(self) -> dict[str, Any]:
        sizes = ("stride", "padding", "dilation", "groups", "deform_groups")
        return {name: getattr(self, name) for name in (*sizes, "data_format", "precision", "forward_mode")}

    @property
    def _smallest_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """x, offset and mask as they may be, for whoever only wants the shapes of the parameters."""
        geometry = self._geometry
        size = geometry.extent
        out = padded(self._name, geometry, cast(CheckedPadding, self.padding), size).output_size(*size)
        shapes: list[tuple[int, ...]] = [(self.in_channels, *size)]
        shapes += [(channels, *out) for channels in (geometry.offset_channels, geometry.mask_channels)]
        if self.data_format == "NHWC":
            shapes = [(*pixels, channels) for channels, *pixels in shapes]
        return tuple(jax.ShapeDtypeStruct((1, *shape), self.param_dtype) for shape in shapes)

    @property
    def _conv_offset_options(self) -> dict[str, Any]:
        """Options of the Flax Conv `conv_offset`: zeros at first, whatever the layer's own initialisers are."""
        return dict(
            kernel_size=self.kernel_size,
            strides=self.stride,
            padding=self.padding,
            kernel_dilation=self.dilation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=initializers.zeros,
            bias_init=initializers.zeros,
        )

    def _run_conv_offset(self, conv_offset: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        axis = self._geometry.channel_axis
        return self._over_leading_axes(lambda x: jnp.moveaxis(conv_offset(jnp.moveaxis(x, axis, 3)), 3, axis), x)

    def _convolve(
        self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *offset_and_mask: jax.Array
    ) -> jax.Array:
        weight = self._weight(kernel)

        def convolve(x: jax.Array, offset: jax.Array, mask: jax.Array | None = None) -> jax.Array:
            return checked_deform_conv2d(self._name, x, offset, mask, weight, bias, **self._options)

        return self._over_leading_axes(convolve, x, **dict(zip(("offset", "mask"), offset_and_mask, strict=False)))

    def _over_leading_axes(self, function: Callable[..., jax.Array], x: jax.Array, **others: Any) -> jax.Array:
        """A function of arrays with a batch axis, of arrays with any number of axes in its place."""
        name = self._name
        check_images(name, x, self.data_format, self.in_channels, "in_channels")
        leading = x.shape[:-3]
        others = {argument: to_array(name, argument, value) for argument, value in others.items()}
        for argument, value in others.items():
            if value.ndim != x.ndim:
                raise ValueError(
                    f"{name}: {argument} has {value.ndim} dimensions, expected x's, {x.ndim}, in shape {value.shape}"
                )
            if value.shape[:-3] != leading:
                raise ValueError(f"{name}: {argument} has batch axes {value.shape[:-3]}, expected x's, {leading}")
        x, *rest = (a.reshape(math.prod(leading), *a.shape[-3:]) for a in (x, *others.values()))
        y = function(x, **dict(zip(others, rest, strict=True)))
        return y.reshape(*leading, *y.shape[1:])


@dataclasses.dataclass(eq=False, repr=False)
class DeformConv2d(Layer):
    """The work of a layer of version 1: `jax_dcn.linen.DeformConv2d` documents it."""

    im2col_step: int = 32

    @property
    def _default_kernel_init(self) -> Initializer:
        """Uniform, with mmcv's bound sqrt(6 / fan_in)."""
        return initializers.he_uniform()

    @property
    def _conv_offset_channels(self) -> int:
        return self._geometry.offset_channels

    def _predict(self, conv_offset: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array]:
        """The offset that a Pack computes itself."""
        return (self._run_conv_offset(conv_offset, x),)


@dataclasses.dataclass(eq=False, repr=False)
class ModulatedDeformConv2d(Layer):
    """The work of a layer of version 2: `jax_dcn.linen.ModulatedDeformConv2d` documents it."""

    bias: Any = True

    @property
    def _default_kernel_init(self) -> Initializer:
        """Uniform, with mmcv's bound 1 / sqrt(in_channels * kh * kw), which `groups` does not change."""
        # variance_scaling's bound is sqrt(3 * scale / fan_in), where fan_in is in_channels / groups * kh * kw.
        return initializers.variance_scaling(1 / (3 * self.groups), "fan_in", "uniform")

    @property
    def _conv_offset_channels(self) -> int:
        return self._geometry.offset_channels + self._geometry.mask_channels

    def _predict(self, conv_offset: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The offset and the mask that a Pack computes itself."""
        out = self._run_conv_offset(conv_offset, x)
        offset, mask = jnp.split(out, [self._geometry.offset_channels], self._geometry.channel_axis - 4)
        return offset, jax.nn.sigmoid(mask)
