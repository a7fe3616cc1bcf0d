"""What models are made of: torch's layers with torch's defaults, and parameters that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

_NORMS = ("BN", "BN2d", "SyncBN")

# mmdet's, which unlike Flax's default counts the output's channels, and does not cut the tails off.
_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class FrozenParam(nnx.Variable):
    """A parameter that is not trained: neither a gradient nor an optimizer with `wrt=nnx.Param` touches it."""


class BatchNorm(nnx.BatchNorm):
    """torch's BatchNorm2d: `nnx.BatchNorm` with torch's defaults, unbiased running variance and counter of batches.

    x has its channels last, and the result x's shape. Under `jit` the statistics are those of the whole batch on all
    devices, as SyncBN's are.

    Args:
      channels: of x.
      norm_eval: whether to use the running statistics, and leave them as they are, in training too.
      rngs, and options such as dtype, param_dtype and scale_init: as in `nnx.BatchNorm`.
    """

    def __init__(self, channels: int, *, norm_eval: bool = False, rngs: nnx.Rngs, **options: Any):
        super().__init__(channels, momentum=0.9, epsilon=1e-5, rngs=rngs, **options)
        self.norm_eval = norm_eval
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # torch's has no other arguments
        """Normalises x, and in training without norm_eval takes its statistics into the running ones."""
        if self.norm_eval or self.use_running_average:
            return super().__call__(x, use_running_average=True)
        before = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average=False)
        count = x.size // x.shape[-1]
        self.var[...] = before + (self.var[...] - before) * (count / max(count - 1, 1))
        self.num_batches_tracked[...] += 1
        return y


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    *,
    bias: bool = False,
    kernel_init: nnx.Initializer = _KAIMING,
    **options: Any,
) -> nnx.Conv:
    """torch's Conv2d, padded to keep the size."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=dilation * (kernel_size // 2),
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=kernel_init,
        **options,
    )


class ConvModule(nnx.Module):
    """mmcv's ConvModule with nothing but its convolution, for the name."""

    def __init__(self, *arguments: Any, **options: Any):
        self.conv = conv(*arguments, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


def max_pool(x: jax.Array) -> jax.Array:
    """torch's MaxPool2d(3, 2, 1)."""

    # Of Flax's max_pool jax2onnx leaves out the padding, and symbolic sizes of its result are those of its input. ONNX
    # Runtime pools over three axes at most.
    def pool_middle(x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 1), (1, 2, 1), ((0, 0), (1, 1), (0, 0)))

    n, h, w, c = x.shape
    x = pool_middle(x.reshape(n * h, w, c))
    w = x.shape[1]
    x = pool_middle(x.reshape(n, h, w, c).reshape(n, h, w * c))
    return x.reshape(n, x.shape[1], w, c)


def resize_nearest(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """torch's nearest neighbours, which are those up and left. jax.image.resize takes those around the centres."""
    for axis, target in zip((1, 2), size, strict=True):
        source = x.shape[axis]
        # In float32, as torch computes them.
        indices = np.floor(np.arange(target, dtype=np.float32) * np.float32(source / target)).astype(int)
        x = jnp.take(x, np.minimum(indices, source - 1), axis=axis)
    return x


def freeze(module: nnx.Module) -> None:
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            freeze_parameters(node)
        if isinstance(node, BatchNorm):
            node.norm_eval = True


def freeze_parameters(module: nnx.Module) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, nnx.Param):
            setattr(module, name, FrozenParam(value[...]))


def trains_norms(name: str, norm_cfg: Mapping[str, Any] | None) -> bool:
    """Whether the normalisations' parameters are trained."""
    norm_cfg = {"type": "BN", **(norm_cfg or {})}
    if norm_cfg["type"] not in _NORMS or set(norm_cfg) - {"type", "requires_grad"}:
        raise ValueError(
            f"{name}: norm_cfg must be dict(type={' or '.join(map(repr, _NORMS))}, requires_grad=...), got {norm_cfg}"
        )
    return norm_cfg.get("requires_grad", True)
