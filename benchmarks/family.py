"""Measures DCNv3, DCNv4 and the attention as benchmarks/run.py does the convolution: checks, then times all in turn.

    python benchmarks/family.py [--cases detr_encoder,internimage_s1] [--quick] [--out FOLDER]

On the CPU, or where JAX has one on a GPU, with torch there too.
The competitors are the plain-XLA form, for DCNv3 also the same sums as a depthwise modulated deformable convolution,
and, where torch is installed, the operators' published form for it, of grid_sample. Writes family.json and family.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from competitors import REFERENCE, SLOW, TOLERANCE
from jax_runs import WIDE, jax_program, plain_xla
from report import (
    caption,
    cores,
    environment,
    installed,
    listed,
    markdown,
    milliseconds,
    named,
    ratio,
    versions,
    write_files,
)
from scaling import extra_memory
from tasks import Results, Run, Task, check, in_turn, stopwatch
from torch_runs import torch_run
from workloads import DIRECTIONS, Arrays, Operands, Workload

import jax_dcn

LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21))  # of an image of 800 x 1344, strides 8 to 64
HEADS, DEPTH, POINTS = 8, 32, 4

# --- for torch, in the manner of the operators' authors, and no library's own kernels ---


def torch_dcnv3(x: Any, offset: Any, mask: Any, groups: int) -> Any:
    import torch
    from torch.nn.functional import grid_sample, pad

    n, height, width, channels = x.shape
    image = pad(x, (0, 0, 1, 1, 1, 1))
    size = torch.tensor([width + 2, height + 2], device=x.device)

    def lattice(columns: int, rows: int) -> Any:
        sides = (torch.arange(side, device=x.device) for side in (columns, rows))
        return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)

    start = lattice(width, height).transpose(0, 1).reshape(1, height * width, 1, 1, 2)
    places = (start + lattice(3, 3).reshape(9, 2) + 0.5) / size
    grid = 2 * (places + offset.reshape(n, height * width, groups, 9, 2) / size) - 1
    grid = grid.transpose(1, 2).flatten(0, 1)
    image = image.permute(0, 3, 1, 2).reshape(n * groups, channels // groups, height + 2, width + 2)
    samples = grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    mask = mask.reshape(n, height * width, groups, 9).transpose(1, 2).reshape(n * groups, 1, height * width, 9)
    return (samples * mask).sum(-1).reshape(n, channels, height, width).permute(0, 2, 3, 1).contiguous()


def torch_attention(value: Any, sampling_locations: Any, attention_weights: Any) -> Any:
    import torch
    from torch.nn.functional import grid_sample

    n, queries = sampling_locations.shape[:2]
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)
    levels = []
    for i, ((h, w), pixels) in enumerate(zip(LEVELS, value.split([h * w for h, w in LEVELS], 1), strict=True)):
        image = pixels.permute(0, 2, 3, 1).reshape(n * HEADS, DEPTH, h, w)
        levels.append(grid_sample(image, grids[:, :, i], mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.transpose(1, 2).reshape(n * HEADS, 1, queries, len(LEVELS) * POINTS)
    y = (torch.stack(levels, -2).flatten(-2) * weights).sum(-1)
    return y.reshape(n, HEADS * DEPTH, queries).transpose(1, 2).contiguous()


# --- cases ---


class Case(NamedTuple):
    what: str
    operands: Callable[[], Arrays]  # float32, with grad_y
    forms: dict[str, Callable[..., Any]]  # by competitor: y of the operands, given by name


def dcnv3(what: str, batch: int, height: int, width: int, channels: int, groups: int) -> Case:
    """All have 3 x 3 taps and a padding of 1."""
    workload = Workload(what, batch, channels, channels, height, width, True, groups=channels, deform_groups=groups)

    def operands() -> Arrays:
        arrays = workload.operands()
        del arrays["weight"]
        return arrays

    def depthwise(x: jax.Array, offset: jax.Array, mask: jax.Array) -> jax.Array:
        by_tap = (*mask.shape[:3], groups, 3, 3)  # along the width first; the convolution's go along the height first
        offset = offset.reshape(*by_tap, 2).swapaxes(4, 5)[..., ::-1].reshape(offset.shape)
        mask = mask.reshape(by_tap).swapaxes(4, 5).reshape(mask.shape)
        weight = jnp.ones((3, 3, 1, channels), x.dtype)
        return jax_dcn.modulated_deform_conv2d(
            x, offset, mask, weight, padding=1, groups=channels, deform_groups=groups, data_format="NHWC"
        )

    forms = {
        "jax_dcn": lambda **operands: jax_dcn.dcnv3(**operands, padding=1, groups=groups),
        "depthwise": depthwise,
        "torch": lambda **operands: torch_dcnv3(**operands, groups=groups),
    }
    return Case(f"DCNv3, {what}: {batch} x {height} x {width} x {channels}, {groups} groups", operands, forms)


def dcnv4(what: str, batch: int, height: int, width: int, channels: int, groups: int) -> Case:
    like = dcnv3(what, batch, height, width, channels, groups)

    def operands() -> Arrays:
        arrays = like.operands()
        parts = [arrays.pop(name).reshape(batch, height, width, groups, -1) for name in ("offset", "mask")]
        joined = np.concatenate(parts, -1).reshape(batch, height, width, -1)
        arrays["offset_mask"] = np.pad(joined, [(0, 0)] * 3 + [(0, -joined.shape[-1] % 8)])
        return arrays

    forms = {"jax_dcn": lambda **operands: jax_dcn.dcnv4(**operands, padding=1, groups=groups)}
    return Case(like.what.replace("DCNv3", "DCNv4"), operands, forms)


def attention(what: str, queries: int | None = None) -> Case:
    """So many queries that look anywhere, or, with None, one for each pixel of the levels that looks around itself."""

    def operands() -> Arrays:
        rng = np.random.default_rng(0)
        sizes = np.array([(w, h) for h, w in LEVELS])
        count = sizes.prod(1).sum() if queries is None else queries
        shape = (1, count, HEADS, len(LEVELS), POINTS, 2)
        if queries is None:
            pixels = [np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).reshape(-1, 2) for w, h in sizes]
            places = np.concatenate([(p + 0.5) / size for p, size in zip(pixels, sizes, strict=True)])
            places = places[None, :, None, None, None] + 2 * rng.standard_normal(shape) / sizes[:, None]
        else:
            places = rng.random(shape)
        # Away from the lattice lines, as Workload's: though these coordinates are rounded, to the same side always.
        coordinates = (np.floor((places * sizes[:, None] - 0.5) * 512) + 0.5) / 512
        logits = rng.standard_normal((1, count, HEADS, len(LEVELS) * POINTS), np.float32)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        shapes = {"value": (1, sizes.prod(1).sum(), HEADS, DEPTH), "grad_y": (1, count, HEADS * DEPTH)}
        arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for name, shape in shapes.items()}
        return {name: np.asarray(array, np.float32) for name, array in arrays.items()} | {
            "sampling_locations": ((coordinates + 0.5) / sizes[:, None]).astype(np.float32),
            "attention_weights": weights.reshape(shape[:-1]),
        }

    forms = {
        "jax_dcn": lambda **operands: jax_dcn.multi_scale_deformable_attention(**operands, spatial_shapes=LEVELS),
        "torch": torch_attention,
    }
    return Case(f"attention, {what}: 4 levels, {HEADS} heads of {DEPTH}, {POINTS} points", operands, forms)


CASES = {
    "internimage_s1": dcnv3("InternImage-T, stage 1", 4, 56, 56, 64, 4),
    "internimage_s3": dcnv3("InternImage-T, stage 3", 4, 14, 14, 256, 16),
    "internimage_det": dcnv3("InternImage-T in a detector, stage 1", 1, 200, 336, 64, 4),
    "internimage_h": dcnv3("groups of 32 as InternImage-H's", 1, 50, 84, 320, 10),
    "channels_1": dcnv3("none in particular: 1 channel a group", 1, 64, 64, 32, 32),
    "channels_4": dcnv3("none in particular: 4 channels a group", 1, 64, 64, 32, 8),
    "flash_s1": dcnv4("FlashInternImage, stage 1", 4, 56, 56, 64, 4),
    "detr_encoder": attention("Deformable DETR's encoder at 800 x 1344, 22323 queries"),
    "detr_decoder": attention("Deformable DETR's decoder at 800 x 1344, 300 queries", 300),
}
# Too large for a CPU to repeat often.
LARGE = {"internimage_b64": dcnv3("InternImage-T, stage 1, of 64 images", 64, 56, 56, 64, 4)}


# --- measuring ---

DEVICE = "cuda" if jax.default_backend() == "gpu" else "cpu"
BFLOAT16 = "bfloat16"  # jax_dcn's, and the column's name
ORDER = (REFERENCE, "jax_dcn", BFLOAT16, "depthwise", "torch")  # the reference checks the others
NORMALISED = 1e-4  # torch's tolerance: it rounds coordinates that are relative to the image's size


def jax_competitor(case: Case, name: str, task: Task) -> tuple[jax.stages.Compiled, Run]:
    form = case.forms["depthwise" if name == "depthwise" else "jax_dcn"]
    arrays = {name: jnp.asarray(a, "float32" if name in WIDE else task.dtype) for name, a in task.arrays.items()}
    with plain_xla() if name == REFERENCE else contextlib.nullcontext():
        program = jax_program(form, task, [arrays], {}, kernels=name != REFERENCE)
    return program, Run(lambda: program([arrays]), jax.block_until_ready)


def torch_competitor(case: Case, task: Task) -> Run:
    import torch

    torch.set_num_threads(task.threads)
    return torch_run(lambda operands: case.forms["torch"](**operands), task, task.arrays, DEVICE)


def with_pauses(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Their seconds, in turn. Right after a run with large arrays the next ones take up to 1.5 times as long."""
    pause = functools.partial(time.sleep, 0.1)  # twice, as every turn has an untimed call
    seconds = in_turn([call for run in runs.values() for call in (pause, run)], rounds)
    return dict(zip(runs, seconds[1::2], strict=True))


