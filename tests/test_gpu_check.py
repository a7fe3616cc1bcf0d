"""scripts/gpu_check without a GPU: limits, verdicts, and what it reads in others' output."""

import argparse
import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import goals
import gpu
import gpu_smoke
import gpu_steps
import numpy as np
import pytest
from gpu_steps import Failed, NotRun, Result, Step, Stopped
from support.benchmark_reports import benchmark_report, measurement

TOP = Path(__file__).parents[1]
loader = importlib.machinery.SourceFileLoader("gpu_check", str(TOP / "scripts" / "gpu_check"))
gpu_check = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
loader.exec_module(gpu_check)


@pytest.fixture
def machine(tmp_path):
    """One with a wheel, an empty output folder, and a minute."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir(), scratch.mkdir()
    arguments = argparse.Namespace(out=out, wheel=Path("a.whl"), baseline=None, python=sys.executable)
    machine = gpu_steps.Machine(arguments, scratch)
    machine.deadline = time.monotonic() + 60
    return machine


def printing(machine, text, status=0):
    """A Machine.run of commands that print this. An exception for a status is raised."""

    def run(command, log, **variables):
        with open(log, "a") as file:
            file.write(text)
        if status is Stopped:
            raise Stopped
        return status

    machine.run = run
    machine.tool = lambda name: name
    return machine


# --- limits ---


def test_the_limits_fit_a_quarter_of_an_hour():
    assert sum(step.first for step in gpu_steps.STEPS) <= 360
    assert sum(step.again for step in gpu_steps.STEPS) <= 240


def test_few_files_come_back():
    assert len({*gpu_steps.FILES, "summary.md"}) <= 8
    assert all("/" not in name for name in gpu_steps.FILES)


def test_a_command_ends_at_the_deadline_with_all_that_it_started(machine, tmp_path):
    log = tmp_path / "log"
    code = "import subprocess, sys; print('begun', flush=True); "
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(3); print(1 + 1)'])"
    start = time.monotonic()
    machine.deadline = start + 1
    with pytest.raises(Stopped):
        machine.run([sys.executable, "-c", code], log)
    assert time.monotonic() - start < 2.5
    time.sleep(3)
    printed = log.read_text().splitlines()
    assert printed[1] == "begun" and "2" not in printed


def test_a_command_that_ends_in_time(machine, tmp_path):
    assert machine.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log") == 3


# --- verdicts ---


def good(machine):
    return Result("fine", "details of it")


def partial(machine):
    return Result("2 of 3", complete=False)


def absent(machine):
    raise NotRun("there is no such tool")


def bad(machine):
    raise Failed("1 wrong", "| which |")


def slow(machine):
    raise Stopped


def broken(machine):
    return 1 // 0


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([Step(good, 1, 1)], "Passed"),
        ([Step(good, 1, 1), Step(partial, 1, 1)], "Passed; partial passed as far as the time went"),
        ([Step(good, 1, 1), Step(absent, 1, 1, required=False)], "Passed; absent did not run"),
        ([Step(good, 1, 1), Step(absent, 1, 1)], "FAILED; absent did not run"),
        ([Step(bad, 1, 1), Step(slow, 1, 1), Step(good, 1, 1)], "FAILED; bad, slow failed"),
        ([Step(broken, 1, 1), Step(good, 1, 1)], "FAILED; broken failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verdicts(machine, steps, expected):
    done = list(gpu_check.outcomes(steps, machine, again=False))
    assert gpu_check.verdict(done) == expected
    summary = gpu_check.summary(done, None, machine.goals())
    for outcome in done:
        assert outcome.verdict in summary and outcome.details in summary
    assert ("ZeroDivisionError" in summary) == (steps[0].run is broken)


def test_a_second_run_leaves_steps_out(machine):
    first, second = (list(gpu_check.outcomes([Step(good, 1, 0)], machine, again)) for again in (False, True))
    assert (first[0].verdict, second[0].verdict) == ("passed", "NOT RUN")
    assert gpu_check.verdict(second) == "Passed; good did not run"


def test_without_a_gpu_nothing_passes(tmp_path):
    """The script itself, with a wheel that holds nothing."""
    wheel = tmp_path / "nothing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1\n")
        archive.writestr("nothing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("nothing-1.dist-info/RECORD", "")
    done = subprocess.run(
        [sys.executable, TOP / "scripts" / "gpu_check", "--wheel", wheel, "--out", tmp_path / "out"],
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "= 360 s" in done.stdout
    assert done.stdout.count("NOT RUN: ") == len(gpu_steps.STEPS)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "FAILED, nothing was checked: JAX finds no GPU." in summary and "passed" not in summary


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("scripts/gpu_check", ["--wheel", "absent.whl"], "absent.whl is no wheel"),
        ("scripts/gpu_check", ["--baseline", "README.md"], "README.md is no wheel"),
        ("scripts/gpu_check", ["smoke", "--again", "smok"], "no such step: smok"),
        ("scripts/gpu_smoke.py", ["--cases", "tiles,tile"], "tile: none of tiles, "),
        ("scripts/gpu_smoke.py", ["--modes", "tf33"], "tf33: none of "),
        ("benchmarks/gpu.py", ["--cases", "r50_c4@16,r50"], "r50 is none of "),
        ("benchmarks/gpu.py", ["--batches", "16,x"], "invalid batches value"),
        ("benchmarks/gpu.py", ["--site", "."], "there is no jax_dcn in ."),
        ("scripts/gpu_wheel", ["--outt"], "unknown option --outt"),
        ("scripts/gpu_wheel", ["--out", "--help"], "--out needs a folder"),
        ("scripts/gpu_wheel", ["a", "b"], "one commit at a time"),
        ("scripts/gpu_wheel", ["no_such_commit"], "no such commit: no_such_commit"),
    ],
)
def test_wrong_arguments(tmp_path, script, arguments, message):
    runner = ["bash"] if script.endswith("wheel") else [sys.executable]
    command = [*runner, TOP / script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_the_smoke_test_says_why_nothing_can_be_checked(tmp_path):
    command = [sys.executable, TOP / "scripts" / "gpu_smoke.py", "--modes", "tf32"]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("nothing was checked: no GPU: ")


# --- what the steps read ---


EVERY = len(gpu_smoke.MODES) * len(gpu_smoke.CHECKS)
SMALL = len(gpu_smoke.MODES) * sum(not check.case.startswith("wide") for check in gpu_smoke.CHECKS)


def report(mode, check, wrong=(), error=1e-3):
    return json.dumps({"mode": mode, **check._asdict(), "wrong": list(wrong), "error": error}) + "\n"


def reports(modes=gpu_smoke.MODES, names=None, **replaced):
    checks = [check for check in gpu_smoke.CHECKS if names is None or check.case in names]
    return "".join(report(mode, check) for mode in modes for check in checks)


def test_smoke_passes(machine):
    result = gpu_steps.smoke(printing(machine, reports()))
    assert result.complete and result.text == f"{EVERY} of {EVERY} checks passed"
    assert "1.0e-03" in result.details and "not run" not in result.details


def test_smoke_names_what_is_wrong(machine):
    lines = reports().splitlines(keepends=True)
    wrong = gpu_smoke.Check("tiles", True)
    lines[gpu_smoke.CHECKS.index(wrong)] = report("float64", wrong, ["grad_x is off by 1.0e+00"])
    with pytest.raises(Failed) as failure:
        gpu_steps.smoke(printing(machine, "".join(lines), 1))
    text, details = failure.value.args
    assert text == f"{EVERY - 1} of {EVERY} checks passed, 1 wrong"
    assert "- tiles, deterministic, float64: grad_x is off by 1.0e+00" in details and "WRONG" in details


def test_smoke_that_is_cut_short_has_not_passed(machine):
    with pytest.raises(Failed) as failure:
        gpu_steps.smoke(printing(machine, reports(modes=("float64",)), Stopped))
    text, details = failure.value.args
    assert (
        text == f"{EVERY // 5} of {EVERY} checks passed, the others were not run: the time was over"
        and "not run" in details
    )


SUMS = "========= ERROR SUMMARY: 0 errors\n" * 5
SANITIZED = reports(names=gpu_steps.SMALL)


def test_memcheck_passes(machine):
    result = gpu_steps.memcheck(printing(machine, SANITIZED + SUMS))
    assert result == Result(f"no fault in {SMALL} checks")
    assert gpu_steps.racecheck(
        printing(
            machine,
            reports(("tf32", "bfloat16"), ("tiles", "small_groups"))
            + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n" * 2,
        )
    ) == Result("no fault in 8 checks")


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (SANITIZED + "========= Invalid __global__ write of size 16 bytes\n" + SUMS, 0, "1 faults found"),
        (SANITIZED + SUMS.replace(" 0 errors", " 2 errors", 1), 0, "2 faults found"),
        (SANITIZED + "========= Invalid __global__ write of size 16 bytes\n", Stopped, "1 faults found"),
        (
            SANITIZED.replace('"wrong": []', '"wrong": ["y"]', 1) + SUMS,
            1,
            f"{SMALL - 1} of {SMALL} checks passed, 1 wrong",
        ),
        (
            SANITIZED.replace('"wrong": []', '"wrong": ["y"]', 1),
            Stopped,
            f"{SMALL - 1} of {SMALL} checks passed, 1 wrong",
        ),
        (reports(("tf32",), ("tiles",)) + SUMS, 1, f"2 of {SMALL} checks passed, the others were not run"),
        (SANITIZED, 0, "has summed up 0 of 5 processes"),
    ],
)
def test_memcheck_fails(machine, text, status, message):
    with pytest.raises(Failed, match=message):
        gpu_steps.memcheck(printing(machine, text, status))


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (SANITIZED + "========= Error: Device not supported. Please refer\n" + SUMS, 0, "does not support"),
        ("", Stopped, "no check ended"),
        ("compute-sanitizer: command not found\n", 1, "command not found"),
    ],
)
def test_memcheck_did_not_run(machine, text, status, message):
    with pytest.raises(NotRun, match=message):
        gpu_steps.memcheck(printing(machine, text, status))


def test_calls_of_cudas_api_are_no_faults(machine):
    text = "========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to named symbol not found\n"
    assert gpu_steps.memcheck(printing(machine, SANITIZED + text + SUMS)).complete
    assert "--report-api-errors no" in gpu_steps.SANITIZER


def test_memcheck_that_is_cut_short_passes_in_part(machine):
    result = gpu_steps.memcheck(printing(machine, reports(("tf32",), ("tiles",)), Stopped))
    assert result == Result(f"no fault in 2 of {SMALL} checks", complete=False)


def test_there_is_no_sanitizer(machine, monkeypatch):
    machine.variables["PATH"] = ""
    with pytest.raises(NotRun, match="there is no compute-sanitizer"):
        gpu_steps.memcheck(machine)


PARALLEL = """bringing up nodes...
tests/test_numbers.py::test_a[native-NCHW]
[gw0] [ 33%] PASSED tests/test_numbers.py::test_a[native-NCHW]
tests/test_numbers.py::test_b[1-2] [gw3] [ 66%] SKIPPED tests/x.py::no_line_of_its_own
[gw1] [ 66%] PASSED tests/test_numbers.py::test_b[x y]
"""
SERIAL = """tests/test_numbers.py::test_a[native-NCHW] PASSED                        [ 33%]
tests/test_numbers.py::test_b[x y] PASSED                                [ 66%]
"""


@pytest.mark.parametrize("text", [PARALLEL, SERIAL], ids=["parallel", "serial"])
@pytest.mark.parametrize("status", [0, Stopped], ids=["ended", "stopped"])
def test_tests_pass(machine, text, status):
    result = gpu_steps.tests(ending(machine, text, status))
    assert (result.text, result.complete) == ("2 passed", status == 0)


@pytest.mark.parametrize("text", [PARALLEL, SERIAL], ids=["parallel", "serial"])
@pytest.mark.parametrize("status", [1, Stopped], ids=["ended", "stopped"])
def test_tests_fail(machine, text, status):
    with pytest.raises(Failed) as failure:
        gpu_steps.tests(ending(machine, text.replace("PASSED", "FAILED", 1), status))
    text, details = failure.value.args
    assert text == "1 passed, 1 failed" + ", stopped at the limit" * (status is Stopped)
    assert "- FAILED tests/test_numbers.py::test_a[native-NCHW]" in details


@pytest.mark.parametrize(
    ("text", "status", "error", "message"),
    [
        (PARALLEL, 3, Failed, "2 passed"),
        ("ImportError\n", 4, Failed, "ImportError"),
        ("bringing up nodes...\n", Stopped, NotRun, "no test ended: bringing up nodes"),
    ],
)
def test_tests_end_otherwise(machine, text, status, error, message):
    with pytest.raises(error, match=message):
        gpu_steps.tests(ending(machine, text, status))


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["serial", "parallel"])
def test_what_pytest_prints_is_read(tmp_path, options):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('value', ['a', 'b c', '1-2'])\ndef test_good(value): pass\n"
        "def test_bad(): assert False\n"
        "def test_skipped(): pytest.skip('a reason')\n"
        "def test_error(absent): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, "test_it.py"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert {name.split("::")[1]: verdict for name, verdict in gpu_steps.test_outcomes(text).items()} == {
        "test_good[a]": "PASSED",
        "test_good[b c]": "PASSED",
        "test_good[1-2]": "PASSED",
        "test_bad": "FAILED",
        "test_skipped": "SKIPPED",
        "test_error": "ERROR",
    }


def ending(machine, text, status):
    """A machine that has pytest, which ends so."""
    run = printing(machine, text, status).run
    machine.run = lambda command, log, **options: 0 if "import" in command[2] else run(command, log, **options)
    return machine


CSV = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","lts__t_bytes.sum"
"","","nsecond","byte"
"0","void jax_dcn::cuda::ForwardKernel<jax_dcn::cuda::BFloat16>(Problem)","1,234,567","3,000,000,000"
"1","void jax_dcn::cuda::GradSamplesKernel<float>(Problem)","2,000,000","9,000,000,000"
"""


