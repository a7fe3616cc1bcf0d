"""Models with deformable convolutions, for Flax's nnx: mmdet's backbones, pyramid and CenterNet, and InternImage.

Their arguments, state-dict keys and numbers are those of mmdet 3.3.0, or of InternImage's own code, so that
`jax_dcn.mmcv.load_into` fills them from the originals' checkpoints. Images and feature maps are NCHW, as there, unless
data_format says otherwise; inside, the channels come last, which the kernels and XLA prefer.
"""

try:
    import flax.nnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("jax_dcn.models needs Flax: pip install jax_dcn[flax]") from error

from jax_dcn.mmcv.nn import BatchNorm2d as BatchNorm
from jax_dcn.mmcv.nn import FrozenParam
from jax_dcn.models.centernet import CenterNet
from jax_dcn.models.centernet_loss import (
    CenterNetTargets,
    centernet_loss,
    centernet_targets,
    gaussian_focal_loss,
)
from jax_dcn.models.fpn import FPN
from jax_dcn.models.internimage import InternImage
from jax_dcn.models.resnet import ResNet, ResNeXt

__all__ = [
    "FPN",
    "BatchNorm",
    "CenterNet",
    "CenterNetTargets",
    "FrozenParam",
    "InternImage",
    "ResNeXt",
    "ResNet",
    "centernet_loss",
    "centernet_targets",
    "gaussian_focal_loss",
]
