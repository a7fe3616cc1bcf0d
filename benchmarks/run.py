"""Measures deformable convolution against what else there is: checks its numbers first, then times all in turn.

    python benchmarks/run.py [--cases r50_c3,edvr_m] [--quick] [--out FOLDER]

The competitors are those in competitors.py, as far as they are installed (`pip install -e ".[bench]"`). Each number of
threads has a process of its own, because XLA's is fixed when a process starts. Everything of a case and direction is
timed in turn, round after round, across the processes, so a machine that changes its speed changes it for all: the
ratios are the result. Writes results.json, table.md and chart.svg. All cases take a quarter of an hour on two quiet
cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from chart import draw
from competitors import BOTH, COMPETITORS, REFERENCE, Problem, Run, imported
from report import caption, cores, environment, markdown, paired_ratio, write_json
from workloads import CASES, Arrays, to_nchw, to_nhwc

from jax_dcn._operator import native

# Largest error against the plain-XLA form in float32, relative to the largest value. float32: a few hundred roundings.
# bfloat16: the rounding of the result, since everything up to it is in float32, but where the samples are rounded too.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2.0**-8}
if native.cpu_isa() == "avx512bf16":
    TOLERANCE["bfloat16"] *= 2

DIRECTIONS = ("forward", "both")

# A run of LONG seconds has no use for a warm-up. One beyond SLOW is measured once, in float32 with all threads only. In
# between there are as many rounds as fit in BUDGET seconds.
LONG, SLOW, BUDGET = 0.2, 2.0, 2.0


class Key(NamedTuple):
    dtype: str
    competitor: str


# --- in the worker ---


class Worker:
    """The competitors with one number of threads. Its public methods are what the parent may ask for."""

    def __init__(self, threads: int, all_threads: bool):
        self.threads, self.all_threads = threads, all_threads
        self.runs: dict[Key, Run] = {}

    def versions(self) -> dict[str, str]:
        modules = {name: imported(name) for competitor in COMPETITORS for name in competitor.modules}
        return {name: module.__version__ for name, module in modules.items() if module is not None}

    def prepare(self, case_name: str, backward: bool, dtypes: list[str], left_out: set[str]) -> dict[Key, float]:
        """Builds the competitors and returns the seconds that their first runs took.

        With all threads the plain-XLA form takes part, and the others' results are compared with its own. A competitor
        that turns out to be slow is left out with the next dtypes.
        """
        case = CASES[case_name]
        arrays = {"NHWC": case.operands()}
        arrays["NCHW"] = to_nchw(arrays["NHWC"])
        self.runs.clear()
        seconds = {}
        expected = None
        for competitor in COMPETITORS:
            for dtype in dtypes if competitor.name != REFERENCE else ["float32"]:
                if competitor.name in left_out or not competitor.takes_part(backward, dtype, self.all_threads):
                    continue
                operands = dict(arrays[competitor.data_format])
                grad_y = operands.pop("grad_y")
                run = competitor.build(Problem(case, backward, dtype, self.threads, operands, grad_y))
                first, result = stopwatch(run)
                if SLOW < first < 4 * SLOW:  # perhaps only because it was the first
                    first, result = stopwatch(run)
                seconds[Key(dtype, competitor.name)] = first
                self.runs[Key(dtype, competitor.name)] = run
                if first > SLOW:
                    left_out.add(competitor.name)
                if not self.all_threads or not competitor.deformable:
                    continue
                result = {name: np.asarray(array, np.float32) for name, array in result.items()}
                result = to_nhwc(result) if competitor.data_format == "NCHW" else result
                if expected is None:
                    expected = result
                check(f"{case_name}, {competitor.name}, {dtype}", result, expected, TOLERANCE[dtype])
        return seconds

    def timed(self, key: Key, warm_up: bool) -> float:
        # Idle threads of the competitor before may spin for some milliseconds before they sleep.
        time.sleep(0.01)
        if warm_up:
            self.runs[key]()
        return stopwatch(self.runs[key])[0]


def stopwatch(run: Run) -> tuple[float, dict[str, Any]]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def check(label: str, actual: Arrays, expected: Arrays, tolerance: float) -> None:
    if actual.keys() != expected.keys():
        raise ValueError(f"{label}: has {sorted(actual)}, expected {sorted(expected)}")
    for name, array in actual.items():
        error = np.abs(array - expected[name]).max() / np.abs(expected[name]).max()
        if not error <= tolerance:  # NaN fails too
            what = "result" if name == "y" else f"gradient of {name}"
            raise ValueError(f"{label}: the {what} is off by {error:.1e}, allowed is {tolerance:.1e}")


def serve(connection: Connection, threads: int, all_threads: bool) -> None:
    """Answers the parent's requests, (method, arguments), until it closes its end."""
    worker = Worker(threads, all_threads)
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            try:
                connection.send((getattr(worker, method)(*arguments), None))
            except Exception:
                connection.send((None, traceback.format_exc()))