def profiled(machine, *outputs):
    """A machine whose ncu writes these into its log file, in turn."""
    outputs = iter(outputs)
    asked = []

    def run(command, log, **options):
        Path(command[command.index("--log-file") + 1]).write_text(next(outputs))
        asked.append(command[command.index("--metrics") + 1])
        log.write_text("")
        return 0

    machine.run, machine.tool = run, lambda name: name
    return asked


def test_counters(machine):
    profiled(machine, CSV)
    result = gpu_steps.ncu(machine)
    assert result.text == "launches profiled: 2"
    rows = [line.split("|")[1:-1] for line in result.details.splitlines()]
    assert [[cell.strip() for cell in row] for row in rows if "-" not in row[0]] == [
        ["", "Forward", "GradSamples"],
        ["ms", "1.23", "2"],
        ["L2, GB", "3", "9"],
    ]


def test_counters_that_this_gpu_lacks_are_left_out(machine):
    asked = profiled(machine, "==ERROR== Failed to find metric regex:^dram__bytes(\\.|$)\n", CSV)
    assert gpu_steps.ncu(machine).text == "launches profiled: 2"
    assert "dram__bytes.sum" in asked[0] and "dram__bytes.sum" not in asked[1]
    assert len(asked[1].split(",")) == len(gpu_steps.METRICS) - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("==ERROR== ERR_NVGPUCTRPERM - The user\n", "ERR_NVGPUCTRPERM"), ("==WARNING== No kernels\n", "no kernels")],
)
def test_counters_are_missing(machine, text, message):
    profiled(machine, text)
    with pytest.raises(NotRun, match=message):
        gpu_steps.ncu(machine)


