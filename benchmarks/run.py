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
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from chart import draw
from competitors import BOTH, REFERENCE, SLOW, TOLERANCE, Competition, Key
from report import caption, cores, environment, installed, listed, markdown, milliseconds, named, ratio, write_files
from workers import Failure, Worker
from workloads import DIRECTIONS, WORKLOADS

# A run of LONG seconds has no use for a warm-up. One that is not SLOW has as many rounds as fit in BUDGET seconds.
LONG, BUDGET = 0.2, 2.0


def measure(workers: dict[int, Worker], case: str, direction: str, dtypes: list[str], rounds: int) -> list[dict]:
    """One entry for each competitor, dtype and number of threads."""
    firsts: dict[tuple[int, Key], float] = {}
    for threads, worker in sorted(workers.items(), reverse=True):
        slow = {key.competitor for (_, key), first in firsts.items() if first > SLOW}
        for key, first in worker.ask("prepare", case, direction == "both", dtypes, slow).items():
            firsts[threads, key] = first
    seconds = {turn: [first] if first > SLOW else [] for turn, first in firsts.items()}
    for i in range(rounds):
        for (threads, key), first in firsts.items():
            if first <= SLOW and i < max(2, BUDGET / first):
                seconds[threads, key].append(workers[threads].ask("timed", key, first < LONG))
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
    legend = (
        f"Medians of milliseconds and of ratios, {report['threads'][-1]} threads, float32 unless it says otherwise. "
        "conv: XLA's plain convolution of the same format; torch conv: torch's, in NCHW; engine: the faster of ONNX "
        "Runtime and OpenVINO; gather: plain XLA operations; ~: measured once, as beyond "
        f"{SLOW:.0f} seconds, before the others."
    )
    rows = table(report["measurements"], report["threads"])
    return "\n\n".join([caption(report["environment"]), named(report["versions"]), legend, rows]) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(__file__).parent / "results" / "cpu"
    parser.add_argument("--cases", type=listed(WORKLOADS), default=list(WORKLOADS), metavar="NAME,...")
    parser.add_argument("--directions", type=listed(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--dtypes", type=listed(BOTH), default=list(BOTH))
    parser.add_argument("--threads", type=listed(range(1, cores() + 1), int), default=[1, cores()])
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
    workers = {n: Worker(f"{n} threads", Competition, n, n == threads[-1], threads=n) for n in threads}
    report = {
        "environment": environment(),
        "versions": workers[threads[-1]].ask("versions"),
        "threads": threads,
        "tolerance": TOLERANCE,
        "measurements": [],
    }
    for case, direction in itertools.product(arguments.cases, arguments.directions):
        start = time.perf_counter()
        report["measurements"] += measure(workers, case, direction, arguments.dtypes, arguments.rounds)
        print(f"{case}, {direction}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        write_files(arguments.out, {"results.json": report, "table.md": page(report)})
    for worker in workers.values():
        worker.stop()
    if installed("matplotlib"):
        draw(report, arguments.out / "chart.svg")
    print(page(report))


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        raise SystemExit(str(failure)) from None
