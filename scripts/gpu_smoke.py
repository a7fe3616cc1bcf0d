"""Runs every CUDA kernel in every dtype, forward and backward, against plain XLA on the CPU, and names what is wrong.

    python scripts/gpu_smoke.py [--modes bfloat16,tf32] [--cases tiles,padded] [--under COMMAND]

Prints a line of JSON for each check and fails if one does. Each mode has a process of its own, --under a command such
as compute-sanitizer. After an error, which may leave the GPU unusable to its process, the next check begins in a new
one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parents[1] / "tests"

# dtypes, and for float32 what its products are made in. Offset and mask are float32 with the narrower ones, but for one
# case.
MODES = ("float64", "float32", "tf32", "bfloat16", "float16")


class Check(NamedTuple):
    case: str
    deterministic: bool = False  # XLA is asked for the same bits in every run


# Tiles of every width, several of pixels, of output channels and of a group's channels; parts of the stages, as pixels
# are few in most; channels that are padded on both sides; more taps than a table has columns; bundles of groups and
# small groups, in several tiles and parts; no mask, no bias, no images; pixels that nothing may read; calls without a
# weight.
CHECKS = (
    Check("tiles"),
    Check("padded"),
    Check("odd"),
    Check("many_taps"),
    Check("bundles"),
    Check("small_groups"),
    Check("many_small_groups"),
    Check("island"),
    Check("no_images"),
    Check("dcnv3"),
    Check("attention"),
    Check("tiles", deterministic=True),
    Check("padded", deterministic=True),
    Check("bundles", deterministic=True),
    Check("small_groups", deterministic=True),
    Check("dcnv3", deterministic=True),
    Check("attention", deterministic=True),
    Check("wide_128"),
    Check("wide_256"),
)

# The tests' tolerances, but for TF32, whose errors in these cases are 6e-4 at most: with operands that are cut instead
# of rounded they are 1e-3.
TOLERANCE = {"bfloat16": "bfloat16 samples", "float16": "float16 samples"}
TF32_TOLERANCE = 8e-4


@functools.cache
def cases() -> dict[str, Any]:
    from support.cases import ISLAND, Case

    # The wide tiles want more than 132 blocks of 128 pixels.
    many_pixels = dict(batch=1, c_in=8, size=(131, 129), kernel=(1, 1), padding=(0, 0), mask=False)
    all_cases = (
        Case("tiles", batch=1, c_in=40, c_out=264, size=(13, 17)),
        Case("padded", batch=3, c_in=42, c_out=50, kernel=(3, 2), stride=(2, 1), groups=2, deform_groups=3),
        Case(
            "odd",
            c_in=80,
            c_out=50,
            size=(11, 9),
            kernel=(3, 2),
            stride=(2, 1),
            padding=((2, 3), (1, 0)),
            dilation=(2, 3),
            mask=False,
            bias=False,
        ),
        Case("many_taps", batch=1, c_in=72, c_out=40, size=(9, 10), kernel=(4, 5), padding=(2, 2), deform_groups=3),
        Case("bundles", batch=1, c_in=80, c_out=65, size=(13, 17), groups=5, deform_groups=5),
        Case("small_groups", c_in=36, c_out=60, groups=12, deform_groups=9),
        Case(
            "many_small_groups",
            batch=1,
            c_in=63,
            c_out=144,
            size=(47, 45),
            kernel=(1, 2),
            padding=(0, 0),
            groups=9,
            deform_groups=3,
        ),
        dataclasses.replace(ISLAND, c_out=20),
        Case("no_images", batch=0, c_in=8, c_out=20),
        # Padded channels, more than a block of GradXInOrderSums owns, and more taps than a block locates at a time. The
        # attention has as many queries as a convolution has outputs.
        Case("dcnv3", c_in=270, c_out=270, size=(9, 8), stride=(2, 1), padding=((1, 2), (0, 1)), deform_groups=27),
        Case("attention", c_in=64, c_out=64, size=(13, 17), kernel=(60, 3), padding=(24, 0), deform_groups=2),
        Case("wide_128", c_out=100, **many_pixels),
        Case("wide_256", c_out=200, **many_pixels),
    )
    return {case.name: case for case in all_cases}


def dcnv3(case: Any, operands: dict[str, Any]) -> Any:
    from support.formats import to_nchw, to_nhwc

    import jax_dcn

    sizes = {name: getattr(case, name) for name in ("stride", "padding", "dilation")}
    arrays = {name: to_nhwc(array) for name, array in operands.items()}
    return to_nchw(jax_dcn.dcnv3(**arrays, kernel_size=case.kernel, groups=case.deform_groups, **sizes))


def attention(case: Any, operands: dict[str, Any]) -> Any:
    """A kernel's columns are of levels, which are a row each and what is left of the image."""
    from support.formats import to_nchw, to_nhwc

    import jax_dcn

    x, offset, mask = (to_nhwc(operands[name]) for name in ("x", "offset", "mask"))
    (n, h, w, _), (points, levels), heads = x.shape, case.kernel, case.deform_groups
    by_point = (n, -1, heads, levels, points)
    y = jax_dcn.multi_scale_deformable_attention(
        x.reshape(n, h * w, heads, -1),
        [(1, w)] * (levels - 1) + [(h - levels + 1, w)],
        (offset / 4 + 0.5).reshape(*by_point, 2),  # the middle of a level, more or less
        mask.reshape(by_point),
    )
    return to_nchw(y.reshape(n, *case.output_size, -1))