def measure(name: str, backward: bool, rounds: int, left_out: set[str]) -> dict[str, Any]:
    case = (CASES | LARGE)[name]
    operands = Operands(case.operands())
    runs: dict[str, Run] = {}
    slow = set()
    expected: Results = {}
    errors = {}
    for label in ORDER:
        if label in left_out or (label in ("depthwise", "torch") and label not in case.forms):
            continue
        dtype = BFLOAT16 if label == BFLOAT16 else "float32"
        task = Task(None, backward, dtype, "NHWC", operands, threads=cores())
        runs[label] = run = torch_competitor(case, task) if label == "torch" else jax_competitor(case, label, task)[1]
        seconds, results = stopwatch(run)
        if SLOW < seconds < 4 * SLOW:  # perhaps only because it was the first
            seconds, results = stopwatch(run)
        if seconds > SLOW:
            slow.add(label)
        results = run.fetch(results[0])
        expected = expected or results
        try:
            errors[label] = check(results, expected, NORMALISED if label == "torch" else TOLERANCE[dtype])
        except ValueError as error:
            raise SystemExit(f"{name}, {DIRECTIONS[backward]}, {label}: {error}") from None
    # All take part in the first round, so that slow ones, which have no other, are compared within it.
    times = with_pauses(runs, 1)
    fast = {label: run for label, run in runs.items() if label not in slow}
    for label, more in with_pauses(fast, rounds - 1).items():
        times[label] += more
    return {
        "case": name,
        "direction": DIRECTIONS[backward],
        "errors": errors,
        "median_ms": {label: round(statistics.median(seconds) * 1e3, 4) for label, seconds in times.items()},
        "ms": {label: [round(s * 1e3, 4) for s in seconds] for label, seconds in times.items()},  # round by round
    }


