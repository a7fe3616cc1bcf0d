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
KERNELS = ("ForwardKernel", "GradSamplesKernel", "GradXInOrderKernel", "GradWeightKernel")  # of products

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
    return compile_for(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def turing(tmp_path_factory):
    return compile_for("sm_75", tmp_path_factory)


def compile_for(architecture, tmp_path_factory):
    """The kernels by mangled name: ptxas's report and the machine code."""
    nvcc, nvdisasm = shutil.which("nvcc"), find_nvdisasm()
    if nvcc is None:
        pytest.skip("no nvcc")
    if nvdisasm is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    kernels = {}
    for source in SOURCES.glob("*.cu"):
        cubin = tmp_path_factory.mktemp(architecture) / "kernels.cubin"
        report = run(nvcc, "-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas=-v", source, "-o", cubin)
        kernels |= parse(report, run(nvdisasm, "-c", cubin))
    return kernels


def parse(report, disassembly):
    code = re.split(r"\.section\s+\.text\.(\w+)", disassembly)
    code = dict(zip(code[1::2], code[2::2], strict=True))
    properties = re.findall(r"entry function '(\w+)'(.*?Used \d+ registers)", report, re.DOTALL)
    return {name: (text, code[name]) for name, text in properties}


def test_no_spills(compiled):
    for name, (properties, _) in compiled.items():
        # Nor is an array of theirs in memory, as those are whose index the compiler does not know.
        assert " 0 bytes stack frame, 0 bytes spill stores" in properties, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("operand", INSTRUCTIONS)
def test_tensor_core_kernels(compiled, kernel, operand):
    found = {name: both for name, both in compiled.items() if kernel in name and operand in name and SMALL not in name}
    assert found
    for name, (_, code) in found.items():
        assert f" {INSTRUCTIONS[operand]} " in code, name
        assert "LDGSTS" in code, name  # copies to shared memory that pass the registers by


def test_kernels_of_small_groups(compiled):
    found = [name for name in compiled if SMALL in name]
    assert len(found) == 4 * len(("Forward", "GradSamples", "GradXInOrder", "GradWeight"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_turing(turing, kernel):
    """Tensor cores for float16."""
    found = {name: both for name, both in turing.items() if kernel in name and "7Float16" in name and SMALL not in name}
    assert found
    for name, (properties, code) in found.items():
        assert " 0 bytes stack frame, 0 bytes spill stores" in properties, name
        assert " HMMA.1688.F32 " in code, name
