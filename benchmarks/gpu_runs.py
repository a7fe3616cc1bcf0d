"""What benchmarks/gpu.py measures, and how: in a process that has one build of jax_dcn and the GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from typing import Any

# torch works on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from jax_runs import conv_run, deformable, deterministic, jax_dcn_run, jax_program, plain_xla
from report import environment, kernels, versions
from tasks import Competitor, Results, Run, Task, check
from torch_runs import torch_run
from workers import described
from workloads import DIRECTIONS, GPU_WORKLOADS, Arrays, Operands, Workload

# Largest error, relative to the largest value. 16 bits: the rounding of the result, of which a sum of roundings in the
# gradients is no more. TF32: operands with 11 bits. float32: a few hundred roundings.
TOLERANCE = {"tf32": 2e-3, "bfloat16": 2.0**-7, "float16": 2.0**-9, "float32": 2e-5}

# Others' 16 bits are wrong by more than this, in the norm: what is computed of other arrays, or not at all, is off by 1
# and more. An emulation of torchvision's kernels in float16 is off by 0.003 at most, its atomic sums of 16 bits apart.
LOOSE = 5e-2

# A timed call repeats as often as fills MEASURE seconds, with as many sets of arrays as fill CACHES times the L2 cache
# of the largest GPUs, but at least MIN_SETS.
MEASURE, L2_BYTES, CACHES, MIN_SETS, MAX_SETS = 0.02, 64 * 2**20, 3, 2, 24


def without_command_buffers_run(task: Task) -> Run:
    """XLA launches each kernel itself, and records no CUDA graph again where arrays have moved."""
    return jax_dcn_run(task, xla_gpu_enable_command_buffer="")


def deterministic_run(task: Task) -> Run:
    with deterministic():
        return jax_dcn_run(task)


def torchvision_run(task: Task) -> Run:
    """All operands of one dtype: float16 instead of bfloat16, for which it has no kernels."""
    import torch
    from torchvision.ops import deform_conv2d

    if task.dtype == "bfloat16":
        task = task._replace(dtype="float16")
    torch.backends.cuda.matmul.allow_tf32 = task.precision != "highest"
    sizes = {name: task.workload.sizes[name] for name in ("stride", "padding", "dilation")}

    def function(operands: dict[str, Any]) -> Any:
        return deform_conv2d(operands["x"], operands["offset"], operands["weight"], mask=operands.get("mask"), **sizes)

    return torch_run(function, task, task.arrays, "cuda", wide=())


def half_coordinates(workload: Workload, operands: Arrays) -> Arrays:
    """Operands whose coordinates in float32 are those that torchvision computes in float16."""
    taps = np.arange(workload.kernel**2)
    h_out, w_out = (np.arange(n) * workload.stride - workload.padding for n in workload.output_size)
    regular = np.empty((len(h_out), len(w_out), 1, len(taps), 2), np.float32)
    regular[..., 0] = h_out[:, None, None, None] + taps // workload.kernel * workload.dilation
    regular[..., 1] = w_out[None, :, None, None] + taps % workload.kernel * workload.dilation
    offset = operands["offset"].reshape(-1, *regular.shape[:2], workload.deform_groups, *regular.shape[3:])
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


def deformops_run(task: Task) -> Run:
    """deformops' Triton kernels, in their own order of axes: NHWC, but the weight. They have no TF32."""
    from deformops.registry import Backend, conv

    if task.few_tiles:
        keep_few_tiles()
    workload, arrays = task.workload, dict(task.operands.nhwc)
    taps, (h_out, w_out) = workload.kernel**2, workload.output_size
    arrays["weight"] = task.operands.nchw["weight"]
    arrays["offset"] = arrays["offset"].reshape(-1, h_out, w_out, workload.deform_groups, taps, 2)
    if "mask" in arrays:
        arrays["mask"] = arrays["mask"].reshape(-1, h_out, w_out, workload.deform_groups, taps)

    def function(operands: dict[str, Any]) -> Any:
        return conv(
            *(operands["x"], operands["offset"], operands["weight"]),
            mask=operands.get("mask"),
            offset_groups=workload.deform_groups,
            **{name: workload.sizes[name] for name in ("stride", "padding", "dilation", "groups")},
            backend=Backend.TRITON,
        )

    run = torch_run(function, task, arrays, "cuda")

    def fetch(results: Results) -> Results:
        results = run.fetch(results)
        if "weight" in results:
            results["weight"] = results["weight"].transpose(2, 3, 1, 0)
        shapes = {name: task.arrays["grad_y" if name == "y" else name].shape for name in results}
        return {name: array.reshape(shapes[name]) for name, array in results.items()}

    return run._replace(fetch=fetch)


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


ALL_MODES = tuple(TOLERANCE)
COMPETITORS = {
    "jax_dcn NHWC": Competitor(jax_dcn_run, ALL_MODES, "NHWC"),
    "plain convolution": Competitor(conv_run, ALL_MODES, "NHWC", deformable=False),
    "torchvision": Competitor(torchvision_run, ALL_MODES, packages=("torchvision",)),
    "jax_dcn NCHW": Competitor(jax_dcn_run, ALL_MODES),
    "grad_x": Competitor(jax_dcn_run, ALL_MODES, "NHWC", only="x"),
    "deterministic grad_x": Competitor(deterministic_run, ALL_MODES, "NHWC", only="x"),
    "without command buffers": Competitor(without_command_buffers_run, ALL_MODES, "NHWC"),
    "deformops": Competitor(deformops_run, ("bfloat16", "float16", "float32"), "NHWC", packages=("deformops",)),
}


