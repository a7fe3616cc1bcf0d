"""What each primitive becomes on each platform: the native kernel where there is one, else plain XLA.

A rule computes the results of a primitive from its operands by name and its other parameters. The tables at the end
name the rules by platform, None being every platform without an entry of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_dcn._operator import native, reference
from jax_dcn._operator.geometry import Geometry
from jax_dcn._operator.operands import DOT, results, to_nchw, to_nhwc

Arrays = dict[str, jax.Array]
Rule = Callable[..., list[jax.Array]]


def in_nhwc(rule: Rule) -> Rule:
    """A rule for either format by one that takes and gives NHWC."""

    def in_either(given: Arrays, *, geometry: Geometry, **params: Any) -> list[jax.Array]:
        if geometry.data_format == "NHWC":
            return rule(given, geometry=geometry, **params)
        given = {name: to_nhwc(name, operand) for name, operand in given.items()}
        computed = rule(given, geometry=geometry.in_format("NHWC"), **params)
        return [to_nchw(name, result) for name, result in zip(results(params), computed, strict=True)]

    return in_either


# --- deform_conv2d ---


@in_nhwc
def deform_conv2d_xla(given: Arrays, **params: Any) -> list[jax.Array]:
    return [reference.deform_conv2d(**_with_absent(given, "mask", "weight", "bias"), **params)]


def deform_conv2d_cpu(given: Arrays, *, geometry: Geometry, precision: Any) -> list[jax.Array]:
    attributes = native.attributes(given, geometry, **_options(given, precision, jnp.bfloat16))
    return native.call(native.DEFORM_CONV2D, [_y(given, geometry)], given, attributes)


@in_nhwc
def deform_conv2d_cuda(given: Arrays, *, geometry: Geometry, precision: Any) -> list[jax.Array]:
    attributes = native.attributes(given, geometry, **_options(given, precision, jnp.float32))
    workspace = native.cuda_workspace(native.DEFORM_CONV2D, given, attributes)
    y, _ = native.call(native.DEFORM_CONV2D, [_y(given, geometry), workspace], given, attributes)
    return [y]


def _y(given: Arrays, geometry: Geometry) -> jax.ShapeDtypeStruct:
    source, axis = ("weight", geometry.out_axis) if "weight" in given else ("x", geometry.channel_axis)
    c_out = given[source].shape[axis]
    return jax.ShapeDtypeStruct(geometry.y_shape(given["offset"].shape, c_out), given["x"].dtype)


# --- deform_conv2d_backward ---


@in_nhwc
def deform_conv2d_backward_xla(given: Arrays, *, wanted: tuple[str, ...], **params: Any) -> list[jax.Array]:
    gradients = reference.deform_conv2d_backward(**_with_absent(given, "mask", "weight"), **params)
    return [gradients[name] for name in wanted]


def deform_conv2d_backward_cpu(
    given: Arrays, *, geometry: Geometry, precision: Any, wanted: tuple[str, ...]
) -> list[jax.Array]:
    attributes = native.attributes(given, geometry, wanted=wanted, **_options(given, precision, jnp.bfloat16))
    summed = _summed_gradients(given, wanted, geometry)
    gradients = native.call(native.DEFORM_CONV2D_BACKWARD, summed, given, attributes)
    return _rounded(gradients, given, wanted)


@in_nhwc
def deform_conv2d_backward_cuda(
    given: Arrays, *, geometry: Geometry, precision: Any, wanted: tuple[str, ...]
) -> list[jax.Array]:
    attributes = native.attributes(given, geometry, wanted=wanted, **_options(given, precision, jnp.float32))
    workspace = native.cuda_workspace(native.DEFORM_CONV2D_BACKWARD, given, attributes)
    summed = _summed_gradients(given, wanted, geometry)
    *gradients, _ = native.call(native.DEFORM_CONV2D_BACKWARD, [*summed, workspace], given, attributes)
    return _rounded(gradients, given, wanted)


def _summed_gradients(given: Arrays, wanted: tuple[str, ...], geometry: Geometry) -> list[jax.ShapeDtypeStruct]:
    """The gradients as the kernels give them.

    Those of one value per pixel have its dtype, those that many samples add to come in the dtype of their sums.
    """
    shapes = {name: operand.shape for name, operand in given.items()}
    if "bias" in wanted:
        shapes["bias"] = (given["weight"].shape[geometry.out_axis],)
    summed = reference.accumulation_dtype(given["x"].dtype)
    return [
        jax.ShapeDtypeStruct(shapes[name], given[name].dtype if name in ("offset", "mask") else summed)
        for name in wanted
    ]


def _rounded(gradients: Sequence[jax.Array], given: Arrays, wanted: tuple[str, ...]) -> list[jax.Array]:
    """The gradients in their operands' dtypes, the bias's being x's."""
    dtypes = {name: operand.dtype for name, operand in given.items()} | {"bias": given["x"].dtype}
    return [gradient.astype(dtypes[name]) for name, gradient in zip(wanted, gradients, strict=True)]