def benchmarked(machine, report, status):
    def run(command, log, **options):
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        gpu.write(folder, report)
        if status is Stopped:
            raise Stopped
        return status

    machine.run = run
    return machine


def test_a_measurement_that_hangs_fails_and_the_others_count(machine):
    with pytest.raises(Failed) as failure:
        gpu_steps.headline(benchmarked(machine, benchmark_report(under_way="r50_c4, batch 16"), Stopped))
    text, details = failure.value.args
    assert text == "4 measured, stopped in r50_c4, batch 16" and "0.25" in details
    assert json.loads((machine.out / "headline.json").read_text())["measurements"] == benchmark_report()["measurements"]


def test_what_there_was_no_time_for(machine):
    result = gpu_steps.headline(benchmarked(machine, benchmark_report(left_out=["x101"]), 0))
    assert result.text == "4 measured, 1 left out" and not result.complete
    with pytest.raises(NotRun, match="before anything was measured"):
        gpu_steps.cases(benchmarked(machine, benchmark_report(measurements=[], left_out=["x101"]), 0))


def test_wrong_numbers_of_ours_fail_and_others_do_not(machine):
    others = benchmark_report(
        measurement("torchvision", mode="float16", failure="ValueError: is off"),
        measurement(gpu.OWN, build="baseline", mode="float16", failure="ValueError: is off"),
    )
    assert gpu_steps.cases(benchmarked(machine, others, 0)).complete
    ours = benchmark_report(measurement(gpu.OWN, mode="float16", failure="ValueError: is off"))
    with pytest.raises(Failed, match="1 of jax_dcn's failed"):
        gpu_steps.headline(benchmarked(machine, ours, 1))


