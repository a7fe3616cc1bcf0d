"""The layers for flax.nnx.

They are those of `jax_dcn.linen`, which documents them, and take `rngs` besides. The parameters are the attributes
`kernel` and `bias`, which is None without a bias, and in the Packs the submodule `conv_offset`, an `nnx.Conv`. The
submodules of `DCNv3`, `DCNv4` and the attention have the originals' names; `dw_conv` is an `nnx.Dict`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jax_dcn._layers import attention, conv, dcnv3, parts

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ImportError("jax_dcn.nnx needs Flax: pip install jax_dcn[flax]") from error

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
]


@dataclasses.dataclass(eq=False, repr=False)
class DeformConv2d(conv.DeformConv2d, nnx.Module):
    """Deformable convolution with given offsets: `jax_dcn.linen.DeformConv2d` for nnx.

    Args:
      rngs: as in `nnx.Conv`. The others, their defaults and errors are those of `jax_dcn.linen.DeformConv2d`.
    """

    bias: dataclasses.InitVar[Any] = False
    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, bias: bool, rngs: nnx.Rngs) -> None:
        self._check_arguments(bias)
        self.kernel, self.bias = _parameters(self, bias, rngs)

    def __call__(self, x: jax.Array, offset: jax.Array) -> jax.Array:
        """Applies the layer, with the shapes of `jax_dcn.linen.DeformConv2d`."""
        return self._convolve(*_promoted(self, x), offset)


class DeformConv2dPack(DeformConv2d):
    """`DeformConv2d` that computes its offsets itself: `jax_dcn.linen.DeformConv2dPack` for nnx."""

    def __post_init__(self, bias: bool, rngs: nnx.Rngs) -> None:
        super().__post_init__(bias, rngs)
        self.conv_offset = _conv_offset(self, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # as in mmcv
        """Applies the layer, with the shapes of `jax_dcn.linen.DeformConv2d`."""
        return self._convolve(*_promoted(self, x), *self._predict(self.conv_offset, x))


@dataclasses.dataclass(eq=False, repr=False)
class ModulatedDeformConv2d(conv.ModulatedDeformConv2d, nnx.Module):
    """Modulated deformable convolution: `jax_dcn.linen.ModulatedDeformConv2d` for nnx.

    Args:
      rngs: as in `nnx.Conv`. The others, their defaults and errors are those of `jax_dcn.linen.ModulatedDeformConv2d`.
    """

    bias: dataclasses.InitVar[Any] = True
    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, bias: bool, rngs: nnx.Rngs) -> None:
        self._check_arguments(bias)
        self.kernel, self.bias = _parameters(self, bias, rngs)

    def __call__(self, x: jax.Array, offset: jax.Array, mask: jax.Array) -> jax.Array:
        """Applies the layer, with the shapes of `jax_dcn.linen.ModulatedDeformConv2d`."""
        return self._convolve(*_promoted(self, x), offset, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """`ModulatedDeformConv2d` that computes offsets and mask itself: `jax_dcn.linen.ModulatedDeformConv2dPack`."""

    def __post_init__(self, bias: bool, rngs: nnx.Rngs) -> None:
        super().__post_init__(bias, rngs)
        self.conv_offset = _conv_offset(self, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # as in mmcv
        """Applies the layer, with the shapes of `jax_dcn.linen.DeformConv2d`."""
        return self._convolve(*_promoted(self, x), *self._predict(self.conv_offset, x))


@dataclasses.dataclass(eq=False, repr=False)
class DCNv3(dcnv3.DCNv3, nnx.Module):
    """InternImage's layer: `jax_dcn.linen.DCNv3` for nnx.

    Args:
      rngs: as in `nnx.Conv`. The others, their defaults and errors are those of `jax_dcn.linen.DCNv3`.
    """

    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        self._check_arguments()
        _build(self, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, with the shapes of `jax_dcn.linen.DCNv3`."""
        return self._over_images(lambda x: self._run(x, _built(self)), x)


