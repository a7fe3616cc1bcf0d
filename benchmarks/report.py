"""What the benchmarks read and write: arguments, where they ran, tables and files."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any


def listed(allowed: Collection[Any], kind: type = str) -> Callable[[str], list[Any]]:
    """The type of an argument that is a list with commas."""

    def parse(text: str) -> list[Any]:
        values = [kind(value) for value in text.split(",")]
        for value in values:
            if value not in allowed:
                raise argparse.ArgumentTypeError(f"{value} is none of {', '.join(map(str, allowed))}")
        return values

    return parse


# --- where they ran ---


def commit() -> tuple[str, bool]:
    """The commit of the package, and whether there were changes to it.

    From the wheel where scripts/gpu_wheel made it, which has it as its build tag; else this clone's.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution("jax_dcn").read_text("WHEEL") or ""
        if tag := re.search(r"^Build: 0_g([0-9a-f]+)(_changed)?$", wheel, re.MULTILINE):
            return tag[1], tag[2] is not None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") or "unknown", bool(git("status", "--porcelain", "--untracked-files=no"))


def installed(package: str) -> str | None:
    """The version of a Python package."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def versions(packages: Sequence[str]) -> dict[str, str]:
    return {package: version for package in packages if (version := installed(package))}


def named(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def config() -> list[str]:
    import jax_dcn  # which reports may be made without

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        jax_dcn.show_config()
    return printed.getvalue().splitlines()


def kernels(platform: str) -> str:
    """What the configuration says of those for "cpu" or "cuda"."""
    return next(line.removeprefix(platform).strip() for line in config() if line.startswith(platform))


def environment() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        processor = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    commit_id, changed = commit()
    return {
        "processor": processor,
        "cores": cores(),
        "load_average": os.getloadavg()[0],  # of the last minute: above 1 or so, others were at work too
        "platform": platform.platform(),
        "commit": commit_id,
        "uncommitted_changes": changed,
        "config": config(),
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- tables and files ---


def caption(environment: dict[str, Any], more: Sequence[str] = ()) -> str:
    changed = ", with uncommitted changes" if environment["uncommitted_changes"] else ""
    lines = [f"{environment['processor']}, {environment['cores']} cores, load {environment['load_average']:.1f}"]
    lines += [f"commit {environment['commit']}{changed}", *environment["config"], *more]
    return "\n".join(["```", *lines, "```"])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up as text too, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    return "\n".join([line(header), rule, *map(line, rows)])


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over the rounds, of two that ran within seconds; a slow one has its first run alone."""
    return statistics.median(x / y for x, y in zip(a, b, strict=False))


def milliseconds(times: Sequence[float]) -> str:
    """The median, after ~ if there is only one."""
    if not times:
        return ""
    value = statistics.median(times)
    return "~" * (len(times) == 1) + (f"{value:.0f}" if value >= 100 else f"{value:.3g}")


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    return "~" * (1 in (len(a), len(b))) + f"{paired_ratio(a, b):.2f}" if a and b else ""


def write_files(folder: Path, files: dict[str, str | dict[str, Any]]) -> None:
    """Texts, and JSON of dicts. Each file is replaced as a whole, so that a run that is cut short leaves whole ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        new = folder / f"{name}.new"
        new.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
        os.replace(new, folder / name)