# Without a weight and a bias.
UNWEIGHTED = {"dcnv3": dcnv3, "attention": attention}


# --- one process ---


def operands(name: str, mode: str) -> tuple[dict[str, Any], Any]:
    """NCHW operands, of which some offsets lead nowhere, and a cotangent, in the dtypes of the mode."""
    import numpy as np
    from jax import numpy as jnp
    from support.cases import OUT_OF_RANGE, PER_IMAGE, island

    case = cases()[name]
    arrays = case.operands("float64")
    if name == "island":
        moved, untouched = island()
        arrays["offset"] = moved["offset"]
        arrays["x"][:, :, untouched] = np.nan
    elif arrays["offset"].size:
        chosen = np.random.default_rng(2).choice(arrays["offset"].size, len(OUT_OF_RANGE), replace=False)
        arrays["offset"].flat[chosen] = OUT_OF_RANGE
    if name in UNWEIGHTED:
        arrays = {key: arrays[key] for key in PER_IMAGE}
    dtype = jnp.dtype("float32" if mode == "tf32" else mode)
    wide = dtype if name == "padded" else jnp.promote_types(dtype, "float32")  # of offset and mask
    with np.errstate(over="ignore"):
        arrays = {key: a.astype(wide if key in ("offset", "mask") else dtype) for key, a in arrays.items()}
    return arrays, case.cotangent(dtype)


def lowered(name: str, arrays: dict[str, Any], cotangent: Any, implementation: str) -> Any:
    """The program of y and all gradients."""
    import jax
    from support.cases import deform_conv2d

    case = cases()[name]
    call = functools.partial(UNWEIGHTED[name], case) if name in UNWEIGHTED else deform_conv2d(case, "NHWC")

    @jax.jit
    def function(arrays, cotangent):
        y, vjp = jax.vjp(call, arrays)
        return {"y": y, **{f"grad_{key}": gradient for key, gradient in vjp(cotangent)[0].items()}}

    os.environ["JAX_DCN_IMPLEMENTATION"] = implementation  # read when traced
    return function.lower(arrays, cotangent)


def results(compiled: Any, *arguments: Any) -> dict[str, Any]:
    import numpy as np

    return {key: np.asarray(value, np.float64) for key, value in compiled(*arguments).items()}