def test_the_summary_judges_the_goals_by_both_benchmarks(machine):
    of_one = [measurement(name, case="r50_c4", batch=1, milliseconds=[1.0]) for name in (gpu.OWN, "torchvision")]
    for step, report in ((gpu_steps.headline, benchmark_report()), (gpu_steps.cases, benchmark_report(*of_one))):
        step(benchmarked(machine, report, 0))
    summary = gpu_check.summary([], None, machine.goals())
    for row in ("r50_c4_76 .* at most 4 .* met", "r50_c4_76 .* at least 6 .* missed", "r50_c4 .* at least 3 .* missed"):
        assert re.search(row, summary)


def test_the_benchmarks_measure_the_baseline_and_what_goals_are_for(machine, monkeypatch):
    sites = machine.site, machine.baseline = [machine.scratch / name for name in ("site", "baseline")]
    for site in sites:
        (site / "jax_dcn").mkdir(parents=True)
    measured = set()

    def run(command, log, **options):
        monkeypatch.setattr(sys, "argv", list(map(str, command[1:])))
        arguments = gpu.parse_arguments()
        assert [arguments.site, arguments.baseline] == list(map(str, sites)) and arguments.modes[0] == goals.MODE
        (default,) = arguments.batches
        for case, batch in arguments.cases:
            at = case, batch or default
            for direction in arguments.directions:
                names = gpu.competitors(*at, direction, arguments.alternatives, arguments.goals)
                measured.update((*at, direction, name) for name in names)
        raise Stopped

    machine.run = run
    for step in (gpu_steps.headline, gpu_steps.cases):
        with pytest.raises(Failed, match="the time was over"):
            step(machine)
    for goal in goals.GOALS:
        assert measured >= {(goal.case, goal.batch, goal.direction, name) for name in goal.competitors}


