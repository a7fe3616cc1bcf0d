"""The arrays of the primitives: their names, and where their axes are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_dcn._operator.geometry import Geometry

# The order in which the handlers take their operands, of which some are optional.
OPERANDS = ("grad_y", "x", "offset", "weight", "mask", "bias")

# The gradients of the backward primitive, in the order of its results.
GRADIENTS = ("x", "offset", "mask", "weight", "bias")

# A tangent is called as its operand, and this.
DOT = "_dot"


def results(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The results of a primitive with these parameters: y, or those gradients that are wanted."""
    return params.get("wanted", ("y",))


def shaped_as(name: str) -> str:
    """The operand, or y, that a tangent or a gradient has the shape of."""
    return name.removesuffix(DOT).removeprefix("grad_")


def is_per_image(name: str) -> bool:
    """Whether the array has one entry per image, in front."""
    return shaped_as(name) not in ("weight", "bias")


def channel_axis(geometry: Geometry, name: str) -> int:
    """The axis of the array's channels: output channels for weight and bias."""
    return {"weight": geometry.out_axis, "bias": 0}.get(shaped_as(name), geometry.channel_axis)


def to_nhwc(name: str, array: jax.Array) -> jax.Array:
    """From NCHW, or from OIHW to HWIO."""
    axes = {"weight": (2, 3, 1, 0), "bias": (0,)}.get(shaped_as(name), (0, 2, 3, 1))
    return jnp.transpose(array, axes)


def to_nchw(name: str, array: jax.Array) -> jax.Array:
    """From NHWC, or from HWIO to OIHW."""
    axes = {"weight": (3, 2, 0, 1), "bias": (0,)}.get(shaped_as(name), (0, 3, 1, 2))
    return jnp.transpose(array, axes)


def present(**operands: jax.Array | None) -> dict[str, jax.Array]:
    """Those that are given."""
    return {name: operand for name, operand in operands.items() if operand is not None}
