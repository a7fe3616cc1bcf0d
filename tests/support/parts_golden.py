"""The parts of jax_dcn.mmcv.nn as torch has them: the cases, and their numbers, made by data/make_parts.py.

A case gives the name of a part and its arguments, which are the same here and in torch.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from support.models_golden import random_inputs, random_state_dict

PATH = Path(__file__).parents[1] / "data" / "parts.npz"


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    arguments: tuple = ()
    options: dict = dataclasses.field(default_factory=dict)
    shape: tuple = (2, 6, 7, 9)
    training: bool = False

    @property
    def images(self):
        """Whether the input's channels are on axis 1 in torch."""
        return len(self.shape) == 4 and self.name not in ("Linear", "LayerNorm")


def part(name, *arguments, shape=(2, 6, 7, 9), training=False, **options):
    return Part(name, arguments, options, shape, training)


RELU = {"type": "ReLU"}
LAYERS = {
    "conv": part("Conv2d", 6, 4, 3),
    "conv-1x1": part("Conv2d", 6, 4, 1, bias=False),
    "conv-all": part("Conv2d", 6, 4, (2, 3), (2, 1), (1, 2), (1, 2), 2, True),
    "conv-same": part("Conv2d", 6, 4, 4, padding="same", dilation=(1, 2)),
    "conv-valid": part("Conv2d", 6, 4, 3, padding="valid"),
    "conv-reflect": part("Conv2d", 6, 4, 3, 2, (1, 2), padding_mode="reflect"),
    "conv-replicate": part("Conv2d", 6, 4, 3, padding=(2, 1), padding_mode="replicate"),
    "conv-circular": part("Conv2d", 6, 4, 3, padding=(2, 1), padding_mode="circular"),
    "conv-image": part("Conv2d", 6, 4, 3, padding=1, shape=(6, 7, 9)),
    "transpose": part("ConvTranspose2d", 6, 4, 3),
    "transpose-4x4": part("ConvTranspose2d", 6, 4, 4, 2, 1, bias=False),
    "transpose-all": part("ConvTranspose2d", 6, 4, (3, 2), (2, 3), (1, 0), (1, 2), 2, True, (2, 1)),
    "transpose-depthwise": part("ConvTranspose2d", 6, 6, 4, stride=2, padding=1, groups=6, bias=False),
    "transpose-cropped": part("ConvTranspose2d", 6, 4, 2, padding=3),
    "linear": part("Linear", 6, 4, shape=(2, 5, 6)),
    "linear-no_bias": part("Linear", 6, 4, False, shape=(6,)),
    "batch_norm": part("BatchNorm2d", 6),
    "batch_norm-training": part("BatchNorm2d", 6, 1e-3, 0.3, training=True),
    "batch_norm-not_affine": part("BatchNorm2d", 6, affine=False, training=True),
    "group_norm": part("GroupNorm", 3, 6),
    "group_norm-not_affine": part("GroupNorm", 2, 6, 1e-2, False),
    "layer_norm": part("LayerNorm", 9),
    "layer_norm-no_bias": part("LayerNorm", (9,), 1e-2, bias=False),
    "layer_norm-not_affine": part("LayerNorm", 9, elementwise_affine=False),
    "module": part("ConvModule", 6, 4, 3),
    "module-bn": part("ConvModule", 6, 4, 3, 2, 1, norm_cfg={"type": "BN", "requires_grad": False}),
    "module-gn": part("ConvModule", 6, 4, 3, norm_cfg={"type": "GN", "num_groups": 2}, act_cfg=None),
    "module-deconv": part("ConvModule", 6, 4, 4, 2, 1, conv_cfg={"type": "deconv"}, norm_cfg={"type": "SyncBN"}),
    "module-order": part("ConvModule", 6, 4, 3, norm_cfg={"type": "BN"}, order=("norm", "act", "conv"), bias=True),
    "module-reflect": part("ConvModule", 6, 4, 3, padding=1, padding_mode="reflect"),
    **{
        f"module-{cfg['type']}": part("ConvModule", 6, 4, 1, act_cfg=cfg)
        for cfg in (
            {"type": "LeakyReLU", "negative_slope": 0.1},
            *({"type": name} for name in ("ReLU6", "ELU", "Sigmoid", "Tanh", "GELU", "SiLU", "Mish")),
            {"type": "HSigmoid", "bias": 1.0, "divisor": 2.0},
            {"type": "HSwish"},
        )
    },
}

BILINEAR = {"mode": "bilinear", "align_corners": False}
ALIGNED = {"mode": "bilinear", "align_corners": True}
FUNCTIONS = {
    **{
        f"interpolate-{name}-{'x'.join(map(str, after.values()))}": part("interpolate", shape=shape, **after, **how)
        for name, how in (("nearest", {}), ("bilinear", BILINEAR), ("aligned", ALIGNED))
        for shape, after in (
            ((2, 3, 7, 9), {"size": (14, 18)}),
            ((2, 3, 7, 9), {"size": (7, 5)}),
            ((1, 2, 25, 42), {"size": (50, 83)}),
            ((1, 2, 1, 5), {"size": (4, 1)}),
            ((2, 3, 7, 9), {"scale_factor": 2}),
            ((2, 3, 7, 9), {"scale_factor": 0.5}),
            ((2, 3, 7, 9), {"scale_factor": (1.7, 0.6)}),
            ((1, 1, 33, 49), {"scale_factor": 1.03}),
        )
    },
    "max_pool": part("max_pool2d", 3, 2, 1),
    "max_pool-2": part("max_pool2d", 2),
    "max_pool-all": part("max_pool2d", (3, 2), (2, 1), (1, 0)),
    "max_pool-ceil": part("max_pool2d", 2, 2, 1, ceil_mode=True),
    "max_pool-ceil-far": part("max_pool2d", (2, 3), (5, 4), ceil_mode=True),
    "mean": part("adaptive_avg_pool2d", 1),
    "mean-3x4": part("adaptive_avg_pool2d", (3, 4)),
    "mean-larger": part("adaptive_avg_pool2d", 11),
    "mean-one_axis": part("adaptive_avg_pool2d", (None, 1)),
}
CASES = {**LAYERS, **FUNCTIONS}


class GoldenPart:
    """A case's `part`, and torch's numbers: `state_dict`, `x`, `y`, the cotangent `gy`, and `grads` by name.

    The gradient of x stands under the name x, and what training made of the statistics in `after`.
    """

    def __init__(self, case):
        self.part = CASES[case]
        with np.load(PATH) as arrays:
            shapes = json.loads(str(arrays["shapes"]))[case]
            self.y = arrays[f"{case}/y"]
            self.grads, self.after = (
                {
                    key.removeprefix(f"{case}/{kind}/"): arrays[key]
                    for key in arrays.files
                    if key.startswith(f"{case}/{kind}/")
                }
                for kind in ("grads", "after")
            )
        self.state_dict, self.x, self.gy = inputs(case, shapes, self.y.shape)


def inputs(case, shapes, shape_out):
    """The state dict of a case, its input and the cotangent of its output, all random."""
    x, gy = random_inputs(case, [CASES[case].shape, shape_out])
    return random_state_dict(shapes), x, gy
