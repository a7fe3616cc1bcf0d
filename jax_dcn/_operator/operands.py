"""The arrays of the primitives: their names, and where their axes are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_dcn._operator.geometry import Geometry

# The gradients of the backward primitive, in the order of its results.
GRADIENTS = ("x", "offset", "mask", "weight", "bias")

# A tangent is called as its operand, and this.
DOT = "_dot"


def array_of(name: str) -> str:
    """The operand, or y, that a tangent or a gradient is shaped as."""
    return name.removesuffix(DOT).removeprefix("grad_")


def is_per_image(name: str) -> bool:
    """Whether the array has one entry per image, in front."""
    return array_of(name) not in ("weight", "bias")


def channel_axis(geometry: Geometry, name: str) -> int:
    """The axis of the array's channels: output channels for weight and bias."""
    return {"weight": geometry.out_axis, "bias": 0}.get(array_of(name), geometry.channel_axis)


def to_nhwc(name: str, array: jax.Array) -> jax.Array:
    """From NCHW, or from OIHW to HWIO."""
    axes = {"weight": (2, 3, 1, 0), "bias": (0,)}.get(array_of(name), (0, 2, 3, 1))
    return jnp.transpose(array, axes)


def to_nchw(name: str, array: jax.Array) -> jax.Array:
    """From NHWC, or from HWIO to OIHW."""
    axes = {"weight": (3, 2, 0, 1), "bias": (0,)}.get(array_of(name), (0, 3, 1, 2))
    return jnp.transpose(array, axes)


def present(**operands: jax.Array | None) -> dict[str, jax.Array]:
    """Those that are given."""
    return {name: operand for name, operand in operands.items() if operand is not None}
