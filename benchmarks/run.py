"""Times deformable convolution against what else there is, and prints ratios.

    python benchmarks/run.py [--cases r50_c3,edvr_m] [--repeats 9] [--json results.json]

Checks the numbers first, then measures all competitors of a case in turn, again and again, so that a machine that
changes its speed changes it for all. The figures are medians in milliseconds; "x conv" is the ratio to XLA's plain
convolution of the same shape and format. torchvision takes part if it can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, Case
from jax import lax

import jax_dcn

# Largest error against the plain-XLA form, relative to the largest value: a few hundred roundings of float32.
TOLERANCE = 2e-5

Run = Callable[[], Any]


def to_nchw(operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        name: operand.transpose((3, 2, 0, 1) if name == "weight" else (0, 3, 1, 2))
        for name, operand in operands.items()
    }


def deform(case: Case, data_format: str) -> Callable[[dict[str, jax.Array]], jax.Array]:
    def function(operands):
        return jax_dcn.deform_conv2d(**operands, **case.static, data_format=data_format)

    return function


def plain(case: Case, data_format: str) -> Callable[[dict[str, jax.Array]], jax.Array]:
    weight_format = {"NHWC": "HWIO", "NCHW": "OIHW"}[data_format]

    def function(operands):
        return lax.conv_general_dilated(
            operands["x"],
            operands["weight"],
            window_strides=(case.stride,) * 2,
            padding=((1, 1), (1, 1)),
            dimension_numbers=(data_format, weight_format, data_format),
            feature_group_count=case.groups,
        )

    return function


def jitted(function: Callable, operands: dict[str, jax.Array], backward: bool) -> Run:
    if not backward:
        call = jax.jit(function)
        return lambda: call(operands)
    grad_y = jnp.asarray(np.random.default_rng(1).standard_normal(jax.eval_shape(function, operands).shape), "float32")

    @jax.jit
    def call(operands, grad_y):
        y, vjp = jax.vjp(function, operands)
        return y, vjp(grad_y)[0]

    return lambda: call(operands, grad_y)


def with_implementation(implementation: str, run: Run) -> Run:
    """Compiles `run` with the given implementation; it keeps it afterwards."""
    os.environ["JAX_DCN_IMPLEMENTATION"] = implementation
    jax.block_until_ready(run())
    del os.environ["JAX_DCN_IMPLEMENTATION"]
    return run


def torchvision_run(case: Case, operands: dict[str, jax.Array], backward: bool) -> Run | None:
    try:
        import torch
        from torchvision.ops import deform_conv2d
    except (ImportError, RuntimeError):
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensors = {name: torch.tensor(np.array(operand)) for name, operand in to_nchw(operands).items()}
    for tensor in tensors.values():
        tensor.requires_grad_(backward)
    out = jax.eval_shape(deform(case, "NCHW"), to_nchw(operands)).shape
    grad_y = torch.tensor(np.random.default_rng(1).standard_normal(out), dtype=torch.float32)

    def run():
        y = deform_conv2d(
            tensors["x"], tensors["offset"], tensors["weight"], None, case.stride, 1, 1, tensors.get("mask")
        )
        if not backward:
            return np.asarray(y)
        return y, torch.autograd.grad(y, list(tensors.values()), grad_y)

    return run


def check(name: str, actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error = float(jnp.abs(a - e).max() / jnp.abs(e).max())
        if not error < TOLERANCE:
            raise SystemExit(f"{name}: error {error:.1e} against the plain-XLA form, allowed is {TOLERANCE:.0e}")


def measure(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(ts) for name, ts in times.items()}


def benchmark(name: str, case: Case, backward: bool, repeats: int) -> dict[str, float]:
    nhwc = case.operands()
    nchw = to_nchw(nhwc)
    runs = {
        "jax_dcn NHWC": jitted(deform(case, "NHWC"), nhwc, backward),
        "jax_dcn NCHW": jitted(deform(case, "NCHW"), nchw, backward),
        "XLA gather": with_implementation("xla", jitted(deform(case, "NHWC"), nhwc, backward)),
        "conv NHWC": jitted(plain(case, "NHWC"), nhwc, backward),
        "conv NCHW": jitted(plain(case, "NCHW"), nchw, backward),
    }
    vision = torchvision_run(case, nhwc, backward)
    if vision is not None:
        runs["torchvision"] = vision
    results = {label: jax.block_until_ready(run()) for label, run in runs.items()}
    check(f"{name} NHWC", results["jax_dcn NHWC"], results["XLA gather"])
    # The forward is checked in both formats; backward the random grad_y differs between them.
    if not backward:
        check(f"{name} NCHW", results["jax_dcn NCHW"].transpose(0, 2, 3, 1), results["XLA gather"])
        if vision is not None:
            check(f"{name} torchvision", results["torchvision"].transpose(0, 2, 3, 1), results["XLA gather"])
    elif vision is not None:
        y, gradients = results["torchvision"]
        check(f"{name} torchvision", y.detach().numpy(), results["jax_dcn NCHW"][0])
        for key, gradient in zip(nhwc, gradients, strict=True):
            check(f"{name} torchvision {key}", gradient.numpy(), results["jax_dcn NCHW"][1][key])
    del results
    return measure(runs, repeats)


def row(name: str, direction: str, times: dict[str, float]) -> str:
    cells = [f"{name:<11}{direction:<9}"]
    for data_format in ("NHWC", "NCHW"):
        ours, conv = times[f"jax_dcn {data_format}"], times[f"conv {data_format}"]
        cells.append(f"{ours:8.1f} {conv:8.1f} {ours / conv:6.2f}")
    for other in ("XLA gather", "torchvision"):
        if other in times:
            cells.append(f"{times[other]:8.1f} {times[other] / times['jax_dcn NHWC']:6.1f}")
    return " | ".join(cells)


def environment() -> dict[str, str]:
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "jax": jax.__version__,
        "jax_dcn": jax_dcn.__version__,
        "commit": git.stdout.strip(),
        "cpu": cpu,
        "threads": str(len(os.sched_getaffinity(0))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="a file to write the figures to")
    arguments = parser.parse_args()

    jax_dcn.show_config()
    report = {"environment": environment(), "milliseconds": {}}
    print("\nmilliseconds              NHWC                       NCHW             XLA gather      torchvision")
    print("case       direction    jax_dcn     conv x conv |  jax_dcn     conv x conv |           x NHWC       x NHWC")
    for name in arguments.cases.split(","):
        for direction in ("fwd", "fwd+bwd"):
            times = benchmark(name, CASES[name], direction != "fwd", arguments.repeats)
            report["milliseconds"][f"{name} {direction}"] = times
            print(row(name, direction, times), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
