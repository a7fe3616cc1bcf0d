"""What each primitive becomes on each platform: the native kernel where there is one, else plain XLA.

The rules are functions of the primitive's operands and parameters; the tables at the end name them by platform,
None being every platform without an entry of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jax_dcn import native, reference

# The gradients of the backward primitive, in the order of its results.
GRADIENTS = ("x", "offset", "mask", "weight", "bias")


def _deform_conv2d_xla(*operands, names, **params):
    given = dict(zip(names, operands, strict=True))
    return [
        reference.deform_conv2d(
            given["x"], given["offset"], given.get("mask"), given["weight"], given.get("bias"), **params
        )
    ]


def _deform_conv2d_cpu(*operands, names, geometry, precision):
    given = dict(zip(names, operands, strict=True))
    result = jax.ShapeDtypeStruct((*given["offset"].shape[:3], given["weight"].shape[3]), given["x"].dtype)
    return native.call(native.DEFORM_CONV2D, [result], given, geometry)


def _deform_conv2d_backward_xla(*operands, names, wanted, **params):
    given = dict(zip(names, operands, strict=True))
    gradients = reference.deform_conv2d_backward(
        given["grad_y"], given["x"], given["offset"], given.get("mask"), given["weight"], **params
    )
    gradients = dict(zip(GRADIENTS, gradients, strict=True))
    return [gradients[name] for name in wanted]


def _deform_conv2d_backward_cpu(*operands, names, geometry, precision, wanted):
    given = dict(zip(names, operands, strict=True))
    shapes = {name: operand.shape for name, operand in given.items()} | {"bias": given["weight"].shape[3:]}
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
