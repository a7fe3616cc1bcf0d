"""How a primitive runs on the devices of a mesh: each computes its own part, and sums what all contribute to.

Devices share the images, the output channels, or both. With several weight groups they share the groups, input
channels included, if every deform group lies within one of them or there is only one deform group. Anything else is
replicated: a sample reads the whole image and all its channels of a group. So are images, channels and groups that do
not divide among the devices, as XLA would pad the last shard, and what it pads with must not enter a sum.
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

from jax_dcn import _compat
from jax_dcn.geometry import Geometry
from jax_dcn.lowering import DOT


@dataclasses.dataclass(frozen=True)
class _Call:
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
        return dict(self.others).get("wanted", ("y",))


def partitioned(primitive: core.Primitive, rule: Callable[..., Any]) -> Callable[..., Any]:
    """The lowering of the primitive whose part on one device `rule` computes."""
    here = mlir.lower_fun(rule, multiple_results=True)

    def lower(ctx, *operands, names, geometry, **others):
        if not _compat.partitions(ctx):
            return here(ctx, *operands, names=names, geometry=geometry, **others)
        call = _Call(primitive, names, geometry, tuple(sorted(others.items())))
        return mlir.lower_fun(functools.partial(_on_all_devices, call), multiple_results=True)(ctx, *operands)

    return lower


@functools.partial(custom_partitioning, static_argnums=(0,))
def _on_all_devices(call: _Call, *operands: jax.Array) -> list[jax.Array]:
    return call.bind(*operands)


# --- which axes may be shared ---


def _channels_shared(geometry: Geometry, mesh) -> bool:
    """Whether devices may share the output channels, or with several groups the groups."""
    groups, deform_groups = geometry.groups, geometry.deform_groups
    if groups == 1:
        return True
    # Shardy would divide groups among a part of a mesh axis that does not divide them, and JAX fails at that.
    return (deform_groups == 1 or deform_groups % groups == 0) and not any(groups % n for n in mesh.shape.values())


def _shared_by_channel(call: _Call, name: str) -> bool:
    """Whether devices that share the output channels, or the groups, share the array's channels too."""
    if name in ("y", "weight", "bias"):
        return True
    return call.geometry.groups > 1 and (name == "x" or call.geometry.deform_groups > 1)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _operand(name: str) -> str:
    """The operand, or y, that a tangent or a gradient is shaped as."""
    return name.removesuffix(DOT).removeprefix("grad_")


def _channel_axis(geometry: Geometry, name: str) -> int:
    return {"weight": geometry.out_axis, "bias": 0}.get(name, geometry.channel_axis)


def _sharding_rule(call: _Call, mesh, operand_types, result_types) -> tuple[str, dict[str, Any]]:
    """As Shardy writes it: n are the images, o the output channels, g the groups; no other axis is shared."""
    groups = call.geometry.groups
    channels_shared = _channels_shared(call.geometry, mesh)
    shared = {"n", "g", "o"}
    sizes = {"g": groups} if groups > 1 and channels_shared else {}

    def factors(i: int, name: str, shape: Sequence[int]) -> str:
        name = _operand(name)
        axes = [f"{axis}{i}" for axis in "abcd"[: len(shape)]]
        if name not in ("weight", "bias"):
            axes[0] = "n"
        channel = _channel_axis(call.geometry, name)
        if channels_shared and _shared_by_channel(call, name):
            if groups == 1:
                axes[channel] = "o"
            elif shape[channel] == groups:
                axes[channel] = "g"
                sizes.pop("g", None)  # to be named only where no axis tells it
            else:
                sizes[axes[channel]] = shape[channel] // groups
                axes[channel] = f"(g {axes[channel]})"
        return " ".join(axes)

    names = (*call.names, *call.results)
    shapes = [mlir.ir.RankedTensorType(array).shape for array in (*operand_types, *result_types)]
    arrays = [factors(i, name, shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))]
    rule = f"{', '.join(arrays[: len(call.names)])} -> {', '.join(arrays[len(call.names) :])}"
    # Shardy wants them in the order in which they appear.
    appearing = dict.fromkeys(" ".join(arrays).replace("(", "").replace(")", "").split())
    return rule, {"need_replication_factors": tuple(f for f in appearing if f not in shared), **sizes}


# --- the part of one device ---


def _partition(call: _Call, mesh, arg_shapes, result_shape):
    geometry = call.geometry
    shapes = {_operand(name): array.shape for name, array in zip(call.names, arg_shapes, strict=True)}
    # What the partitioner has settled on. The results come first: an operand may still be whole on every device.
    settled = [
        (_operand(name), array.sharding.spec)
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
    outs = ()
    if _channels_shared(geometry, mesh):
        outs = axes_along(functools.partial(_channel_axis, geometry), ("y", "weight", "bias"))
        outs = tuple(axis for axis in outs if axis not in images)
        outs = dividing(geometry.groups if geometry.groups > 1 else shapes["weight"][geometry.out_axis], outs)

    def sharding(name: str) -> NamedSharding:
        name = _operand(name)
        spec: list[Any] = [None] * (1 if name == "bias" else 4)
        if name not in ("weight", "bias"):
            spec[0] = images or None
        if _shared_by_channel(call, name):
            spec[_channel_axis(geometry, name)] = outs or None
        return NamedSharding(mesh, PartitionSpec(*spec))

    local = geometry
    if geometry.groups > 1:
        deform_groups = max(1, geometry.deform_groups // parts(outs))
        local = dataclasses.replace(geometry, groups=geometry.groups // parts(outs), deform_groups=deform_groups)

    def summed_over(name: str) -> tuple[str, ...]:
        """The mesh axes along which every device has only its part of a sum."""
        if name in ("weight", "bias"):
            return images
        return () if _shared_by_channel(call, name) else outs

    def compute(*operands: jax.Array) -> list[jax.Array]:
        with _compat.no_mesh():
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
