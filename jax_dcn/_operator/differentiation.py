"""The operator as JAX differentiates it: in reverse mode by rules of its own, or in any by those of the primitives."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_dcn._operator import compat, primitives
from jax_dcn._operator.geometry import Geometry
from jax_dcn._operator.operands import GRADIENTS


def deform_conv2d(
    x: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None,
    weight: jax.Array | None,  # None: the samples of a channel are summed over the taps, and there is no bias
    bias: jax.Array | None,
    *,
    forward_mode: bool,
    geometry: Geometry,
    precision: Any,
    implementation: str,  # "native" or "xla"
) -> jax.Array:
    """The result, of operands in the geometry's format that have been checked."""
    operands: list[Any] = compat.equally_varying(x, offset, mask, weight, _sharded_as_outputs(bias, weight, geometry))
    static = _Static(geometry, precision, implementation)
    if forward_mode:
        return primitives.deform_conv2d(*operands, **vars(static))
    return _deform_conv2d(static, *operands)


def _sharded_as_outputs(bias: jax.Array | None, weight: jax.Array | None, geometry: Geometry) -> jax.Array | None:
    """The bias sharded as the weight's C_out on a mesh with explicit axes, as the type of its gradient is."""
    if bias is None or weight is None:
        return bias
    sharding = jax.typeof(weight).sharding
    spec = PartitionSpec(sharding.spec[geometry.out_axis])
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(bias).sharding.spec == spec:
        return bias
    return jax.sharding.reshard(bias, NamedSharding(sharding.mesh, spec))


@dataclasses.dataclass(frozen=True)
class _Static:
    """The parameters of the primitives."""

    geometry: Geometry
    precision: Any
    implementation: str


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """Which operands a gradient is asked for, carried from the forward to the backward rule."""

    names: tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _deform_conv2d(static: _Static, x, offset, mask, weight, bias):
    return primitives.deform_conv2d(x, offset, mask, weight, bias, **vars(static))


def _deform_conv2d_forward(static: _Static, x, offset, mask, weight, bias):
    operands = {"x": x, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
    perturbed = tuple(name for name, operand in operands.items() if operand is not None and operand.perturbed)
    x, offset, mask, weight, bias = (operand if operand is None else operand.value for operand in operands.values())
    # The primitive, unlike a custom_vjp function, has a JVP rule: a gradient can be differentiated in either mode.
    y = primitives.deform_conv2d(x, offset, mask, weight, bias, **vars(static))
    return y, (x, offset, mask, weight, _Perturbed(perturbed))


def _deform_conv2d_backward(static: _Static, residuals, grad_y):
    *operands, perturbed = residuals
    gradients = {}
    if perturbed.names and not isinstance(grad_y, SymbolicZero):
        gradients = primitives.deform_conv2d_backward(grad_y, *operands, wanted=perturbed.names, **vars(static))
    return tuple(gradients.get(name) for name in GRADIENTS)


_deform_conv2d.defvjp(_deform_conv2d_forward, _deform_conv2d_backward, symbolic_zeros=True)
