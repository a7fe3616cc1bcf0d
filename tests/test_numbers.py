"""The numbers of the forward pass: the operator is mmcv's, in every geometry and dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from jax import lax
from support import cases, golden, marks
from support.cases import (
    AWKWARD,
    BY_NAME,
    DTYPES,
    DTYPES_OF_16_BITS,
    LARGE,
    PER_IMAGE,
    TORCHVISION,
    Case,
    by_definition,
    drawn_by_definition,
)
from support.tolerances import assert_close

import jax_dcn
from jax_dcn._operator import native

# --- against others ---


@pytest.mark.parametrize("case", AWKWARD, ids=str)
@marks.implementations_dtypes_and_formats
def test_result_is_the_definition(case, implementation, dtype, data_format):
    y = cases.forward(case, case.operands(dtype), data_format)
    assert y.dtype == dtype
    assert_close(y, drawn_by_definition(case))


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@marks.dtypes_and_formats
def test_large_result_is_the_definition(case, implementation, dtype, data_format):
    assert_close(cases.forward(case, case.operands(dtype), data_format), drawn_by_definition(case))


@pytest.mark.parametrize("case", golden.CASES, ids=str)
@marks.dtypes_and_formats
def test_result_is_mmcvs(case, implementation, dtype, data_format):
    assert_close(cases.forward(case, golden.operands(case, dtype), data_format), golden.result(case))


def onnx_model(case):
    names = ["X", "W", "offset", "B", "mask"]
    node = onnx.helper.make_node(
        "DeformConv",
        names,
        ["Y"],
        kernel_shape=case.kernel,
        strides=case.stride,
        pads=[p[side] for side in (0, 1) for p in case.sides],
        dilations=case.dilation,
        group=case.groups,
        offset_group=case.deform_groups,
    )
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in [*names, "Y"]]
    graph = onnx.helper.make_graph([node], "deform_conv", values[:-1], values[-1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)


def onnx_inputs(operands):
    names = {"X": "x", "W": "weight", "offset": "offset", "B": "bias", "mask": "mask"}
    return {theirs: operands[ours] for theirs, ours in names.items()}


# ONNX's DeformConv has the same layouts, and counts every pixel outside the image as 0, which the bilinear
# interpolation turns into the same result at the border: the two definitions agree everywhere.


@pytest.mark.parametrize(
    "name", ["torchvision", "one_column", "padding_per_side", "depthwise", "groups_4_deform_groups_3", "c_in_258"]
)
def test_result_is_onnx_runtimes(name, implementation):
    case = BY_NAME[name]
    operands = case.operands("float32")
    session = onnxruntime.InferenceSession(onnx_model(case).SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, onnx_inputs(operands))
    assert_close(cases.forward(case, operands), expected)


def test_result_is_the_onnx_references(implementation):
    case = dataclasses.replace(TORCHVISION, batch=2)
    operands = case.operands("float32")
    (expected,) = onnx.reference.ReferenceEvaluator(onnx_model(case)).run(None, onnx_inputs(operands))
    assert_close(cases.forward(case, operands), expected)


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", c_in=5),
        Case("strided", size=(9, 8), kernel=(2, 3), stride=(2, 3), padding=(0, 2), dilation=(3, 1), mask=False),
        Case("grouped", c_in=12, c_out=8, groups=4, deform_groups=6, bias=False),
    ],
    ids=str,
)
def test_zero_offset_is_the_plain_convolution(case, implementation, data_format):
    operands = case.operands()
    operands["offset"] = np.zeros_like(operands["offset"])
    if case.mask:
        operands["mask"] = np.ones_like(operands["mask"])
    expected = lax.conv_general_dilated(
        operands["x"],
        operands["weight"],
        window_strides=case.stride,
        padding=case.sides,
        rhs_dilation=case.dilation,
        feature_group_count=case.groups,
    )
    if case.bias:
        expected += operands["bias"][None, :, None, None]
    assert_close(cases.forward(case, operands, data_format), expected)


# As the functions take it, and as JAX's convolutions do.
PADDINGS = [
    (0, ((0, 0), (0, 0))),
    (2, ((2, 2), (2, 2))),
    ((1, 0), ((1, 1), (0, 0))),
    ([3, 2], ((3, 3), (2, 2))),
    (((0, 3), (2, 1)), ((0, 3), (2, 1))),
    ((1, (0, 2)), ((1, 1), (0, 2))),
    (np.array([[1, 0], [0, 2]]), ((1, 0), (0, 2))),
    ("SAME", "SAME"),
    ("same_lower", "SAME_LOWER"),
    ("Valid", "VALID"),
]


@pytest.mark.parametrize(("padding", "explicit"), PADDINGS, ids=lambda padding: str(padding).replace("\n", ""))
@marks.implementations_and_formats
def test_padding_is_that_of_jaxs_convolutions(padding, explicit, implementation, data_format):
    """With kernels even and odd, and sizes that the strides divide and do not."""
    for kernel, stride, dilation in [((3, 4), (1, 1), (1, 2)), ((2, 3), (2, 3), (1, 1)), ((4, 1), (3, 2), (2, 1))]:
        case = Case("padded", size=(9, 8), kernel=kernel, stride=stride, dilation=dilation, padding=padding, c_in=2)
        rng = np.random.default_rng(0)
        operands = {"x": rng.standard_normal((2, 2, 9, 8)), "weight": rng.standard_normal((3, 2, *kernel))}
        expected = lax.conv_general_dilated(*operands.values(), stride, explicit, rhs_dilation=dilation)
        operands["offset"] = np.zeros((2, 2 * kernel[0] * kernel[1], *expected.shape[2:]))
        assert_close(cases.forward(case, operands, data_format), expected)


def test_integer_offsets_are_shifted_reads(implementation, data_format):
    """A 1x1 kernel of ones over one channel, so that every result is one pixel, or 0 outside the image."""
    case = Case("read", c_in=1, c_out=1, size=(9, 8), kernel=(1, 1), padding=(0, 0), mask=False, bias=False)
    operands = case.operands()
    operands["weight"] = np.ones((1, 1, 1, 1))
    operands["offset"] = np.round(2 * operands["offset"])
    margin = int(np.abs(operands["offset"]).max())
    padded = np.pad(operands["x"][:, 0], [(0, 0), (margin, margin), (margin, margin)])
    image, row, column = np.indices((2, 9, 8))
    dy, dx = np.moveaxis(operands["offset"].astype(int), 1, 0)
    expected = padded[image, row + dy + margin, column + dx + margin]
    assert 0 < np.count_nonzero(expected) < expected.size
    np.testing.assert_array_equal(cases.forward(case, operands, data_format)[:, 0], expected)


# --- dtypes ---


@pytest.mark.parametrize("dtype", DTYPES_OF_16_BITS)
@pytest.mark.parametrize("name", ["torchvision", "kernel_7x7", "c_in_258"])
def test_16_bit_result_is_the_rounded_definition(name, implementation, dtype, data_format):
    case = BY_NAME[name]
    operands = case.operands(dtype)
    y = cases.forward(case, operands, data_format)
    assert y.dtype == dtype
    assert_close(y, by_definition(case, operands), cases.tolerance_of_products(dtype, implementation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_wider_than_16_bits(implementation, dtype):
    """Positive terms: a sum of 2304 of them kept in bfloat16 or float16 would stop growing well before its end."""
    case = Case("positive", batch=1, c_in=256, c_out=2, size=(4, 4), padding=(0, 0), mask=False, bias=False)
    operands = case.operands()
    operands |= {name: (1 + abs(operands[name])) / 4 for name in ("x", "weight")}
    operands["offset"] %= 1
    operands = {name: operand.astype(jnp.dtype(dtype)) for name, operand in operands.items()}
    assert_close(cases.forward(case, operands), by_definition(case, operands))


@pytest.mark.parametrize(
    ("x", "offset", "mask"),
    [
        ("bfloat16", "float32", "float64"),
        ("float16", "float64", "float32"),
        ("float32", "float64", "bfloat16"),
        ("float64", "float32", "float16"),
    ],
)
def test_offset_and_mask_have_dtypes_of_their_own(implementation, data_format, x, offset, mask):
    """Only the coordinates' float32 or float64 may round the offset and the mask, never a narrower x."""
    case = BY_NAME["groups_4_deform_groups_3"]
    operands = {**case.operands(x), "offset": case.operands(offset)["offset"], "mask": case.operands(mask)["mask"]}
    y = cases.forward(case, operands, data_format)
    assert y.dtype == x
    assert_close(y, by_definition(case, operands))