def memory(name: str, backward: bool) -> dict[str, float]:
    """Of jax_dcn, what the page calls temporary and all, in a fresh process."""
    case = CASES[name]
    task = Task(None, backward, "float32", "NHWC", Operands(case.operands()))
    program, run = jax_competitor(case, "jax_dcn", task)
    return {"temporary": program.memory_analysis().temp_size_in_bytes / 2**20, "all": extra_memory(run)}


def memories(names: list[str]) -> dict[str, Any]:
    """The least of three processes: a machine may take pages of the operands back before the call reads them again."""
    if DEVICE != "cpu" or not Path("/proc/self/clear_refs").exists():  # Linux
        return {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return {
            name: {
                direction: min((pool.submit(memory, name, bool(i)).result() for _ in range(3)), key=lambda m: m["all"])
                for i, direction in enumerate(DIRECTIONS)
            }
            for name in names
        }


# --- the page ---


def table(measurements: list[dict[str, Any]]) -> str:
    ratios = {"/ gather": ("jax_dcn", REFERENCE), "/ depthwise": ("jax_dcn", "depthwise")}
    ratios |= {"/ torch": ("jax_dcn", "torch"), "bf16 / f32": (BFLOAT16, "jax_dcn")}
    header = ["case", "direction", *(f"{label} ms" for label in ("jax_dcn", *ORDER[2:], REFERENCE)), *ratios]
    rows = []
    for m in measurements:
        times = m["ms"]
        row = [m["case"], m["direction"]]
        row += [milliseconds(times.get(label, [])) for label in ("jax_dcn", *ORDER[2:], REFERENCE)]
        rows.append(row + [ratio(times.get(a, []), times.get(b, [])) for a, b in ratios.values()])
    measured = [any(column) for column in zip(*rows, strict=True)]
    header, *rows = [list(itertools.compress(cells, measured)) for cells in (header, *rows)]
    return markdown(header, rows)


def page(report: dict[str, Any]) -> str:
    cases = dict.fromkeys(m["case"] for m in report["measurements"])
    legend = (
        f"Medians of milliseconds and of jax_dcn's ratios, below 1 where it is faster; on a CPU all {cores()} threads; "
        "float32 unless it says otherwise; both: with the gradients of all operands. gather: plain XLA operations; "
        "depthwise: as a modulated deformable convolution with a weight of ones; torch: the published form, of "
        f"grid_sample; ~: measured once, as beyond {SLOW:.0f} seconds."
    )
    parts = [caption(report["environment"]), named(report["versions"])]
    described = "\n".join(f"- {name}: {(CASES | LARGE)[name].what}" for name in cases)
    parts += [described, legend, table(report["measurements"])]
    if report["memory_mib"]:
        header = ["jax_dcn", *(f"{d}, {what}" for d in DIRECTIONS for what in ("temporary", "all"))]
        rows = [
            [name, *(f"{entry[d][what]:.1f}" for d in DIRECTIONS for what in ("temporary", "all"))]
            for name, entry in report["memory_mib"].items()
        ]
        text = (
            "MiB above operands and results: temporary, the arrays of XLA's program in between; all, what the process "
            "took at its peak, with those and what the kernels allocate themselves"
        )
        parts += [f"{text}\n\n{markdown(header, rows)}"]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=listed(CASES | LARGE), default=list(CASES), metavar="NAME,...")
    parser.add_argument("--quick", action="store_true", help="float32 in three rounds, not seven")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / DEVICE)
    arguments = parser.parse_args()
    rounds, left_out = (3, {BFLOAT16}) if arguments.quick else (7, set())
    if not installed("torch"):
        left_out.add("torch")

    report = {"environment": environment(), "versions": versions(["jax", "torch"]), "tolerance": TOLERANCE}
    report |= {"measurements": [], "memory_mib": {}}
    for name, backward in itertools.product(arguments.cases, (False, True)):
        start = time.perf_counter()
        report["measurements"].append(measure(name, backward, rounds, left_out))
        print(f"{name}, {DIRECTIONS[backward]}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        write_files(arguments.out, {"family.json": report, "family.md": page(report)})
    report["memory_mib"] = memories(arguments.cases)
    write_files(arguments.out, {"family.json": report, "family.md": page(report)})
    print(page(report))


if __name__ == "__main__":
    main()
