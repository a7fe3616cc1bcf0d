"""Any geometry: the result and all gradients against the definition.

The examples do not depend on chance. JAX_DCN_HYPOTHESIS_EXAMPLES asks for more of them.
"""

import math
import os

import cases
import jax
import oracle
from cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close


@st.composite
def geometries(draw):
    def pair(smallest, largest):
        return tuple(draw(st.integers(smallest, largest)) for _ in "hw")

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 4), pair(1, 3)
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    groups, deform_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Case(
        "random",
        batch=draw(st.integers(0, 3)),
        c_in=math.lcm(groups, deform_groups) * draw(st.integers(1, 5)),
        c_out=groups * draw(st.integers(1, 6)),
        size=tuple(n + draw(st.integers(0, 4)) for n in smallest),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=deform_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@settings(
    max_examples=int(os.environ.get("JAX_DCN_HYPOTHESIS_EXAMPLES", 25)),
    derandomize=True,
    deadline=None,
    # `implementation` only sets an environment variable, to the same value for every example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=geometries(),
    dtype=st.sampled_from(["float64", "float32"]),
    data_format=st.sampled_from(["NCHW", "NHWC"]),
    offset_scale=st.sampled_from([0, 0.25, 1, 8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_result_and_gradients_are_the_definition(implementation, case, dtype, data_format, offset_scale, seed):
    operands, cotangent = case.operands(dtype, seed), case.cotangent(dtype, seed)
    operands["offset"] *= offset_scale

    @jax.jit
    def function(operands, cotangent):
        y, vjp = jax.vjp(cases.deform_conv2d(case, data_format), operands)
        return y, vjp(cotangent)[0]

    y, gradients = function(operands, cotangent)
    complete = {"mask": None, "bias": None, **operands}
    assert y.dtype == dtype
    assert_close(y, oracle.deform_conv2d(**complete, **case.arguments))
    expected = oracle.deform_conv2d_backward(cotangent, **complete, **case.arguments)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(gradient, expected[name], err_msg=name)
