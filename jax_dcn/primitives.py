"""The primitives and their rules, on operands that `geometry.check_operands` passed.

`deform_conv2d_p` computes y, `deform_conv2d_tangent_p` how y moves with its operands, and `deform_conv2d_backward_p`
the gradients that its parameter `wanted` names. The last two are linear, in the tangents and in grad_y, and each
other's transpose; the first is linear in x, or in the weight. Some operands are optional, so the parameter `names`
says which operand is which. The other parameters are `geometry`, `precision` and `implementation`, "native" or "xla".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_dcn import _compat, lowering, partitioning
from jax_dcn.lowering import DOT

# --- batching: the mapped axis is merged with another one, so that one call serves all examples ---

# Operands and gradients that have one entry per image.
_PER_IMAGE = {"grad_y", "x", "offset", "mask", "x_dot", "offset_dot", "mask_dot"}


def _in_front(operand: jax.Array, axis: int | None, size: int) -> jax.Array:
    if axis is None:
        return jnp.broadcast_to(operand, (size, *operand.shape))
    return jnp.moveaxis(operand, axis, 0)


def _fold(operand: jax.Array, axis: int | None, size: int, into: int) -> jax.Array:
    """Merges the mapped axis into axis `into` of the unmapped operand, as the slower index."""
    operand = _in_front(operand, axis, size)
    shape = list(operand.shape[1:])
    shape[into] *= size
    return jnp.moveaxis(operand, 0, into).reshape(shape)


def _unfold(result: jax.Array, size: int, axis: int) -> jax.Array:
    """Undoes `_fold`: the mapped axis stands at `axis` afterwards."""
    shape = result.shape
    return result.reshape(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :])


def _fold_in_groups(operand: jax.Array, axis: int | None, size: int, into: int, groups: int) -> jax.Array:
    """Merges the mapped axis of weight or bias into C_out, which is axis `into`, within each group."""
    operand = _in_front(operand, axis, size)
    shape = operand.shape[1:]
    operand = operand.reshape(size, *shape[:into], groups, shape[into] // groups, *shape[into + 1 :])
    return jnp.moveaxis(operand, 0, into + 1).reshape(*shape[:into], size * shape[into], *shape[into + 1 :])


def _unfold_in_groups(y: jax.Array, size: int, axis: int, groups: int) -> jax.Array:
    """Undoes `_fold_in_groups`: the mapped axis stands at 0 afterwards."""
    shape = y.shape
    y = y.reshape(*shape[:axis], groups, size, shape[axis] // (groups * size), *shape[axis + 1 :])
    return jnp.moveaxis(y, axis + 1, 0).reshape(size, *shape[:axis], shape[axis] // size, *shape[axis + 1 :])


def _batcher(primitive: core.Primitive, operands: Sequence[Any], axes: Sequence[int | None], **params: Any):
    geometry, names = params["geometry"], params["names"]
    mapped = {name: axis for name, axis in zip(names, axes, strict=True) if axis is not None}
    size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
    # Output channels for weight and bias, else the array's own channels.
    channel_axis = {name: geometry.channel_axis for name in (*_PER_IMAGE, "y")}
    channel_axis |= {"weight": geometry.out_axis, "weight_dot": geometry.out_axis, "bias": 0, "bias_dot": 0}

    if size == 0:
        example = [
            jax.ShapeDtypeStruct(_in_front(operand, axis, 0).shape[1:], operand.dtype)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        results = jax.eval_shape(functools.partial(primitive.bind, **params), *example)
        return [jnp.zeros((0, *result.shape), result.dtype) for result in results], [0] * len(results)

    if mapped.keys() <= _PER_IMAGE >= set(params.get("wanted", ())):
        # Nothing sums over the images, so the examples are more images.
        folded = [
            _fold(operand, axis, size, 0) if name in _PER_IMAGE else operand
            for name, operand, axis in zip(names, operands, axes, strict=True)
        ]
        results = primitive.bind(*folded, **params)
        return [_unfold(result, size, 0) for result in results], [0] * len(results)

    if "grad_y" not in names and mapped.keys().isdisjoint(_PER_IMAGE):
        # Only the weight and the bias differ, so the examples are more output channels, and share the samples.
        folded = [
            operand if name in _PER_IMAGE else _fold_in_groups(operand, axis, size, channel_axis[name], geometry.groups)
            for name, operand, axis in zip(names, operands, axes, strict=True)
        ]
        (y,) = primitive.bind(*folded, **params)
        return [_unfold_in_groups(y, size, geometry.channel_axis, geometry.groups)], [0]

    # The examples are more groups.
    folded = [
        _fold(operand, axis, size, channel_axis[name])
        for name, operand, axis in zip(names, operands, axes, strict=True)
    ]
    results = primitive.bind(*folded, **dict(params, geometry=geometry.repeat_groups(size)))
    into = [channel_axis[name] for name in params.get("wanted", ("y",))]
    return [_unfold(result, size, axis) for result, axis in zip(results, into, strict=True)], into


# --- deform_conv2d ---


def deform_conv2d(
    x: jax.Array,  # NHWC: (N, H, W, C_in)
    offset: jax.Array,  # (N, H_out, W_out, deform_groups*kh*kw*2)
    mask: jax.Array | None,  # (N, H_out, W_out, deform_groups*kh*kw)
    weight: jax.Array,  # (kh, kw, C_in/groups, C_out)
    bias: jax.Array | None,  # (C_out,)
    **params: Any,
) -> jax.Array:  # (N, H_out, W_out, C_out)
    names, operands = _present(x=x, offset=offset, weight=weight, mask=mask, bias=bias)
    (y,) = deform_conv2d_p.bind(*operands, names=names, **params)
    return y


def _deform_conv2d_abstract(*operands, names, geometry, **params):
    aval = dict(zip(names, operands, strict=True))
    shape = geometry.y_shape(aval["offset"].shape, aval["weight"].shape)
    images = partitioning.mesh_axes(aval["x"].sharding.spec[0])
    outs = partitioning.mesh_axes(aval["weight"].sharding.spec[geometry.out_axis])
    spec: list[Any] = [None] * 4
    spec[0] = images or None
    # An axis shards the images or the channels: where it is both operands', the weight is gathered.
    spec[geometry.channel_axis] = tuple(axis for axis in outs if axis not in images) or None
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
    wanted = tuple(name for name in lowering.GRADIENTS if name in linear)
    gradients = _bind(deform_conv2d_backward_p, {"grad_y": grad_y, **primals}, wanted=wanted, **params)
    gradients = dict(zip(wanted, gradients, strict=True))
    return [gradients.get(name) for name in names]


# --- deform_conv2d_tangent ---


def _deform_conv2d_tangent_transpose(cotangents, *operands, names, **params):
    given = dict(zip(names, operands, strict=True))
    linear = {name: operand for name, operand in given.items() if ad.is_undefined_primal(operand)}
    (grad_y,) = cotangents
    if type(grad_y) is ad.Zero:
        return [ad.Zero(operand.aval) if name in linear else None for name, operand in given.items()]
    primals = {name: operand for name, operand in given.items() if not name.endswith(DOT)}
    wanted = tuple(name for name in lowering.GRADIENTS if name + DOT in linear)
    gradients = _bind(deform_conv2d_backward_p, {"grad_y": grad_y, **primals}, wanted=wanted, **params)
    gradients = dict(zip(wanted, gradients, strict=True))
    return [gradients.get(name.removesuffix(DOT)) if name in linear else None for name in names]


# --- deform_conv2d_backward ---


def deform_conv2d_backward(
    grad_y: jax.Array,  # NHWC: (N, H_out, W_out, C_out)
    x: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None,
    weight: jax.Array,
    *,
    wanted: tuple[str, ...],  # of lowering.GRADIENTS, in that order
    **params: Any,
) -> dict[str, jax.Array]:  # the gradients by the names in `wanted`, each of its operand's shape and dtype
    names, operands = _present(grad_y=grad_y, x=x, offset=offset, weight=weight, mask=mask)
    gradients = deform_conv2d_backward_p.bind(*operands, names=names, wanted=wanted, **params)
    return dict(zip(wanted, gradients, strict=True))


def _deform_conv2d_backward_abstract(*operands, names, wanted, geometry, **params):
    aval = dict(zip(names, operands, strict=True))
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
        function = _automatically_sharded(
            lambda operands: xla(*(operands[name] for name in names), names=names, **params), results
        )
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


def _present(**operands: jax.Array | None) -> tuple[tuple[str, ...], list[jax.Array]]:
    present = {name: operand for name, operand in operands.items() if operand is not None}
    return tuple(present), list(present.values())


def _reshaped(aval, shape: tuple[int, ...], spec: tuple[Any, ...]):
    """An abstract value like `aval` of another shape, sharded along its first axes as `spec` says."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*spec, *[None] * (len(shape) - len(spec))))
    return aval.update(shape=shape, sharding=sharding, weak_type=False)


def _primitive(name: str, abstract: Callable[..., Any], lowerings: dict[str | None, Callable[..., Any]]):
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(_compat.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = functools.partial(_batcher, primitive)
    for platform, rule in lowerings.items():
        mlir.register_lowering(primitive, partitioning.partitioned(primitive, rule), platform=platform)
    _compat.requires_devices_during_lowering(primitive)
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
_compat.def_dce_rule(deform_conv2d_backward_p, _deform_conv2d_backward_dce)
ad.primitive_transposes[deform_conv2d_backward_p] = _deform_conv2d_backward_transpose
ad.primitive_jvps[deform_conv2d_backward_p] = functools.partial(
    _second_jvp, deform_conv2d_backward_p, lambda name: name == "grad_y", lowering.deform_conv2d_backward_xla
)
