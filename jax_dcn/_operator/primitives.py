"""The primitives and their rules.

`deform_conv2d_p` computes y, `deform_conv2d_tangent_p` how y moves with its operands, and `deform_conv2d_backward_p`
the gradients that its parameter `wanted` names. The last two are linear, in the tangents and in grad_y, and each
other's transpose; the first is linear in x, or in the weight. Some operands are optional, so the parameter `names`
says which operand is which. Without a weight, every channel is the sum of its own samples over the taps. The other
parameters are `geometry`, `precision` and `implementation`, "native" or "xla".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, mlir
from jax.interpreters import batching as jax_batching
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_dcn._operator import batching, compat, lowering, partitioning
from jax_dcn._operator.operands import DOT, GRADIENTS, present

# --- deform_conv2d ---


def deform_conv2d(
    x: jax.Array,  # NHWC: (N, H, W, C_in)
    offset: jax.Array,  # (N, H_out, W_out, deform_groups*kh*kw*2)
    mask: jax.Array | None,  # (N, H_out, W_out, deform_groups*kh*kw)
    weight: jax.Array | None,  # (kh, kw, C_in/groups, C_out)
    bias: jax.Array | None,  # (C_out,)
    **params: Any,
) -> jax.Array:  # (N, H_out, W_out, C_out)
    (y,) = _bind(deform_conv2d_p, present(x=x, offset=offset, weight=weight, mask=mask, bias=bias), **params)
    return y


def _deform_conv2d_abstract(*operands, names, geometry, **params):
    aval = dict(zip(names, operands, strict=True))
    images = partitioning.mesh_axes(aval["x"].sharding.spec[0])
    source, axis = ("weight", geometry.out_axis) if "weight" in aval else ("x", geometry.channel_axis)
    shape = geometry.y_shape(aval["offset"].shape, aval[source].shape[axis])
    outs = partitioning.mesh_axes(aval[source].sharding.spec[axis])
    spec: list[Any] = [None] * 4
    spec[0] = images or None
    taken = images
    if not geometry.has_grid:
        queries = partitioning.mesh_axes(aval["offset"].sharding.spec[geometry.column_axis])
        queries = tuple(axis for axis in queries if axis not in taken)
        spec[geometry.column_axis] = queries or None
        taken = (*taken, *queries)
    # An axis shards the images or the channels: where it is both operands', the weight is gathered.
    spec[geometry.channel_axis] = tuple(axis for axis in outs if axis not in taken) or None
    return [_reshaped(aval["x"], shape, spec)]


def _deform_conv2d_jvp(primals, tangents, *, names, **params):
    (y,) = deform_conv2d_p.bind(*primals, names=names, **params)
    operands = {name: primal for name, primal in zip(names, primals, strict=True) if name != "bias"}
    (y_dot,) = _bind(deform_conv2d_tangent_p, operands, _dots(names, tangents), **params)
    return [y], [y_dot]


def _deform_conv2d_transpose(cotangents, *operands, names, **params):
    """Along x or the weight, with the bias if there is one: beside a constant bias the result is only affine."""
    given = dict(zip(names, operands, strict=True))
    linear = {name: operand for name, operand in given.items() if ad.is_undefined_primal(operand)}
    if linear.keys() - {"bias"} not in ({"x"}, {"weight"}) or "bias" in given.keys() - linear.keys():
        raise NotImplementedError(f"deform_conv2d of {', '.join(given)} is not linear in {', '.join(linear)}")
    (grad_y,) = cotangents
    if type(grad_y) is ad.Zero:
        return [ad.Zero(operand.aval) if name in linear else None for name, operand in given.items()]
    # The gradient of what is linear does not read its value.
    primals = given | {name: ad.zeros_like_aval(operand.aval) for name, operand in linear.items()}
    primals.pop("bias", None)
    wanted = tuple(name for name in GRADIENTS if name in linear)
    gradients = deform_conv2d_backward(grad_y, **{"mask": None, "weight": None, **primals}, wanted=wanted, **params)
    return [gradients.get(name) for name in names]


# --- deform_conv2d_tangent ---


def _deform_conv2d_tangent_transpose(cotangents, *operands, names, **params):
    given = dict(zip(names, operands, strict=True))
    linear = {name: operand for name, operand in given.items() if ad.is_undefined_primal(operand)}
    (grad_y,) = cotangents
    if type(grad_y) is ad.Zero:
        return [ad.Zero(operand.aval) if name in linear else None for name, operand in given.items()]
    primals = {name: operand for name, operand in given.items() if not name.endswith(DOT)}
    wanted = tuple(name for name in GRADIENTS if name + DOT in linear)
    gradients = deform_conv2d_backward(grad_y, **{"mask": None, "weight": None, **primals}, wanted=wanted, **params)
    return [gradients.get(name.removesuffix(DOT)) if name in linear else None for name in names]


# --- deform_conv2d_backward ---


def deform_conv2d_backward(
    grad_y: jax.Array,  # NHWC: (N, H_out, W_out, C_out)
    x: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None,
    weight: jax.Array | None,
    *,
    wanted: tuple[str, ...],  # of operands.GRADIENTS, in that order
    **params: Any,
) -> dict[str, jax.Array]:  # the gradients by the names in `wanted`, each of its operand's shape and dtype
    operands = present(grad_y=grad_y, x=x, offset=offset, weight=weight, mask=mask)
    gradients = _bind(deform_conv2d_backward_p, operands, wanted=wanted, **params)
    return dict(zip(wanted, gradients, strict=True))


def _deform_conv2d_backward_abstract(*operands, names, wanted, geometry, **params):
    aval = dict(zip(names, operands, strict=True))
    if "bias" in wanted:
        weight, out = aval["weight"], geometry.out_axis
        aval["bias"] = _reshaped(weight, (weight.shape[out],), (weight.sharding.spec[out],))
    return [aval[name].update(weak_type=False) for name in wanted]


def _deform_conv2d_backward_dce(used: list[bool], equation):
    """Drops the gradients that nobody uses, and with the last one the whole call."""
    if not any(used):
        return [False] * len(equation.invars), None
    wanted = equation.params["wanted"]
    equation = equation.replace(
        outvars=[var for var, keep in zip(equation.outvars, used, strict=True) if keep],
        params=dict(equation.params, wanted=tuple(name for name, keep in zip(wanted, used, strict=True) if keep)),
    )
    return [True] * len(equation.invars), equation


def _deform_conv2d_backward_transpose(cotangents, *operands, names, wanted, **params):
    given = dict(zip(names, operands, strict=True))
    grad_y = given.pop("grad_y")
    dots = _dots(wanted, cotangents)
    if not dots:
        return [ad.Zero(grad_y.aval), *[None] * len(given)]
    (result,) = _bind(deform_conv2d_tangent_p, given, dots, **params)
    return [result, *[None] * len(given)]


# --- second derivatives ---


def _second_jvp(primitive, linear_in, xla, primals, tangents, *, names, implementation, **params):
    """The JVP rule of a primitive that is linear in some operands: by itself along these, by plain XLA along others."""
    results = primitive.bind(*primals, names=names, implementation=implementation, **params)
    operands = dict(zip(names, primals, strict=True))
    moving = {name: t for name, t in zip(names, tangents, strict=True) if type(t) is not ad.Zero}
    terms = []
    linear = {name: tangent for name, tangent in moving.items() if linear_in(name)}
    if linear:
        fixed = {name: operand for name, operand in operands.items() if not linear_in(name)}
        terms.append(_bind(primitive, linear, fixed, implementation=implementation, **params))
    others = {name: tangent for name, tangent in moving.items() if not linear_in(name)}
    if others:
        # These are plain operations, whose types need not say how what they compute is sharded.
        function = _automatically_sharded(lambda operands: xla(operands, **params), results)
        at = {name: operands[name] for name in others}
        terms.append(jax.jvp(lambda moved: function(operands | moved), (at,), (others,))[1])
    return results, [sum(term[1:], term[0]) for term in zip(*terms, strict=True)]


def _automatically_sharded(function: Callable[..., Any], results: Sequence[jax.Array]) -> Callable[..., Any]:
    """Has XLA choose the shardings inside of the function where the caller's mesh has explicit axes.

    Its results are sharded as these.
    """
    shardings = [jax.typeof(result).sharding for result in results]
    if any(AxisType.Explicit in sharding.mesh.axis_types for sharding in shardings):
        return jax.sharding.auto_axes(function, out_sharding=[sharding.spec for sharding in shardings])
    return function


# --- registration ---


def _bind(primitive: core.Primitive, *operands: dict[str, jax.Array], **params: Any) -> list[jax.Array]:
    named = functools.reduce(dict.__or__, operands)
    return primitive.bind(*named.values(), names=tuple(named), **params)


def _dots(names: Sequence[str], tangents: Sequence[Any]) -> dict[str, jax.Array]:
    """The tangents that are not zero, by their names."""
    return {name + DOT: t for name, t in zip(names, tangents, strict=True) if type(t) is not ad.Zero}


def _reshaped(aval, shape: tuple[int, ...], spec: Sequence[Any]):
    """An abstract value like `aval` of another shape, sharded along its first axes as `spec` says."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*spec, *[None] * (len(shape) - len(spec))))
    return aval.update(shape=shape, sharding=sharding, weak_type=False)


