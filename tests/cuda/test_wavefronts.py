"""Wide accesses to shared memory have no bank conflicts in the kernels of products: see access_counts.h."""

import functools

import on_cpu
import pytest
from support.cases import Case

CASE = Case("wavefronts", c_in=64, c_out=64, size=(12, 11))


@functools.cache
def counts(programs, mode, backward):
    dtype = on_cpu.dtype_of(mode)
    cotangent = CASE.cotangent(dtype) if backward else None
    return on_cpu.counts(on_cpu.run, programs, CASE, mode, CASE.operands(dtype), cotangent)


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("ForwardKernel", "LoadMatrix4"),
        ("ForwardKernel", "CopyAsync16"),
        ("ForwardKernel", "Write16"),
        ("GradSamplesKernel", "LoadMatrix4"),
        ("GradSamplesKernel", "CopyAsync16"),
        ("GradSamplesKernel", "Write16"),
        ("GradSamplesKernel", "Read16"),
        ("GradWeightKernel", "LoadMatrix4Transposed"),
        ("GradWeightKernel", "CopyAsync16"),
        ("GradWeightKernel", "Write16"),
    ],
)
def test_no_bank_conflicts(programs, kernel, kind, mode):
    if (kernel, kind, mode) == ("GradWeightKernel", "LoadMatrix4Transposed", "tf32"):
        kind = "Read4"  # such matrices of TF32 are read by words
    kernels = counts(programs, mode, kernel != "ForwardKernel")
    (accesses,) = (memory["shared"][kind] for name, memory in kernels.items() if name.startswith(kernel))
    assert accesses.instructions > 0
    assert accesses.wavefronts == accesses.least
