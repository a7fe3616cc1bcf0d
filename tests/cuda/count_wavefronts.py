"""Prints how the CUDA kernels access memory, as counted on the CPU (see access_counts.h): tables in Markdown.

Needs cmake, a C++ compiler and jax_dcn, and no GPU. Every run of a checkout counts the same.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("tests", "scripts", "benchmarks"))

import on_cpu
from report import markdown
from support.cases import Case

# So few pixels that the forward takes narrow tiles, and so many that it takes the widest.
CASES = (
    Case("256 to 256", batch=1, c_in=256, c_out=256, size=(16, 16)),
    Case("256 to 256, 32 groups", batch=1, c_in=256, c_out=256, size=(16, 16), groups=32),
    Case("64 to 64, 8 deform groups", batch=1, c_in=64, c_out=64, size=(16, 16), deform_groups=8),
    Case("256 to 256, kernel 1 x 1", batch=1, c_in=256, c_out=256, size=(128, 128), kernel=(1, 1), padding=(0, 0)),
)


def table(memory, type_, kernels):
    """The accesses to a memory, with the sums of each kernel."""
    rows = []
    for name, memories in kernels.items():
        accesses = memories[memory]
        if len(accesses) > 1:
            accesses["all"] = map(sum, zip(*accesses.values(), strict=True))
        rows += [[f"`{name}`", kind, *map(str, counts)] for kind, counts in accesses.items()]
    return markdown([f"{memory} memory", "access", *type_._fields], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=on_cpu.MODES, default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--programs", type=Path, metavar="FOLDER", help="where to build, and find what is built already"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        programs = arguments.programs or Path(temporary)
        programs.mkdir(parents=True, exist_ok=True)
        on_cpu.build(programs)
        dtype = on_cpu.dtype_of(arguments.mode)
        for case in CASES:
            operands, kernels = case.operands(dtype), {}
            for cotangent in (None, case.cotangent(dtype)):
                kernels |= on_cpu.counts(on_cpu.run, programs, case, arguments.mode, operands, cotangent)
            print(f"## {case}, image {case.size[0]} x {case.size[1]}, {arguments.mode}", end="\n\n")
            print(table("shared", on_cpu.SharedAccesses, kernels), end="\n\n")
            print(table("global", on_cpu.GlobalAccesses, kernels), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
