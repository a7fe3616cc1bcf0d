"""Parameters that are not trained, and torch's initial values."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike


class FrozenParam(nnx.Variable):
    """A parameter that is not trained, or a buffer: no gradient and no optimizer with `wrt=nnx.Param` touches it."""


def freeze_parameters(module: nnx.Module) -> None:
    """Makes `FrozenParam`s of a module's own parameters, not of its children's."""
    for name, value in list(vars(module).items()):
        if isinstance(value, nnx.Param):
            setattr(module, name, FrozenParam(value[...]))


# torch's for kernels is uniform within 1 / sqrt(fan_in), of transposed convolutions too, whose fan_in counts outputs.
torchs_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torchs_bias_init(fan_in: int) -> nnx.Initializer:
    """Uniform within 1 / sqrt(fan_in), fan_in being that of the kernel."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: DTypeLike = float) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def kaiming_init(slope: float = 0) -> nnx.Initializer:
    """mmcv's, for a leaky ReLU of that slope, which unlike Flax's counts outputs, and does not cut the tails off."""
    return nnx.initializers.variance_scaling(2 / (1 + slope**2), "fan_out", "normal")
