"""How a primitive runs on the devices of a mesh: each computes its own part, and sums what all contribute to.

Devices share the images, the output channels, or both. With several weight groups they share the units that
`Geometry.units` counts, input channels included. Without a grid they share the outputs of a row too, which are the
queries of an attention. Anything else is replicated: a sample reads the whole image and all its channels of a unit. So
are images, channels, units and queries that do not divide among the devices, as XLA would pad the last shard, and what
it pads with must not enter a sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_dcn._operator import compat
from jax_dcn._operator.geometry import Geometry
from jax_dcn._operator.operands import channel_axis, is_per_image, results, shaped_as


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A primitive and its parameters."""

    primitive: core.Primitive
    names: tuple[str, ...]
    geometry: Geometry
    others: tuple[tuple[str, Any], ...]

    def bind(self, *operands: jax.Array, geometry: Geometry | None = None) -> list[jax.Array]:
        params = dict(self.others, names=self.names, geometry=geometry or self.geometry)
        return self.primitive.bind(*operands, **params)

    @property
    def results(self) -> tuple[str, ...]:
        return results(dict(self.others))


def partitioned(primitive: core.Primitive, rule: Callable[..., Any]) -> Callable[..., Any]:
    """The lowering of the primitive whose part on one device `rule` computes."""
    here = mlir.lower_fun(rule, multiple_results=True)

    def lower(ctx, *operands, names, geometry, **others):
        to_partition = compat.to_partition(ctx)
        if to_partition is None:
            return here(ctx, *operands, names=names, geometry=geometry, **others)
        call = _Bound(primitive, names, geometry, tuple(sorted(others.items())))
        return mlir.lower_fun(functools.partial(_on_all_devices, call), multiple_results=True)(to_partition, *operands)

    return lower


@functools.partial(custom_partitioning, static_argnums=(0,))
def _on_all_devices(call: _Bound, *operands: jax.Array) -> list[jax.Array]:
    return call.bind(*operands)


# --- which axes may be shared ---


def _channels_shared(geometry: Geometry, mesh) -> bool:
    """Whether devices may share the output channels, or with several groups the units."""
    if geometry.groups == 1:
        return True
    # Shardy would divide units among a part of a mesh axis that does not divide them, and JAX fails at that.
    return geometry.units > 1 and not any(geometry.units % n for n in mesh.shape.values())


def _shared_by_channel(geometry: Geometry, name: str) -> bool:
    """Whether devices that share the output channels, or the units, share the array's channels too."""
    if shaped_as(name) in ("y", "weight", "bias"):
        return True
    return geometry.groups > 1 and (shaped_as(name) == "x" or geometry.deform_groups > 1)


def _shared_by_query(geometry: Geometry, name: str) -> bool:
    """Whether devices that share the queries share the array's columns."""
    return not geometry.has_grid and shaped_as(name) in ("y", "offset", "mask")


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _sharding_rule(call: _Bound, mesh, operand_types, result_types) -> tuple[str, dict[str, Any]]:
    """As Shardy writes it: n are the images, q the queries, o the output channels, u the units; no other is shared."""
    geometry = call.geometry
    channels_shared = _channels_shared(geometry, mesh)
    shared = {"n", "q", "u", "o"}
    sizes = {"u": geometry.units} if geometry.groups > 1 and channels_shared else {}

    def factors(i: int, name: str, shape: Sequence[int]) -> str:
        axes = [f"{axis}{i}" for axis in "abcd"[: len(shape)]]
        if is_per_image(name):
            axes[0] = "n"
        if _shared_by_query(geometry, name):
            axes[geometry.column_axis] = "q"
        channel = channel_axis(geometry, name)
        if channels_shared and _shared_by_channel(geometry, name):
            if geometry.groups == 1:
                axes[channel] = "o"
            elif shape[channel] == geometry.units:
                axes[channel] = "u"
                sizes.pop("u", None)  # to be named only where no axis tells it
            else:
                sizes[axes[channel]] = shape[channel] // geometry.units
                axes[channel] = f"(u {axes[channel]})"
        return " ".join(axes)

    names = (*call.names, *call.results)
    shapes = [mlir.ir.RankedTensorType(array).shape for array in (*operand_types, *result_types)]
    arrays = [factors(i, name, shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))]
    rule = f"{', '.join(arrays[: len(call.names)])} -> {', '.join(arrays[len(call.names) :])}"
    # Shardy wants them in the order in which they appear.
    appearing = dict.fromkeys(" ".join(arrays).replace("(", "").replace(")", "").split())
    return rule, {"need_replication_factors": tuple(f for f in appearing if f not in shared), **sizes}


