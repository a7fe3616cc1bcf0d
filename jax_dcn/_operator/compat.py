"""What differs between jax 0.10 and 0.12, and every import from JAX's private modules."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax._src import dispatch, mesh, sharding_impls
from jax._src.dispatch import apply_primitive as apply_primitive
from jax.extend import core
from jax.interpreters import mlir
from jax.interpreters import partial_eval as pe


def def_dce_rule(primitive: core.Primitive, rule: Callable[[list[bool], Any], tuple[list[bool], Any]]) -> None:
    """Registers `rule(used_outputs, equation) -> (used_inputs, equation or None)`.

    jax 0.12 passes the live inputs between the two arguments.
    """
    pe.dce_rules[primitive] = lambda used, *rest: rule(used, rest[-1])


def requires_devices_during_lowering(primitive: core.Primitive) -> None:
    """Has the devices at hand when the primitive is lowered, as custom_partitioning wants."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def equally_varying(*operands: jax.Array | None) -> list[jax.Array | None]:
    """Brings the operands to one set of varying mesh axes, as shard_map's check of these wants of a custom_vjp.

    The transpose of what is inserted here is the sum over the axes along which an operand was replicated.
    """
    varying = [set() if a is None else set(jax.typeof(a).manual_axis_type.varying) for a in operands]
    union = set().union(*varying)
    missing = [tuple(sorted(union - axes)) for axes in varying]
    return [
        lax.pcast(a, axes, to="varying") if a is not None and axes else a
        for a, axes in zip(operands, missing, strict=True)
    ]


def to_partition(ctx: mlir.LoweringRuleContext) -> mlir.LoweringRuleContext | None:
    """The context for a custom partitioning, in a program for several devices of which this is not yet one's part.

    None where there is nothing to partition, or no mesh for it, so that all devices compute the same. Nor is it for
    export: JAX cannot export how a custom partitioning works.
    """
    context = ctx.module_context.axis_context
    if not isinstance(context, sharding_impls.ShardingContext) or context.num_devices == 1:
        return None
    if ctx.module_context.lowering_parameters.for_export:
        return None
    if context.abstract_mesh is not None or not mesh.thread_resources.env.physical_mesh.empty:
        return ctx
    # Where no argument or result is sharded, JAX has not looked for the mesh of `jax.set_mesh`.
    current = jax.sharding.get_abstract_mesh()
    if current.size != context.num_devices:
        return None
    context = dataclasses.replace(context, abstract_mesh=current)
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=context))


def no_mesh() -> contextlib.AbstractContextManager[Any]:
    """Keeps an explicit mesh of the caller out of what is traced for one device, where jax 0.12 refuses a psum."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