@dataclasses.dataclass(eq=False, repr=False)
class DCNv4(dcnv3.DCNv4, nnx.Module):
    """FlashInternImage's layer: `jax_dcn.linen.DCNv4` for nnx.

    Args:
      rngs: as in `nnx.Conv`. The others, their defaults and errors are those of `jax_dcn.linen.DCNv4`.
    """

    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        self._check_arguments()
        _build(self, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, with the shapes of `jax_dcn.linen.DCNv3`."""
        return self._over_images(lambda x: self._run(x, _built(self)), x)


@dataclasses.dataclass(eq=False, repr=False)
class MultiScaleDeformableAttention(attention.MultiScaleDeformableAttention, nnx.Module):
    """Deformable DETR's attention: `jax_dcn.linen.MultiScaleDeformableAttention` for nnx.

    Its dropout is the submodule `dropout`, which `train()` and `eval()` switch.

    Args:
      rngs: as in `nnx.Linear` and `nnx.Dropout`. The others, their defaults and errors are those of
        `jax_dcn.linen.MultiScaleDeformableAttention`.
    """

    dropout: dataclasses.InitVar[Any] = 0.1
    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, dropout: float, rngs: nnx.Rngs) -> None:
        self._check_arguments(dropout)
        _build(self, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array | None = None,
        value: jax.Array | None = None,
        identity: jax.Array | None = None,
        query_pos: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        reference_points: jax.Array | None = None,
        spatial_shapes: Sequence[Sequence[int]] | None = None,
        level_start_index: Any = None,
    ) -> jax.Array:
        """Applies the layer, with the arguments of `jax_dcn.linen.MultiScaleDeformableAttention`."""
        y = self._run(_built(self), query, value, query_pos, key_padding_mask, reference_points, spatial_shapes)
        return self.dropout(y) + self._like_query("identity", query if identity is None else identity, query)


def _parameters(layer: conv.Layer, bias: bool, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param | None]:
    kernel_init = layer.kernel_init or layer._default_kernel_init
    kernel = nnx.Param(kernel_init(rngs.params(), layer._kernel_shape, layer.param_dtype))
    if not bias:
        return kernel, nnx.data(None)
    return kernel, nnx.Param(layer.bias_init(rngs.params(), (layer.out_channels,), layer.param_dtype))


def _conv_offset(layer: conv.Layer, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(layer.in_channels, layer._conv_offset_channels, rngs=rngs, **layer._conv_offset_options)


_Layer = DeformConv2d | ModulatedDeformConv2d


def _promoted(layer: _Layer, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """x, kernel and bias in the dtype of the computation."""
    bias = None if layer.bias is None else layer.bias[...]
    return nnx.nn.dtypes.promote_dtype((x, layer.kernel[...], bias), dtype=layer.dtype)


def _build(layer: DCNv3 | DCNv4 | MultiScaleDeformableAttention, rngs: nnx.Rngs) -> None:
    """Makes attributes of the parts."""
    options: dict[str, Any] = dict(dtype=layer.dtype, param_dtype=layer.param_dtype, rngs=rngs)

    def build(part: parts.Part) -> Any:
        if isinstance(part, parts.Zeros):
            return nnx.Param(nnx.initializers.zeros(rngs.params(), part.shape, layer.param_dtype))
        if isinstance(part, parts.LayerNorm):
            return nnx.LayerNorm(part.channels, epsilon=part.epsilon, use_fast_variance=False, **options)
        if isinstance(part, parts.Linear):
            return nnx.Linear(
                part.in_features,
                part.out_features,
                use_bias=part.bias,
                kernel_init=part.kernel_init,
                bias_init=part.bias_init,
                precision=layer.precision,
                **options,
            )
        return nnx.Conv(
            part.channels,
            part.channels,
            part.kernel_size,
            part.stride,
            padding=part.padding,
            feature_group_count=part.channels,
            kernel_init=part.init,
            bias_init=part.init,
            precision=layer.precision,
            **options,
        )

    for name, part in layer._parts.items():
        *parents, leaf = name.split(".")
        parent: Any = layer
        for child in parents:
            if not hasattr(parent, child):
                setattr(parent, child, nnx.Dict())
            parent = getattr(parent, child)
        setattr(parent, leaf, build(part))


def _built(layer: DCNv3 | DCNv4 | MultiScaleDeformableAttention) -> parts.Built:
    return {name: functools.reduce(getattr, name.split("."), layer) for name in layer._parts}