# --- in the parent ---


class Process:
    """A worker in a process that has `threads` cores, and libraries that use as many threads."""

    def __init__(self, threads: int, all_threads: bool):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, threads, all_threads), daemon=True)
        # XLA goes by NPROC, OpenMP by its own; KMP_BLOCKTIME ends the spinning of Intel's after 5 ms instead of 200.
        os.environ.update(NPROC=str(threads), OMP_NUM_THREADS=str(threads), KMP_BLOCKTIME="5")
        with pinned(threads):
            self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        self.connection.send((method, arguments))
        answer, error = self.connection.recv()
        if error:
            raise SystemExit(error)
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join()


@contextlib.contextmanager
def pinned(count: int) -> Iterator[None]:
    """Processes started within it have `count` cores, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(available)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, available)


def measure(processes: dict[int, Process], case: str, direction: str, dtypes: list[str], rounds: int) -> list[dict]:
    """One entry for each competitor, dtype and number of threads."""
    firsts: dict[tuple[int, Key], float] = {}
    for threads, process in sorted(processes.items(), reverse=True):
        slow = {key.competitor for (_, key), first in firsts.items() if first > SLOW}
        for key, first in process.ask("prepare", case, direction == "both", dtypes, slow).items():
            firsts[threads, key] = first
    seconds = {turn: [first] if first > SLOW else [] for turn, first in firsts.items()}
    for i in range(rounds):
        for (threads, key), first in firsts.items():
            if first <= SLOW and i < max(2, BUDGET / first):
                seconds[threads, key].append(processes[threads].ask("timed", key, first < LONG))
    return [
        {
            "case": case,
            "direction": direction,
            "dtype": key.dtype,
            "threads": threads,
            "competitor": key.competitor,
            "median_ms": round(statistics.median(times) * 1e3, 4),
            "ms": [round(t * 1e3, 4) for t in times],  # round by round
        }
        for (threads, key), times in seconds.items()
    ]


def table(measurements: list[dict], threads: list[int]) -> str:
    """jax_dcn's milliseconds in float32 with all threads, and ratios: below 1, jax_dcn is faster."""
    times = {(m["case"], m["direction"], m["threads"], m["dtype"], m["competitor"]): m["ms"] for m in measurements}
    formats = ("NHWC", "NCHW")
    few, many = threads[0], threads[-1]
    header = ["case", "direction"]
    for data_format in formats:
        header += [f"{data_format} ms", "/ conv", "/ engine"]
    header += ["NHWC / torch conv", "gather / NHWC", "Paddle / NHWC"]
    header += [f"{few} / {many} threads", "bf16 / f32", "bf16 / conv"]
    rows = []
    for case, direction in dict.fromkeys((m["case"], m["direction"]) for m in measurements):

        def ms(*names, threads=many, dtype="float32", at=(case, direction)) -> list[float]:
            """The times of the fastest of the named ones, round by round; none if none was measured."""
            found = [times[*at, threads, dtype, name] for name in names if (*at, threads, dtype, name) in times]
            return min(found, key=statistics.median, default=[])

        row = [case, direction]
        for data_format in formats:
            ours = ms(f"jax_dcn {data_format}")
            row += [milliseconds(ours), ratio(ours, ms(f"XLA conv {data_format}"))]
            row += [ratio(ours, ms("ONNX Runtime", "OpenVINO"))]
        ours, bfloat16 = ms("jax_dcn NHWC"), ms("jax_dcn NHWC", dtype="bfloat16")
        row += [ratio(ours, ms("torch conv")), ratio(ms(REFERENCE), ours), ratio(ms("Paddle"), ours)]
        row += [ratio(ms("jax_dcn NHWC", threads=few), ours) if few < many else "", ratio(bfloat16, ours)]
        row += [ratio(bfloat16, ms("XLA conv NHWC", dtype="bfloat16"))]
        rows.append(row)
    measured = [any(column) for column in zip(*rows, strict=True)]
    header, *rows = [list(itertools.compress(cells, measured)) for cells in (header, *rows)]
    return markdown(header, rows)