def _primitive(name: str, abstract: Callable[..., Any], lowerings: Mapping[str | None, Callable[..., Any]]):
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(compat.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    jax_batching.primitive_batchers[primitive] = functools.partial(batching.batch, primitive)
    for platform, rule in lowerings.items():
        mlir.register_lowering(primitive, partitioning.partitioned(primitive, rule), platform=platform)
    compat.requires_devices_during_lowering(primitive)
    return primitive


deform_conv2d_p = _primitive("deform_conv2d", _deform_conv2d_abstract, lowering.DEFORM_CONV2D)

ad.primitive_jvps[deform_conv2d_p] = _deform_conv2d_jvp
ad.primitive_transposes[deform_conv2d_p] = _deform_conv2d_transpose

deform_conv2d_tangent_p = _primitive("deform_conv2d_tangent", _deform_conv2d_abstract, lowering.DEFORM_CONV2D_TANGENT)
ad.primitive_transposes[deform_conv2d_tangent_p] = _deform_conv2d_tangent_transpose
ad.primitive_jvps[deform_conv2d_tangent_p] = functools.partial(
    _second_jvp, deform_conv2d_tangent_p, lambda name: name.endswith(DOT), lowering.deform_conv2d_tangent_xla
)

deform_conv2d_backward_p = _primitive(
    "deform_conv2d_backward", _deform_conv2d_backward_abstract, lowering.DEFORM_CONV2D_BACKWARD
)
compat.def_dce_rule(deform_conv2d_backward_p, _deform_conv2d_backward_dce)
ad.primitive_transposes[deform_conv2d_backward_p] = _deform_conv2d_backward_transpose
ad.primitive_jvps[deform_conv2d_backward_p] = functools.partial(
    _second_jvp, deform_conv2d_backward_p, lambda name: name == "grad_y", lowering.deform_conv2d_backward_xla
)