# --- the smoke test's processes ---


@pytest.mark.parametrize("run", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_one_is_wrong_in_whichever_run(value, run):
    exact = {"y": np.array([1.0, -4.0]), "grad_x": np.zeros(0)}
    runs = [{"y": np.array([1.0, -3.0]), "grad_x": np.zeros(0)} for _ in range(2)]
    assert gpu_smoke.largest_errors(runs, exact) == {"y": 0.25, "grad_x": 0}
    runs[run]["y"][0] = value
    assert not gpu_smoke.largest_errors(runs, exact)["y"] <= 1


@pytest.mark.parametrize(
    ("process", "wrong"),
    [
        ("import sys; sys.exit(3)", ["exit status 3"] * 3),
        ("", ["exit status 0"] * 3),
        ("print('{not a report}'); raise SystemExit('killed')", ["exit status 1: "] * 3),
        # One report, and the end.
        ("import sys, json; print(json.dumps(dict(mode='tf32', case=sys.argv[5], wrong=[])))", [None] * 3),
    ],
)
def test_every_check_has_a_report_whatever_its_process_does(tmp_path, process, wrong):
    program = tmp_path / "program.py"
    program.write_text(process)
    under = [sys.executable, str(program)]  # which leaves the command behind it alone
    done = gpu_smoke.supervised("tf32", list(gpu_smoke.CHECKS[:3]), under)
    assert len(done) == 3
    for report, expected in zip(done, wrong, strict=True):
        assert report["wrong"] == [] if expected is None else report["wrong"][0].startswith(expected)
