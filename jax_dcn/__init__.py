"""Deformable convolution for JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_dcn._operator.native import show_config as show_config
from jax_dcn.functional import dcnv3 as dcnv3
from jax_dcn.functional import dcnv4 as dcnv4
from jax_dcn.functional import deform_conv2d as deform_conv2d
from jax_dcn.functional import modulated_deform_conv2d as modulated_deform_conv2d
from jax_dcn.functional import multi_scale_deformable_attention as multi_scale_deformable_attention
from jax_dcn.version import __version__ as __version__

if TYPE_CHECKING:
    from jax_dcn import linen as linen
    from jax_dcn import mmcv as mmcv
    from jax_dcn import models as models
    from jax_dcn import nnx as nnx
    from jax_dcn import onnx as onnx
    from jax_dcn import plot as plot
    from jax_dcn.linen import DCNv3 as DCNv3
    from jax_dcn.linen import DCNv4 as DCNv4
    from jax_dcn.linen import DeformConv2d as DeformConv2d
    from jax_dcn.linen import DeformConv2dPack as DeformConv2dPack
    from jax_dcn.linen import ModulatedDeformConv2d as ModulatedDeformConv2d
    from jax_dcn.linen import ModulatedDeformConv2dPack as ModulatedDeformConv2dPack
    from jax_dcn.linen import MultiScaleDeformableAttention as MultiScaleDeformableAttention

# Imported when first used, because most of them need what is optional, as Flax is.
_MODULES = ("linen", "mmcv", "models", "nnx", "onnx", "plot")
_LAYERS = (
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
)


if not TYPE_CHECKING:  # for which every name would exist

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"jax_dcn.{name}")
        if name in _LAYERS:
            return getattr(importlib.import_module("jax_dcn.linen"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_LAYERS})
