import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def programs(pytestconfig):
    """The folder of the programs that CMakeLists.txt builds: the CUDA kernels on the CPU, and tests of that."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake to build the CUDA kernels for the CPU")
    folder = pytestconfig.cache.mkdir("cuda_on_cpu")
    for command in (
        ["cmake", "-S", str(Path(__file__).parent), "-B", str(folder)],
        ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder
