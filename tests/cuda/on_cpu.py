"""Calls of the CUDA kernels on the CPU: see cuda_on_cpu.cc."""

import fcntl
import os
import struct
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from cuda_counts import short_name
from support.cases import OPERANDS
from support.formats import to_nchw, to_nhwc

# dtypes and what float32 products are made in: jax.lax.Precision.HIGHEST for "float32".
MODES = ("float64", "float32", "tf32", "bfloat16", "float16")
MAX_LEVELS = 8
CODES = {name: code for code, name in enumerate(("float32", "float64", "bfloat16", "float16"))}


def dtype_of(mode):
    return jnp.dtype("float32" if mode == "tf32" else mode)


class Failure(Exception):
    """A program of the harness did not end well."""


def build(folder):
    """Builds the programs of CMakeLists.txt in a folder, unless they are there."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of all the processes of pytest-xdist one builds
        for command in (
            ["cmake", "-S", str(Path(__file__).parent), "-B", str(folder)],
            ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


def execute(program, *arguments, data=b"", **environment):
    command, environment = [program, *map(str, arguments)], {**os.environ, **environment}
    done = subprocess.run(command, input=data, env=environment, capture_output=True, timeout=900, check=False)
    if done.returncode != 0:
        raise Failure(f"{program} {arguments}: exit status {done.returncode}\n{done.stderr.decode()}")
    return done.stdout


def run(
    programs,
    case,
    mode,
    operands,
    cotangent=None,
    wanted=OPERANDS,
    deterministic=False,
    x_first=False,
    levels=(),
    seed=0,
    fault=(),
    architecture=900,
    device=0,
    **environment,
):
    """The result, or with a cotangent the wanted gradients by name. All NCHW, as cases.Case makes them.

    Without a weight among the operands `x_first` and `levels` are those of Geometry.
    """
    n, (h, w), (h_out, w_out) = case.batch, case.size, case.output_size
    sizes = (n, h, w, case.c_in, h_out, w_out, case.c_out)
    before = tuple(p for p, _ in case.sides)
    sizes += case.kernel + case.stride + before + case.dilation + (case.groups, case.deform_groups)
    wanted = [name for name in wanted if name in operands]
    code = {name: CODES[operands[name].dtype.name] if name in operands else -1 for name in OPERANDS}
    height, width = ([level[axis] for level in levels] + [0] * (MAX_LEVELS - len(levels)) for axis in (0, 1))
    first = [sum(h * w for h, w in levels[:i]) for i in range(MAX_LEVELS)]
    call = struct.pack(
        f"17q2?xx{1 + 3 * MAX_LEVELS}i12q",
        *sizes,
        *("weight" in operands, x_first, len(levels), *height, *width, *first),
        cotangent is not None,
        *(code["x"], code["offset"], code["mask"], "bias" in operands),
        *(mode == "float32", deterministic),
        *(name in wanted for name in OPERANDS),
    )
    inputs = operands if cotangent is None else {"grad_y": cotangent, **operands}
    if cotangent is not None:
        inputs.pop("bias", None)
    data = call + b"".join(to_nhwc(inputs[name], name).tobytes() for name in ("grad_y", *OPERANDS) if name in inputs)
    output = execute(programs / f"cuda_on_cpu_{architecture}", seed, device, *fault, data=data, **environment)

    def take(name, like, dtype):
        nonlocal output
        size = to_nhwc(np.zeros(like), name).shape
        array = np.frombuffer(output, dtype, count=np.prod(size, dtype=int)).reshape(size)
        output = output[array.nbytes :]
        return to_nchw(array, name)

    if cotangent is None:
        return take("y", (n, case.c_out, h_out, w_out), operands["x"].dtype)
    sums = jnp.promote_types(operands["x"].dtype, jnp.float32)
    return {
        name: take(name, operands[name].shape, operands[name].dtype if name in ("offset", "mask") else sums)
        for name in OPERANDS
        if name in wanted
    }


class SharedAccesses(NamedTuple):
    instructions: int
    wavefronts: int
    least: int  # wavefronts without bank conflicts


class GlobalAccesses(NamedTuple):
    instructions: int
    lines: int
    sectors: int


def counts(function, *arguments, **keywords):
    """What a call of `run` or `execute` accesses, by kernel, memory and kind: the counts of access_counts.h."""
    with tempfile.NamedTemporaryFile("r") as file:
        function(*arguments, **keywords, JAX_DCN_ACCESS_COUNTS=file.name)
        lines = [line.rstrip().split("\t") for line in file]
    kernels = defaultdict(lambda: {"shared": {}, "global": {}})
    for kernel, memory, kind, *numbers in lines:
        accesses = kernels[short_name(kernel)][memory]
        type_ = {"shared": SharedAccesses, "global": GlobalAccesses}[memory]
        before = accesses.get(kind, type_(0, 0, 0))  # of other launches
        accesses[kind] = type_(*(a + int(b) for a, b in zip(before, numbers, strict=True)))
    return dict(kernels)
