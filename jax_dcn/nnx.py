"""The layers for flax.nnx.

They are those of `jax_dcn.linen`, which documents them, and take `rngs` besides. The parameters are the attributes
`kernel` and `bias`, which is None without a bias, and in the Packs the submodule `conv_offset`, an `nnx.Conv`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jax_dcn._layers import conv

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ImportError("jax_dcn.nnx needs Flax: pip install jax_dcn[flax]") from error

__all__ = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"]


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
