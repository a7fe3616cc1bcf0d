"""What benchmarks/gpu.py measures, and how: in a process that has one build of jax_dcn and the GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# torch works on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from report import environment
from workloads import CASES, Arrays, Case, to_nchw

import jax_dcn
from jax_dcn._operator import native

# The dtype of x, weight and y, and what float32 products are made in. Offset and mask are float32, but torchvision's.
MODES = {"tf32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
WIDE = ("offset", "mask")

# Largest error, relative to the largest value. 16 bits: the rounding of the result, of which a sum of roundings in the
# gradients is no more. TF32: operands with 11 bits. float32: a few hundred roundings.
TOLERANCE = {"tf32": 2e-3, "bfloat16": 2.0**-7, "float16": 2.0**-9, "float32": 2e-5}

# Others' 16 bits are wrong by more than this, in the norm: what is computed of other arrays, or not at all, is off by 1
# and more. An emulation of torchvision's kernels in float16 is off by 0.003 at most, its atomic sums of 16 bits apart.
LOOSE = 5e-2

# A timed call repeats as often as fills MEASURE seconds, with as many sets of arrays as fill CACHES times the L2 cache
# of the largest GPUs, but at least MIN_SETS.
MEASURE, L2_BYTES, CACHES, MIN_SETS, MAX_SETS = 0.02, 64 * 2**20, 3, 2, 24

DeviceArrays = dict[str, jax.Array]


class Operands:
    """With grad_y, in both formats."""

    def __init__(self, nhwc: Arrays):
        self.nhwc = nhwc

    @functools.cached_property
    def nchw(self) -> Arrays:
        return to_nchw(self.nhwc)


class Problem(NamedTuple):
    case: Case
    backward: bool  # y and the gradients of all operands, else y alone
    mode: str
    operands: Operands
    sets: int
    few_tiles: bool = False  # deformops tries some of its tiles only


class Run(NamedTuple):
    results: list[DeviceArrays]  # NHWC, of some sets, which are all alike; none of what is not deformable
    enqueue: Callable[[], Any]  # starts one computation per set
    wait: Callable[[Any], Any]  # until what enqueue returned last is there


# --- JAX ---


def jax_program(
    function: Callable[..., jax.Array],
    problem: Problem,
    sets: list[DeviceArrays],
    options: dict[str, Any],
    kernels: bool = False,
) -> jax.stages.Compiled:
    """The results of each set. `kernels`: the program must call those of jax_dcn, else it must not."""

    def one(operands: DeviceArrays) -> DeviceArrays:
        operands = dict(operands)
        grad_y = operands.pop("grad_y")
        if not problem.backward:
            return {"y": function(**operands)}
        y, vjp = jax.vjp(lambda operands: function(**operands), operands)
        return {"y": y, **vjp(grad_y)[0]}

    compiled = jax.jit(lambda sets: [one(operands) for operands in sets]).lower(sets).compile(options)
    if (native.DEFORM_CONV2D in compiled.as_text()) != kernels:
        raise RuntimeError(f"the program {'does not call' if kernels else 'calls'} the kernels of jax_dcn")
    return compiled


def jax_run(
    function: Callable[..., jax.Array],
    problem: Problem,
    names: list[str],
    nchw: bool = False,
    kernels: bool = False,
    **options: Any,
) -> Run:
    """`function` of the operands with these names, once per set in one compiled program."""
    dtype = MODES[problem.mode]
    arrays = problem.operands.nchw if nchw else problem.operands.nhwc
    first = {name: jnp.asarray(arrays[name], "float32" if name in WIDE else dtype) for name in (*names, "grad_y")}
    sets = [first] + [jax.tree.map(jnp.copy, first) for _ in range(problem.sets - 1)]
    compiled = jax_program(function, problem, sets, options, kernels)
    # Of two calls, the second of which finds its work space used.
    results = [compiled(sets)[0], compiled(sets)[-1]]
    return Run([to_nhwc(r) for r in results] if nchw else results, lambda: compiled(sets), jax.block_until_ready)


def to_nhwc(arrays: DeviceArrays) -> DeviceArrays:
    axes = {name: (2, 3, 1, 0) if name == "weight" else (0, 2, 3, 1) for name in arrays}
    return {name: jnp.transpose(array, axes[name]) for name, array in arrays.items()}


def precision(problem: Problem) -> str | None:
    return "highest" if problem.mode == "float32" else None


def deformable(problem: Problem, data_format: str) -> Callable[..., jax.Array]:
    def function(**operands: jax.Array) -> jax.Array:
        sizes = problem.case.sizes
        return jax_dcn.deform_conv2d(**operands, **sizes, data_format=data_format, precision=precision(problem))

    return function


def jax_dcn_run(problem: Problem, data_format: str = "NHWC", **options: Any) -> Run:
    names = [name for name in problem.operands.nhwc if name != "grad_y"]
    nchw = data_format == "NCHW"
    return jax_run(deformable(problem, data_format), problem, names, nchw, kernels=True, **options)


def without_command_buffers_run(problem: Problem) -> Run:
    """XLA launches each kernel itself, and records no CUDA graph again where arrays have moved."""
    return jax_dcn_run(problem, xla_gpu_enable_command_buffer="")


def conv_run(problem: Problem) -> Run:
    case = problem.case

    def function(x: jax.Array, weight: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            weight,
            window_strides=(case.stride,) * 2,
            padding=((case.padding,) * 2,) * 2,
            rhs_dilation=(case.dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=case.groups,
            precision=precision(problem),
        )

    return jax_run(function, problem, ["x", "weight"])._replace(results=[])


# --- torch ---


def torch_run(
    function: Callable[..., Any], problem: Problem, arrays: Arrays, dtypes: Callable[[str], str], nchw: bool
) -> Run:
    """`function` of a dict of operands once per set, on the default stream.

    No CUDA graph: one that is captured on another stream lacks the kernels of torchvision, which launches them on the
    default one whatever the current stream is.
    """
    import torch

    on_gpu = {name: torch.from_numpy(array).to("cuda", getattr(torch, dtypes(name))) for name, array in arrays.items()}
    grad_y = on_gpu.pop("grad_y")
    sets = [
        {name: array.clone().requires_grad_(problem.backward) for name, array in on_gpu.items()}
        for _ in range(problem.sets)
    ]

    def one(operands: dict[str, Any]) -> dict[str, Any]:
        y = function(operands)
        gradients = torch.autograd.grad(y, list(operands.values()), grad_y) if problem.backward else ()
        return {"y": y.detach(), **dict(zip(operands, gradients, strict=problem.backward))}

    def to_jax(name: str, array: Any) -> jax.Array:
        if name == "weight":
            array = array.permute(2, 3, 1, 0)
        elif nchw:
            array = array.permute(0, 2, 3, 1)
        shape = problem.operands.nhwc["grad_y" if name == "y" else name].shape
        return jnp.asarray(array.float().contiguous().cpu().numpy()).reshape(shape)

    results = {name: to_jax(name, array) for name, array in one(sets[0]).items()}
    return Run([results], lambda: [one(operands) for operands in sets], lambda _: torch.cuda.synchronize())


def torchvision_run(problem: Problem) -> Run:
    """All operands of one dtype, which may not be bfloat16."""
    import torch
    from torchvision.ops import deform_conv2d

    torch.backends.cuda.matmul.allow_tf32 = problem.mode == "tf32"
    case = problem.case

    def function(operands: dict[str, Any]) -> Any:
        sizes = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        return deform_conv2d(operands["x"], operands["offset"], operands["weight"], mask=operands.get("mask"), **sizes)

    return torch_run(function, problem, problem.operands.nchw, lambda _: MODES[problem.mode], nchw=True)


def half_coordinates(case: Case, operands: Arrays) -> Arrays:
    """Operands whose coordinates in float32 are those that torchvision computes in float16."""
    taps = np.arange(case.kernel**2)
    h_out, w_out = (np.arange(n) * case.stride - case.padding for n in case.output_size)
    regular = np.empty((len(h_out), len(w_out), 1, len(taps), 2), np.float32)
    regular[..., 0] = h_out[:, None, None, None] + taps // case.kernel * case.dilation
    regular[..., 1] = w_out[None, :, None, None] + taps % case.kernel * case.dilation
    offset = operands["offset"].reshape(-1, *regular.shape[:2], case.deform_groups, *regular.shape[3:])
    at = regular.astype(np.float16) + offset.astype(np.float16)
    offset = (at.astype(np.float32) - regular).reshape(operands["offset"].shape)
    mask = {"mask": operands["mask"].astype(np.float16).astype(np.float32)} if "mask" in operands else {}
    return operands | {"offset": offset} | mask


# The tiles of deformops that --few-tiles leaves, as (BLOCK_M, BLOCK_N, BLOCK_K, warps). Of all 40 each takes seconds to
# compile.
FEW_TILES = {
    "_conv_forward_kernel": {(64, 64, 32, 4), (128, 64, 32, 8), (64, 64, 64, 8)},
    "_conv_backward_kernel": {(64, 64, 32, 8), (32, 64, 32, 4)},
}


def deformops_run(problem: Problem) -> Run:
    """deformops' Triton kernels, in their own order of axes: NHWC, but the weight. They have no TF32."""
    from deformops.registry import Backend, conv

    if problem.few_tiles:
        keep_few_tiles()
    case, arrays = problem.case, dict(problem.operands.nhwc)
    taps, (h_out, w_out) = case.kernel**2, case.output_size
    arrays["weight"] = problem.operands.nchw["weight"]
    arrays["offset"] = arrays["offset"].reshape(-1, h_out, w_out, case.deform_groups, taps, 2)
    if "mask" in arrays:
        arrays["mask"] = arrays["mask"].reshape(-1, h_out, w_out, case.deform_groups, taps)

    def function(operands: dict[str, Any]) -> Any:
        sizes = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups}
        return conv(
            *(operands["x"], operands["offset"], operands["weight"]),
            mask=operands.get("mask"),
            **sizes,
            offset_groups=case.deform_groups,
            backend=Backend.TRITON,
        )

    dtype = MODES[problem.mode]
    return torch_run(function, problem, arrays, lambda name: "float32" if name in WIDE else dtype, nchw=False)


