"""torch's normalizations.

All take the variance around the mean, as torch does. Flax's default, the mean of squares less the square of the mean,
keeps one digit where the mean is a thousand deviations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jax_dcn._checks import check_array, check_bool, check_data_format, check_images, to_array, to_count
from jax_dcn._layers.arguments import MmcvArguments
from jax_dcn.mmcv.nn.formats import channels_last

_AFFINE = {"epsilon": "eps", "use_bias": "affine", "use_scale": "affine"}


class BatchNorm2d(MmcvArguments, nnx.BatchNorm):
    """torch's BatchNorm2d, as `nnx.BatchNorm` with torch's defaults, unbiased running variance and counter of batches.

    The result has x's shape. Under `jit` the statistics are those of the whole batch on all devices, as SyncBN's are.

    Args:
      num_features: channels of x.
      eps: added to the variance (default 1e-5).
      momentum: the weight of a batch in the running statistics (default 0.1; Flax's momentum is that of the past).
      affine: whether there are a scale and a bias (default True).
      norm_eval: whether to use the running statistics, and leave them as they are, in training too (mmdet's).
      data_format: "NHWC" (default) for a last axis of channels, or "NCHW" for the third from the end.
      rngs, and options such as dtype, param_dtype and scale_init: as in `nnx.BatchNorm`.

    Raises:
      TypeError, ValueError: arguments of the wrong type, among them torch's momentum=None, or another x.
    """

    _OTHER_NAMES: ClassVar[Mapping[str, str]] = _AFFINE

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        norm_eval: bool = False,
        data_format: str = "NHWC",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        name = type(self).__name__
        check_data_format(name, data_format)
        for argument, value in (("affine", affine), ("norm_eval", norm_eval)):
            check_bool(name, argument, value)
        if not isinstance(momentum, (int, float)):
            raise TypeError(f"{name}: momentum must be a number, got {momentum!r}")
        super().__init__(
            to_count(name, "num_features", num_features),
            momentum=1 - momentum,
            epsilon=eps,
            use_bias=affine,
            use_scale=affine,
            use_fast_variance=False,
            rngs=rngs,
            **options,
        )
        self.norm_eval, self.data_format = norm_eval, data_format
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # torch's has no other arguments
        """Normalises x, and in training without norm_eval takes its statistics into the running ones."""
        check_images(type(self).__name__, x, self.data_format, self.num_features, "num_features", least=2)
        x = to_array(type(self).__name__, "x", x)
        if math.prod(x.shape) == self.num_features and not (self.norm_eval or self.use_running_average):
            raise ValueError(f"{type(self).__name__}: in training x must have more than one pixel, got {x.shape}")
        return channels_last(self._normalize, x, self.data_format)

    def _normalize(self, x: jax.Array) -> jax.Array:
        # Flax's would have the dtype of the running statistics too, float32 at least.
        parameters = [parameter[...] for parameter in (self.scale, self.bias) if parameter is not None]
        dtype = self.dtype or jnp.result_type(x, *parameters)
        count = math.prod(x.shape[:-1])
        if self.norm_eval or self.use_running_average or count == 0:  # of nothing there are no statistics
            return super().__call__(x, use_running_average=True).astype(dtype)
        before = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average=False).astype(dtype)
        self.var[...] = before + (self.var[...] - before) * (count / (count - 1))
        self.num_batches_tracked[...] += 1
        return y


class GroupNorm(MmcvArguments, nnx.GroupNorm):
    """torch's GroupNorm, as `nnx.GroupNorm` with torch's order of the arguments and its epsilon.

    x has its images on the first axis, and any axes between these and the channels.

    Args:
      num_groups: groups of channels with statistics of their own.
      num_channels: channels of x, a multiple of num_groups.
      eps: added to the variance (default 1e-5; Flax's 1e-6).
      affine: whether there are a scale and a bias (default True).
      data_format: "NHWC" (default) for a last axis of channels, or "NCHW" for the third from the end.
      rngs, and options such as dtype and param_dtype: as in `nnx.GroupNorm`.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another, or another x.
    """

    _OTHER_NAMES: ClassVar[Mapping[str, str]] = {**_AFFINE, "num_features": "num_channels"}

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        data_format: str = "NHWC",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        name = type(self).__name__
        check_data_format(name, data_format)
        check_bool(name, "affine", affine)
        if to_count(name, "num_channels", num_channels) % to_count(name, "num_groups", num_groups):
            raise ValueError(f"{name}: num_channels ({num_channels}) must be a multiple of num_groups ({num_groups})")
        super().__init__(
            int(num_channels),
            int(num_groups),
            epsilon=eps,
            use_bias=affine,
            use_scale=affine,
            use_fast_variance=False,
            rngs=rngs,
            **options,
        )
        self.num_channels, self.data_format = int(num_channels), data_format

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # torch's has no other arguments
        """Normalises x."""
        check_images(type(self).__name__, x, self.data_format, self.num_channels, "num_channels", least=2)
        return channels_last(super().__call__, x, self.data_format)


class LayerNorm(MmcvArguments, nnx.LayerNorm):
    """torch's LayerNorm over the last axis, as `nnx.LayerNorm` with torch's epsilon.

    Args:
      normalized_shape: the size of the last axis, an int or a sequence of one. (torch takes several axes.)
      eps: added to the variance (default 1e-5; Flax's 1e-6).
      elementwise_affine: whether there are a scale and a bias (default True).
      bias: whether there is a bias beside the scale (default True).
      rngs, and options such as dtype and param_dtype: as in `nnx.LayerNorm`.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or another x.
    """

    _OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "epsilon": "eps",
        "num_features": "normalized_shape",
        "use_bias": "bias",
        "use_scale": "elementwise_affine",
    }

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...] | list[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        name = type(self).__name__
        for argument, value in (("elementwise_affine", elementwise_affine), ("bias", bias)):
            check_bool(name, argument, value)
        shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
        if len(shape) != 1:
            raise ValueError(f"{name}: normalized_shape must have one axis, got {normalized_shape}")
        super().__init__(
            to_count(name, "normalized_shape", shape[0]),
            epsilon=eps,
            use_bias=elementwise_affine and bias,
            use_scale=elementwise_affine,
            use_fast_variance=False,
            rngs=rngs,
            **options,
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # torch's has no other arguments
        """Normalises x."""
        check_array(type(self).__name__, "x", x)
        if x.ndim < 1 or x.shape[-1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: x has shape {x.shape}, expected {self.num_features} = normalized_shape last"
            )
        return super().__call__(x)