def page(report: dict[str, Any]) -> str:
    others = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    legend = (
        f"Medians of milliseconds and of ratios, {report['threads'][-1]} threads, float32 unless it says otherwise. "
        "conv: XLA's plain convolution of the same format; torch conv: torch's, in NCHW; engine: the faster of ONNX "
        "Runtime and OpenVINO; gather: plain XLA operations; ~: measured once, as beyond "
        f"{SLOW:.0f} seconds, before the others."
    )
    rows = table(report["measurements"], report["threads"])
    return "\n\n".join([caption(report["environment"]), others, legend, rows]) + "\n"


def milliseconds(times: list[float]) -> str:
    if not times:
        return ""
    value = statistics.median(times)
    return once(times) + (f"{value:.1f}" if value >= 10 else f"{value:.2f}")


def ratio(a: list[float], b: list[float]) -> str:
    return once(a, b) + f"{paired_ratio(a, b):.2f}" if a and b else ""


def once(*measured: list[float]) -> str:
    return "~" if any(len(times) == 1 for times in measured) else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def choice(kind: type, allowed: list | None = None):
        def parse(text: str) -> list:
            values = [kind(value) for value in text.split(",")]
            for value in values:
                if allowed is not None and value not in allowed:
                    raise argparse.ArgumentTypeError(f"{value} is none of {', '.join(map(str, allowed))}")
            return values

        return parse

    default_out = Path(__file__).parent / "results" / "cpu"
    parser.add_argument("--cases", type=choice(str, list(CASES)), default=list(CASES), metavar="NAME,...")
    parser.add_argument("--directions", type=choice(str, list(DIRECTIONS)), default=list(DIRECTIONS))
    parser.add_argument("--dtypes", type=choice(str, list(BOTH)), default=list(BOTH))
    parser.add_argument("--threads", type=choice(int, list(range(1, cores() + 1))), default=[1, cores()])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="float32 with all threads in three rounds")
    parser.add_argument("--out", type=Path, default=default_out, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.dtypes, arguments.threads, arguments.rounds = ["float32"], [cores()], 3
    return arguments


def main() -> None:
    arguments = parse_arguments()
    threads = sorted(set(arguments.threads))
    processes = {count: Process(count, count == threads[-1]) for count in threads}
    report = {
        "environment": environment(),
        "versions": processes[threads[-1]].ask("versions"),
        "threads": threads,
        "tolerance": TOLERANCE,
        "measurements": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for case in arguments.cases:
        for direction in arguments.directions:
            start = time.perf_counter()
            report["measurements"] += measure(processes, case, direction, arguments.dtypes, arguments.rounds)
            print(f"{case}, {direction}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            write_json(arguments.out / "results.json", report)
            text = page(report)
            (arguments.out / "table.md").write_text(text)
    for process in processes.values():
        process.close()
    if imported("matplotlib"):
        draw(report, arguments.out / "chart.svg")
    print(text)


if __name__ == "__main__":
    main()