def keep_few_tiles() -> None:
    from deformops.backends.triton._kernels import conv_deform2d

    for name, tiles in FEW_TILES.items():
        kernel = getattr(conv_deform2d, name)
        kept = [
            config
            for config in kernel.configs
            if (*(config.kwargs[size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K")), config.num_warps) in tiles
        ]
        if kept:
            kernel.configs = kept


# --- who takes part ---


class Competitor(NamedTuple):
    run: Callable[[Problem], Run]
    modes: tuple[str, ...] = tuple(MODES)
    package: str | None = None  # that it needs besides JAX


COMPETITORS = {
    "jax_dcn NHWC": Competitor(jax_dcn_run),
    "plain convolution": Competitor(conv_run),
    "torchvision": Competitor(torchvision_run, ("tf32", "float16", "float32"), "torchvision"),
    "jax_dcn NCHW": Competitor(lambda problem: jax_dcn_run(problem, "NCHW")),
    "without command buffers": Competitor(without_command_buffers_run),
    "deformops": Competitor(deformops_run, ("bfloat16", "float16", "float32"), "deformops"),
}


def installed(package: str) -> str | None:
    """The version of a Python package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- measuring ---


@jax.jit
def _largest_error(actual: DeviceArrays, expected: DeviceArrays) -> jax.Array:
    errors = [jnp.abs(actual[name] - e).max() / jnp.abs(e).max() for name, e in expected.items()]
    return jnp.max(jnp.stack(errors))


@jax.jit
def _norm_error(actual: DeviceArrays, expected: DeviceArrays) -> jax.Array:
    errors = [jnp.linalg.norm((actual[name] - e).ravel()) / jnp.linalg.norm(e.ravel()) for name, e in expected.items()]
    return jnp.max(jnp.stack(errors))


def check(competitor: str, mode: str, actual: DeviceArrays, expected: DeviceArrays) -> float:
    """The error of the worst result. A ValueError if it is too large, or NaN."""
    if actual.keys() != expected.keys():
        raise ValueError(f"has {sorted(actual)}, expected {sorted(expected)}")
    actual = {name: array.astype(jnp.float32) for name, array in actual.items()}
    loose = COMPETITORS[competitor].package is not None and mode in ("bfloat16", "float16")
    error = float((_norm_error if loose else _largest_error)(actual, expected))
    allowed = LOOSE if loose else TOLERANCE[mode]
    if not error <= allowed:
        raise ValueError(f"is off by {error:.1e}, allowed is {allowed:.1e}")
    return error


def stopwatch(run: Run, calls: int, sets: int) -> tuple[float, float]:
    """The seconds of one computation, and those of the host: until the first call has returned, its work under way.

    All calls are queued, and waited for once; but for the first, JAX may have the host wait for the GPU, too.
    """
    start = time.perf_counter()
    pending = run.enqueue()
    host = time.perf_counter() - start
    for _ in range(calls - 1):
        pending = run.enqueue()
    run.wait(pending)
    return (time.perf_counter() - start) / calls / sets, host / sets


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"


class Measurer:
    """The methods that benchmarks/gpu.py calls, from another process."""

    def __init__(self, few_tiles: bool):
        if jax.default_backend() != "gpu":
            raise SystemExit(f"no GPU: JAX runs on {jax.devices()}")
        if native.CUDA_MISSING is not None:
            raise SystemExit(f"no CUDA kernels: {native.CUDA_MISSING}")
        self.few_tiles = few_tiles
        self.at_hand: tuple[str, int] | None = None
        self.runs: list[tuple[Run, int, int]] = []

    def environment(self) -> dict[str, Any]:
        device = jax.devices()[0]
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
        command, card = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], "no nvidia-smi"
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            card = (done.stdout or done.stderr).strip()
        packages = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "torchvision", "triton", "deformops")
        versions = {package: version for package in packages if (version := installed(package))}
        return environment() | {
            "gpu": f"{device.device_kind}, {device.client.platform_version}".replace("\n", ", "),
            "card": card,
            "versions": versions,
        }

    def take_up(self, name: str, batch: int) -> None:
        """A case, unless it is the one at hand."""
        if self.at_hand == (name, batch):
            return
        self.at_hand = None  # until everything has been made
        self.name, self.case = name, dataclasses.replace(CASES[name], batch=batch)
        self.operands = Operands(self.case.operands())
        self.references: dict[bool, DeviceArrays] = {}
        self.reference_program = None
        self.at_hand = (name, batch)

    def reference(self, half: bool) -> DeviceArrays:
        """y and all gradients by plain XLA in float32."""
        if half not in self.references:
            arrays = half_coordinates(self.case, self.operands.nhwc) if half else self.operands.nhwc
            problem = Problem(self.case, True, "float32", Operands(arrays), 1)
            sets = [{name: jnp.asarray(array) for name, array in arrays.items()}]
            if self.reference_program is None:
                os.environ["JAX_DCN_IMPLEMENTATION"] = "xla"  # read when traced
                try:
                    options = {"xla_gpu_autotune_level": 0}
                    self.reference_program = jax_program(deformable(problem, "NHWC"), problem, sets, options)
                finally:
                    del os.environ["JAX_DCN_IMPLEMENTATION"]
            self.references[half] = self.reference_program(sets)[0]
        return self.references[half]

    def prepare(self, name: str, batch: int, backward: bool, mode: str, competitors: list[str]) -> list[dict[str, Any]]:
        """One entry for each competitor that has this mode: what is said of it, and perhaps why it is not measured."""
        self.runs = []
        self.take_up(name, batch)
        set_bytes = sum(array.nbytes for array in self.operands.nhwc.values())
        sets = min(MAX_SETS, max(MIN_SETS, -(-CACHES * L2_BYTES // set_bytes)))
        entries = []
        for competitor in competitors:
            build, modes, package = COMPETITORS[competitor]
            if mode not in modes or (package is not None and installed(package) is None):
                continue
            entry = {"case": self.name, "batch": self.case.batch, "direction": "both" if backward else "forward"}
            entry |= {"mode": mode, "competitor": competitor, "sets": sets}
            entries.append(entry)
            try:
                run = build(Problem(self.case, backward, mode, self.operands, sets, self.few_tiles))
                if run.results:
                    expected = self.reference(half=competitor == "torchvision" and mode == "float16")
                    expected = {name: array for name, array in expected.items() if backward or name == "y"}
                    entry["error"] = max(check(competitor, mode, results, expected) for results in run.results)
                stopwatch(run, 1, sets)
                calls = max(1, round(MEASURE / sets / stopwatch(run, 1, sets)[0]))
                entry["position"] = len(self.runs)
                self.runs.append((run._replace(results=[]), calls, sets))
            except Exception as error:  # the others still count
                entry["failure"] = described(error)
                print(f"{self.name}, {competitor}, {mode}: {entry['failure']}", file=sys.stderr, flush=True)
        return entries

    def round(self) -> list[tuple[float, float] | str]:
        """The times of those that were prepared, by their position, or what went wrong."""

        def timed(run: Run, calls: int, sets: int) -> tuple[float, float] | str:
            try:
                return stopwatch(run, calls, sets)
            except Exception as error:  # the others still count
                return described(error)

        return [timed(*run) for run in self.runs]

    def usable(self) -> bool:
        """Whether the process can still compute: after some errors of CUDA it cannot."""
        try:
            return bool(jnp.ones(()) + 1 == 2)
        except jax.errors.JaxRuntimeError:
            return False
