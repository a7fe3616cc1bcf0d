"""What a layer is made of, for linen.py and nnx.py to build: by torch's names, where a dot leads into a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jax_dcn._operator.geometry import Pair

Initializer = initializers.Initializer
_XAVIER = initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Linear:
    in_features: int
    out_features: int
    bias: bool = True
    kernel_init: Initializer = _XAVIER
    bias_init: Initializer = initializers.zeros


@dataclasses.dataclass(frozen=True)
class DepthwiseConv:
    """With torch's initial values, and padded as if to keep the size."""

    channels: int
    kernel_size: Pair
    stride: Pair

    @property
    def padding(self) -> tuple[Pair, Pair]:
        height, width = (((k - 1) // 2, (k - 1) // 2) for k in self.kernel_size)
        return height, width

    @property
    def init(self) -> Initializer:
        """Uniform within 1 / sqrt(fan_in), of the kernel and the bias."""
        fan_in = self.kernel_size[0] * self.kernel_size[1]

        def init(key: Any, shape: Any, dtype: Any = float, out_sharding: Any = None) -> Any:
            del out_sharding
            return (2 * initializers.uniform(1.0)(key, shape, dtype) - 1) * fan_in**-0.5

        return init


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    channels: int
    epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A parameter of the layer's own, 0 at first."""

    shape: tuple[int, ...]


Part = Linear | DepthwiseConv | LayerNorm | Zeros

# The parts as built, by their names: functions, and parameters of the layer's own.
Built = Mapping[str, Any]


def softmax(x: jax.Array) -> jax.Array:
    """Over the last axis, in float32 at least."""
    return jax.nn.softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)), -1).astype(x.dtype)
