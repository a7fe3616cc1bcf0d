"""Wide accesses to shared memory have no bank conflicts in the kernels of products: see access_counts.h."""

import functools

import on_cpu
import pytest
from support.cases import Case

CASES = [
    Case("plain", c_in=64, c_out=64, size=(12, 11)),
    Case("bundles", c_in=64, c_out=64, groups=8, size=(12, 11)),
    Case("deform_groups", c_in=64, c_out=64, deform_groups=8, size=(12, 11)),
]
WIDE = {"LoadMatrix4", "LoadMatrix4Transposed", "CopyAsync16", "Read16", "Write16", "Read8", "Write8"}


@functools.cache
def counts(programs, case, mode, backward):
    dtype = on_cpu.dtype_of(mode)
    cotangent = case.cotangent(dtype) if backward else None
    return on_cpu.counts(on_cpu.run, programs, case, mode, case.operands(dtype), cotangent)


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("kernel", ["Forward", "GradSamples", "GradWeight"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_bank_conflicts(programs, case, kernel, mode):
    kernels = counts(programs, case, mode, kernel != "Forward")
    (name,) = (name for name in kernels if name.startswith(kernel))
    assert ("Bundle" in name) == (case.groups > 1 and kernel != "GradWeight")
    kinds = WIDE & kernels[name]["shared"].keys()
    matrices = "LoadMatrix4Transposed" if kernel == "GradWeight" else "LoadMatrix4"
    if (kernel, mode) == ("GradWeight", "tf32"):
        matrices = "Read4"  # such matrices of TF32 are read by words
    for kind in sorted(kinds | {"CopyAsync16", matrices}):
        accesses = kernels[name]["shared"][kind]
        assert accesses.instructions > 0
        assert accesses.wavefronts == accesses.least, kind
