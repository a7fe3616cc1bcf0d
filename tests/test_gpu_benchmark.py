"""benchmarks/gpu.py without a GPU: its page, processes and checks, and the coordinates of torchvision in float16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import goals
import gpu
import gpu_runs
import jax_runs
import numpy as np
import pytest
import tasks
from support.benchmark_reports import benchmark_report, measurement
from support.processes import run_python
from workloads import DIRECTIONS, GPU_WORKLOADS, Workload

from jax_dcn._operator import lowering

TOP = Path(__file__).parents[1]


def table(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def test_the_page_of_the_benchmark():
    page = gpu.page(benchmark_report())
    header, _, row = table(page[page.index("Medians of") :])
    found = dict(zip(header, row, strict=True))
    assert found["jax_dcn, ms"] == "2" and found["host, ms"] == "0.1"
    assert (found["/ conv"], found["/ baseline"], found["/ torchvision"]) == ("2.00", "0.50", "0.25")
    for text in ("its name, its driver", "commit abc", "torch 2"):
        assert text in page


# --- goals ---


def verdicts(*more):
    _, _, *rows = table(goals.judged(benchmark_report(*more)["measurements"]))
    return {tuple(row[:4]): row[4:] for row in rows}


def test_goals_are_judged():
    """By the medians of the rounds' ratios; the bounds themselves are met."""
    both = ("r50_c4_76", "16", "both")
    found = verdicts(
        measurement("grad_x", milliseconds=[1.0, 1.0, 4.0]),
        measurement("deterministic grad_x", milliseconds=[1.5, 1.5, 1.5]),
    )
    assert len(found) == len(goals.GOALS)
    assert found[*both, "jax_dcn NHWC / plain convolution"] == ["at most 4", "2.000", "met"]
    assert found[*both, "torchvision / jax_dcn NHWC"] == ["at least 6", "4.000", "missed"]
    assert found[*both, "deterministic grad_x / grad_x"] == ["at most 1.5", "1.500", "met"]
    assert all(row[1:] == ["", "not measured"] for key, row in found.items() if key[:3] != both)


def test_what_failed_or_is_of_other_runs_is_not_judged():
    others = (
        measurement("grad_x", failure="ValueError: is off"),
        measurement("deterministic grad_x", milliseconds=[1.0]),
        measurement(gpu.OWN, case="r50_c4", batch=1, direction="forward", build="baseline", milliseconds=[1.0]),
        measurement("plain convolution", case="r50_c4", batch=1, direction="forward", milliseconds=[1.0]),
        measurement(gpu.OWN, case="r50_c3", mode="float16", milliseconds=[1.0]),
        measurement("torchvision", case="r50_c3", mode="float16", milliseconds=[1.0]),
    )
    assert [row[-1] for row in verdicts(*others).values()].count("not measured") == len(goals.GOALS) - 2


def test_goals_name_what_there_is():
    for goal in goals.GOALS:
        assert goal.case in GPU_WORKLOADS and goal.direction in DIRECTIONS and goal.bound in ("at most", "at least")
        for competitor in goal.competitors:
            known = gpu_runs.COMPETITORS[competitor]._replace(packages=())
            assert known.takes_part(goals.MODE, goal.direction == "both")


def test_with_goals_only_what_they_name_is_measured():
    alternatives = ["plain convolution", "torchvision", "grad_x"]
    host = [gpu.WITHOUT_COMMAND_BUFFERS]
    for case, batch, direction, expected in (
        ("r50_c4_76", 16, "forward", ["plain convolution", "torchvision"]),
        ("r50_c4_76", 16, "both", alternatives),
        ("r50_c4_76", 1, "forward", alternatives),  # no goals
        ("r50_c4", 1, "both", ["torchvision", *host]),
        ("dekr", 16, "both", alternatives),
    ):
        assert gpu.competitors(case, batch, direction, alternatives, goals=True) == [gpu.OWN, *expected]
    assert gpu.competitors("r50_c4", 1, "both", alternatives, goals=False) == [gpu.OWN, *alternatives, *host]


# --- processes ---


# A Measurer of two competitors, of which one fails in its second round, and the process ends in its fourth.
FAKE_RUNS = """
import os
class Measurer:
    rounds = 0
    def __init__(self, few_tiles): pass
    def usable(self): return True
    def take_up(self, name, batch): raise ValueError("which prepare will say, too")
    def prepare(self, name, batch, backward, mode, competitors):
        entry = dict(case=name, batch=batch, direction="both", mode=mode, sets=1)
        return [{**entry, "competitor": c, "position": i} for i, c in enumerate(competitors)]
    def round(self):
        self.rounds += 1
        if self.rounds == END: os._exit(1)
        return [(1e-3, 1e-4), "ValueError: bad" if self.rounds == 2 else (2e-3, 1e-4)][:PREPARED]
"""