# --- mask ---


def test_mask_is_linear_and_unbounded(implementation, data_format):
    case = dataclasses.replace(TORCHVISION, batch=3, bias=False)
    operands = case.operands()
    other = case.operands(seed=2)["mask"]
    f = jax.jit(lambda mask: cases.deform_conv2d(case, data_format)({**operands, "mask": mask}))
    expected = -7 * f(operands["mask"]) + 30 * f(other)
    assert_close(f(-7 * operands["mask"] + 30 * other), expected)


def test_mask_of_ones_is_no_mask(implementation, data_format):
    case = dataclasses.replace(TORCHVISION, batch=3)
    operands = case.operands()
    with_ones = cases.forward(case, {**operands, "mask": np.ones_like(operands["mask"])}, data_format)
    del operands["mask"]
    assert_close(with_ones, cases.forward(case, operands, data_format))


# --- coordinates that must not become addresses ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_unusable_coordinates_contribute_zero(implementation, dtype):
    operands, unusable = cases.unusable_coordinates(dtype)
    y = cases.forward(cases.UNUSABLE, operands)
    assert_close(y, by_definition(cases.UNUSABLE, operands))

    operands["mask"][unusable] = 0
    operands["offset"] = cases.UNUSABLE.operands(dtype)["offset"]
    assert_close(y, cases.forward(cases.UNUSABLE, operands))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_mask_of_a_tap_outside_the_image_is_not_read(implementation, value):
    case = Case("outside", batch=1, padding=(2, 2))
    operands = case.operands()
    offset = operands["offset"].reshape(-1, 2, *case.output_size)
    offset[4] = -50
    operands["mask"][:, 4] = 0
    expected = by_definition(case, operands)
    operands["mask"][:, 4] = value
    assert_close(cases.forward(case, operands), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_no_sample_touches_do_not_leak(implementation, value):
    operands, untouched = cases.island()
    expected = by_definition(cases.ISLAND, operands)
    operands["x"][:, :, untouched] = value
    assert_close(cases.forward(cases.ISLAND, operands), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("axis", [0, 1])
def test_border(implementation, dtype, axis):
    """One line of three pixels a, b, c, read at chosen coordinates."""
    a, b, c = 3.0, -5.0, 7.0
    below = np.nextafter(np.array(3, dtype), np.array(0, dtype))
    expected = {
        -1.5: 0,
        -1: 0,
        -0.75: a / 4,
        -1e-9: a * (1 - 1e-9),
        0: a,
        0.5: (a + b) / 2,
        2: c,
        2.25: 3 * c / 4,
        below: 0,
        3: 0,
        3.5: 0,
    }
    shape = (3, 1) if axis == 0 else (1, 3)
    x = np.tile(np.array([a, b, c], dtype).reshape(shape), (len(expected), 1, 1, 1))
    offset = np.zeros((len(expected), 2, 1, 1), dtype)
    offset[:, axis, 0, 0] = list(expected)
    y = jax_dcn.deform_conv2d(x, offset, np.ones((1, 1, 1, 1), dtype), stride=3)
    assert_close(y.ravel(), list(expected.values()))


# --- arguments ---


def test_positional_arguments_are_mmcvs(implementation):
    operands = TORCHVISION.operands()
    x, offset, mask, weight, bias = operands.values()
    expected = drawn_by_definition(TORCHVISION)
    y = jax_dcn.modulated_deform_conv2d(x, offset, mask, weight, bias, (2, 1), (1, 0), (2, 1), 2, 3)
    assert_close(y, expected)
    y = jax_dcn.deform_conv2d(x, offset, weight, (2, 1), (1, 0), (2, 1), 2, 3, bias, 64, mask=mask)
    assert_close(y, expected)


def test_integer_argument_counts_for_both_axes(implementation):
    case = Case("square", size=(9, 8), stride=(2, 2), padding=(3, 3), dilation=(2, 2), mask=False, bias=False)
    operands = case.operands()
    y = jax_dcn.deform_conv2d(**operands, stride=2, padding=3, dilation=2)
    assert_close(y, drawn_by_definition(case))


def test_false_is_no_bias(implementation):
    case = dataclasses.replace(TORCHVISION, batch=2, bias=False)
    x, offset, mask, weight = case.operands().values()
    expected = drawn_by_definition(case)
    assert_close(jax_dcn.deform_conv2d(x, offset, weight, **case.arguments, bias=False, mask=mask), expected)
    assert_close(jax_dcn.modulated_deform_conv2d(x, offset, mask, weight, False, **case.arguments), expected)


@pytest.mark.parametrize("im2col_step", [1, 7, 1000])
def test_im2col_step_changes_nothing(implementation, im2col_step):
    """Not even with a batch that it does not divide."""
    operands = TORCHVISION.operands()
    y = cases.forward(TORCHVISION, operands, im2col_step=im2col_step)
    np.testing.assert_array_equal(y, cases.forward(TORCHVISION, operands))


@pytest.mark.parametrize("precision", ["highest", lax.Precision.HIGH, (lax.Precision.HIGHEST, lax.Precision.HIGHEST)])
def test_precision_is_accepted(implementation, precision):
    y = cases.forward(TORCHVISION, TORCHVISION.operands("float32"), precision=precision)
    # Precision.HIGH is TF32 on GPUs.
    assert_close(y, drawn_by_definition(TORCHVISION), "tf32" if precision is lax.Precision.HIGH else "float32")


# --- consistency ---


@pytest.mark.parametrize("name", ["torchvision", "kernel_4x5", "c_in_255"])
def test_data_formats_agree(name, implementation):
    case = BY_NAME[name]
    operands = case.operands("float32")
    assert_close(cases.forward(case, operands, "NHWC"), cases.forward(case, operands, "NCHW"))


def test_image_does_not_depend_on_its_batch(implementation, data_format):
    """Nor on a neighbour that is all NaN. The kernels give the same bits."""
    operands = TORCHVISION.operands("float32")
    operands["x"][1] = np.nan
    together = cases.forward(TORCHVISION, operands, data_format)
    one = jax.jit(cases.deform_conv2d(TORCHVISION, data_format))
    for n in (0, 2, 17, 32):
        alone = one({**operands, **{name: operands[name][n : n + 1] for name in PER_IMAGE}})
        assert_close(together[n : n + 1], alone)
        if implementation == "native":
            np.testing.assert_array_equal(together[n : n + 1], alone)


def test_implementation_is_the_one_asked_for(implementation):
    """Guards the guards: the two legs of every other test do run different code."""
    lowered = jax.jit(cases.deform_conv2d(TORCHVISION)).lower(TORCHVISION.operands())
    assert (native.DEFORM_CONV2D in lowered.as_text()) == (implementation == "native")
