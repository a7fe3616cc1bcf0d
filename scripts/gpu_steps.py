"""The steps of scripts/gpu_check: what each runs, and what it makes of the output."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import goals
from gpu import own_failures
from gpu_smoke import CHECKS, MODES, to_report
from report import markdown

TOP = Path(__file__).resolve().parents[1]

# What the steps leave, beside summary.md.
FILES = ("headline.json", "cases.json", "smoke.txt", "benchmark.txt", "tests.txt", "sanitizer.txt", "ncu.txt")

# Of benchmarks/workloads.py.
HEADLINE = "r50_c4_76"

# Without a wheel; in place of the limit of "install".
BUILD_LIMIT = 300

# Tests that are about the host and would only take a GPU's time: checkpoints, pictures, ONNX, texts, imports,
# instruction sets, and processes on CPUs. test_train_distributed also wants a data set that GPU machines may lack.
HOST_TESTS = (
    "test_checkpoints",
    "test_mmcv",
    "test_plot",
    "test_onnx",
    "test_guide",
    "test_imports",
    "test_native",
    "test_errors",
    "test_gpu_benchmark",
    "test_gpu_check",
    "test_devices",
    "test_train_distributed",
)
# Tests that compile large programs or very many, which takes minutes on GPUs.
SLOW_TESTS = ("test_models", "test_examples", "test_random")

# Of our kernels alone, and of no call of CUDA's API, of which XLA makes some that may fail.
SANITIZER = (
    "compute-sanitizer --tool {tool} --kernel-name kns=jax_dcn --report-api-errors no --error-exitcode 9 "
    "--print-limit 20"
)

# Nsight Compute's names, and ours with a factor.
METRICS = {
    "gpu__time_duration.sum": ("ms", 1e-6),
    "launch__registers_per_thread": ("registers", 1),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("warps, %", 1),
    "smsp__inst_executed.sum": ("instructions, M", 1e-6),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("issue, %", 1),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("tensor pipe, %", 1),
    "l1tex__data_pipe_lsu_wavefronts.sum": ("L1 wavefronts, M", 1e-6),
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": ("L1, %", 1),
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": ("of shared memory, M", 1e-6),
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": ("bank conflicts, M", 1e-6),
    "l1tex__t_sector_pipe_lsu_mem_global_op_ld_hit_rate.pct": ("L1 hits, %", 1),
    "lts__t_bytes.sum": ("L2, GB", 1e-9),
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": ("L2, %", 1),
    "lts__t_sectors_op_red.sum": ("L2 sectors of atomics, M", 1e-6),
    "lts__d_atomic_input_cycles_active.avg.pct_of_peak_sustained_elapsed": ("L2 atomics, %", 1),
    "dram__bytes.sum": ("memory, GB", 1e-9),
}


class NotRun(Exception):
    """Why a step has no result, and perhaps details, as of a Result."""


class Failed(Exception):
    """What is wrong, and perhaps details."""


class Stopped(Exception):
    """The step's time was over."""


class Result(NamedTuple):
    text: str  # in the table of steps
    details: str = ""  # Markdown
    complete: bool = True  # or stopped at the limit, with nothing wrong until then


class Machine:
    """What all steps share."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.arguments, self.scratch = arguments, scratch
        self.out: Path = arguments.out
        self.python = arguments.python
        self.site = scratch / "site"
        self.baseline = scratch / "baseline" if arguments.baseline else None
        self.deadline = 0.0  # of the step
        self.environment: dict[str, Any] | None = None
        self.measurements: list[dict[str, Any]] = []
        self.variables = {
            **os.environ,
            # Nothing may fall back to the CPU unseen.
            "JAX_PLATFORMS": "cuda,cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(self.site), *python_path()]),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/nvidia/bin"]),
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def goals(self) -> str:
        """What came of them, as far as the steps have measured."""
        return goals.judged(self.measurements) if self.measurements else ""

    def run(self, command: list[Any], log: Path, **variables: str) -> int:
        """The exit status of a command, whose output is appended to `log`, or Stopped at the step's deadline."""
        with open(log, "a") as output:
            print(f"$ {shlex.join(map(str, command))}", file=output, flush=True)
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.scratch,  # where Python does not find the sources, which have no native modules
                env={**self.variables, **variables},
                process_group=0,
            )
        try:
            return process.wait(max(0, self.left()))
        except subprocess.TimeoutExpired:
            raise Stopped from None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            except ProcessLookupError:
                pass
            process.wait()

    def tool(self, name: str) -> str:
        path = shutil.which(name, path=self.variables["PATH"])
        if path is None:
            raise NotRun(f"there is no {name}")
        return path


