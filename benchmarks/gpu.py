"""Measures the CUDA kernels against torchvision's operator and cuDNN's plain convolution: numbers first, then times.

    python benchmarks/gpu.py [--cases r50_c3,edvr_m] [--batches 16,1] [--modes bfloat16,tf32] [--out FOLDER]

Needs a GPU; torchvision takes part if it is installed. A timed call computes several times, each time on arrays of its
own: so launches hardly count, and no input is found in the cache. The calls of a case are timed in turn, round after
round. What --seconds do not suffice for is left out, and named. Writes results.json and table.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# torch works on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, Arrays, Case, to_nchw, to_nhwc
from jax import lax
from report import caption, environment, markdown, write_json

import jax_dcn

# The dtype of x, weight and y, and what float32 products are made in. Offset and mask are float32.
MODES = {"tf32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
DIRECTIONS = ("forward", "both")

# Largest error, relative to the largest value. 16 bits: the rounding of the result, of which a sum of roundings in the
# gradients is no more. TF32: operands with 11 bits. float32: a few hundred roundings.
TOLERANCE = {"tf32": 2e-3, "bfloat16": 2.0**-7, "float16": 2.0**-9, "float32": 2e-5}

# A timed call repeats as often as fills MEASURE seconds, with as many sets of arrays as fill CACHES times the L2 cache
# of the largest GPUs, but at least MIN_SETS.
MEASURE, L2_BYTES, CACHES, MIN_SETS, MAX_SETS = 0.02, 64 * 2**20, 3, 2, 24
ROUNDS = 7


class Problem(NamedTuple):
    case: Case
    backward: bool  # y and the gradients of all operands, else y alone
    mode: str
    operands: Arrays  # NHWC, with grad_y
    sets: int


class Run(NamedTuple):
    results: dict[str, np.ndarray] | None  # NHWC, of the first set; none for what is not deformable
    enqueue: Callable[[], Any]  # starts one computation per set
    wait: Callable[[Any], None]  # until what enqueue returned is there


# --- what is measured ---


def jax_run(function: Callable[..., jax.Array], problem: Problem, names: list[str], nchw: bool) -> Run:
    """`function` of the operands with these names, once per set in one compiled program."""
    dtype = MODES[problem.mode]
    arrays = to_nchw(problem.operands) if nchw else problem.operands
    wide = ("offset", "mask")
    first = {name: jnp.asarray(arrays[name], "float32" if name in wide else dtype) for name in (*names, "grad_y")}
    sets = [first] + [jax.tree.map(jnp.copy, first) for _ in range(problem.sets - 1)]

    def one(operands):
        operands = dict(operands)
        grad_y = operands.pop("grad_y")
        if not problem.backward:
            return {"y": function(**operands)}
        y, vjp = jax.vjp(lambda operands: function(**operands), operands)
        return {"y": y, **vjp(grad_y)[0]}

    compiled = jax.jit(lambda sets: [one(operands) for operands in sets]).lower(sets).compile()
    results = {name: np.asarray(array, np.float32) for name, array in compiled(sets)[0].items()}
    return Run(to_nhwc(results) if nchw else results, lambda: compiled(sets), jax.block_until_ready)


def precision(problem: Problem) -> str | None:
    return "highest" if problem.mode == "float32" else None


def jax_dcn_run(problem: Problem, data_format: str) -> Run:
    def function(**operands):
        sizes = problem.case.sizes
        return jax_dcn.deform_conv2d(**operands, **sizes, data_format=data_format, precision=precision(problem))

    names = [name for name in problem.operands if name != "grad_y"]
    return jax_run(function, problem, names, nchw=data_format == "NCHW")


def conv_run(problem: Problem) -> Run:
    case = problem.case

    def function(x, weight):
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

    return jax_run(function, problem, ["x", "weight"], nchw=False)._replace(results=None)


def torchvision_run(problem: Problem) -> Run:
    """As a CUDA graph, so that the launches of its many kernels do not count. It has no bfloat16."""
    import torch
    from torchvision.ops import deform_conv2d

    torch.backends.cuda.matmul.allow_tf32 = problem.mode == "tf32"
    case = problem.case
    dtype = getattr(torch, MODES[problem.mode])
    arrays = {name: torch.from_numpy(array).to("cuda", dtype) for name, array in to_nchw(problem.operands).items()}
    grad_y = arrays.pop("grad_y")
    sets = [
        {name: array.clone().requires_grad_(problem.backward) for name, array in arrays.items()}
        for _ in range(problem.sets)
    ]

    def one(operands):
        sizes = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        y = deform_conv2d(operands["x"], operands["offset"], operands["weight"], mask=operands.get("mask"), **sizes)
        gradients = torch.autograd.grad(y, list(operands.values()), grad_y) if problem.backward else ()
        return {"y": y.detach(), **dict(zip(operands, gradients, strict=problem.backward))}

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a warm-up outside the default stream, as capture wants
        first = {name: array.float().cpu().numpy() for name, array in one(sets[0]).items()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [one(operands) for operands in sets]  # the graph writes to these
    return Run(to_nhwc(first), lambda: graph.replay() or kept, lambda _: torch.cuda.synchronize())


COMPETITORS: dict[str, tuple[Callable[[Problem], Run], tuple[str, ...]]] = {  # and the modes in which they take part
    "torchvision": (torchvision_run, ("tf32", "float16", "float32")),
    "jax_dcn NHWC": (lambda problem: jax_dcn_run(problem, "NHWC"), tuple(MODES)),
    "jax_dcn NCHW": (lambda problem: jax_dcn_run(problem, "NCHW"), tuple(MODES)),
    "plain convolution": (conv_run, tuple(MODES)),
}


# --- measuring ---


def reference(case: Case, backward: bool, operands: Arrays) -> Arrays:
    """The results by plain XLA in float32."""
    os.environ["JAX_DCN_IMPLEMENTATION"] = "xla"  # read when traced
    try:
        results = jax_dcn_run(Problem(case, backward, "float32", operands, 1), "NHWC").results
    finally:
        del os.environ["JAX_DCN_IMPLEMENTATION"]
    assert results is not None
    return results


def largest_error(actual: Arrays, expected: Arrays) -> float:
    """Of all results, relative to the largest value. NaN if there is one."""
    if actual.keys() != expected.keys():
        raise ValueError(f"has {sorted(actual)}, expected {sorted(expected)}")
    errors = [np.abs(actual[name] - value).max() / np.abs(value).max() for name, value in expected.items()]
    return float(np.max(errors))


def stopwatch(run: Run, calls: int) -> float:
    """The seconds of one computation: `calls` calls are under way at once, so their launches overlap."""
    start = time.perf_counter()
    for _ in range(calls):
        pending = run.enqueue()
    run.wait(pending)
    return time.perf_counter() - start


def measure(case: Case, name: str, backward: bool, mode: str, operands: Arrays, expected: Arrays) -> list[dict]:
    """One entry for each competitor: its times, or why it has none."""
    set_bytes = sum(array.nbytes for array in operands.values())
    sets = min(MAX_SETS, max(MIN_SETS, -(-CACHES * L2_BYTES // set_bytes)))
    entries, runs = [], {}
    for competitor, (build, modes) in COMPETITORS.items():
        if mode not in modes or (competitor == "torchvision" and not has_torchvision()):
            continue
        entry = {"case": name, "batch": case.batch, "direction": DIRECTIONS[backward], "mode": mode}
        entry |= {"competitor": competitor, "sets": sets}
        entries.append(entry)
        try:
            run = build(Problem(case, backward, mode, operands, sets))
            if run.results is not None:
                entry["error"] = largest_error(run.results, expected)
                # torchvision computes its coordinates in float16 there.
                if not entry["error"] <= TOLERANCE[mode] and (competitor, mode) != ("torchvision", "float16"):
                    raise ValueError(f"is off by {entry['error']:.1e}, allowed is {TOLERANCE[mode]:.1e}")
            stopwatch(run, 1)
            calls = max(1, round(MEASURE / stopwatch(run, 1)))
            runs[competitor] = (run._replace(results=None), calls, entry)
        except Exception as error:  # the others still count
            entry["failure"] = f"{type(error).__name__}: {str(error)[:400]}"
            print(f"{name}, {competitor}, {mode}: {entry['failure']}", file=sys.stderr, flush=True)
    for _ in range(ROUNDS):
        for run, calls, entry in runs.values():
            entry.setdefault("milliseconds", []).append(1e3 * stopwatch(run, calls) / calls / sets)
    return entries


def has_torchvision() -> bool:
    try:
        import torch
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return torch.cuda.is_available()


# --- the report ---


def table(measurements: list[dict]) -> str:
    times = {
        tuple(m[key] for key in ("case", "batch", "direction", "mode", "competitor")): m["milliseconds"]
        for m in measurements
        if "milliseconds" in m
    }
    errors = {(m["case"], m["batch"], m["direction"], m["mode"]): m.get("error") for m in measurements if ours(m)}
    header = ["case", "batch", "", "dtype", "jax_dcn, ms", "TFLOP/s", "/ conv", "NCHW, ms", "torchvision /", "error"]
    rows = []
    for key in dict.fromkeys(key[:4] for key in times):
        nhwc = times.get((*key, "jax_dcn NHWC"), [])
        case = dataclasses.replace(CASES[key[0]], batch=key[1])
        flop = 2 * case.multiply_adds * (3 if key[2] == "both" else 1)
        rate = f"{flop / statistics.median(nhwc) / 1e9:.0f}" if nhwc else ""
        row = [key[0], str(key[1]), key[2], key[3], milliseconds(nhwc), rate]
        row += [ratio(nhwc, times.get((*key, "plain convolution"), []))]
        row += [milliseconds(times.get((*key, "jax_dcn NCHW"), []))]
        row += [ratio(times.get((*key, "torchvision"), []), nhwc)]
        row += [f"{errors[key]:.1e}" if errors.get(key) is not None else ""]
        rows.append(row)
    return markdown(header, rows) if rows else "Nothing was measured."


def ours(measurement: dict) -> bool:
    return measurement["competitor"] == "jax_dcn NHWC"


def milliseconds(times: list[float]) -> str:
    return f"{statistics.median(times):.3g}" if times else ""


def ratio(a: list[float], b: list[float]) -> str:
    """The median over the rounds."""
    return f"{statistics.median(x / y for x, y in zip(a, b, strict=True)):.2f}" if a and b else ""


def page(report: dict[str, Any]) -> str:
    legend = (
        "Medians. TFLOP/s: of the products alone, 2 per multiply-add, three products with the backward pass. / conv: "
        "relative to cuDNN's plain convolution of the same shape through JAX, NHWC. torchvision /: how many times as "
        "long torchvision takes, in NCHW. error: of jax_dcn, relative to the largest value, against plain XLA in "
        "float32."
    )
    left_out = f"Left out for lack of time: {', '.join(report['left_out'])}." if report["left_out"] else ""
    parts = [caption(report["environment"]), report["gpu"], legend, left_out, table(report["measurements"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = ("r50_c3", "r50_c4", "r50_c5", "r50_c4_s2", "edvr_m", "basicvsrpp", "x101", "bevdepth", "dekr", "train")

    def names(allowed: Any) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            for value in text.split(","):
                if value not in allowed:
                    raise argparse.ArgumentTypeError(f"{value} is none of {', '.join(allowed)}")
            return text.split(",")

        return parse

    default_out = Path(__file__).parent / "results" / "gpu"
    parser.add_argument("--cases", type=names(CASES), default=list(listed), metavar="NAME,...")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[16, 1])
    parser.add_argument("--directions", type=names(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--modes", type=names(MODES), default=list(MODES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--out", type=Path, default=default_out, help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def write(folder: Path, report: dict[str, Any]) -> None:
    """After every case, so that a run that is cut short leaves what it has measured."""
    write_json(folder / "results.json", report)
    (folder / "table.md").write_text(page(report))


def main() -> None:
    arguments = parse_arguments()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"benchmarks/gpu.py needs a GPU, but JAX runs on {jax.devices()[0].platform}: {jax.devices()}")
    if jax_dcn.native.CUDA_MISSING is not None:
        raise SystemExit(f"benchmarks/gpu.py needs the CUDA kernels: {jax_dcn.native.CUDA_MISSING}")
    start = time.perf_counter()
    device = jax.devices()[0]
    report = {
        "environment": environment(),
        "gpu": f"{device.device_kind}, {device.client.platform_version}",
        "tolerance": TOLERANCE,
        "left_out": [],
        "measurements": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for batch, name, direction in itertools.product(arguments.batches, arguments.cases, arguments.directions):
        label = f"{name}, batch {batch}, {direction}"
        if time.perf_counter() - start > arguments.seconds:
            report["left_out"].append(label)
            continue
        case = dataclasses.replace(CASES[name], batch=batch)
        backward = direction == "both"
        operands = case.operands()
        expected = reference(case, backward, operands)
        for mode in arguments.modes:
            report["measurements"] += measure(case, name, backward, mode, operands, expected)
        print(f"{label}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        write(arguments.out, report)
    write(arguments.out, report)
    print(page(report))
    failures = [m for m in report["measurements"] if "failure" in m and m["competitor"].startswith("jax_dcn")]
    if failures:
        raise SystemExit(f"{len(failures)} of jax_dcn's runs failed")


if __name__ == "__main__":
    main()
