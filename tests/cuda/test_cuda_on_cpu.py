"""The CUDA kernels' own sources, run on the CPU with all of the harness's checks: the numbers.

See device_on_cpu.h. What only a GPU can show (that the instructions do what they are documented to do, speed) is not
tested here.
"""

import os

import cases
import jax.numpy as jnp
import numpy as np
import on_cpu
import oracle
import pytest
from cases import AWKWARD, ISLAND, UNUSABLE, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_random import geometries
from tolerances import TOLERANCES

# Relative to the largest value of a result, as in tolerances.py, but the samples are rounded to the type that the
# products are made in. For TF32 that type has 10 bits after the point and the hardware truncates.
ROUNDED = {"tf32": 2**-9, "bfloat16": 2**-8, "float16": 2**-11}


def assert_close(mode, actual, expected, name):
    tolerance = TOLERANCES[actual.dtype.name] + ROUNDED.get(mode, 0)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=f"{mode} {name}")


def check(programs, case, mode, operands, seed=0, deterministic=False):
    """The result and all gradients against the definition."""
    complete = {"mask": None, "bias": None, **operands}
    y = on_cpu.run(programs, case, mode, operands, seed=seed)
    assert_close(mode, y, oracle.deform_conv2d(**complete, **case.arguments), "y")
    cotangent = case.cotangent(y.dtype)
    gradients = on_cpu.run(programs, case, mode, operands, cotangent, seed=seed, deterministic=deterministic)
    expected = oracle.deform_conv2d_backward(cotangent, **complete, **case.arguments)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(mode, gradient, expected[name], name)


@pytest.mark.parametrize("mode", on_cpu.MODES)
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_awkward_geometries(programs, case, mode):
    check(programs, case, mode, case.operands(on_cpu.dtype_of(mode)))
