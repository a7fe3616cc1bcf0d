"""Reverse mode: the gradients are mmcv's, and those that nobody asks for are not computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.interpreters import partial_eval as pe
from jax.test_util import check_grads
from support import cases, golden, marks
from support.cases import AWKWARD, BY_NAME, DTYPES, DTYPES_OF_16_BITS, LARGE, OPERANDS, SUBSETS, TORCHVISION, Case
from support.tolerances import assert_close

import jax_dcn
from jax_dcn._operator import native


def assert_gradients_close(actual, expected, operands, tolerances=None):
    """Each gradient has its operand's dtype, and the precision that the narrower of that and the sums allow.

    Unless `tolerances` names another for it.
    """
    assert actual.keys() == expected.keys() == operands.keys()
    sums = jnp.promote_types(operands["x"].dtype, jnp.float32)
    for name, gradient in actual.items():
        dtype = operands[name].dtype
        assert gradient.dtype == dtype, name
        narrower = min(dtype, sums, key=lambda dtype: dtype.itemsize)
        assert_close(gradient, expected[name], (tolerances or {}).get(name, narrower), err_msg=name)


# --- against others ---


@pytest.mark.parametrize("case", golden.CASES, ids=str)
@marks.dtypes_and_formats
def test_gradients_are_mmcvs(case, implementation, dtype, data_format):
    """Zero and integer offsets among them, where the border rule shows."""
    operands = golden.operands(case, dtype)
    actual = cases.gradients(case, operands, golden.cotangent(case, dtype), data_format)
    assert_gradients_close(actual, golden.gradients(case), operands)


@pytest.mark.parametrize("case", AWKWARD, ids=str)
@marks.implementations_dtypes_and_formats
def test_gradients_are_the_definition(case, implementation, dtype, data_format):
    operands = case.operands(dtype)
    actual = cases.gradients(case, operands, case.cotangent(dtype), data_format)
    assert_gradients_close(actual, cases.drawn_gradients_by_definition(case), operands)


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@marks.dtypes_and_formats
def test_gradients_of_large_operands_are_the_definition(case, implementation, dtype, data_format):
    operands = case.operands(dtype)
    actual = cases.gradients(case, operands, case.cotangent(dtype), data_format)
    assert_gradients_close(actual, cases.drawn_gradients_by_definition(case), operands)


@pytest.mark.parametrize("wanted", OPERANDS)
def test_gradients_are_the_finite_differences(implementation, wanted):
    """Away from the lattice lines, where the operator has a kink."""
    case = dataclasses.replace(TORCHVISION, batch=2)
    operands = case.operands()
    rng = np.random.default_rng(2)
    operands["offset"] = np.floor(operands["offset"]) + rng.uniform(0.1, 0.9, operands["offset"].shape)
    f = jax.jit(lambda value: cases.deform_conv2d(case)({**operands, wanted: value}))
    check_grads(f, (operands[wanted],), order=1, modes=["rev"], eps=1e-4, atol=1e-7, rtol=1e-7)


# --- dtypes ---


@pytest.mark.parametrize("dtype", DTYPES_OF_16_BITS)
@pytest.mark.parametrize("name", ["torchvision", "c_in_258"])
def test_16_bit_gradients_are_the_rounded_definition(name, implementation, dtype):
    case = BY_NAME[name]
    operands, cotangent = case.operands(dtype), case.cotangent(dtype)
    actual = cases.gradients(case, operands, cotangent)
    tolerances = {"weight": cases.tolerance_of_products(dtype, implementation)}
    assert_gradients_close(actual, cases.gradients_by_definition(case, operands, cotangent), operands, tolerances)


@pytest.mark.parametrize(
    ("x", "offset", "mask"),
    [
        ("bfloat16", "float32", "float64"),
        ("float16", "float64", "bfloat16"),
        ("float32", "float64", "float16"),
        ("float64", "float32", "bfloat16"),
    ],
)
def test_gradients_have_the_dtypes_of_their_operands(implementation, x, offset, mask):
    case = BY_NAME["groups_4_deform_groups_3"]
    operands = {**case.operands(x), "offset": case.operands(offset)["offset"], "mask": case.operands(mask)["mask"]}
    cotangent = case.cotangent(x)
    actual = cases.gradients(case, operands, cotangent)
    assert_gradients_close(actual, cases.gradients_by_definition(case, operands, cotangent), operands)


@pytest.mark.parametrize("dtype", DTYPES_OF_16_BITS)
def test_16_bit_gradients_are_summed_in_float32(implementation, dtype):
    """Positive terms: thousands of them meet in a pixel, in a weight and in a bias."""
    case = Case("positive", batch=1, c_in=2, c_out=64, size=(4, 256), padding=(1, 1))
    operands, cotangent = case.operands(dtype), abs(case.cotangent(dtype))
    operands |= {name: abs(operands[name]) for name in ("x", "mask", "weight")}
    operands["offset"] = np.round(operands["offset"] / 4)
    actual = cases.gradients(case, operands, cotangent)
    assert_gradients_close(actual, cases.gradients_by_definition(case, operands, cotangent), operands)


# --- lattice, border and beyond ---


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("axis", [0, 1])
def test_offset_gradient_at_the_border(implementation, dtype, axis):
    """One line of three pixels a, b, c: the right-hand derivative, and 0 as soon as the sample is invalid."""
    a, b, c = 3.0, -5.0, 7.0

    def next_to(value, other):
        return float(np.nextafter(np.array(value, dtype), np.array(other, dtype)))

    expected = {
        -1.5: 0,
        -1: 0,
        next_to(-1, 0): a,
        -0.5: a,
        -1e-9: a,
        0: b - a,
        0.5: b - a,
        next_to(1, 0): b - a,
        1: c - b,
        2: -c,
        next_to(3, 0): -c,
        3: 0,
        3.5: 0,
    }
    shape = (3, 1) if axis == 0 else (1, 3)
    x = np.tile(np.array([a, b, c], dtype).reshape(shape), (len(expected), 1, 1, 1))
    offset = np.zeros((len(expected), 2, 1, 1), dtype)
    offset[:, axis, 0, 0] = list(expected)
    weight = np.ones((1, 1, 1, 1), dtype)
    gradient = jax.grad(lambda offset: jax_dcn.deform_conv2d(x, offset, weight, stride=3).sum())(offset)
    assert_close(gradient[:, axis, 0, 0], list(expected.values()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unusable_coordinates_have_zero_gradients(implementation, dtype):
    operands, unusable = cases.unusable_coordinates(dtype)
    cotangent = cases.UNUSABLE.cotangent("float32")
    actual = cases.gradients(cases.UNUSABLE, operands, cotangent)
    assert_gradients_close(actual, cases.gradients_by_definition(cases.UNUSABLE, operands, cotangent), operands)
    assert not np.any(np.asarray(actual["mask"])[unusable])
    assert not np.any(np.asarray(actual["offset"])[np.repeat(unusable, 2, axis=1)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_mask_of_a_tap_outside_the_image_does_not_reach_the_gradients(implementation, value):
    case = Case("outside", batch=1, padding=(2, 2))
    operands, cotangent = case.operands(), case.cotangent()
    operands["offset"].reshape(-1, 2, *case.output_size)[4] = -50
    operands["mask"][:, 4] = value
    actual = cases.gradients(case, operands, cotangent)
    assert_gradients_close(actual, cases.gradients_by_definition(case, operands, cotangent), operands)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_no_sample_touches_do_not_leak(implementation, value):
    operands, untouched = cases.island()
    cotangent = cases.ISLAND.cotangent()
    expected = cases.gradients_by_definition(cases.ISLAND, operands, cotangent)
    operands["x"][:, :, untouched] = value
    actual = cases.gradients(cases.ISLAND, operands, cotangent)
    assert_gradients_close(actual, expected, operands)


# --- consistency ---


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
def test_gradients_have_the_same_bits_every_time(implementation, monkeypatch):
    """On a GPU, where XLA is told to compute so."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    case = Case("repeated", batch=3, c_in=96, c_out=40, size=(25, 26))
    operands, cotangent = case.operands("float32"), case.cotangent("float32")
    _, vjp = jax.vjp(jax.jit(cases.deform_conv2d(case)), operands)
    vjp = jax.jit(vjp)
    (first,) = vjp(cotangent)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, vjp(cotangent)[0], first)