def python_path() -> list[str]:
    return [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def fenced(log: Path, lines: int = 25) -> str:
    return f"```\n{tail(log, lines)}\n```"


# --- the steps ---


def install(machine: Machine) -> Result:
    """The wheel goes into a folder, and JAX must find the GPU and the kernels."""
    log, arguments = machine.scratch / "install.txt", machine.arguments
    if machine.run([machine.python, "-c", "import jax"], log) != 0:
        raise NotRun(f"{machine.python} has no JAX; set PYTHON to one that has", fenced(log))
    if arguments.wheel is None:
        if machine.run([machine.python, "-c", "import jax; jax.devices('cuda')"], log) != 0:
            raise NotRun("JAX finds no GPU", fenced(log))
        options = {"CUDAARCHS": os.environ.get("CUDAARCHS", "native"), "CMAKE_ARGS": "-DJAX_DCN_CUDA=ON"}
        try:
            pip_install(machine, machine.site, TOP, log, "--no-build-isolation", **options)
        except Stopped:
            raise Failed("building took too long; build a wheel beforehand: scripts/gpu_wheel", fenced(log)) from None
    else:
        pip_install(machine, machine.site, arguments.wheel, log)
    if machine.baseline is not None:
        pip_install(machine, machine.baseline, arguments.baseline, log)
    machine.environment, text = describe(machine, log), "commit unknown"
    if machine.environment is not None:
        text = f"commit {machine.environment['commit'][:12]}"
    return Result(text)


def pip_install(machine: Machine, site: Path, what: Path, log: Path, *more: str, **variables: str) -> None:
    command = [machine.python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site]
    if machine.run([*command, *more, what], log, **variables) == 0:
        return
    hint = ""
    if "is not a supported wheel" in tail(log):
        hint = f": it is not for {machine.python}; build it with PYTHON of the same version, or set PYTHON"
    raise Failed(f"pip could not install {what.name}{hint}", fenced(log))


def describe(machine: Machine, log: Path) -> dict[str, Any] | None:
    """The environment, as the benchmark has it. None if there was no time for it, which is no reason to end here."""
    found = machine.scratch / "environment.json"
    code = (
        f"import sys, json; sys.path.insert(0, {str(TOP / 'benchmarks')!r}); import gpu_runs; "
        f"json.dump(gpu_runs.Measurer(False).environment(), open({str(found)!r}, 'w'))"
    )
    try:
        machine.run([machine.python, "-c", code], log)
    except Stopped:
        return None
    if found.exists():
        return json.loads(found.read_text())
    if re.search("no GPU|Unable to initialize backend|Unknown backend", tail(log)):
        raise NotRun("JAX finds no GPU", fenced(log))
    raise Failed("the package does not work", fenced(log))


def smoke_reports(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text(errors="replace").splitlines()
    return [report for line in lines if (report := to_report(line))]


def smoke(machine: Machine) -> Result:
    """Every kernel in every dtype, forward and backward, against plain XLA."""
    log = machine.out / "smoke.txt"
    stopped = False
    try:
        machine.run([machine.python, TOP / "scripts" / "gpu_smoke.py"], log)
    except Stopped:
        stopped = True
    return judged(smoke_reports(log), [(mode, *check) for mode in MODES for check in CHECKS], stopped, log)


def judged(reports: list[dict[str, Any]], wanted: list[tuple[Any, ...]], stopped: bool, log: Path) -> Result:
    """The result of smoke checks: a table of the errors, and what is wrong."""
    found = {(r["mode"], r["case"], r["deterministic"]): r for r in reports}
    modes = list(dict.fromkeys(mode for mode, *_ in wanted))

    def cell(key: tuple[Any, ...]) -> str:
        if key not in found:
            return "not run" if key in wanted else ""
        return "WRONG" if found[key]["wrong"] else f"{found[key]['error']:.1e}"

    checks = list(dict.fromkeys(tuple(check) for _, *check in wanted))
    rows = [
        [case + ", deterministic" * deterministic, *(cell((mode, case, deterministic)) for mode in modes)]
        for case, deterministic in checks
    ]
    wrong = [r for r in reports if r["wrong"]]
    details = [markdown(["largest errors", *modes], rows)]
    details += [
        f"- {r['case']}{', deterministic' * r['deterministic']}, {r['mode']}: {'; '.join(r['wrong'])}" for r in wrong
    ]
    text = f"{len(found) - len(wrong)} of {len(wanted)} checks passed"
    if wrong:
        raise Failed(f"{text}, {len(wrong)} wrong", "\n".join(details))
    if len(found) < len(wanted):
        if not found:
            details.append(fenced(log))
        raise Failed(f"{text}, the others were not run" + ": the time was over" * stopped, "\n".join(details))
    return Result(text, "\n".join(details))


def benchmark(machine: Machine, name: str, *arguments: str, seconds: float) -> Result:
    log, folder = machine.out / "benchmark.txt", machine.scratch / name
    command = [machine.python, TOP / "benchmarks" / "gpu.py", "--site", machine.site, "--out", folder]
    if machine.baseline is not None:
        command += ["--baseline", machine.baseline]
    status = None
    try:
        status = machine.run([*command, *arguments, "--seconds", f"{seconds:.0f}"], log)
    except Stopped:
        pass
    if not (folder / "results.json").exists():
        raise Failed("the time was over" if status is None else tail(log, 3))
    shutil.copyfile(folder / "results.json", machine.out / f"{name}.json")
    report = json.loads((folder / "results.json").read_text())
    page = (folder / "table.md").read_text()
    page = page[page.index("Medians of") :]  # without the environment and the goals, which the summary has
    if "baseline" in report["builds"]:
        page = f"Baseline: commit {report['builds']['baseline']['commit']}. {page}"
    machine.measurements += report["measurements"]
    measured = [m for m in report["measurements"] if "milliseconds" in m]
    failures = own_failures(report)
    text = f"{len(measured)} measured" + f", {len(report['left_out'])} left out" * bool(report["left_out"])
    if failures:
        raise Failed(f"{text}, {len(failures)} of jax_dcn's failed", page)
    if status is None:  # long after it should have begun nothing more
        raise Failed(f"{text}, stopped in {report['under_way']}", page)
    if status != 0:
        raise Failed(f"{text}, exit status {status}", page)
    if not measured:
        raise NotRun("the time was over before anything was measured")
    return Result(text, page, complete=not report["left_out"])


def headline(machine: Machine) -> Result:
    """ResNet's c4, 16 images, in 3 dtypes, beside plain convolutions and torchvision."""
    options = ["--cases", HEADLINE, "--batches", "16", "--modes", "bfloat16,float16,tf32"]
    options += ["--alternatives", "plain convolution,torchvision,jax_dcn NCHW,grad_x,deterministic grad_x"]
    return benchmark(machine, "headline", *options, seconds=machine.left() - 15)


def cases(machine: Machine) -> Result:
    """The other cases in bfloat16, those with goals first; as many as fit."""
    listed = "r50_c4@1,r50_c3,edvr_m,x101,depthwise,r50_c5,dekr,train,bevdepth,basicvsrpp,r50_c4_s2"
    options = ["--cases", listed, "--batches", "16", "--modes", "bfloat16", "--goals"]
    options += ["--alternatives", "plain convolution,torchvision"]
    return benchmark(machine, "cases", *options, seconds=machine.left() - 15)


def family(machine: Machine) -> Result:
    """DCNv3 and the attention beside plain XLA and torch's plain forms."""
    log, folder = machine.out / "benchmark.txt", machine.scratch / "family"
    command = [machine.python, TOP / "benchmarks" / "family.py", "--cases", "internimage_b64,detr_encoder"]
    try:
        status = machine.run([*command, "--quick", "--out", folder], log)
    except Stopped:
        status = None
    page = folder / "family.md"
    if not page.exists():
        raise NotRun("the time was over") if status is None else Failed(tail(log, 3))
    text = page.read_text()
    details = text[text.index("Medians of") :]
    if status:
        raise Failed(tail(log, 3), details)
    return Result("measured", details, complete=status == 0)


def tests(machine: Machine) -> Result:
    """The tests on the kernels, but those about the host and the slow ones; as many as fit."""
    log = machine.out / "tests.txt"
    command = [machine.python, "-m", "pytest", TOP / "tests", "-c", TOP / "pyproject.toml", "--rootdir", TOP]
    command += ["-o", f"cache_dir={machine.scratch / 'cache'}", "-p", "no:benchmark", "-v", "-k", "not xla"]
    command += ["--durations", "15"]
    for name in ("cuda", *(f"{name}.py" for name in (*HOST_TESTS, *SLOW_TESTS))):
        command += ["--ignore", TOP / "tests" / name]
    probe = [machine.python, "-c", "import pytest, hypothesis, onnxruntime, flax"]
    if machine.run(probe, log) != 0:
        raise NotRun(tail(log, 1))
    if machine.run([machine.python, "-c", "import xdist"], log) == 0:
        command += ["-n", str(min(16, os.cpu_count() or 1))]
    # As users compile, but for the autotuning, which takes far longer than the small programs run.
    options = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    options |= {"JAX_DCN_ALLOWED_SKIPS": "processor|import", "JAX_DCN_FAILURES": str(log)}
    status = None
    try:
        status = machine.run(command, log, **options)
    except Stopped:
        pass
    outcomes = test_outcomes(log.read_text(errors="replace"))
    counts = {verdict: list(outcomes.values()).count(verdict) for verdict in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    text = ", ".join(f"{count} {verdict.lower()}" for verdict, count in counts.items() if count)
    wrong = [f"- {verdict} {name}" for name, verdict in outcomes.items() if verdict in ("FAILED", "ERROR")]
    left_out = f"Left out: {', '.join((*HOST_TESTS, *SLOW_TESTS))}, and tests of the plain-XLA form."
    details = "\n".join([left_out, *wrong])
    if wrong or status:
        raise Failed((text or tail(log, 3)) + ", stopped at the limit" * (status is None), details)
    if not outcomes:
        raise NotRun(f"no test ended: {tail(log, 1)}")
    return Result(text, details, complete=status is not None)


def test_outcomes(text: str) -> dict[str, str]:
    """What pytest -v says of each test as it goes, with pytest-xdist or without."""
    verdict = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
    parallel = re.findall(rf"^\[gw\d+\] \[ *\d+%\] {verdict} (\S+::.*?) *$", text, re.MULTILINE)
    serial = re.findall(rf"^(\S+::.*?) {verdict} .*\[ *\d+%\]$", text, re.MULTILINE)
    return {name: verdict for verdict, name in parallel} | dict(serial)


def sanitize(machine: Machine, tool: str, modes: tuple[str, ...], names: tuple[str, ...]) -> Result:
    machine.tool("compute-sanitizer")
    log, before = machine.out / "sanitizer.txt", 0
    if log.exists():
        before = len(log.read_text(errors="replace"))
    command = [machine.python, TOP / "scripts" / "gpu_smoke.py", "--under", SANITIZER.format(tool=tool)]
    command += ["--modes", ",".join(modes), "--cases", ",".join(names)]
    # Every array is an allocation of its own, so that what lies outside of one is outside of all.
    options = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    options["XLA_FLAGS"] = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
    stopped = False
    try:
        machine.run(command, log, **options)
    except Stopped:
        stopped = True
    part = machine.scratch / f"{tool}.txt"
    text = log.read_text(errors="replace")[before:]
    part.write_text(text)
    if "Device not supported" in text:
        raise NotRun("compute-sanitizer does not support this machine")
    reports = smoke_reports(part)
    wanted = [(mode, *check) for mode in modes for check in CHECKS if check.case in names]
    findings = [line for line in text.splitlines() if re.match(r"=+ (Invalid|Error: Race|Warning: Race)", line)]
    sums = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    faults = max(len(findings), sum(int(a or b) for a, b in sums))
    if faults:
        raise Failed(f"{faults} faults found in {len(reports)} of {len(wanted)} checks", "\n".join(findings[:20]))
    if not reports:
        raise NotRun("no check ended before the time was over" if stopped else tail(part, 1))
    if stopped and not any(report["wrong"] for report in reports):
        return Result(f"no fault in {len(reports)} of {len(wanted)} checks", complete=False)
    result = judged(reports, wanted, stopped, part)
    if len(sums) < len(modes):
        raise Failed(f"compute-sanitizer has summed up {len(sums)} of {len(modes)} processes", result.details)
    return Result(f"no fault in {len(reports)} checks")


# The checks of small arrays.
SMALL = tuple(dict.fromkeys(check.case for check in CHECKS if not check.case.startswith("wide")))


def memcheck(machine: Machine) -> Result:
    """compute-sanitizer's memcheck of every kernel but the widest tiles."""
    return sanitize(machine, "memcheck", MODES, SMALL)


def racecheck(machine: Machine) -> Result:
    """compute-sanitizer's racecheck of tiles and small groups in TF32 and bfloat16."""
    return sanitize(machine, "racecheck", ("tf32", "bfloat16"), ("tiles", "small_groups"))


def ncu(machine: Machine) -> Result:
    """Nsight Compute's counters of the headline's kernels in bfloat16."""
    profiler, log, table = machine.tool("ncu"), machine.out / "ncu.txt", machine.scratch / "ncu.csv"
    code = (
        f"import sys, dataclasses; sys.path.insert(0, {str(TOP / 'benchmarks')!r}); import gpu_runs as g; "
        f"workload = dataclasses.replace(g.GPU_WORKLOADS[{HEADLINE!r}], batch=16); "
        "task = g.Task(workload, True, 'bfloat16', 'NHWC', g.Operands(workload.operands())); "
        "run = g.without_command_buffers_run(task); run(); run()"
    )
    metrics = list(METRICS)
    while metrics:
        command = [profiler, "--target-processes", "all", "--kernel-name-base", "demangled"]
        command += ["--kernel-name", "regex:jax_dcn", "--launch-count", "12", "--clock-control", "none"]
        command += ["--metrics", ",".join(metrics), "--csv", "--page", "raw", "--log-file", table]
        table.unlink(missing_ok=True)
        try:
            machine.run([*command, machine.python, "-c", code], log)
        except Stopped:
            raise NotRun("the time was over") from None
        text = table.read_text(errors="replace") if table.exists() else ""
        with open(log, "a") as file:
            file.write(text)
        if "ERR_NVGPUCTRPERM" in text:
            raise NotRun("the driver keeps the counters from this user (ERR_NVGPUCTRPERM)")
        unknown = set(re.findall(r"Failed to find metric (?:regex:\^?)?(\w+)", text + tail(log)))
        known = [metric for metric in metrics if metric.split(".")[0] not in unknown]
        if known == metrics:
            break
        metrics = known
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))[1:]  # the first has units
    if not rows:
        raise NotRun(f"no kernels were profiled: {tail(log, 1)}")
    return Result(f"launches profiled: {len(rows)}", counters(rows))


def counters(rows: list[dict[str, str]]) -> str:
    """A table of the launches, a column each."""

    def value(row: dict[str, str], metric: str, factor: float) -> str:
        text = row.get(metric, "").replace(",", "")
        return f"{float(text) * factor:.3g}" if re.fullmatch(r"[\d.e+-]+", text) else text

    def kernel(name: str) -> str:
        found = re.search(r"(\w+)Kernel", name)
        return found[1] if found else name

    header = ["", *(kernel(row.get("Kernel Name", "")) for row in rows)]
    lines = [[label, *(value(row, metric, factor) for row in rows)] for metric, (label, factor) in METRICS.items()]
    return markdown(header, [line for line in lines if any(line[1:])])


class Step(NamedTuple):
    run: Callable[[Machine], Result]
    first: int  # seconds at most
    again: int  # ... in a second run; 0: it is left out there
    required: bool = True  # that it runs

    @property
    def name(self) -> str:
        return self.run.__name__


# In the order of their value.
STEPS = (
    Step(install, 35, 20),
    Step(smoke, 45, 35),
    Step(headline, 60, 45),
    Step(cases, 65, 40),
    Step(family, 30, 20, required=False),
    Step(tests, 55, 30),
    Step(memcheck, 25, 20, required=False),
    Step(racecheck, 15, 0, required=False),
    Step(ncu, 30, 30, required=False),
)
