"""Measures the CUDA kernels against cuDNN's plain convolution, torchvision and deformops: numbers first, then times.

    python benchmarks/gpu.py [--cases r50_c3,edvr_m@4] [--batches 16,1] [--modes bfloat16,tf32] [--out FOLDER]
    python benchmarks/gpu.py --site FOLDER --baseline FOLDER   # two builds, as pip install --target makes them

Needs a GPU; torchvision and deformops take part if they are installed. A timed call computes several times, each time
on arrays of its own: so launches hardly count, and no input is found in the cache. Several calls are queued and waited
for once. The calls of a case are timed in turn, round after round, those of the two builds too, each of which has a
process. What --seconds do not suffice for is left out, and named. Writes results.json and table.md, which judges the
goals of goals.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goals import GOALS, OWN, judged
from report import caption, listed, markdown, milliseconds, named, ratio, write_files
from workers import Failure, Worker, ask_all
from workloads import DIRECTIONS, GPU_WORKLOADS

LISTED = ("r50_c4_76", "r50_c4", "r50_c3", "r50_c5", "r50_c4_s2", "edvr_m", "basicvsrpp", "x101", "depthwise")
LISTED += ("bevdepth", "dekr", "train")
MODES = ("bfloat16", "float16", "tf32", "float32")
OTHERS = ("plain convolution", "torchvision", "deformops")
ALTERNATIVES = (*OTHERS, "jax_dcn NCHW", "grad_x", "deterministic grad_x")
ROUNDS = 7

# Where the host may be what is slow, also measured without command buffers.
HOST_BOUND, WITHOUT_COMMAND_BUFFERS = ("r50_c4", 1), "without command buffers"


# --- processes ---


def measurer(site: str | None, few_tiles: bool) -> Any:
    """A Measurer of the build in the folder `site`."""
    if site is not None:
        sys.path.insert(0, site)
    from gpu_runs import Measurer  # in the worker only: nothing here needs JAX

    return Measurer(few_tiles)


class Build(Worker):
    """A build of jax_dcn, in a process of its own."""

    def __init__(self, name: str, site: str | None, few_tiles: bool):
        super().__init__(name, measurer, site, few_tiles)

    def usable(self) -> Build:
        """With a process that can compute, and has not lost its GPU to an error."""
        try:
            if self.ask("usable"):
                return self
        except Failure as failure:
            print(failure, file=sys.stderr, flush=True)
        self.stop()
        return self


# --- measuring ---


def competitors(name: str, batch: int, direction: str, alternatives: list[str], goals: bool) -> list[str]:
    """Who takes part: ours in NHWC and the alternatives, with `goals` only those that goals of the case name."""
    of_case = [goal for goal in GOALS if (goal.case, goal.batch) == (name, batch)]
    if goals and of_case:
        named = {competitor for goal in of_case if goal.direction == direction for competitor in goal.competitors}
        alternatives = [alternative for alternative in alternatives if alternative in named]
    more = [WITHOUT_COMMAND_BUFFERS] if (name, batch) == HOST_BOUND else []
    return [OWN, *alternatives, *more]


def measure(
    builds: list[Build], name: str, batch: int, backward: bool, mode: str, competitors: list[str]
) -> list[dict[str, Any]]:
    """The entries of all builds, with the times of each round. The first build's process measures the others too."""
    entries: list[tuple[Build, list[dict[str, Any]]]] = []
    ask_all(builds, "take_up", name, batch)  # on the host alone; where it fails, the next request will say so
    for build in builds:
        own = [competitor for competitor in competitors if build is builds[0] or competitor == OWN]
        try:
            prepared = build.usable().ask("prepare", name, batch, backward, mode, own)
        except Failure as failure:
            entry = {"case": name, "batch": batch, "direction": DIRECTIONS[backward], "mode": mode}
            prepared = [entry | {"competitor": OWN, "failure": str(failure)}]
        entries.append((build, [entry | {"build": build.name} for entry in prepared]))
    for _ in range(ROUNDS):
        for build, prepared in entries:
            timed = [entry for entry in prepared if "failure" not in entry]
            if not timed:
                continue
            try:
                times = build.ask("round")
            except Failure as failure:
                for entry in timed:
                    entry["failure"] = str(failure)
                continue
            for entry in timed:
                found = times[entry["position"]]
                if isinstance(found, str):
                    entry["failure"] = found
                    continue
                entry.setdefault("milliseconds", []).append(1e3 * found[0])
                entry.setdefault("host_milliseconds", []).append(1e3 * found[1])
    every = [entry for _, prepared in entries for entry in prepared]
    for entry in every:
        if "failure" in entry:  # its times may be of anything
            entry.pop("milliseconds", None), entry.pop("host_milliseconds", None)
    return every


