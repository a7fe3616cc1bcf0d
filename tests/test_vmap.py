"""vmap over any subset of the operands, at any axis, is a loop over the examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import cases, marks
from support.cases import OPERANDS, PER_IMAGE, SUBSETS, Case
from support.tolerances import assert_close

# Groups of both kinds, so that a channel that strays into a neighbouring group shows.
CASE = Case("grouped", c_in=6, c_out=4, size=(4, 3), kernel=(2, 1), padding=((2, 0), (0, 2)), groups=2, deform_groups=3)


def axis_of(name, subset):
    """Where the mapped axis stands: in front, inside or behind, different from operand to operand and subset."""
    return (0, 1, -1)[(OPERANDS.index(name) + len(subset) + SUBSETS.index(subset)) % 3]


def mapped_operands(case, subset, size):
    """Operands, those in `subset` with a mapped axis of this size, and the in_axes that say where."""
    examples = [case.operands(seed=seed) for seed in range(size)]
    operands = dict(examples[0])
    in_axes = dict.fromkeys(operands)
    for name in subset:
        in_axes[name] = axis_of(name, subset)
        operands[name] = np.stack([example[name] for example in examples], in_axes[name])
    return operands, in_axes


def example(operands, in_axes, index):
    return {
        name: operand if in_axes[name] is None else np.take(operand, index, in_axes[name])
        for name, operand in operands.items()
    }


def loop(case, operands, in_axes, size, cotangents):
    """The results, and the gradients of each example, by the definition."""
    each = [example(operands, in_axes, index) for index in range(size)]
    results = [cases.by_definition(case, operands) for operands in each]
    gradients = [
        cases.gradients_by_definition(case, operands, cotangent)
        for cotangent, operands in zip(cotangents, each, strict=True)
    ]
    return np.stack(results), {name: np.stack([g[name] for g in gradients]) for name in gradients[0]}


@marks.implementations_and_subsets
def test_result_and_gradients_are_the_loops(implementation, subset):
    """In one program: the vmap, the vmap of its gradient (the cotangent not mapped) and the gradient of the vmap."""
    size = 3
    operands, in_axes = mapped_operands(CASE, subset, size)
    cotangents = np.stack([CASE.cotangent(seed=seed) for seed in range(10, 10 + size)])
    f = cases.deform_conv2d(CASE)

    @jax.jit
    def function(operands, cotangents):
        def gradient(operands):
            return jax.vjp(f, operands)[1](cotangents[0])[0]

        y, vjp = jax.vjp(jax.vmap(f, (in_axes,)), operands)
        return y, jax.vmap(gradient, (in_axes,))(operands), vjp(cotangents)[0]

    y, per_example, total = function(operands, cotangents)
    expected, expected_per_example = loop(CASE, operands, in_axes, size, [cotangents[0]] * size)
    assert_close(y, expected)
    for name in OPERANDS:
        assert_close(per_example[name], expected_per_example[name], err_msg=name)

    _, expected_gradients = loop(CASE, operands, in_axes, size, cotangents)
    for name in OPERANDS:
        if in_axes[name] is None:
            assert_close(total[name], expected_gradients[name].sum(0), err_msg=name)
        else:
            assert_close(jnp.moveaxis(total[name], in_axes[name], 0), expected_gradients[name], err_msg=name)


@pytest.mark.parametrize("wanted", ["x", "offset", "mask", "weight"])
@pytest.mark.parametrize("mapped", ["x", "offset", "weight", "cotangent"])
def test_one_gradient_alone(implementation, mapped, wanted):
    """Which rule applies depends on what is mapped and on which gradients are wanted."""
    size = 2
    operands, in_axes = mapped_operands(CASE, () if mapped == "cotangent" else (mapped,), size)
    cotangents = np.stack([CASE.cotangent(seed=seed) for seed in (10, 11 if mapped == "cotangent" else 10)])
    f = cases.deform_conv2d(CASE)

    @functools.partial(jax.vmap, in_axes=(in_axes, 0 if mapped == "cotangent" else None))
    def gradient(operands, cotangent):
        return jax.vjp(lambda value: f({**operands, wanted: value}), operands[wanted])[1](cotangent)[0]

    actual = jax.jit(gradient)(operands, cotangents if mapped == "cotangent" else cotangents[0])
    _, expected = loop(CASE, operands, in_axes, size, cotangents)
    assert_close(actual, expected[wanted])


@pytest.mark.parametrize(
    ("outer", "inner"), [(("x",), ("weight",)), (("weight", "bias"), ("x", "offset")), (("mask",), OPERANDS)]
)
def test_nested(implementation, outer, inner):
    """The outer axis in front of all the others."""
    operands, inner_axes = mapped_operands(CASE, inner, 3)
    operands |= {name: np.stack([operands[name], -2 * operands[name]]) for name in outer}
    outer_axes = {name: 0 if name in outer else None for name in operands}
    f = jax.vmap(jax.vmap(cases.deform_conv2d(CASE), (inner_axes,)), (outer_axes,))
    y = jax.jit(f)(operands)
    assert y.shape[:2] == (2, 3)
    for i, j in np.ndindex(2, 3):
        one = example(example(operands, outer_axes, i), inner_axes, j)
        assert_close(y[i, j], cases.by_definition(CASE, one))


@pytest.mark.parametrize("out_axis", [1, -1])
def test_out_axes(implementation, out_axis):
    operands, in_axes = mapped_operands(CASE, ("x", "weight"), 3)
    y = jax.jit(jax.vmap(cases.deform_conv2d(CASE), (in_axes,), out_axis))(operands)
    for index in range(3):
        one = example(operands, in_axes, index)
        assert_close(jnp.take(y, index, out_axis), cases.by_definition(CASE, one))


@pytest.mark.parametrize("subset", [("x",), ("weight",), ("offset", "mask"), OPERANDS], ids="-".join)
@pytest.mark.parametrize("size", [0, 1])
def test_mapped_axis_may_be_empty_or_one(implementation, subset, size):
    operands, in_axes = mapped_operands(CASE, subset, 1)
    operands |= {name: np.take(operands[name], range(size), in_axes[name]) for name in subset}
    cotangents = np.stack([CASE.cotangent()])[:size]

    @jax.jit
    def function(operands, cotangents):
        y, vjp = jax.vjp(jax.vmap(cases.deform_conv2d(CASE), (in_axes,)), operands)
        return y, vjp(cotangents)[0]

    y, gradients = function(operands, cotangents)
    assert y.shape == cotangents.shape
    if size:
        assert_close(y[0], cases.by_definition(CASE, example(operands, in_axes, 0)))
    for name, gradient in gradients.items():
        assert gradient.shape == operands[name].shape
        if not size:
            assert not np.any(gradient)


def test_without_mask_and_bias(implementation):
    case = Case("plain", c_in=4, size=(4, 3), kernel=(1, 2), mask=False, bias=False)
    operands, in_axes = mapped_operands(case, ("x", "weight"), 3)
    y = jax.jit(jax.vmap(cases.deform_conv2d(case), (in_axes,)))(operands)
    for index in range(3):
        one = example(operands, in_axes, index)
        assert_close(y[index], cases.by_definition(case, one))


def test_vmap_of_images_equals_their_batch(implementation):
    """Bit for bit with the kernels: the examples become images of one call."""
    case = Case("images", batch=6, c_in=17, c_out=5, size=(9, 8))
    operands = case.operands("float32")
    split = operands | {name: operands[name].reshape(3, 2, *operands[name].shape[1:]) for name in PER_IMAGE}
    in_axes = {name: 0 if name in PER_IMAGE else None for name in operands}
    y = jax.jit(jax.vmap(cases.deform_conv2d(case), (in_axes,)))(split)
    together = cases.forward(case, operands)
    assert_close(y.reshape(together.shape), together)
    if implementation == "native":
        np.testing.assert_array_equal(y.reshape(together.shape), together)


@pytest.mark.parametrize("subset", [("x", "mask"), ("weight", "bias"), OPERANDS], ids="-".join)
def test_any_number_of_examples(implementation, subset):
    """Of an exported program, which knows it only when it is called."""
    targets = "jax_dcn_deform_conv2d", "jax_dcn_deform_conv2d_backward"
    in_axes = {name: 0 if name in subset else None for name in CASE.operands()}
    f = cases.deform_conv2d(CASE)

    def function(operands, cotangent):
        """The results, and the gradients of each example."""

        def one(operands):
            y, vjp = jax.vjp(f, operands)
            return y, vjp(cotangent)[0]

        return jax.vmap(one, (in_axes,))(operands)

    (k,) = jax.export.symbolic_shape("k")
    shapes = {
        name: jax.ShapeDtypeStruct((k, *operand.shape) if name in subset else operand.shape, operand.dtype)
        for name, operand in CASE.operands().items()
    }
    exported = jax.export.export(
        jax.jit(function),
        platforms=("cpu", "cuda", "tpu", "rocm"),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target) for target in targets],
    )(shapes, CASE.cotangent())
    assert all((target in exported.mlir_module()) == (implementation == "native") for target in targets)
    for size in 1, 3:
        examples = [CASE.operands(seed=seed) for seed in range(size)]
        operands = examples[0] | {name: np.stack([example[name] for example in examples]) for name in subset}
        y, gradients = exported.call(operands, CASE.cotangent())
        expected_y, expected = loop(CASE, operands, in_axes, size, [CASE.cotangent()] * size)
        assert_close(y, expected_y)
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name], err_msg=name)
