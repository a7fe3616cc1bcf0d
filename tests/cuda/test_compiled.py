"""What the compiler made of the CUDA kernels: needs nvcc, and nvdisasm of the package nvidia-cuda-nvdisasm, no GPU."""

import cuda_counts
import pytest

# The tensor core instruction of each operand type, which is a template argument of the kernels.
INSTRUCTIONS = {
    "4TF32": "HMMA.1688.F32.TF32",
    "8BFloat16": "HMMA.16816.F32.BF16",
    "7Float16": "HMMA.16816.F32",
}
KERNELS = (
    "ForwardKernel",
    "ForwardBundleKernel",
    "GradSamplesKernel",
    "GradXInOrderKernel",
    "GradWeightKernel",
)  # of products

SMALL = "SmallGroups"  # in the names of kernels that take no tensor cores


def compile_for(architecture):
    try:
        return cuda_counts.compiled(architecture)
    except cuda_counts.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request):
    return compile_for(request.param)


@pytest.fixture(scope="module")
def turing():
    return compile_for("sm_75")


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


def test_hottest_loops_of_products(compiled):
    """Each step of a product is in the table's loop, and what comes with it, but nothing of what follows the loop."""
    for name, (_, code) in compiled.items():
        if "ForwardKernel" in name and any(operand in name for operand in INSTRUCTIONS):
            loops = cuda_counts.hottest_loops(code)
            assert loops["products"].count("HMMA") == sum(line.count(" HMMA.") for line in code.splitlines())
            body = {name for loop in loops.values() for name in loop}
            assert {"LDSM", "LDS", "STS", "LDG"} <= body
            assert "STG" not in body


@pytest.mark.parametrize("kernel", ["ForwardSumsKernel", "GradSumsKernel", "GradXInOrderSumsKernel"])
def test_kernels_without_a_weight(compiled, kernel):
    """Channels are loaded as vectors, and atomics are only where the order of the sums may change."""
    found = {name: both for name, both in compiled.items() if kernel in name}
    assert len(found) == 4
    for name, (_, code) in found.items():
        assert ("LDG.E.128" in code) == ("InOrder" not in kernel), name  # whose threads have a channel each
        assert any(f" {atomic}" in code for atomic in cuda_counts.ATOMICS) == (kernel == "GradSumsKernel"), name
