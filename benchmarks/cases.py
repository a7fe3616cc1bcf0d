"""The shapes of well-known models with deformable convolutions, at their usual input sizes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    c_in: int
    c_out: int
    height: int
    width: int
    modulated: bool
    stride: int = 1
    groups: int = 1
    deform_groups: int = 1

    @property
    def static(self) -> dict[str, int]:
        """The keyword arguments of `deform_conv2d` besides the arrays. Kernel 3 and padding 1 throughout."""
        return dict(stride=self.stride, padding=1, groups=self.groups, deform_groups=self.deform_groups)

    def operands(self, seed: int = 0) -> dict[str, jax.Array]:
        """Random NHWC operands, with offsets of a standard deviation of 2 pixels."""
        rng = np.random.default_rng(seed)
        out = (self.batch, (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1)
        shapes = {
            "x": (self.batch, self.height, self.width, self.c_in),
            "offset": (*out, self.deform_groups * 18),
            "weight": (3, 3, self.c_in // self.groups, self.c_out),
        }
        operands = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        operands["offset"] *= 2
        operands["weight"] *= (9 * self.c_in // self.groups) ** -0.5
        if self.modulated:
            operands["mask"] = rng.random((*out, self.deform_groups * 9), np.float32)
        return {name: jnp.asarray(operand) for name, operand in operands.items()}


CASES = {
    "r50_c3": Case(1, 128, 128, 100, 168, True),
    "r50_c4": Case(1, 256, 256, 50, 84, True),
    "r50_c5": Case(1, 512, 512, 25, 42, False),
    "r50_c4_s2": Case(1, 256, 256, 100, 168, True, stride=2),
    "edvr_m": Case(4, 64, 64, 64, 64, True, deform_groups=8),
    "basicvsrpp": Case(2, 128, 64, 64, 64, True, deform_groups=16),
    "x101": Case(1, 256, 256, 50, 84, False, groups=32),
    "bevdepth": Case(6, 512, 512, 16, 44, False, groups=4),
    "dekr": Case(1, 255, 255, 64, 64, False, groups=17, deform_groups=17),
    "train": Case(8, 256, 256, 14, 14, True),
}
