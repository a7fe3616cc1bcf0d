"""What each primitive becomes on each platform: the native kernel where there is one, else plain XLA.

The rules are functions of the primitive's operands and parameters; the tables at the end name them by platform,
None being every platform without an entry of its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_dcn import native, reference
from jax_dcn.geometry import Geometry

# The gradients of the backward primitive, in the order of its results.
GRADIENTS = ("x", "offset", "mask", "weight", "bias")

# A tangent is called as its operand, and this.
DOT = "_dot"


def _to_nhwc(name: str, array: jax.Array, geometry: Geometry) -> jax.Array:
    name = name.removesuffix(DOT)
    if geometry.data_format == "NHWC" or name == "bias":
        return array
    return jnp.transpose(array, (2, 3, 1, 0) if name == "weight" else (0, 2, 3, 1))


def _from_nhwc(name: str, array: jax.Array, geometry: Geometry) -> jax.Array:
    if geometry.data_format == "NHWC" or name == "bias":
        return array
    return jnp.transpose(array, (3, 2, 0, 1) if name == "weight" else (0, 3, 1, 2))


def deform_conv2d_xla(*operands, names, geometry, **params):
    given = {name: _to_nhwc(name, operand, geometry) for name, operand in zip(names, operands, strict=True)}
    y = reference.deform_conv2d(
        *(given["x"], given["offset"], given.get("mask"), given["weight"], given.get("bias")),
        geometry=geometry,
        **params,
    )
    return [_from_nhwc("y", y, geometry)]


def _deform_conv2d_cpu(*operands, names, geometry, precision):
    given = dict(zip(names, operands, strict=True))
    attributes = native.attributes(given, geometry, highest_precision=_is_high(precision))
    return native.call(native.DEFORM_CONV2D, [_y(given, geometry)], given, attributes)


def _deform_conv2d_cuda(*operands, names, geometry, precision):
    nhwc = dataclasses.replace(geometry, data_format="NHWC")
    given = {name: _to_nhwc(name, operand, geometry) for name, operand in zip(names, operands, strict=True)}
    attributes = native.attributes(given, nhwc, **_cuda_options(given, precision))
    workspace = native.cuda_workspace(native.DEFORM_CONV2D, given, attributes)
    y, _ = native.call(native.DEFORM_CONV2D, [_y(given, nhwc), workspace], given, attributes)
    return [_from_nhwc("y", y, geometry)]


def _y(given: dict[str, jax.Array], geometry: Geometry) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(geometry.y_shape(given["offset"].shape, given["weight"].shape), given["x"].dtype)


def deform_conv2d_backward_xla(*operands, names, wanted, geometry, **params):
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
    attributes = native.attributes(given, geometry, **_flags(wanted), highest_precision=_is_high(precision))
    results = _summed_gradients(given, wanted, geometry)
    gradients = native.call(native.DEFORM_CONV2D_BACKWARD, results, given, attributes)
    return _rounded(gradients, given, wanted)


def _deform_conv2d_backward_cuda(*operands, names, geometry, precision, wanted):
    nhwc = dataclasses.replace(geometry, data_format="NHWC")
    given = {name: _to_nhwc(name, operand, geometry) for name, operand in zip(names, operands, strict=True)}
    attributes = native.attributes(given, nhwc, **_flags(wanted), **_cuda_options(given, precision))
    workspace = native.cuda_workspace(native.DEFORM_CONV2D_BACKWARD, given, attributes)
    results = [*_summed_gradients(given, wanted, nhwc), workspace]
    *gradients, _ = native.call(native.DEFORM_CONV2D_BACKWARD, results, given, attributes)
    gradients = _rounded(gradients, given, wanted)
    return [_from_nhwc(name, gradient, geometry) for name, gradient in zip(wanted, gradients, strict=True)]


def deform_conv2d_tangent_xla(*operands, names, geometry, **params):
    given = {name: _to_nhwc(name, operand, geometry) for name, operand in zip(names, operands, strict=True)}
    dots = {name.removesuffix(DOT): given.pop(name) for name in names if name.endswith(DOT)}

    def forward(perturbed: dict[str, jax.Array]) -> jax.Array:
        operands = given | perturbed
        return reference.deform_conv2d(
            *(operands["x"], operands["offset"], operands.get("mask"), operands["weight"], operands.get("bias")),
            geometry=geometry,
            **params,
        )

    # The result does not depend on the bias itself.
    at = {name: given[name] if name in given else jnp.zeros_like(dot) for name, dot in dots.items()}
    _, y_dot = jax.jvp(forward, (at,), (dots,))
    return [_from_nhwc("y", y_dot, geometry)]


def _deform_conv2d_tangent_by(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The tangent by the forward kernel, as far as the result is linear in what moves; by plain XLA for the rest."""

    def rule(*operands, names, geometry, precision):
        given = dict(zip(names, operands, strict=True))
        primals = {name: operand for name, operand in given.items() if not name.endswith(DOT)}

        def along(rule: Callable[..., Any], operands: dict[str, jax.Array]) -> jax.Array:
            (y_dot,) = rule(*operands.values(), names=tuple(operands), geometry=geometry, precision=precision)
            return y_dot

        terms = []
        if "x_dot" in given:
            terms.append(along(kernel, {**primals, "x": given["x_dot"]}))
        if "weight_dot" in given:
            terms.append(along(kernel, {**primals, "weight": given["weight_dot"]}))
        rest = {name: given[name] for name in ("offset_dot", "mask_dot", "bias_dot") if name in given}
        if rest:
            terms.append(along(deform_conv2d_tangent_xla, {**primals, **rest}))
        return [sum(terms[1:], terms[0])]

    return rule


def _flags(wanted: tuple[str, ...]) -> dict[str, bool]:
    return {f"grad_{name}": name in wanted for name in GRADIENTS}


def _summed_gradients(
    given: dict[str, jax.Array], wanted: tuple[str, ...], geometry: Geometry
) -> list[jax.ShapeDtypeStruct]:
    """The gradients as the kernels give them.

    Those of one value per pixel have its dtype, those that many samples add to come in the dtype of their sums.
    """
    shapes = {name: operand.shape for name, operand in given.items()}
    shapes["bias"] = (given["weight"].shape[geometry.out_axis],)
    summed = reference.accumulation_dtype(given["x"].dtype)
    return [
        jax.ShapeDtypeStruct(shapes[name], given[name].dtype if name in ("offset", "mask") else summed)
        for name in wanted
    ]


def _rounded(gradients: Sequence[jax.Array], given: dict[str, jax.Array], wanted: tuple[str, ...]) -> list[jax.Array]:
    """The gradients in their operands' dtypes, the bias's being x's."""
    dtypes = {name: operand.dtype for name, operand in given.items()} | {"bias": given["x"].dtype}
    return [gradient.astype(dtypes[name]) for name, gradient in zip(wanted, gradients, strict=True)]


# --- options of the kernels ---

# The precisions that allow the operands of products to be rounded: on GPUs float32 to TF32, whose numbers have 11
# significant bits (Precision.HIGH does so for XLA's own products too), on CPUs the samples of bfloat16 images to
# bfloat16. All others mean float32.
_ALLOW_ROUNDING = {
    None,
    lax.Precision.DEFAULT,
    lax.Precision.HIGH,
    lax.DotAlgorithmPreset.DEFAULT,
    lax.DotAlgorithmPreset.TF32_TF32_F32,
    lax.DotAlgorithmPreset.F16_F16_F32,
    lax.DotAlgorithmPreset.F16_F16_F16,
    lax.DotAlgorithmPreset.BF16_BF16_F32,
    lax.DotAlgorithmPreset.BF16_BF16_BF16,
}

# XLA's flags that ask for results that are the same in every run.
_DETERMINISTIC = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")


def _is_high(precision: Any) -> bool:
    of_both = set(precision) if isinstance(precision, tuple) else {precision}
    return not of_both <= _ALLOW_ROUNDING


def _cuda_options(given: dict[str, jax.Array], precision: Any) -> dict[str, bool]:
    highest = given["x"].dtype == jnp.float32 and _is_high(precision)
    return {"highest_precision": highest, "deterministic": _deterministic(os.environ.get("XLA_FLAGS", ""))}


def _deterministic(xla_flags: str) -> bool:
    """What XLA_FLAGS ask for. A flag without a value is on, and the last of several counts."""
    values = {}
    for flag in xla_flags.split():
        name, _, value = flag.lstrip("-").partition("=")
        values[name] = value.lower() not in ("false", "0")
    return any(values.get(name, False) for name in _DETERMINISTIC)


# --- tables ---


def _lowerings(xla: Callable[..., Any], kernels: dict[str, Callable[..., Any]]) -> dict[str | None, Callable[..., Any]]:
    """The rules by platform, None being every platform without an entry of its own."""

    def choosing(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def rule(*operands, implementation, **params):
            return (kernel if implementation == "native" else xla)(*operands, **params)

        return rule

    return {platform: choosing(kernel) for platform, kernel in {None: xla, **kernels}.items()}


def _available(**kernels: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    missing = {"cpu": native.MISSING, "cuda": native.CUDA_MISSING}
    return {platform: kernel for platform, kernel in kernels.items() if missing[platform] is None}


DEFORM_CONV2D = _lowerings(deform_conv2d_xla, _available(cpu=_deform_conv2d_cpu, cuda=_deform_conv2d_cuda))
DEFORM_CONV2D_TANGENT = _lowerings(
    deform_conv2d_tangent_xla,
    _available(cpu=_deform_conv2d_tangent_by(_deform_conv2d_cpu), cuda=_deform_conv2d_tangent_by(_deform_conv2d_cuda)),
)
DEFORM_CONV2D_BACKWARD = _lowerings(
    deform_conv2d_backward_xla,
    _available(cpu=_deform_conv2d_backward_cpu, cuda=_deform_conv2d_backward_cuda),
)
