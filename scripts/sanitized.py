"""Runs every CUDA kernel once or so on small arrays, for compute-sanitizer; scripts/gpu_check starts it.

Each result is compared with plain XLA on the CPU, so that a run that went nowhere does not pass for a clean one.
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import cases
import jax
import jax.numpy as jnp
import numpy as np
from tolerances import TOLERANCES

from jax_dcn import native

# Most of their groups are so small that kernels of their own take them; four of every eight are made larger.
CASES = [
    *(
        dataclasses.replace(case, batch=min(case.batch, 2), c_out=case.c_out + number // 4 % 2 * 17 * case.groups)
        for number, case in enumerate(cases.AWKWARD)
    ),
    cases.Case("tiles", batch=1, c_in=40, c_out=264, size=(13, 17)),  # of pixels and of output channels
]


def results(case, operands, cotangent):
    @jax.jit
    def function(operands, cotangent):
        y, vjp = jax.vjp(cases.deform_conv2d(case), operands)
        return {"y": y, **{f"grad_{name}": gradient for name, gradient in vjp(cotangent)[0].items()}}

    return {name: np.asarray(value, np.float64) for name, value in function(operands, cotangent).items()}


def main():
    assert jax.default_backend() == "gpu" and native.CUDA_MISSING is None, native.CUDA_MISSING
    worst = 0.0
    for number, case in enumerate(CASES):
        os.environ["JAX_DCN_IMPLEMENTATION"] = "xla"
        with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
            exact = case.operands("float32"), case.cotangent("float32")
            expected = results(case, *exact)
        os.environ["JAX_DCN_IMPLEMENTATION"] = "native"
        # Every case in one dtype and with one of the options, each of which has several cases then.
        dtype = ("float32", "tf32", "bfloat16", "float16")[number % 4]
        os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops={'true' if number % 3 == 0 else 'false'}"
        operands, cotangent = case.operands("float32"), case.cotangent("float32")
        if dtype != "tf32":
            narrow = {name for name in operands if name not in ("offset", "mask")}
            operands = {name: a.astype(jnp.dtype(dtype)) if name in narrow else a for name, a in operands.items()}
            cotangent = cotangent.astype(jnp.dtype(dtype))
        with jax.default_matmul_precision("default" if dtype == "tf32" else "highest"):
            actual = results(case, operands, cotangent)
        for name, value in expected.items():
            error = np.abs(actual[name] - value).max(initial=0) / np.abs(value).max(initial=1)
            # The operands were rounded, too.
            assert error <= 8 * TOLERANCES[dtype], f"{case}, {dtype}, {name}: off by {error:.1e}"
            worst = max(worst, error)
    print(f"{len(CASES)} cases, largest error {worst:.1e}")


if __name__ == "__main__":
    main()
