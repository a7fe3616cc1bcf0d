"""Any geometry: the result and all gradients against the definition."""

import jax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import cases
from support.formats import DATA_FORMATS
from support.strategies import SETTINGS, geometries
from support.tolerances import assert_close


@settings(
    SETTINGS,
    # `implementation` only sets an environment variable, to the same value for every example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=geometries(),
    dtype=st.sampled_from(["float64", "float32"]),
    data_format=st.sampled_from(DATA_FORMATS),
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
    assert y.dtype == dtype
    assert_close(y, cases.by_definition(case, operands))
    expected = cases.gradients_by_definition(case, operands, cotangent)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(gradient, expected[name], err_msg=name)
