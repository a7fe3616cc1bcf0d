"""What the compiler made of the CUDA kernels: needs nvcc, and nvdisasm of the package nvidia-cuda-nvdisasm, no GPU."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"

# The tensor core instruction of each operand type, which is a template argument of the kernels.
INSTRUCTIONS = {
    "4TF32": "HMMA.1688.F32.TF32",
    "8BFloat16": "HMMA.16816.F32.BF16",
    "7Float16": "HMMA.16816.F32",
}

SMALL = "SmallGroups"  # in the names of kernels that take no tensor cores


def find_nvdisasm():
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    return shutil.which("nvdisasm") or next(map(str, packaged), None)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, tmp_path_factory):
    """The kernels by mangled name: ptxas's report and the machine code."""
    nvcc, nvdisasm = shutil.which("nvcc"), find_nvdisasm()
    if nvcc is None:
        pytest.skip("no nvcc")
    if nvdisasm is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    kernels = {}
    for source in SOURCES.glob("*.cu"):
        cubin = tmp_path_factory.mktemp(request.param) / "kernels.cubin"
        report = run(nvcc, "-std=c++17", "-O3", "-cubin", f"-arch={request.param}", "-Xptxas=-v", source, "-o", cubin)
        kernels |= parse(report, run(nvdisasm, "-c", cubin))
    return kernels


def parse(report, disassembly):
    code = re.split(r"\.section\s+\.text\.(\w+)", disassembly)
    code = dict(zip(code[1::2], code[2::2], strict=True))
    properties = re.findall(r"entry function '(\w+)'(.*?Used \d+ registers)", report, re.DOTALL)
    return {name: (text, code[name]) for name, text in properties}


@pytest.mark.parametrize("kernel", ["ForwardKernel", "GradSamplesKernel", "GradXInOrderKernel", "GradWeightKernel"])
@pytest.mark.parametrize("operand", INSTRUCTIONS)
def test_tensor_core_kernels(compiled, kernel, operand):
    found = {name: both for name, both in compiled.items() if kernel in name and operand in name and SMALL not in name}
    assert found
    for name, (properties, code) in found.items():
        assert f" {INSTRUCTIONS[operand]} " in code, name
        assert "LDGSTS" in code, name  # copies to shared memory that pass the registers by
        assert "0 bytes spill stores" in properties, name


def test_kernels_of_small_groups(compiled):
    found = {name: both for name, both in compiled.items() if SMALL in name}
    assert len(found) == 4 * len(("Forward", "GradSamples", "GradXInOrder", "GradWeight"))
    for name, (properties, _) in found.items():
        # Nor is an array of theirs in memory, as those are whose index the compiler does not know.
        assert " 0 bytes stack frame, 0 bytes spill stores" in properties, name