@pytest.mark.parametrize(("end", "prepared"), [(4, 2), (-1, 2), (-1, 1)])
def test_builds_are_measured_in_processes_of_their_own(tmp_path, end, prepared):
    """And what reports on them needs no jax_dcn, nor JAX."""
    sites = []
    for name in ("this", "baseline"):
        sites.append(tmp_path / name)
        sites[-1].mkdir()
        code = FAKE_RUNS.replace("END", str(end if name == "this" else -1)).replace("PREPARED", str(prepared))
        (sites[-1] / "gpu_runs.py").write_text(code)
    code = f"""
import sys, json
sys.path.insert(0, {str(TOP / "benchmarks")!r})
import gpu

def main():
    sites = zip(("this", "baseline"), {list(map(str, sites))!r})
    builds = [gpu.Build(name, site, False) for name, site in sites]
    others = ["torchvision"] * {prepared - 1}
    print(json.dumps(gpu.measure(builds, "r50_c4", 16, True, "bfloat16", [gpu.OWN, *others])))
    assert not any(name.split(".")[0] in ("jax", "jax_dcn", "gpu_runs") for name in sys.modules)
    for build in builds:
        build.stop()

if __name__ == "__main__":
    main()
"""
    (tmp_path / "main.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {(m["build"], m["competitor"]): m for m in json.loads(done.stdout)}
    own, other = found["this", "jax_dcn NHWC"], found["baseline", "jax_dcn NHWC"]
    assert other["milliseconds"] == [1.0] * 7
    if end == 4:
        assert "the process of this ended" in own["failure"] and "milliseconds" not in own
    else:
        assert own["milliseconds"] == [1.0] * 7 and "failure" not in own
    if prepared == 2:
        failed = found["this", "torchvision"]
        assert "ValueError: bad" in failed["failure"] and "milliseconds" not in failed


# --- numbers ---


def test_the_gradient_of_x_alone():
    workload = Workload("", 1, 4, 4, 6, 7, True)
    task = tasks.Task(workload, True, "float32", "NHWC", tasks.Operands(workload.operands()), sets=2)
    every, alone = (jax_runs.gather_run(task._replace(only=only))() for only in (None, "x"))
    for of_all, of_one in zip(every, alone, strict=True):
        assert set(of_all) == {"y", "x", "offset", "mask", "weight"} and set(of_one) == {"x"}
        assert np.array_equal(of_all["x"], of_one["x"])
    assert task.wanted(every[0]) == every[0] and set(task._replace(backward=False).wanted(every[0])) == {"y"}


@pytest.mark.parametrize("flags", [None, "--xla_gpu_autotune_level=0"])
def test_kernels_are_deterministic_where_the_benchmark_asks_for_it(flags, monkeypatch):
    if flags is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", flags)
    lowered = []
    monkeypatch.setattr(gpu_runs, "jax_dcn_run", lambda task: lowered.append(os.environ["XLA_FLAGS"]))
    gpu_runs.COMPETITORS["deterministic grad_x"].build(None)
    assert lowering._deterministic(lowered[0]) and (flags or "") in lowered[0]
    assert os.environ.get("XLA_FLAGS") == flags


def test_the_wheel_names_its_commit(tmp_path):
    info = tmp_path / "jax_dcn-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax_dcn\nVersion: 0.1.0\n")
    for tag, expected in (("0_g12ab", ("12ab", False)), ("0_g12ab_changed", ("12ab", True))):
        (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: cp312-cp312-linux_x86_64\nBuild: {tag}\n")
        printed = run_python("import report; print(report.commit())", tmp_path, TOP / "benchmarks")
        assert printed.strip() == str(expected)


@pytest.mark.parametrize("norm", [False, True])
def test_wrong_numbers_fail(norm):
    """Too large an error, a NaN in a large array or a small one, and arrays that are missing or of other shapes."""
    rng = np.random.default_rng(0)
    expected = {"y": rng.standard_normal((1, 7, 11, 256), np.float32), "x": rng.standard_normal(5, np.float32)}
    assert tasks.check({name: array * 1.01 for name, array in expected.items()}, expected, 0.02, norm) < 0.011
    for name, what in (("y", "result"), ("x", "gradient of x")):
        changed = expected[name] * 1.03
        with pytest.raises(ValueError, match=f"the {what} is off by 3.0e-02, allowed is 2.0e-02"):
            tasks.check(expected | {name: changed}, expected, 0.02, norm)
        changed = expected[name].copy()
        changed.flat[-1] = np.nan
        with pytest.raises(ValueError, match=f"the {what} is off by nan"):
            tasks.check(expected | {name: changed}, expected, 0.02, norm)
        with pytest.raises(ValueError, match=r"has .* expected "):
            tasks.check(expected | {name: expected[name][:, None]}, expected, 0.02, norm)
    with pytest.raises(ValueError, match="has "):
        tasks.check({"y": expected["y"]}, expected, 0.02, norm)


def test_half_coordinates():
    """torchvision's float16: the regular part and the offset are rounded, and so is their sum."""
    workload = Workload("", 2, 4, 4, 9, 70, True, kernel=3, stride=2, padding=2, dilation=3, deform_groups=2)
    operands = workload.operands()
    changed = gpu_runs.half_coordinates(workload, operands)
    h_out, w_out = workload.output_size
    both = [a["offset"].reshape(2, h_out, w_out, 2, 3, 3, 2) for a in (operands, changed)]
    rng = np.random.default_rng(0)
    for n, row, column, g, i, j in zip(*(rng.integers(0, size, 50) for size in both[0].shape[:-1]), strict=True):
        for axis, regular in enumerate((row * 2 - 2 + i * 3, column * 2 - 2 + j * 3)):
            offset, instead = (float(a[n, row, column, g, i, j, axis]) for a in both)
            assert np.float32(regular + instead) == np.float16(np.float16(regular) + np.float16(offset))
    assert changed["mask"].dtype == np.float32 and np.array_equal(changed["x"], operands["x"])
