import os
import platform
import shutil
from pathlib import Path

import on_cpu
import pytest


@pytest.fixture(scope="session")
def programs(pytestconfig):
    """The folder of the programs that CMakeLists.txt builds: the CUDA kernels on the CPU, and tests of that.

    JAX_DCN_CUDA_ON_CPU names one where they are built already.
    """
    if "JAX_DCN_CUDA_ON_CPU" in os.environ:
        return Path(os.environ["JAX_DCN_CUDA_ON_CPU"])
    if platform.machine() != "x86_64":
        pytest.skip("the harness switches between threads in x86-64 assembly")
    if shutil.which("cmake") is None:
        pytest.skip("no cmake to build the CUDA kernels for the CPU")
    folder = pytestconfig.cache.mkdir("cuda_on_cpu")
    on_cpu.build(folder)
    return folder