# --- deform_conv2d_tangent ---


@in_nhwc
def deform_conv2d_tangent_xla(given: Arrays, **params: Any) -> list[jax.Array]:
    primals, dots = _primals_and_dots(given)

    def forward(perturbed: Arrays) -> jax.Array:
        return reference.deform_conv2d(**_with_absent(primals | perturbed, "mask", "weight", "bias"), **params)

    # The result does not depend on the bias itself.
    at = {name: primals[name] if name in primals else jnp.zeros_like(dot) for name, dot in dots.items()}
    return [jax.jvp(forward, (at,), (dots,))[1]]


def tangent_by(kernel: Rule) -> Rule:
    """The tangent by the forward kernel along all that the result is linear in, by plain XLA along the offset."""

    def rule(given: Arrays, **params: Any) -> list[jax.Array]:
        primals, dots = _primals_and_dots(given)
        terms = []
        bias = {"bias": dots["bias"]} if "bias" in dots else {}  # any of the calls adds it
        for name in ("x", "mask", "weight"):
            if name in dots:
                terms += kernel({**primals, name: dots[name], **bias}, **params)
                bias = {}
        rest = bias | ({"offset": dots["offset"]} if "offset" in dots else {})
        if rest:
            tangents = {name + DOT: dot for name, dot in rest.items()}
            terms += deform_conv2d_tangent_xla({**primals, **tangents}, **params)
        return [sum(terms[1:], terms[0])]

    return rule


def _primals_and_dots(given: Arrays) -> tuple[Arrays, Arrays]:
    """The operands that are no tangents, and the tangents, both by the operands' names."""
    primals = {name: operand for name, operand in given.items() if not name.endswith(DOT)}
    return primals, {name.removesuffix(DOT): dot for name, dot in given.items() if name.endswith(DOT)}


def _with_absent(given: Arrays, *optional: str) -> dict[str, Any]:
    """The operands, None for the optional ones that are missing."""
    return {**dict.fromkeys(optional), **given}


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


def _options(given: Arrays, precision: Any, rounded: jax.typing.DTypeLike) -> dict[str, Any]:
    """The kernels' options; `rounded` is the dtype of which they may round the operands of products."""
    of_both = set(precision) if isinstance(precision, tuple) else {precision}
    return {
        "highest_precision": given["x"].dtype == rounded and not of_both <= _ALLOW_ROUNDING,
        "deterministic": _deterministic(os.environ.get("XLA_FLAGS", "")),
    }


def _deterministic(xla_flags: str) -> bool:
    """What XLA_FLAGS ask for. A flag without a value is on, and the last of several counts."""
    values = {}
    for flag in xla_flags.split():
        name, _, value = flag.lstrip("-").partition("=")
        values[name] = value.lower() not in ("false", "0")
    return any(values.get(name, False) for name in _DETERMINISTIC)


# --- tables ---


def choosing(xla: Rule, kernel: Rule | None) -> Callable[..., list[jax.Array]]:
    """The lowering, of a primitive's operands and parameters, by the kernel, unless `implementation` is "xla"."""

    def rule(*operands: jax.Array, names: tuple[str, ...], implementation: str, **params: Any) -> list[jax.Array]:
        given = dict(zip(names, operands, strict=True))
        return (kernel if kernel is not None and implementation == "native" else xla)(given, **params)

    return rule


def _lowerings(xla: Rule, **kernels: Rule) -> Mapping[str | None, Callable[..., list[jax.Array]]]:
    """By platform, None being every platform without an entry of its own."""
    missing = {"cpu": native.MISSING, "cuda": native.CUDA_MISSING}
    there = {platform: kernel for platform, kernel in kernels.items() if missing[platform] is None}
    return {None: choosing(xla, None)} | {platform: choosing(xla, kernel) for platform, kernel in there.items()}


DEFORM_CONV2D = _lowerings(deform_conv2d_xla, cpu=deform_conv2d_cpu, cuda=deform_conv2d_cuda)
DEFORM_CONV2D_TANGENT = _lowerings(
    deform_conv2d_tangent_xla, cpu=tangent_by(deform_conv2d_cpu), cuda=tangent_by(deform_conv2d_cuda)
)
DEFORM_CONV2D_BACKWARD = _lowerings(
    deform_conv2d_backward_xla, cpu=deform_conv2d_backward_cpu, cuda=deform_conv2d_backward_cuda
)