# --- the part of one device ---


def _partition(call: _Bound, mesh, arg_shapes, result_shape):
    geometry = call.geometry
    shapes = {
        shaped_as(name): array.shape
        for name, array in zip((*call.names, *call.results), (*arg_shapes, *result_shape), strict=True)
    }
    # What the partitioner has settled on. The results come first: an operand may still be whole on every device.
    settled = [
        (shaped_as(name), array.sharding.spec)
        for name, array in zip((*call.results, *call.names), (*result_shape, *arg_shapes), strict=True)
    ]

    def axes_along(axis: Callable[[str], int], names: Sequence[str]) -> tuple[str, ...]:
        found = [spec[axis(name)] for name, spec in settled if name in names and len(spec) > axis(name)]
        return mesh_axes(next((entry for entry in found if entry), None))

    def parts(axes: tuple[str, ...]) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    def dividing(size: int, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The first of the mesh axes, as many as divide the size."""
        while size % parts(axes):
            axes = axes[:-1]
        return axes

    images = dividing(shapes["x"][0], axes_along(lambda name: 0, ("y", "x", "offset", "mask")))
    queries: tuple[str, ...] = ()
    if not geometry.has_grid:
        queries = axes_along(lambda name: geometry.column_axis, ("y", "offset", "mask"))
        queries = tuple(axis for axis in queries if axis not in images)
        queries = dividing(shapes["offset"][geometry.column_axis], queries)
    outs: tuple[str, ...] = ()
    if _channels_shared(geometry, mesh):
        outs = axes_along(functools.partial(channel_axis, geometry), ("y", "weight", "bias"))
        outs = tuple(axis for axis in outs if axis not in (*images, *queries))
        outs = dividing(geometry.units if geometry.groups > 1 else shapes["y"][geometry.channel_axis], outs)

    def sharding(name: str) -> NamedSharding:
        spec: list[Any] = [None] * (1 if shaped_as(name) == "bias" else 4)
        if is_per_image(name):
            spec[0] = images or None
        if _shared_by_query(geometry, name):
            spec[geometry.column_axis] = queries or None
        if _shared_by_channel(geometry, name):
            spec[channel_axis(geometry, name)] = outs or None
        return NamedSharding(mesh, PartitionSpec(*spec))

    local = geometry.divide_units(parts(outs)) if geometry.groups > 1 else geometry

    def summed_over(name: str) -> tuple[str, ...]:
        """The mesh axes along which every device has only its part of a sum."""
        if not is_per_image(name):
            return images
        by_channel = () if _shared_by_channel(geometry, name) else outs
        return by_channel if _shared_by_query(geometry, name) else (*queries, *by_channel)

    def compute(*operands: jax.Array) -> list[jax.Array]:
        with compat.no_mesh():
            results = call.bind(*operands, geometry=local)
            return _sum_over(results, [summed_over(name) for name in call.results])

    return mesh, compute, [sharding(name) for name in call.results], tuple(sharding(name) for name in call.names)


def _sum_over(arrays: Sequence[jax.Array], axes: Sequence[tuple[str, ...]]) -> list[jax.Array]:
    """Each array summed over its mesh axes, those with the same axes and dtype in one go."""
    summed = list(arrays)
    for over, dtype in dict.fromkeys((a, array.dtype) for a, array in zip(axes, arrays, strict=True) if a):
        at = [i for i, array in enumerate(arrays) if (axes[i], array.dtype) == (over, dtype)]
        flat = lax.psum(jnp.concatenate([arrays[i].ravel() for i in at]), over)
        start = 0
        for i in at:
            summed[i] = flat[start : start + arrays[i].size].reshape(arrays[i].shape)
            start += arrays[i].size
    return summed


_on_all_devices.def_partition(_partition, sharding_rule=_sharding_rule)