def own_failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of the build itself that failed: not those of others, or of the baseline."""
    failures = [m for m in report["measurements"] if "failure" in m and m["build"] == "this"]
    return [m for m in failures if m["competitor"] not in OTHERS]


# --- the report ---


def table(measurements: list[dict[str, Any]], baseline: bool) -> str:
    def key(m: dict[str, Any]) -> tuple[Any, ...]:
        return m["case"], m["batch"], m["direction"], m["mode"]

    by_key: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for m in measurements:
        name = m["competitor"] if m["build"] == "this" else m["build"]
        by_key.setdefault(key(m), {})[name] = m
    header = ["case", "batch", "", "dtype", "jax_dcn, ms", "host, ms", "TFLOP/s", "/ conv"]
    header += ["/ baseline"] * baseline + ["/ torchvision", "/ deformops", "NCHW /", "no graphs /"]
    header += ["deterministic /", "error"]
    rows = []
    for (name, batch, direction, mode), found in by_key.items():

        def times(competitor: str, found: dict = found) -> list[float]:
            return found.get(competitor, {}).get("milliseconds", [])

        def against(competitor: str, times: Callable = times) -> str:
            return ratio(times(OWN), times(competitor))

        own = found.get(OWN, {})
        products = 3 if direction == "both" else 1
        flop = 2 * products * dataclasses.replace(GPU_WORKLOADS[name], batch=batch).multiply_adds
        rate = f"{flop / statistics.median(times(OWN)) / 1e9:.0f}" if times(OWN) else ""
        row = [name, str(batch), direction, mode, milliseconds(times(OWN)) or "FAILED"]
        row += [milliseconds(own.get("host_milliseconds", [])), rate, against("plain convolution")]
        row += [against("baseline")] * baseline + [against("torchvision"), against("deformops")]
        row += [ratio(times(other), times(OWN)) for other in ("jax_dcn NCHW", WITHOUT_COMMAND_BUFFERS)]
        row.append(ratio(times("deterministic grad_x"), times("grad_x")))
        rows.append([*row, f"{own['error']:.1e}" if "error" in own else ""])
    return markdown(header, rows) if rows else "Nothing was measured."


LEGEND = """Medians of {rounds} rounds. host: until the first call has returned, its work being under way; near
jax_dcn's time, the host is what is slow. TFLOP/s: of the products alone, 2 per multiply-add, three products with the
backward pass. / conv, / baseline, / torchvision, / deformops: jax_dcn's time, in NHWC, relative to that of cuDNN's
plain convolution of the same shape through JAX in NHWC, of the other build, of torchvision in NCHW, of deformops'
Triton kernels in NHWC; torchvision, which has no bfloat16, computes in float16 there. NCHW /, no graphs /: of jax_dcn
in NCHW, or without XLA's command buffers, relative to it. deterministic /: of the gradient of x alone, asked to be the
same bits in every run, relative to that without. error: of jax_dcn, relative to the largest value, against plain XLA in
float32. The others' results are compared too, those of torchvision in float16 with those of the coordinates that it
rounds to float16."""


def page(report: dict[str, Any]) -> str:
    parts = []
    for name, environment in report["builds"].items():
        lines = [environment["card"], environment["gpu"], named(environment["versions"])]
        parts += [f"Build: {name}." if len(report["builds"]) > 1 else "", caption(environment, lines)]
    parts.append(judged(report["measurements"]))
    parts.append(LEGEND.format(rounds=ROUNDS).replace("\n", " "))
    if report["few_tiles"]:
        parts.append("Of deformops' 40 choices of tiles 5 were tried, as each takes seconds to compile.")
    if report["under_way"]:
        parts.append(f"Stopped in {report['under_way']}.")
    if report["left_out"]:
        parts.append(f"Left out for lack of time: {', '.join(report['left_out'])}.")
    parts.append(table(report["measurements"], "baseline" in report["builds"]))
    failures = [m for m in report["measurements"] if "failure" in m]
    labels = [", ".join(m[key] for key in ("direction", "mode", "competitor", "build")) for m in failures]
    lines = zip(failures, labels, strict=True)
    parts.append("\n".join(f"- {m['case']}, batch {m['batch']}, {label}: {m['failure']}" for m, label in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def cases(text: str) -> list[tuple[str, int | None]]:
        parts = [part.partition("@") for part in text.split(",")]
        for name, *_ in parts:
            listed(GPU_WORKLOADS)(name)
        return [(name, int(batch) if batch else None) for name, _, batch in parts]

    def batches(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    def site(text: str) -> str:
        if not (Path(text) / "jax_dcn").is_dir():
            raise argparse.ArgumentTypeError(f"there is no jax_dcn in {text}")
        return text

    default_out = Path(__file__).parent / "results" / "gpu"
    parser.add_argument("--site", type=site, help="folder of the build to measure (default: what Python finds)")
    parser.add_argument("--baseline", type=site, metavar="SITE", help="folder of another build, to compare with")
    default, every = [(name, None) for name in LISTED], ", ".join(GPU_WORKLOADS)
    parser.add_argument("--cases", type=cases, default=default, metavar="NAME[@BATCH],...", help=every)
    parser.add_argument("--batches", type=batches, default=[16, 1], help="of cases without @BATCH")
    parser.add_argument("--directions", type=listed(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--modes", type=listed(MODES), default=list(MODES))
    parser.add_argument("--alternatives", type=listed(ALTERNATIVES), default=list(ALTERNATIVES), metavar="NAME,...")
    parser.add_argument("--goals", action="store_true", help="where goals.py has a case, only alternatives it names")
    parser.add_argument("--few-tiles", action="store_true", help="have deformops try 5 of its 40 choices of tiles")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after so many")
    parser.add_argument("--out", type=Path, default=default_out, help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def write(folder: Path, report: dict[str, Any]) -> None:
    write_files(folder, {"results.json": report, "table.md": page(report)})


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    builds = [Build("this", arguments.site, arguments.few_tiles)]
    if arguments.baseline is not None:
        builds.append(Build("baseline", arguments.baseline, arguments.few_tiles))
    report: dict[str, Any] = {"few_tiles": arguments.few_tiles, "left_out": [], "measurements": []}
    report["under_way"] = None  # what is being measured
    environments = ask_all(builds, "environment")
    for failure in environments:
        if isinstance(failure, Failure):
            raise SystemExit(str(failure))
    report["builds"] = {build.name: environment for build, environment in zip(builds, environments, strict=True)}
    every_batch = [(name, batch) for batch in arguments.batches for name, own in arguments.cases if own is None]
    of_one = [(name, own) for name, own in arguments.cases if own is not None]
    for name, batch in (*of_one, *every_batch):
        for mode, direction in itertools.product(arguments.modes, arguments.directions):
            label = f"{name}, batch {batch}, {mode}, {direction}"
            if time.perf_counter() - start > arguments.seconds:
                report["left_out"].append(label)
                continue
            taking_part = competitors(name, batch, direction, arguments.alternatives, arguments.goals)
            report["under_way"] = label
            write(arguments.out, report)
            report["measurements"] += measure(builds, name, batch, direction == "both", mode, taking_part)
            print(f"{label}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    report["under_way"] = None
    write(arguments.out, report)
    print(page(report))
    for build in builds:
        build.stop()
    if own_failures(report):
        raise SystemExit(f"{len(own_failures(report))} of jax_dcn's runs failed")


if __name__ == "__main__":
    main()
