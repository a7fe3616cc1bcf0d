"""DCNv3 and DCNv4: the arguments of the layers, and all of their work that needs no Flax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from jax_dcn._checks import (
    PaddingLike,
    check_bool,
    check_images,
    check_remove_center,
    to_count,
    to_padding,
    to_pair,
    to_scale,
)
from jax_dcn._layers.arguments import MmcvArguments
from jax_dcn._layers.parts import Built, DepthwiseConv, LayerNorm, Linear, Part, Zeros, softmax
from jax_dcn._operator.geometry import Pair
from jax_dcn.functional import checked_dcnv3, checked_dcnv4

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "ReLU": jax.nn.relu,
    "SiLU": jax.nn.silu,
}


class _Layer(MmcvArguments):
    """What both do."""

    # By the names of the functions, and of Flax's layers.
    _OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "padding": "pad",
        "groups": "group",
        "strides": "stride",
        "kernel_dilation": "dilation",
    }

    channels: int
    kernel_size: int | Sequence[int]
    dw_kernel_size: int | Sequence[int] | None
    stride: int | Sequence[int]
    pad: PaddingLike
    dilation: int | Sequence[int]
    group: int
    offset_scale: float
    center_feature_scale: bool
    remove_center: bool
    param_dtype: DTypeLike
    precision: Any
    forward_mode: bool

    @property
    def _name(self) -> str:
        """With which errors begin."""
        return type(self).__name__

    def _check_arguments(self) -> None:
        """Checks the arguments, and makes pairs of those that may be an int."""
        name = self._name
        for argument in ("channels", "group"):
            setattr(self, argument, to_count(name, argument, getattr(self, argument)))
        for argument in ("kernel_size", "stride", "dilation"):
            setattr(self, argument, to_pair(name, argument, getattr(self, argument), 1))
        if self.dw_kernel_size is not None:
            self.dw_kernel_size = to_pair(name, "dw_kernel_size", self.dw_kernel_size, 1)
        self.pad = to_padding(name, self.pad)
        self.offset_scale = to_scale(name, "offset_scale", self.offset_scale)
        for argument in ("center_feature_scale", "forward_mode"):
            check_bool(name, argument, getattr(self, argument))
        if self.channels % self.group:
            raise ValueError(f"{name}: channels ({self.channels}) must be a multiple of group ({self.group})")
        check_remove_center(name, self.remove_center, cast(Pair, self.kernel_size))

    @property
    def _smallest_inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """x as it may be, for whoever only wants the shapes of the parameters."""
        sizes = zip(cast(Pair, self.kernel_size), cast(Pair, self.dilation), strict=True)
        return (jax.ShapeDtypeStruct((1, *((k - 1) * d + 1 for k, d in sizes), self.channels), self.param_dtype),)

    @property
    def _taps(self) -> int:
        kh, kw = cast(Pair, self.kernel_size)
        return kh * kw - self.remove_center

    def _depthwise(self, kernel_size: Any) -> DepthwiseConv:
        return DepthwiseConv(self.channels, kernel_size, cast(Pair, self.stride))

    @property
    def _center_parts(self) -> dict[str, Part]:
        if not self.center_feature_scale:
            return {}
        return {
            "center_feature_scale_proj_weight": Zeros((self.group, self.channels)),
            "center_feature_scale_proj_bias": Zeros((self.group,)),
        }

    def _over_images(self, function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """A function of images with one batch axis, of images with any number of them."""
        check_images(self._name, x, "NHWC", self.channels, "channels")
        leading = x.shape[:-3]
        y = function(x.reshape(math.prod(leading), *x.shape[-3:]))
        return y.reshape(*leading, *y.shape[1:])

    def _blend(self, y: jax.Array, x: jax.Array, features: jax.Array, parts: Built) -> jax.Array:
        """y with x, the operator's input, mixed in: every group by a share that is predicted from the features."""
        if not self.center_feature_scale:
            return y
        if x.shape != y.shape:
            raise ValueError(
                f"{self._name}: center_feature_scale needs an output of the input's size, got {y.shape[1:3]} of "
                f"{x.shape[1:3]}"
            )
        weight, bias = (parts[f"center_feature_scale_proj_{leaf}"].astype(y.dtype) for leaf in ("weight", "bias"))
        logits = jnp.matmul(features, weight.T, precision=self.precision) + bias[None, None, None]
        share = jax.nn.sigmoid(logits)
        share = jnp.repeat(share, self.channels // self.group, -1)
        return y * (1 - share) + x * share

    @property
    def _options(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "dilation", "offset_scale", "remove_center", "forward_mode")
        return {**{name: getattr(self, name) for name in names}, "padding": self.pad, "groups": self.group}


# Flax's modules bring their own comparison and representation.
@dataclasses.dataclass(eq=False, repr=False)
class DCNv3(_Layer):
    """The work of the layer that `jax_dcn.linen.DCNv3` documents."""

    channels: int = 64
    kernel_size: int | Sequence[int] = 3
    dw_kernel_size: int | Sequence[int] | None = None
    stride: int | Sequence[int] = 1
    pad: PaddingLike = 1
    dilation: int | Sequence[int] = 1
    group: int = 4
    offset_scale: float = 1.0
    act_layer: str = "GELU"
    norm_layer: str = "LN"
    center_feature_scale: bool = False
    remove_center: bool = False
    _: dataclasses.KW_ONLY
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None  # a lax.PrecisionLike
    forward_mode: bool = False

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.act_layer not in _ACTIVATIONS:
            raise ValueError(
                f"{self._name}: act_layer must be one of {', '.join(_ACTIVATIONS)}, got {self.act_layer!r}"
            )
        if self.norm_layer != "LN":
            raise ValueError(
                f"{self._name}: norm_layer must be 'LN', which all published models have, got {self.norm_layer!r}"
            )

    @property
    def _parts(self) -> dict[str, Part]:
        zeros = initializers.zeros
        channels, values = self.channels, self.group * self._taps
        return {
            "dw_conv.0": self._depthwise(self.dw_kernel_size or self.kernel_size),
            "dw_conv.1.1": LayerNorm(channels),
            "offset": Linear(channels, values * 2, kernel_init=zeros),
            "mask": Linear(channels, values, kernel_init=zeros),
            "input_proj": Linear(channels, channels),
            "output_proj": Linear(channels, channels),
            **self._center_parts,
        }

    def _run(self, x: jax.Array, parts: Built) -> jax.Array:
        features = _ACTIVATIONS[self.act_layer](parts["dw_conv.1.1"](parts["dw_conv.0"](x)))
        mask = parts["mask"](features)
        by_group = mask.reshape(*mask.shape[:3], self.group, self._taps)
        x = parts["input_proj"](x)
        y = checked_dcnv3(
            self._name, x, parts["offset"](features), softmax(by_group).reshape(mask.shape), **self._options
        )
        return parts["output_proj"](self._blend(y, x, features, parts))


@dataclasses.dataclass(eq=False, repr=False)
class DCNv4(_Layer):
    """The work of the layer that `jax_dcn.linen.DCNv4` documents."""

    channels: int = 64
    kernel_size: int | Sequence[int] = 3
    stride: int | Sequence[int] = 1
    pad: PaddingLike = 1
    dilation: int | Sequence[int] = 1
    group: int = 4
    offset_scale: float = 1.0
    dw_kernel_size: int | Sequence[int] | None = None
    center_feature_scale: bool = False
    remove_center: bool = False
    output_bias: bool = True
    without_pointwise: bool = False
    _: dataclasses.KW_ONLY
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None  # a lax.PrecisionLike
    forward_mode: bool = False

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for argument in ("output_bias", "without_pointwise"):
            check_bool(self._name, argument, getattr(self, argument))

    @property
    def _parts(self) -> dict[str, Part]:
        channels = self.channels
        values = -(-self.group * self._taps * 3 // 8) * 8
        parts: dict[str, Part] = {"offset_mask": Linear(channels, values, kernel_init=initializers.zeros)}
        if self.dw_kernel_size is not None:
            parts["offset_mask_dw"] = self._depthwise(self.dw_kernel_size)
        if not self.without_pointwise:
            parts["value_proj"] = Linear(channels, channels)
            parts["output_proj"] = Linear(channels, channels, bias=self.output_bias)
        return parts | self._center_parts

    def _run(self, x: jax.Array, parts: Built) -> jax.Array:
        down, right = cast(Pair, self.stride)
        features = parts["offset_mask_dw"](x) if "offset_mask_dw" in parts else x[:, ::down, ::right]
        offset_mask = parts["offset_mask"](features)
        x = parts["value_proj"](x) if "value_proj" in parts else x.astype(offset_mask.dtype)
        y = checked_dcnv4(self._name, x, offset_mask, **self._options)
        y = self._blend(y, x, y, parts)
        return parts["output_proj"](y) if "output_proj" in parts else y
