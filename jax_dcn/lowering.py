"""What each primitive becomes on each platform: the native kernel where there is one, else plain XLA.

The rules are functions of the primitive's operands and parameters; the tables at the end name them by platform,
None being every platform without an entry of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jax_dcn import native, reference


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
    gradients = dict(zip(("x", "offset", "mask", "weight"), gradients, strict=True))
    return [gradients[name] for name in wanted]


def _deform_conv2d_backward_cpu(*operands, names, geometry, precision, wanted):
    given = dict(zip(names, operands, strict=True))
    # Gradients that many samples add to come back in the dtype of their sums.
    summed = reference.accumulation_dtype(given["x"].dtype)
    results = [
        jax.ShapeDtypeStruct(given[name].shape, summed if name in ("x", "weight") else given[name].dtype)
        for name in wanted
    ]
    wanted_flags = {f"grad_{name}": name in wanted for name in ("x", "offset", "mask", "weight")}
    gradients = native.call(native.DEFORM_CONV2D_BACKWARD, results, given, geometry, **wanted_flags)
    return [gradient.astype(given[name].dtype) for name, gradient in zip(wanted, gradients, strict=True)]


def _choose(xla: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    def rule(*operands, implementation, **params):
        return (xla if implementation == "xla" else kernel)(*operands, **params)

    return rule


DEFORM_CONV2D = {None: _choose(_deform_conv2d_xla, _deform_conv2d_xla)}
DEFORM_CONV2D_BACKWARD = {None: _choose(_deform_conv2d_backward_xla, _deform_conv2d_backward_xla)}

if native.MISSING is None:
    DEFORM_CONV2D["cpu"] = _choose(_deform_conv2d_xla, _deform_conv2d_cpu)
    DEFORM_CONV2D_BACKWARD["cpu"] = _choose(_deform_conv2d_backward_xla, _deform_conv2d_backward_cpu)
