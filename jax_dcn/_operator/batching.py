"""`vmap` of a primitive: the mapped axis is merged with another one, so that one call serves all examples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jax_dcn._operator.operands import channel_axis, is_per_image, results


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


def batch(primitive: core.Primitive, operands: Sequence[Any], axes: Sequence[int | None], **params: Any):
    """The batching rule: the results with a mapped axis each, and where these are."""
    geometry, names = params["geometry"], params["names"]
    computed = results(params)
    mapped = [name for name, axis in zip(names, axes, strict=True) if axis is not None]
    size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)

    if size == 0:
        example = [
            jax.ShapeDtypeStruct(_in_front(operand, axis, 0).shape[1:], operand.dtype)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        avals = jax.eval_shape(functools.partial(primitive.bind, **params), *example)
        return [jnp.zeros((0, *aval.shape), aval.dtype) for aval in avals], [0] * len(avals)

    if all(map(is_per_image, (*mapped, *computed))):
        # Nothing sums over the images, so the examples are more images.
        folded = [
            _fold(operand, axis, size, 0) if is_per_image(name) else operand
            for name, operand, axis in zip(names, operands, axes, strict=True)
        ]
        return [_unfold(result, size, 0) for result in primitive.bind(*folded, **params)], [0] * len(computed)

    if not isinstance(size, int):
        # The examples could only be more output channels or groups, whose number a call must know.
        examples = {
            name: jnp.moveaxis(operand, axis, 0)
            for name, operand, axis in zip(names, operands, axes, strict=True)
            if axis is not None
        }
        others = dict(zip(names, operands, strict=True))

        def one(example: dict[str, jax.Array]) -> list[jax.Array]:
            return primitive.bind(*(others | example).values(), **params)

        return lax.map(one, examples), [0] * len(computed)

    if "grad_y" not in names and not any(map(is_per_image, mapped)):
        # Only the weight and the bias differ, so the examples are more output channels, and share the samples.
        folded = [
            operand
            if is_per_image(name)
            else _fold_in_groups(operand, axis, size, channel_axis(geometry, name), geometry.groups)
            for name, operand, axis in zip(names, operands, axes, strict=True)
        ]
        (y,) = primitive.bind(*folded, **params)
        return [_unfold_in_groups(y, size, geometry.channel_axis, geometry.groups)], [0]

    # The examples are more groups.
    folded = [
        _fold(operand, axis, size, channel_axis(geometry, name))
        for name, operand, axis in zip(names, operands, axes, strict=True)
    ]
    unfolded = primitive.bind(*folded, **dict(params, geometry=geometry.repeat_groups(size)))
    into = [channel_axis(geometry, name) for name in computed]
    return [_unfold(result, size, axis) for result, axis in zip(unfolded, into, strict=True)], into