# --- measuring ---


def seconds_per_set(run: Run, calls: int, sets: int) -> tuple[float, float]:
    """The seconds of one computation, and those of the host: until the first call has returned, its work under way.

    All calls are queued, and waited for once; but for the first, JAX may have the host wait for the GPU, too.
    """
    start = time.perf_counter()
    pending = run.start()
    host = time.perf_counter() - start
    for _ in range(calls - 1):
        pending = run.start()
    run.wait(pending)
    return (time.perf_counter() - start) / calls / sets, host / sets


class Measurer:
    """The methods that benchmarks/gpu.py calls, from another process."""

    def __init__(self, few_tiles: bool):
        if jax.default_backend() != "gpu":
            raise SystemExit(f"no GPU: JAX runs on {jax.devices()}")
        if not kernels("cuda").startswith("kernels for "):
            raise SystemExit(f"no CUDA kernels: {kernels('cuda')}")
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
        return environment() | {
            "gpu": f"{device.device_kind}, {device.client.platform_version}".replace("\n", ", "),
            "card": card,
            "versions": versions(packages),
        }

    def take_up(self, name: str, batch: int) -> None:
        """A workload, unless it is the one at hand."""
        if self.at_hand == (name, batch):
            return
        self.at_hand = None  # until everything has been made
        self.workload = dataclasses.replace(GPU_WORKLOADS[name], batch=batch)
        self.operands = Operands(self.workload.operands())
        self.references: dict[bool, Results] = {}
        self.reference_program = None
        self.at_hand = (name, batch)

    def reference(self, half: bool) -> Results:
        """y and all gradients by plain XLA in float32."""
        if half not in self.references:
            nhwc = half_coordinates(self.workload, self.operands.nhwc) if half else self.operands.nhwc
            sets = [{name: jnp.asarray(array) for name, array in nhwc.items()}]
            if self.reference_program is None:
                task = Task(self.workload, True, "float32", "NHWC", self.operands, precision="highest")
                with plain_xla():
                    options = {"xla_gpu_autotune_level": 0}
                    self.reference_program = jax_program(deformable(task), task, sets, options)
            self.references[half] = self.reference_program(sets)[0]
        return self.references[half]

    def prepare(self, name: str, batch: int, backward: bool, mode: str, competitors: list[str]) -> list[dict[str, Any]]:
        """One entry for each competitor that has this mode: what is said of it, and perhaps why it is not measured."""
        self.runs = []
        self.take_up(name, batch)
        set_bytes = sum(array.nbytes for array in self.operands.nhwc.values())
        sets = min(MAX_SETS, max(MIN_SETS, -(-CACHES * L2_BYTES // set_bytes)))
        entries = []
        for label in competitors:
            competitor = COMPETITORS[label]
            if not competitor.takes_part(mode, backward):
                continue
            entry = {"case": name, "batch": batch, "direction": DIRECTIONS[backward], "mode": mode}
            entry |= {"competitor": label, "sets": sets}
            entries.append(entry)
            dtype, precision = "float32" if mode == "tf32" else mode, "highest" if mode == "float32" else None
            task = Task(self.workload, backward, dtype, competitor.data_format, self.operands, precision, sets)
            task = task._replace(few_tiles=self.few_tiles, only=competitor.only)
            try:
                run = competitor.build(task)
                if competitor.deformable:
                    entry["error"] = self.checked(run, task, mode, label)
                seconds_per_set(run, 1, sets)
                calls = max(1, round(MEASURE / sets / seconds_per_set(run, 1, sets)[0]))
                entry["position"] = len(self.runs)
                self.runs.append((run, calls, sets))
            except Exception as error:  # the others still count
                entry["failure"] = described(error)
                print(f"{name}, {label}, {mode}: {entry['failure']}", file=sys.stderr, flush=True)
        return entries

    def checked(self, run: Run, task: Task, mode: str, label: str) -> float:
        """The largest error of two sets, by two calls, the second of which finds its work space used."""
        half = label == "torchvision" and mode in ("bfloat16", "float16")
        expected = task.wanted(self.reference(half))
        loose = bool(COMPETITORS[label].packages) and mode in ("bfloat16", "float16")
        allowed = LOOSE if loose else TOLERANCE[mode]
        return max(check(task.nhwc(run.fetch(run()[i])), expected, allowed, norm=loose) for i in (0, -1))

    def round(self) -> list[tuple[float, float] | str]:
        """The times of those that were prepared, by their position, or what went wrong."""

        def timed(run: Run, calls: int, sets: int) -> tuple[float, float] | str:
            try:
                return seconds_per_set(run, calls, sets)
            except Exception as error:  # the others still count
                return described(error)

        return [timed(*run) for run in self.runs]

    def usable(self) -> bool:
        """Whether the process can still compute: after some errors of CUDA it cannot."""
        try:
            return bool(jnp.ones(()) + 1 == 2)
        except jax.errors.JaxRuntimeError:
            return False
