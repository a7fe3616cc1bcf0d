"""Wrong use raises TypeError or ValueError while tracing, and says what was expected and what came."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.formats import to_nhwc

import jax_dcn

FUNCTIONS = (jax_dcn.deform_conv2d, jax_dcn.modulated_deform_conv2d)


def valid_shapes():
    return {
        "x": (2, 6, 7, 8),
        "offset": (2, 36, 3, 8),
        "mask": (2, 18, 3, 8),
        "weight": (4, 3, 3, 2),
        "bias": (4,),
    }


PADDING_FORMS = (
    "an integer, a pair (height, width), pairs ((top, bottom), (left, right)), 'SAME', 'SAME_LOWER' or 'VALID'"
)
ARGUMENTS = {"stride": (2, 1), "padding": (1, 1), "dilation": (2, 2), "groups": 2, "deform_groups": 3}


def to_format(name, shape, data_format):
    if data_format == "NCHW" or len(shape) != 4:
        return shape
    return to_nhwc(np.empty(shape), name).shape


def trace(function, data_format="NCHW", *, dtypes=None, **changes):
    """Traces a call that is valid but for `changes`: shapes, NCHW, by operand and values by argument."""
    operands = {}
    for name, shape in valid_shapes().items():
        shape = to_format(name, changes.pop(name, shape), data_format)
        operands[name] = jax.ShapeDtypeStruct(shape, (dtypes or {}).get(name, jnp.float32))
    arguments = {"data_format": data_format, **ARGUMENTS, **changes}
    return jax.eval_shape(lambda operands: function(**operands, **arguments), operands)


# What changes, and the message behind the function's name.
SHAPES = [
    ({"x": (2, 6, 7)}, "x has 3 dimensions, expected 4"),
    ({"offset": (36, 3, 8)}, "offset has 3 dimensions, expected 4"),
    ({"mask": (2, 18, 3, 8, 1)}, "mask has 5 dimensions, expected 4"),
    ({"weight": (4, 3)}, "weight has 2 dimensions, expected 4"),
    ({"bias": (4, 1)}, "bias has 2 dimensions, expected 1"),
    ({"offset": (1, 36, 3, 8)}, "offset has batch size 1, expected x's, 2"),
    ({"offset": (2, 18, 3, 8)}, "offset has 18 channels, expected 36 = deform_groups (3) * kernel 3 * 2 * 2"),
    ({"offset": (2, 36, 8, 3)}, "offset has spatial size 8 x 3, expected that of the output, 3 x 8"),
    ({"mask": (0, 18, 3, 8)}, "mask has batch size 0, expected x's, 2"),
    ({"mask": (2, 36, 3, 8)}, "mask has 36 channels, expected 18 = deform_groups (3) * kernel 3 * 2"),
    ({"mask": (2, 18, 3, 7)}, "mask has spatial size 3 x 7, expected that of the output, 3 x 8"),
    ({"groups": 4}, "C_in (6) must be a positive multiple of groups (4)"),
    ({"groups": 3}, "C_out (4) must be a positive multiple of groups (3)"),
    ({"x": (2, 0, 7, 8)}, "C_in (0) must be a positive multiple of groups (2)"),
    ({"weight": (0, 3, 3, 2)}, "C_out (0) must be a positive multiple of groups (2)"),
    ({"deform_groups": 4}, "C_in (6) must be a multiple of deform_groups (4)"),
    ({"weight": (4, 6, 3, 2)}, "weight has 6 input channels, expected 3 = C_in (6) / groups (2)"),
    ({"weight": (4, 3, 0, 2)}, "weight has an empty kernel"),
    ({"bias": (3,)}, "bias has shape (3,), expected (4,) = (C_out,)"),
    ({"x": (2, 6, 0, 8)}, "x has no pixels, its spatial size is 0 x 8"),
    ({"x": (2, 6, 2, 8)}, "the output would have no pixels, its size would be 0 x 8 for an input of 2 x 8"),
]

ARGUMENT_VALUES = [
    ({"stride": (0, 1)}, ValueError, "stride must be at least 1, got (0, 1)"),
    ({"stride": (1, 2, 3)}, ValueError, "stride must be an integer or a pair (height, width), got (1, 2, 3)"),
    ({"stride": 2.0}, TypeError, "stride must be an integer, got 2.0"),
    ({"stride": (1, "2")}, TypeError, "stride must be an integer, got '2'"),
    ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ({"padding": ((0, 1), (-1, 0))}, ValueError, "padding must be at least 0, got ((0, 1), (-1, 0))"),
    ({"padding": "CIRCULAR"}, ValueError, f"padding must be {PADDING_FORMS}, got 'CIRCULAR'"),
    ({"padding": (1, 2, 3)}, ValueError, f"padding must be {PADDING_FORMS}, got (1, 2, 3)"),
    ({"padding": ((1, 2), (3,))}, ValueError, f"padding must be {PADDING_FORMS}, got ((1, 2), (3,))"),
    ({"padding": ((1, 2), (3, 0.5))}, TypeError, f"padding must be {PADDING_FORMS}, got ((1, 2), (3, 0.5))"),
    ({"padding": ("SAME", 1)}, TypeError, f"padding must be {PADDING_FORMS}, got ('SAME', 1)"),
    ({"padding": None}, TypeError, f"padding must be {PADDING_FORMS}, got None"),
    ({"padding": True}, TypeError, f"padding must be {PADDING_FORMS}, got True"),
    (
        {"padding": ((0, 2**31 - 1), (0, 0))},
        ValueError,
        "an image, its padded height and its padded width must have fewer than 2^31 pixels, got 7 x 8 with padding "
        "((0, 2147483647), (0, 0))",
    ),
    ({"padding": 2**31}, ValueError, "padding must be at most 2147483647, got 2147483648"),
    ({"forward_mode": 1}, TypeError, "forward_mode must be a bool, got 1"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    ({"dilation": True}, TypeError, "dilation must be an integer, got True"),
    ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    ({"groups": 1.5}, TypeError, "groups must be an integer, got 1.5"),
    ({"deform_groups": -3}, ValueError, "deform_groups must be at least 1, got -3"),
    ({"deform_groups": (3,)}, TypeError, "deform_groups must be an integer, got (3,)"),
]

both_functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def raises(function, exception, message):
    return pytest.raises(exception, match="^" + re.escape(f"{function.__name__}: {message}"))


@both_functions
def test_valid_call_is_valid(function, data_format):
    """So that every other call fails for its own reason."""
    y = trace(function, data_format)
    assert y.shape == to_format("y", (2, 4, 3, 8), data_format)


@both_functions
@pytest.mark.parametrize(("changes", "message"), SHAPES, ids=[message for _, message in SHAPES])
def test_shape_that_does_not_fit(function, data_format, changes, message):
    with raises(function, ValueError, message):
        trace(function, data_format, **changes)


@both_functions
@pytest.mark.parametrize(
    ("changes", "exception", "message"), ARGUMENT_VALUES, ids=[message for *_, message in ARGUMENT_VALUES]
)
def test_argument_out_of_range_or_of_the_wrong_type(function, data_format, changes, exception, message):
    with raises(function, exception, message):
        trace(function, data_format, **changes)


@both_functions
@pytest.mark.parametrize("name", valid_shapes())
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "float8_e4m3fn"])
def test_dtype_that_is_not_supported(function, name, dtype):
    message = f"{name} has dtype {dtype}, expected one of float32, float64, bfloat16, float16"
    with raises(function, TypeError, message):
        trace(function, dtypes={name: jnp.dtype(dtype)})


@both_functions
@pytest.mark.parametrize("name", valid_shapes())
def test_byte_order(function, name):
    operands = {operand: np.ones(shape, "f8") for operand, shape in valid_shapes().items()}
    operands[name] = operands[name].astype(np.dtype("f8").newbyteorder())
    with raises(function, TypeError, f"{name} has dtype {operands[name].dtype}, expected this machine's byte order"):
        function(**operands, **ARGUMENTS)


@both_functions
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weight_and_bias_have_the_dtype_of_x(function, name):
    with raises(function, TypeError, f"{name} has dtype bfloat16, expected x's, float32"):
        trace(function, dtypes={name: jnp.bfloat16})


@both_functions
@pytest.mark.parametrize("data_format", ["NCWH", "nhwc", "channels_last", None, 1])
def test_unknown_data_format(function, data_format):
    with raises(function, ValueError, f"data_format must be one of ('NCHW', 'NHWC'), got {data_format!r}"):
        trace(function, data_format)


@both_functions
@pytest.mark.parametrize("name", valid_shapes())
def test_operand_that_is_not_an_array(function, name):
    operands = {name: jnp.ones(shape) for name, shape in valid_shapes().items()}
    operands[name] = operands[name].tolist()
    with raises(function, TypeError, f"{name} must be an array, got list"):
        function(**operands, **ARGUMENTS)


def test_modulated_deform_conv2d_needs_a_mask():
    operands = {name: jnp.ones(shape) for name, shape in valid_shapes().items()} | {"mask": None}
    with raises(jax_dcn.modulated_deform_conv2d, TypeError, "mask must be an array, got None"):
        jax_dcn.modulated_deform_conv2d(**operands, **ARGUMENTS)


def test_traced_argument():
    """An argument that shapes depend on cannot be an operand of jit."""
    operands = {name: jnp.ones(shape) for name, shape in valid_shapes().items()}
    arguments = dict(ARGUMENTS)
    del arguments["stride"]
    with raises(jax_dcn.deform_conv2d, TypeError, "stride must be an integer, got "):
        jax.jit(lambda stride: jax_dcn.deform_conv2d(**operands, stride=stride, **arguments))(2)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad, jax.vmap], ids=["eager", "jit", "grad", "vmap"])
def test_message_of_the_contract(transform):
    """The message is complete, and the same under every transformation."""

    def function(x):
        offset, weight = np.ones((1, 36, 5, 5), np.float32), np.ones((2, 2, 3, 3), np.float32)
        return jax_dcn.deform_conv2d(x, offset, weight, padding=1).sum()

    x = np.ones((1, 2, 5, 5), np.float32)
    with pytest.raises(ValueError) as error:
        transform(function)(x[None] if transform is jax.vmap else x)
    assert str(error.value) == (
        "deform_conv2d: offset has 36 channels, expected 18 = deform_groups (1) * kernel 3 * 3 * 2"
    )


@pytest.mark.parametrize("weight", [(4, 8, 3, 3), (3, 3, 8, 4)])
@pytest.mark.parametrize("groups", [1, 2])
def test_x_in_the_other_data_format(weight, groups):
    """Whichever format the weight has."""
    weight = tuple(size // groups if size == 8 else size for size in weight)
    x, offset = np.ones((1, 11, 10, 8)), np.ones((1, 18, 11, 10))
    with pytest.raises(ValueError, match=r"; x's shape \(1, 11, 10, 8\) would fit with data_format='NHWC'$"):
        jax_dcn.deform_conv2d(x, offset, np.ones(weight), padding=1, groups=groups)


def test_offset_in_the_other_data_format():
    x, offset = np.ones((1, 8, 11, 10)), np.ones((1, 11, 10, 18))
    message = r"offset has 11 channels, .*; offset's shape \(1, 11, 10, 18\) would fit with data_format='NHWC'$"
    with pytest.raises(ValueError, match=message):
        jax_dcn.deform_conv2d(x, offset, np.ones((4, 8, 3, 3)), padding=1)


def test_offsets_of_another_level():
    """Which mmcv does not check in version 2."""
    x, offset, mask, weight = (np.ones((1, *shape)) for shape in ((2, 5, 5), (18, 9, 9), (9, 9, 9), (2, 3, 3)))
    message = r"offset has spatial size 9 x 9, .*: jax_dcn\.mmcv\.nn\.reread gives what it reads of larger ones$"
    with pytest.raises(ValueError, match=message):
        jax_dcn.modulated_deform_conv2d(x, offset, mask, weight, padding=1)
    with pytest.raises(ValueError, match=r"expected that of the output, 5 x 5$"):
        jax_dcn.deform_conv2d(x, offset, weight, padding=1)


def test_unknown_implementation(monkeypatch):
    monkeypatch.setenv("JAX_DCN_IMPLEMENTATION", "cuda")
    with pytest.raises(ValueError, match=r"JAX_DCN_IMPLEMENTATION must be one of .*, got 'cuda'"):
        trace(jax_dcn.deform_conv2d)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_symbolic_channels(name):
    (c,) = jax.export.symbolic_shape("c")
    shapes = {"x": (1, 8, 4, 4), "offset": (1, 2, 4, 4), "weight": (8, 8, 1, 1)}
    shapes[name] = (shapes[name][0], c, *shapes[name][2:])
    operands = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"^deform_conv2d: only batch, height and width may be symbolic, got C_in \("):
        jax.eval_shape(lambda operands: jax_dcn.deform_conv2d(**operands), operands)


def test_channels_that_the_kernels_cannot_count():
    shapes = {"x": (1, 2**27, 1, 1), "offset": (1, 2, 1, 1), "weight": (1, 2**27, 1, 1)}
    operands = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"C_in \(134217728\) or C_out \(1\), must be fewer than 2\^27"):
        jax.eval_shape(lambda operands: jax_dcn.deform_conv2d(**operands), operands)
