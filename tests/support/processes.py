"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_python(code: str, *folders: Path, **environment: str) -> str:
    """Runs code as a user would, in a folder without the package's sources, and returns what it prints.

    On the CPU, unless JAX_PLATFORMS says otherwise: what needs a process of its own is about the CPU's threads,
    instruction sets and devices. XLA's thread pool follows NPROC. The code may import from the `folders`, too.
    """
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path(*folders)}
    settings.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    settings |= environment
    return _run(settings, "-c", code)


def run_example(name: str, *arguments: str) -> str:
    """Runs a program of examples/ as a user would, on the CPU, and returns what it prints."""
    return _run({**os.environ, "JAX_PLATFORMS": "cpu"}, str(EXAMPLES / f"{name}.py"), *arguments)


def _run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders in front."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
