"""What is measured through JAX, on CPUs and GPUs: the operator, by its kernels and by plain XLA, and convolutions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tasks import Results, Run, Task

import jax_dcn

KERNELS = 'custom_call_target="jax_dcn_'  # how XLA's programs name them
# In float32 whatever the task's dtype.
WIDE = ("offset", "mask", "offset_mask", "sampling_locations", "attention_weights")


def calls_kernels(program: jax.stages.Compiled) -> bool:
    return KERNELS in program.as_text()


def jax_program(
    function: Callable[..., jax.Array],
    task: Task,
    sets: list[Results],
    options: dict[str, Any],
    kernels: bool = False,
) -> jax.stages.Compiled:
    """The results of each set. `kernels`: the program must call those of jax_dcn, else it must not."""

    def one(operands: Results) -> Results:
        operands = dict(operands)
        grad_y = operands.pop("grad_y")
        if not task.backward:
            return {"y": function(**operands)}
        variables = operands if task.only is None else {task.only: operands[task.only]}
        y, vjp = jax.vjp(lambda variables: function(**operands | variables), variables)
        return task.wanted({"y": y, **vjp(grad_y)[0]})

    compiled = jax.jit(lambda sets: [one(operands) for operands in sets]).lower(sets).compile(options)
    if calls_kernels(compiled) != kernels:
        raise RuntimeError(f"the program {'does not call' if kernels else 'calls'} the kernels of jax_dcn")
    return compiled


def jax_run(
    function: Callable[..., jax.Array], task: Task, names: list[str], kernels: bool = False, **options: Any
) -> Run:
    """`function` of the operands with these names, once per set in one compiled program."""
    dtypes = {name: "float32" if name in WIDE else task.dtype for name in (*names, "grad_y")}
    first = {name: jnp.asarray(task.arrays[name], dtype) for name, dtype in dtypes.items()}
    sets = [first] + [jax.tree.map(jnp.copy, first) for _ in range(task.sets - 1)]
    compiled = jax_program(function, task, sets, options, kernels)
    return Run(lambda: compiled(sets), jax.block_until_ready)


def deformable(task: Task) -> Callable[..., jax.Array]:
    def function(**operands: jax.Array) -> jax.Array:
        how = {"data_format": task.data_format, "precision": task.precision}
        return jax_dcn.deform_conv2d(**operands, **task.workload.sizes, **how)

    return function


def jax_dcn_run(task: Task, kernels: bool = True, **options: Any) -> Run:
    names = [name for name in task.arrays if name != "grad_y"]
    return jax_run(deformable(task), task, names, kernels, **options)


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """The environment has it within."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def plain_xla() -> contextlib.AbstractContextManager[None]:
    """The operator, where it is traced within, is one without kernels."""
    return variable("JAX_DCN_IMPLEMENTATION", "xla")


def deterministic() -> contextlib.AbstractContextManager[None]:
    """Of programs lowered within, the kernels are. XLA's own operations are not: it reads its flags once."""
    return variable("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true")


def gather_run(task: Task) -> Run:
    with plain_xla():
        return jax_dcn_run(task, kernels=False)


def conv_run(task: Task) -> Run:
    workload, layout = task.workload, task.data_format

    def function(x: jax.Array, weight: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            weight,
            window_strides=(workload.stride,) * 2,
            padding=((workload.padding,) * 2,) * 2,
            rhs_dilation=(workload.dilation,) * 2,
            dimension_numbers=(layout, "HWIO" if layout == "NHWC" else "OIHW", layout),
            feature_group_count=workload.groups,
            precision=task.precision,
        )

    return jax_run(function, task, ["x", "weight"])