def poison() -> None:
    """Leaves NaN in the memory that is handed out next, so that what is not written does not pass for zeros."""
    import jax
    import numpy as np

    for size in (2**26, 2**20, 2**16):
        jax.device_put(np.full(size // 4, np.nan, np.float32)).block_until_ready().delete()


def expected(name: str, mode: str, pool: concurrent.futures.Executor) -> concurrent.futures.Future:
    """The results by plain XLA on the CPU, in float64, of the operands as the mode rounds them."""
    import jax
    import numpy as np

    arrays, cotangent = operands(name, mode)
    arrays, cotangent = {key: a.astype(np.float64) for key, a in arrays.items()}, cotangent.astype(np.float64)
    # Compiling takes most of the time.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    with jax.default_device(jax.devices("cpu")[0]):
        program = lowered(name, arrays, cotangent, "xla")
    return pool.submit(lambda: results(program.compile(options), arrays, cotangent))


def largest_errors(runs: list[dict[str, Any]], exact: dict[str, Any]) -> dict[str, float]:
    """Of each result, in all runs, relative to its largest value or to 1. NaN if there is one."""
    import numpy as np

    return {
        key: float(np.max([np.abs(run[key] - e).max(initial=0) for run in runs]) / np.abs(e).max(initial=1))
        for key, e in exact.items()
    }


def run(mode: str, check: Check, exact: concurrent.futures.Future) -> dict[str, Any]:
    """What came of a check: the largest error, relative to the largest value or to 1, and which results are wrong."""
    import jax
    import numpy as np
    from support.tolerances import TOLERANCES

    tolerance = TF32_TOLERANCE if mode == "tf32" else TOLERANCES[TOLERANCE.get(mode, mode)]
    arguments = operands(check.case, mode)
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops={str(check.deterministic).lower()}"  # read when traced
    with jax.default_matmul_precision("default" if mode == "tf32" else "highest"):
        compiled = lowered(check.case, *arguments, "native").compile()
    poison()
    first, again = (results(compiled, *arguments) for _ in range(2))
    errors = largest_errors([first, again], exact.result())
    wrong = [f"{key} is off by {error:.1e}" for key, error in errors.items() if not error <= tolerance]
    if check.deterministic:
        wrong += [f"{key} has other bits" for key, a in first.items() if not np.array_equal(a, again[key])]
    return {"error": float(np.max(list(errors.values()))), "allowed": tolerance, "wrong": wrong}


def reports(mode: str, checks: list[Check]) -> Iterator[dict[str, Any]]:
    """A report for each check, until one fails with an exception."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        exact = {name: expected(name, mode, pool) for name in dict.fromkeys(check.case for check in checks)}
        for check in checks:
            report = {"mode": mode, **check._asdict()}
            try:
                yield report | run(mode, check, exact[check.case])
            except Exception as error:  # whatever XLA, CUDA or a kernel has to say
                yield report | {"wrong": [f"{type(error).__name__}: {str(error)[:500]}"]}
                return


def run_in_this_process(mode: str, checks: list[Check]) -> None:
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"  # the reference is computed on the CPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if reason := unusable():
        print(reason)
        raise SystemExit(UNUSABLE)
    for report in reports(mode, checks):
        print(json.dumps(report), flush=True)


def unusable() -> str | None:
    """Why nothing can be checked."""
    try:
        import jax

        from jax_dcn._operator import native

        if jax.default_backend() != "gpu":
            return f"no GPU: JAX runs on {jax.devices()}"
    except (ImportError, RuntimeError) as error:
        return f"no GPU: {error}" if isinstance(error, RuntimeError) else str(error)
    jax.config.update("jax_enable_x64", True)
    return native.CUDA_MISSING


# --- all of them ---

# The exit status of a process in which nothing can be checked.
UNUSABLE = 77


class Unusable(Exception):
    """Why nothing can be checked."""


def supervised(mode: str, checks: list[Check], under: list[str]) -> list[dict[str, Any]]:
    """The reports of all checks, in as many processes as it takes. Prints everything that these print."""
    done = []
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}  # what is checked are the tests' cases
    while checks:
        command = [*under, sys.executable, __file__, "--process", mode, *map("-".join, names(checks))]
        before, last = len(checks), ""
        streams: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with subprocess.Popen(command, env=environment, **streams) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if report := to_report(line):
                    done.append(report)
                    checks = checks[1:]
                elif line.strip():
                    last = line.strip()
        if process.returncode == UNUSABLE:
            raise Unusable(last)
        if len(checks) == before:
            report = {"mode": mode, **checks[0]._asdict(), "wrong": [f"exit status {process.returncode}: {last}"]}
            print(json.dumps(report), flush=True)
            done.append(report)
            checks = checks[1:]
    return done


def to_report(line: str) -> dict[str, Any] | None:
    """What a line of the output reports; others' lines come between."""
    return json.loads(line) if line.startswith('{"mode"') else None


def names(checks: list[Check]) -> list[tuple[str, ...]]:
    return [(check.case, "deterministic") if check.deterministic else (check.case,) for check in checks]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every_case = list(dict.fromkeys(check.case for check in CHECKS))

    def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(allowed):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: none of {', '.join(allowed)}")
            return text.split(",")

        return parse

    parser.add_argument("--modes", type=names(MODES), default=MODES, metavar="MODE,...", help=", ".join(MODES))
    parser.add_argument("--cases", type=names(every_case), default=every_case, metavar="CASE,...")
    parser.add_argument("--under", type=shlex.split, default=[], metavar="COMMAND", help="that starts the processes")
    parser.add_argument("--process", nargs="+", help=argparse.SUPPRESS)  # a mode and the checks of a process
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.process:
        mode, *chosen = arguments.process
        by_name = dict(zip(map("-".join, names(list(CHECKS))), CHECKS, strict=True))
        return run_in_this_process(mode, [by_name[name] for name in chosen])
    checks = [check for check in CHECKS if check.case in arguments.cases]
    with concurrent.futures.ThreadPoolExecutor(len(arguments.modes)) as pool:
        done = pool.map(lambda mode: supervised(mode, checks, arguments.under), arguments.modes)
        try:
            wrong = [report for reports in done for report in reports if report["wrong"]]
        except Unusable as reason:
            raise SystemExit(f"nothing was checked: {reason}") from None
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(checks) * len(arguments.modes)} checks failed")


if __name__ == "__main__":
    main()
