"""What each primitive becomes on each platform: the native kernel where there is one, else plain XLA.

The rules are functions of the primitive's operands and parameters; the tables at the end name them by platform,
None being every platform without an entry of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_dcn import native, reference
from jax_dcn.geometry import Geometry

# The gradients of the backward primitive, in the order of its results.
GRADIENTS = ("x", "offset", "mask", "weight", "bias")


def _to_nhwc(name: str, array: jax.Array, geometry: Geometry) -> jax.Array:
    if geometry.data_format == "NHWC" or name == "bias":
        return array
    return jnp.transpose(array, (2, 3, 1, 0) if name == "weight" else (0, 2, 3, 1))


def _from_nhwc(name: str, array: jax.Array, geometry: Geometry) -> jax.Array:
    if geometry.data_format == "NHWC" or name == "bias":
        return array
    return jnp.transpose(array, (3, 2, 0, 1) if name == "weight" else (0, 3, 1, 2))


def _deform_conv2d_xla(*operands, names, geometry, **params):
    given = {name: _to_nhwc(name, operand, geometry) for name, operand in zip(names, operands, strict=True)}
    y = reference.deform_conv2d(
        *(given["x"], given["offset"], given.get("mask"), given["weight"], given.get("bias")),
        geometry=geometry,
        **params,
    )
    return [_from_nhwc("y", y, geometry)]


def _deform_conv2d_cpu(*operands, names, geometry, precision):
    given = dict(zip(names, operands, strict=True))
    result = jax.ShapeDtypeStruct(geometry.y_shape(given["offset"].shape, given["weight"].shape), given["x"].dtype)
    return native.call(native.DEFORM_CONV2D, [result], given, geometry)


def _deform_conv2d_backward_xla(*operands, names, wanted, geometry, **params):
    given = {name: _to_nhwc(name, operand, geometry) for name, operand in zip(names, operands, strict=True)}
    gradients = reference.deform_conv2d_backward(
        *(given["grad_y"], given["x"], given["offset"], given.get("mask"), given["weight"]),
        geometry=geometry,
        **params,
    )
    gradients = dict(zip(GRADIENTS, gradients, strict=True))
    return [_from_nhwc(name, gradients[name], geometry) for name in wanted]


def _deform_conv2d_backward_cpu(*operands, names, geometry, precision, wanted):
    given = dict(zip(names, operands, strict=True))
    shapes = {name: operand.shape for name, operand in given.items()} | {
        "bias": (given["weight"].shape[geometry.out_axis],)
    }
    dtypes = {name: operand.dtype for name, operand in given.items()} | {"bias": given["x"].dtype}
    # Gradients of one value per pixel have its dtype, those that many samples add to come in the dtype of their sums.
    summed = reference.accumulation_dtype(given["x"].dtype)
    results = [
        jax.ShapeDtypeStruct(shapes[name], dtypes[name] if name in ("offset", "mask") else summed) for name in wanted
    ]
    flags = {f"grad_{name}": name in wanted for name in GRADIENTS}
    gradients = native.call(native.DEFORM_CONV2D_BACKWARD, results, given, geometry, **flags)
    return [gradient.astype(dtypes[name]) for name, gradient in zip(wanted, gradients, strict=True)]


def _lowerings(xla: Callable[..., Any], kernels: dict[str, Callable[..., Any]]) -> dict[str | None, Callable[..., Any]]:
    """The rules by platform, None being every platform without an entry of its own."""

    def choosing(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def rule(*operands, implementation, **params):
            return (kernel if implementation == "native" else xla)(*operands, **params)

        return rule

    return {platform: choosing(kernel) for platform, kernel in {None: xla, **kernels}.items()}


_HAS_CPU = native.MISSING is None

DEFORM_CONV2D = _lowerings(_deform_conv2d_xla, {"cpu": _deform_conv2d_cpu} if _HAS_CPU else {})
DEFORM_CONV2D_BACKWARD = _lowerings(
    _deform_conv2d_backward_xla, {"cpu": _deform_conv2d_backward_cpu} if _HAS_CPU else {}
)
