"""Parts of models for Flax's nnx that behave as torch's and mmcv's, for ports of what was written with these.

They have their originals' names, arguments, defaults and initial values, and their names in a state dict, so that
`jax_dcn.mmcv.load_into` fills them. What concerns images takes them with the channels last, as Flax does, unless told
data_format="NCHW"; everything else has its channels on the last axis, as in torch. Besides, layers with parameters take
`rngs`, `dtype` (of the computation, default that to which x and parameters promote) and `param_dtype` (default
float32) as Flax's do, and convolutions `kernel_init` and `bias_init`.
"""

try:
    import flax.nnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("jax_dcn.mmcv.nn needs Flax: pip install jax_dcn[flax]") from error

from jax_dcn.mmcv.nn.blocks import (
    ConvModule,
    Scale,
    build_activation_layer,
    build_conv_layer,
    build_norm_layer,
)
from jax_dcn.mmcv.nn.containers import ModuleList, Sequential
from jax_dcn.mmcv.nn.functional import adaptive_avg_pool2d, interpolate, max_pool2d, reread
from jax_dcn.mmcv.nn.linear import Conv2d, ConvTranspose2d, Linear
from jax_dcn.mmcv.nn.normalization import BatchNorm2d, GroupNorm, LayerNorm
from jax_dcn.mmcv.nn.parameters import FrozenParam

__all__ = [
    "BatchNorm2d",
    "Conv2d",
    "ConvModule",
    "ConvTranspose2d",
    "FrozenParam",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "ModuleList",
    "Scale",
    "Sequential",
    "adaptive_avg_pool2d",
    "build_activation_layer",
    "build_conv_layer",
    "build_norm_layer",
    "interpolate",
    "max_pool2d",
    "reread",
]
