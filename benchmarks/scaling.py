"""How jax_dcn's cost grows with the sizes, what a small call costs, and how much memory a call needs.

    python benchmarks/scaling.py [--out FOLDER]

Writes scaling.json and scaling.md.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_runs import calls_kernels, jax_dcn_run
from report import caption, environment, markdown, paired_ratio, write_files
from tasks import Run, Task, in_turn
from workloads import DIRECTIONS, Operands, Workload

import jax_dcn

BASE = Workload("what the others vary", 1, 128, 128, 64, 64, False)
SWEEPS = {
    "pixels": [dataclasses.replace(BASE, height=n, width=n) for n in (1, 4, 8, 16, 32, 64, 128)],
    "taps": [dataclasses.replace(BASE, kernel=k, padding=k // 2) for k in (1, 3, 5, 7)],
    "input channels": [dataclasses.replace(BASE, c_in=c) for c in (4, 16, 64, 128, 256, 512)],
    "output channels": [dataclasses.replace(BASE, c_out=c) for c in (4, 16, 64, 128, 256, 512)],
}
IMAGES = [dataclasses.replace(BASE, height=n, width=n) for n in (64, 128, 256)]


def build(workload: Workload, backward: bool, data_format: str = "NHWC") -> Run:
    return jax_dcn_run(Task(workload, backward, "float32", data_format, Operands(workload.operands())))


# --- cost ---


def measure_cost(rounds: int) -> list[dict[str, Any]]:
    """The time per multiply-add of each, and its ratio to that of BASE, which every round of a sweep has too."""
    entries = []
    for sweep, workloads in SWEEPS.items():
        times = {
            backward: in_turn([build(workload, backward) for workload in (BASE, *workloads)], rounds)
            for backward in (False, True)
        }
        for i, workload in enumerate(workloads, 1):
            entry = {
                "sweep": sweep,
                "pixels": workload.height * workload.width,
                "taps": workload.kernel**2,
                "c_in": workload.c_in,
                "c_out": workload.c_out,
                "multiply_adds": workload.multiply_adds,
            }
            for backward, direction in enumerate(DIRECTIONS):
                # The backward pass has two products of the forward's size.
                work = workload.multiply_adds * (3 if backward else 1)
                entry[f"ns_{direction}"] = statistics.median(times[backward][i]) / work * 1e9
                ratio = paired_ratio(times[backward][i], times[backward][0])
                entry[f"relative_{direction}"] = ratio * BASE.multiply_adds / workload.multiply_adds
            entries.append(entry)
    return entries


def cost_tables(entries: list[dict[str, Any]]) -> str:
    def row(e: dict[str, Any]) -> list[str]:
        sizes = [str(e[key]) for key in ("sweep", "pixels", "taps", "c_in", "c_out")]
        costs = [f"{e['ns_forward']:.4f}", f"{e['relative_forward']:.2f}"]
        costs += [f"{e['ns_both']:.4f}", f"{e['relative_both']:.2f}"]
        return [*sizes, f"{e['multiply_adds'] / 1e6:.2f}", *costs]

    header = ["varied", "pixels", "taps", "C_in", "C_out", "million multiply-adds"]
    header += ["forward", "relative", "forward and backward", "relative"]
    return (
        "Nanoseconds per multiply-add, and relative to those of the case with 4096 pixels, 9 taps and 128 channels, "
        "which ran in the same rounds: that case's own row, 1.00 but for noise, tells how far to trust the others. A "
        "sample serves all output channels, so with few of them the time per multiply-add must grow. With few pixels "
        "it is the reading of the weight that counts.\n\n" + markdown(header, [row(e) for e in entries])
    )


# --- latency ---


def measure_latency(rounds: int) -> dict[str, float]:
    """Microseconds of small jitted calls, from Python and back.

    The empty call is the gradient of the weight for a batch of no images: XLA drops custom calls whose result has no
    elements, so a forward call would not do, but this one reaches the handler, which only clears one number.
    """
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    def operator(x, offset, weight):
        return jax_dcn.deform_conv2d(x, offset, weight, padding=weight.shape[0] // 2, data_format="NHWC")

    def gradient_of_weight(x, offset, weight, grad_y):
        return jax.vjp(lambda weight: operator(x, offset, weight), weight)[1](grad_y)

    def addition(x):
        return x + 1

    def gradients(x, offset, weight, grad_y):
        return jax.vjp(operator, x, offset, weight)[1](grad_y)

    small = (draw(1, 8, 8, 8), draw(1, 8, 8, 18), draw(3, 3, 8, 8))
    programs = {
        "no kernel: x + 1": (addition, small[:1]),
        "empty": (gradient_of_weight, (draw(0, 1, 1, 1), draw(0, 1, 1, 2), draw(1, 1, 1, 1), draw(0, 1, 1, 1))),
        "one pixel, one channel, kernel 1": (operator, (draw(1, 1, 1, 1), draw(1, 1, 1, 2), draw(1, 1, 1, 1))),
        "8x8, 8 -> 8 channels, forward": (operator, small),
        "8x8, 8 -> 8 channels, backward": (gradients, (*small, draw(1, 8, 8, 8))),
    }
    calls = {}
    for name, (function, operands) in programs.items():
        jitted = jax.jit(function)
        if function is not addition and not calls_kernels(jitted.lower(*operands).compile()):
            raise SystemExit(f"latency, {name}: the compiled program calls no kernel")
        calls[name] = lambda jitted=jitted, operands=operands: jax.block_until_ready(jitted(*operands))
    times = in_turn(list(calls.values()), rounds)
    return {name: statistics.median(seconds) * 1e6 for name, seconds in zip(calls, times, strict=True)}


# --- memory ---


def extra_memory(run: Run) -> float:
    """MiB that a run of one set uses above its operands and results, in a fresh process."""

    def kibibytes(key: str) -> int:
        with Path("/proc/self/status").open() as status:
            return int(next(line.split()[1] for line in status if line.startswith(key)))

    ctypes.CDLL(None).malloc_trim(0)  # else the call may reuse what was freed, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in use
    before = kibibytes("VmRSS")
    (results,) = run()
    return (kibibytes("VmHWM") - before) / 1024 - sum(array.nbytes for array in results.values()) / 2**20


def extra_memory_of(workload: Workload, backward: bool, data_format: str) -> float:
    return extra_memory(build(workload, backward, data_format))


def measure_memory() -> list[dict[str, Any]]:
    entries = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for image, data_format in itertools.product(IMAGES, ("NHWC", "NCHW")):
            entry = {"height": image.height, "width": image.width, "channels": image.c_in, "data_format": data_format}
            for backward, direction in enumerate(DIRECTIONS):
                entry[direction] = pool.submit(extra_memory_of, image, bool(backward), data_format).result()
            mebibytes = image.height * image.width * image.c_in * 4 / 2**20
            entries.append(entry | {"image": mebibytes, "columns": mebibytes * image.kernel**2})
    return entries


def memory_table(entries: list[dict[str, Any]]) -> str:
    header = ["image", "format", "forward", "forward and backward", "for scale: the image", "a column buffer"]
    rows = [
        [f"{e['height']} x {e['width']} x {e['channels']}", e["data_format"]]
        + [f"{e[key]:.1f}" for key in ("forward", "both", "image", "columns")]
        for e in entries
    ]
    return "MiB above operands and results\n\n" + markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of the cost; of the latency, a hundred times as many")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()

    report = {"environment": environment(), "cost": measure_cost(arguments.rounds)}
    report["latency_us"] = measure_latency(100 * arguments.rounds)
    tables = [caption(report["environment"]), cost_tables(report["cost"])]
    latency = [[name, f"{us:.1f}"] for name, us in report["latency_us"].items()]
    tables += ["Latency of a call\n\n" + markdown(["call", "µs"], latency)]
    if Path("/proc/self/clear_refs").exists():  # Linux
        report["memory_mib"] = measure_memory()
        tables += [memory_table(report["memory_mib"])]
    text = "\n\n".join(tables)
    write_files(arguments.out, {"scaling.json": report, "scaling.md": text + "\n"})
    print(text)


if __name__ == "__main__":
    main()
