"""The data formats of images."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def channels_last(function: Callable[[jax.Array], jax.Array], x: jax.Array, data_format: str) -> jax.Array:
    """A function of images with the channels last, of images of either format."""
    if data_format == "NHWC":
        return function(x)
    return jnp.moveaxis(function(jnp.moveaxis(x, -3, -1)), -1, -3)