# --- gradients that nobody asked for ---


def backward_calls(function, *args):
    """What each backward primitive computes, in the program that is left after dead-code elimination."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    jaxpr, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [eqn.params["wanted"] for eqn in jaxpr.eqns if eqn.primitive.name == "deform_conv2d_backward"]


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_only_the_gradients_asked_for_are_computed(subset):
    case = dataclasses.replace(TORCHVISION, batch=2)
    operands = case.operands()

    def loss(chosen):
        return cases.deform_conv2d(case)({**operands, **chosen}).sum()

    assert backward_calls(jax.grad(loss), {name: operands[name] for name in subset}) == [subset]


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_gradients_computed_but_unused_are_dropped(subset):
    case = dataclasses.replace(TORCHVISION, batch=2)

    def function(operands, cotangent):
        _, vjp = jax.vjp(cases.deform_conv2d(case), operands)
        gradients = vjp(cotangent)[0]
        return [gradients[name] for name in subset]

    assert backward_calls(function, case.operands(), case.cotangent()) == [subset]


@pytest.mark.parametrize("name", OPERANDS)
def test_stopped_gradient_costs_nothing(name):
    case = dataclasses.replace(TORCHVISION, batch=2)

    def loss(operands):
        return cases.deform_conv2d(case)({**operands, name: lax.stop_gradient(operands[name])}).sum()

    assert backward_calls(jax.grad(loss), case.operands()) == [tuple(other for other in OPERANDS if other != name)]


@pytest.mark.parametrize("wanted", OPERANDS)
def test_a_gradient_asked_for_alone_is_the_same(implementation, wanted):
    case = dataclasses.replace(TORCHVISION, batch=2)
    operands, cotangent = case.operands(), case.cotangent()

    @jax.jit
    def function(value):
        return jax.vjp(lambda value: cases.deform_conv2d(case)({**operands, wanted: value}), value)[1](cotangent)[0]

    assert_close(function(operands[wanted]), cases.gradients_by_definition(case, operands, cotangent)[wanted])


@pytest.mark.parametrize("forward_mode", [False, True])
def test_the_operands_are_saved_and_not_copied(forward_mode):
    """Those that the gradients depend on, and nothing else."""
    operands = {name: jnp.asarray(operand) for name, operand in TORCHVISION.operands().items()}
    _, vjp = jax.vjp(cases.deform_conv2d(TORCHVISION, forward_mode=forward_mode), operands)
    saved = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.Array)]
    expected = {operands[name].unsafe_buffer_pointer() for name in ("x", "offset", "mask", "weight")}
    assert set(saved) == expected


def test_compiled_program_asks_the_kernel_for_no_more(implementation):
    """In the lowered program, which is what runs: jit eliminates dead code before it lowers."""
    case = dataclasses.replace(TORCHVISION, batch=2)

    def function(operands, cotangent):
        return jax.vjp(cases.deform_conv2d(case), operands)[1](cotangent)[0]["weight"]

    lowered = jax.jit(function).lower(case.operands(), case.cotangent())
    if implementation == "xla":
        # Only the image's gradient scatters.
        assert " scatter(" not in lowered.compile().as_text()
        return
    (call,) = [line for line in lowered.as_text().splitlines() if native.DEFORM_CONV2D_BACKWARD in line]
    for name in OPERANDS:
        assert f"grad_{name} = {str(name == 'weight').lower()}" in call
