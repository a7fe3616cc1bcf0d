"""How far a result may be from the exact one."""

import jax
import numpy as np

# Relative to the scale of the result. The 16-bit types are summed in float32, so what is left of them is float32's
# error and one rounding of the result, half the spacing of the numbers below the scale.
TOLERANCES = {
    "float64": 1e-12,
    "float32": 1e-5,
    "bfloat16": 2**-8 + 1e-5,
    "float16": 2**-11 + 1e-5,
    # float32 whose products have operands rounded to TF32's 11 bits. The errors of many products cancel in part.
    "tf32": 2e-3,
    # 16 bits where the samples were rounded too, before they were multiplied.
    "bfloat16 samples": 2**-7 + 1e-5,
    "float16 samples": 2**-10 + 1e-5,
}


def assert_close(actual, expected, dtype=None, err_msg="", both_rounded=False):
    """Checks a result against the exact values, which may be wider.

    `dtype` names the tolerance, by default `actual`'s. The error counts relative to max(1, the largest value). It may
    be twice as large where the expected values have been rounded to the same dtype.
    """
    tolerance = (1 + both_rounded) * TOLERANCES[str(actual.dtype if dtype is None else dtype)]
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{err_msg}: shape {actual.shape}, expected {expected.shape}"
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=err_msg)


def assert_trees_close(actual, expected):
    jax.tree.map(assert_close, actual, expected)


def assert_same_arrays(actual, expected):
    """Checks two dicts of arrays for the same names, dtypes, shapes and bits."""
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name


def relative_error(actual, expected):
    """The largest error, of the largest value."""
    assert actual.shape == expected.shape
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
