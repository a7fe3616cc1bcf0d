"""The operator under JAX's transformations, on one device. `test_vmap` has vmap, `test_devices` meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import cases, marks
from support.cases import DTYPES_OF_16_BITS, PER_IMAGE, SUBSETS, Case
from support.processes import run_python
from support.tolerances import assert_close, assert_trees_close

import jax_dcn
from jax_dcn._operator import native

# Small, for what takes the time is to compile, but with groups of both kinds.
CASE = Case("small", c_in=4, c_out=4, size=(3, 4), kernel=(2, 2), padding=(1, 0), groups=2, deform_groups=2)

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")

PRIMALS = CASE.smooth_operands()
TANGENTS = {name: np.random.default_rng(5).standard_normal(value.shape) for name, value in PRIMALS.items()}


def function(data_format="NCHW", **arguments):
    return cases.deform_conv2d(CASE, data_format, **arguments)


def loss(data_format="NCHW", **arguments):
    """A fresh scalar function of the operands with derivatives of every order."""
    f = function(data_format, **arguments)
    return lambda operands: jnp.sin(f(operands)).sum()


def by_definition(operands):
    return cases.by_definition(CASE, operands)


def gradient_by_definition(operands):
    """Of `loss`."""
    return cases.gradients_by_definition(CASE, operands, np.cos(by_definition(operands)))


def numeric_derivative(f, moving):
    """How f, of numpy arrays, changes when the operands in `moving` move along TANGENTS, by a central difference."""
    step = 1e-5
    there, back = (
        f({name: value + sign * step * TANGENTS[name] * (name in moving) for name, value in PRIMALS.items()})
        for sign in (1, -1)
    )
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), there, back)


@functools.cache
def numeric_jvp(moving=tuple(PRIMALS)):
    return numeric_derivative(by_definition, set(moving))


@functools.cache
def numeric_hvp(moving=tuple(PRIMALS)):
    """The Hessian of `loss` times TANGENTS of the operands in `moving`."""
    return numeric_derivative(gradient_by_definition, set(moving))


def assert_numerically_close(actual, expected):
    """A central difference in float64 has about 9 digits."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-7 * np.abs(e).max())


def dot(a, b):
    return sum(jnp.vdot(a[name], b[name]) for name in a)


# --- second order ---

# The Hessian times a vector, in every order of the two modes that the default allows, and those of forward_mode.
HESSIAN_VECTOR_PRODUCTS = {
    "jvp_of_grad": (False, lambda f, at, t: jax.jvp(jax.grad(f), (at,), (t,))[1]),
    "grad_of_grad": (False, lambda f, at, t: jax.grad(lambda at: dot(jax.grad(f)(at), t))(at)),
    "linearize_of_grad": (False, lambda f, at, t: jax.linearize(jax.grad(f), at)[1](t)),
    "grad_of_jvp": (True, lambda f, at, t: jax.grad(lambda at: jax.jvp(f, (at,), (t,))[1])(at)),
    "jvp_of_grad_in_forward_mode": (True, lambda f, at, t: jax.jvp(jax.grad(f), (at,), (t,))[1]),
}


@pytest.mark.parametrize("product", HESSIAN_VECTOR_PRODUCTS)
@marks.implementations_and_formats
def test_hessian_vector_product(implementation, data_format, product):
    forward_mode, hessian_vector_product = HESSIAN_VECTOR_PRODUCTS[product]
    f = loss(data_format, forward_mode=forward_mode)
    actual = jax.jit(functools.partial(hessian_vector_product, f))(PRIMALS, TANGENTS)
    assert_numerically_close(actual, {name: numeric_hvp()[name] for name in actual})


@pytest.mark.parametrize("moving", [("x",), ("offset",), ("mask",), ("weight",), ("bias",)], ids="-".join)
def test_second_derivatives_of_one_operand(implementation, moving):
    """Which rule applies depends on what moves: an operand, the cotangent, or both."""
    f = loss()

    def gradient(moved):
        return jax.grad(f)(PRIMALS | moved)

    at, along = ({name: values[name] for name in moving} for values in (PRIMALS, TANGENTS))
    actual = jax.jit(lambda at, along: jax.jvp(gradient, (at,), (along,))[1])(at, along)
    assert_numerically_close(actual, {name: numeric_hvp(moving)[name] for name in actual})


@marks.implementations_and_formats
@pytest.mark.parametrize("forward_mode", [False, True])
def test_hessian(implementation, data_format, forward_mode):
    """Forward over reverse mode, vmapped over all directions, of both operands and between them."""
    names = ("mask", "bias")
    f = loss(data_format, forward_mode=forward_mode)
    hessian = jax.jit(jax.hessian(lambda moved: f(PRIMALS | moved)))({name: PRIMALS[name] for name in names})
    for row in names:
        actual = sum(np.tensordot(hessian[row][column], TANGENTS[column], TANGENTS[column].ndim) for column in names)
        assert_numerically_close(actual, numeric_hvp(names)[row])


# --- forward mode ---


def test_jvp_and_linearize_in_forward_mode(implementation, data_format):
    f = function(data_format, forward_mode=True)

    @jax.jit
    def derivatives(operands, tangents):
        y, linear = jax.linearize(f, operands)
        return jax.jvp(f, (operands,), (tangents,)), (y, linear(tangents))

    for y, y_dot in derivatives(PRIMALS, TANGENTS):
        assert_close(y, by_definition(PRIMALS))
        assert_numerically_close(y_dot, numeric_jvp())


def compiled_jvp(moving):
    """Of the operands in `moving` and their tangents."""
    f = function(forward_mode=True)

    def y_dot(at, along):
        return jax.jvp(lambda moved: f(PRIMALS | moved), (at,), (along,))[1]

    at, along = ({name: values[name] for name in moving} for values in (PRIMALS, TANGENTS))
    return jax.jit(y_dot).lower(at, along).compile(), at, along


@marks.implementations_and_subsets
def test_jvp_along_some_operands(implementation, subset):
    compiled, *arguments = compiled_jvp(subset)
    assert_numerically_close(compiled(*arguments), numeric_jvp(subset))


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@pytest.mark.parametrize("moving", SUBSETS, ids="-".join)
def test_jvp_is_calls_of_the_forward_kernel(implementation, moving):
    """One along each operand that the result is linear in, but the bias, whose tangent needs none. Only the offset's
    tangent samples the image in plain XLA.
    """
    text = compiled_jvp(moving)[0].as_text()
    calls = re.findall(r'custom_call_target="(jax_dcn\w+)"', text)
    assert calls == [native.DEFORM_CONV2D] * len({"x", "mask", "weight"} & set(moving))
    assert (" gather(" in text) == ("offset" in moving)


@marks.implementations_and_formats
def test_jacfwd_is_jacrev(implementation, data_format):
    operands = {name: PRIMALS[name] for name in ("weight", "mask")}
    forward, reverse = function(data_format, forward_mode=True), function(data_format)

    @jax.jit
    def jacobians(moved):
        return jax.jacfwd(lambda moved: forward(PRIMALS | moved))(moved), jax.jacrev(
            lambda moved: reverse(PRIMALS | moved)
        )(moved)

    assert_trees_close(*jacobians(operands))


@marks.implementations_and_formats
def test_reverse_mode_in_forward_mode(implementation, data_format):
    assert_trees_close(
        jax.jit(jax.grad(loss(data_format, forward_mode=True)))(PRIMALS),
        {name: gradient_by_definition(PRIMALS)[name] for name in PRIMALS},
    )


@pytest.mark.parametrize("moved", [("x",), ("x", "bias"), ("weight",), ("weight", "bias")], ids="-".join)
def test_linear_transpose(implementation, moved):
    """In forward mode, along what the operator is linear in, as JAX's convolution has it."""
    operands = {name: PRIMALS[name] for name in PRIMALS if name in moved or name != "bias"}
    linear = {name: operands.pop(name) for name in moved}
    f = function(forward_mode=True)
    cotangent = CASE.cotangent()
    (actual,) = jax.linear_transpose(lambda linear: f(operands | linear), linear)(cotangent)
    expected = cases.gradients_by_definition(CASE, operands | linear, cotangent)
    assert_trees_close(actual, {name: expected[name] for name in moved})


@pytest.mark.parametrize("moved", [("x", "weight", "bias"), ("offset",), ("x",), ("bias",)], ids="-".join)
def test_linear_transpose_is_refused_where_not_linear(implementation, moved):
    f = function(forward_mode=True)
    with pytest.raises(NotImplementedError, match="not linear in"):
        jax.linear_transpose(lambda linear: f(PRIMALS | linear), {name: PRIMALS[name] for name in moved})(
            CASE.cotangent()
        )


@pytest.mark.parametrize("dtype", DTYPES_OF_16_BITS)
def test_strict_dtype_promotion(implementation, dtype):
    """No derivative mixes dtypes without saying so."""
    operands = CASE.operands(dtype)
    gradient = jax.grad(loss())
    f = function(forward_mode=True)
    with jax.numpy_dtype_promotion("strict"):
        for transformed in (
            f,
            gradient,
            lambda operands: jax.jvp(f, (operands,), (operands,)),
            lambda operands: jax.jvp(gradient, (operands,), (operands,)),
        ):
            jax.jit(transformed).lower(operands)


def test_forward_mode_is_refused_without_it(implementation):
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        jax.jvp(loss(), (PRIMALS,), (TANGENTS,))


# --- vmap of derivatives ---

EXAMPLES = [CASE.smooth_operands(seed=seed) for seed in range(2)]

# Images only, which become more images; weights only; and all of it.
MAPPED = (PER_IMAGE, ("weight", "bias"), tuple(PRIMALS))


@pytest.mark.parametrize("mapped", MAPPED, ids="-".join)
def test_vmap_of_derivatives(implementation, mapped):
    """Of jvp, which jvp of vmap equals, and of the Hessian times a vector."""
    f, g = function(forward_mode=True), loss()
    in_axes = {name: 0 if name in mapped else None for name in PRIMALS}
    stacked = {
        name: np.stack([example[name] for example in EXAMPLES]) if name in mapped else PRIMALS[name] for name in PRIMALS
    }
    tangents = {name: np.stack([value, 2 * value]) if name in mapped else value for name, value in TANGENTS.items()}

    def along(operands, tangents):
        return jax.jvp(f, (operands,), (tangents,))[1], jax.jvp(jax.grad(g), (operands,), (tangents,))[1]

    @jax.jit
    def derivatives(operands, tangents):
        vmapped = jax.vmap(along, (in_axes, in_axes))(operands, tangents)
        return *vmapped, jax.jvp(jax.vmap(f, (in_axes,)), (operands,), (tangents,))[1]

    vmap_of_jvp, vmap_of_hvp, jvp_of_vmap = derivatives(stacked, tangents)
    assert_close(jvp_of_vmap, vmap_of_jvp)
    one = jax.jit(along)
    for i, example in enumerate(EXAMPLES):
        y_dot, hvp = one(
            {name: example[name] if name in mapped else PRIMALS[name] for name in PRIMALS},
            {name: tangents[name][i] if name in mapped else TANGENTS[name] for name in PRIMALS},
        )
        assert_close(vmap_of_jvp[i], y_dot)
        assert_trees_close(jax.tree.map(lambda product, i=i: product[i], vmap_of_hvp), hvp)


# --- control flow, checkpoints, debugging ---


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "everything_saveable"])
@marks.implementations_and_formats
def test_checkpoint(implementation, data_format, policy):
    rematerialised = jax.checkpoint(loss(data_format), policy=getattr(jax.checkpoint_policies, policy))
    actual = jax.jit(jax.grad(rematerialised))(PRIMALS)
    assert_trees_close(actual, {name: gradient_by_definition(PRIMALS)[name] for name in PRIMALS})


# Its result has x's shape, to be the next step's x.
SCANNED = Case("scanned", size=(3, 4), c_out=4, groups=2)


@pytest.mark.parametrize(
    ("implementation", "forward_mode"),
    [("native", False), ("native", True), ("xla", True)],
    indirect=["implementation"],
)
def test_scan(implementation, forward_mode):
    operands = SCANNED.smooth_operands()
    f = cases.deform_conv2d(SCANNED, forward_mode=forward_mode)

    def step(x, weight):
        return f({**operands, "x": x, "weight": weight}), None

    def scanned(weights):
        return jnp.sin(jax.lax.scan(step, operands["x"], weights)[0]).sum()

    def unrolled(weights):
        return jnp.sin(step(step(operands["x"], weights[0])[0], weights[1])[0]).sum()

    weights = np.stack([operands["weight"], 2 * operands["weight"]])

    def derivatives(f, weights):
        gradient, second = jax.jvp(jax.grad(f), (weights,), (jnp.ones_like(weights),))
        return gradient, second, jax.jvp(f, (weights,), (weights,)) if forward_mode else None

    assert_trees_close(*(jax.jit(functools.partial(derivatives, f))(weights) for f in (scanned, unrolled)))


def test_disable_jit_and_debug_nans(implementation, data_format):
    f = loss(data_format)
    with jax.disable_jit(), jax.debug_nans(True):
        actual = jax.grad(f)(PRIMALS)
    assert_trees_close(actual, {name: gradient_by_definition(PRIMALS)[name] for name in PRIMALS})


def test_debug_nans_finds_one(implementation):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.jit(function())(PRIMALS | {"bias": np.full_like(PRIMALS["bias"], np.nan)})


def test_eval_shape(implementation, data_format):
    y, gradient, product = jax.eval_shape(
        lambda operands, tangents: (
            function(data_format)(operands),
            *jax.jvp(jax.grad(loss(data_format)), (operands,), (tangents,)),
        ),
        PRIMALS,
        TANGENTS,
    )
    assert (y.shape, y.dtype) == ((CASE.batch, CASE.c_out, *CASE.output_size), jnp.float64)
    for name, operand in PRIMALS.items():
        assert gradient[name].shape == product[name].shape == operand.shape


# --- export ---

TARGETS = ("jax_dcn_deform_conv2d", "jax_dcn_deform_conv2d_backward")


def exported(f, *shapes):
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    return export.export(jax.jit(f), platforms=PLATFORMS, disabled_checks=checks)(*shapes)


def with_symbolic_sizes(case, data_format="NCHW", constraints=("w >= 2",)):
    """The shapes of the operands for any images of any size."""
    n, h, w = export.symbolic_shape("n, h, w", constraints=constraints)
    symbolic = dataclasses.replace(case, batch=n, size=(h, w))

    def shape_of(name, value):
        if name not in PER_IMAGE:
            return value.shape
        sizes = (h, w) if name == "x" else symbolic.output_size
        return (n, value.shape[1], *sizes) if data_format == "NCHW" else (n, *sizes, value.shape[1])

    return {name: jax.ShapeDtypeStruct(shape_of(name, value), value.dtype) for name, value in case.operands().items()}


@marks.implementations_and_formats
def test_export_for_all_platforms_runs_in_another_process(implementation, data_format, tmp_path):
    """The result and, by the VJP that the artefact carries, the gradients, for images of three sizes."""
    artefact = exported(function(data_format), with_symbolic_sizes(CASE))
    assert (TARGETS[0] in artefact.mlir_module()) == (implementation == "native")
    (tmp_path / "exported").write_bytes(artefact.serialize(vjp_order=1))

    examples = {
        str(i): dataclasses.replace(CASE, batch=batch, size=size)
        for i, (batch, size) in enumerate([(1, (1, 2)), (2, (3, 4)), (3, (17, 6))])
    }
    for i, case in examples.items():
        np.savez(tmp_path / f"operands{i}.npz", **case.smooth_operands())
    run_python(
        f"""
import jax, numpy as np, jax_dcn
jax.config.update("jax_enable_x64", True)
folder = {str(tmp_path)!r}
exported = jax.export.deserialize(bytearray(open(f"{{folder}}/exported", "rb").read()))
assert exported.platforms == {PLATFORMS}
for i in {"".join(examples)!r}:
    operands = dict(np.load(f"{{folder}}/operands{{i}}.npz"))
    y, vjp = jax.vjp(exported.call, operands)
    np.savez(f"{{folder}}/results{{i}}.npz", y=y, **vjp(jax.numpy.cos(y))[0])
"""
    )
    for i, case in examples.items():
        operands = case.smooth_operands()
        y = cases.by_definition(case, operands)
        with np.load(tmp_path / f"results{i}.npz") as file:
            results = dict(file)
        assert_close(results.pop("y"), y, err_msg=case.size)
        assert_trees_close(results, cases.gradients_by_definition(case, operands, np.cos(y)))


STRIDED = Case("strided", size=(7, 6), kernel=(3, 2), stride=(2, 3), padding=((0, 2), (1, 0)), mask=False)


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
def test_export_with_strides_and_padding_on_each_side(implementation):
    artefact = exported(cases.deform_conv2d(STRIDED), with_symbolic_sizes(STRIDED, constraints=()))
    for size in (1, 1), (9, 6), (12, 23):
        case = dataclasses.replace(STRIDED, size=size)
        operands = case.operands()
        assert_close(artefact.call(operands), cases.by_definition(case, operands))


def test_export_without_pixels_is_refused_at_the_call(implementation):
    """By a constraint, which JAX checks whatever the platform."""
    artefact = exported(function(), with_symbolic_sizes(CASE))
    with pytest.raises(ValueError, match="constraint w >= 2"):
        artefact.call(dataclasses.replace(CASE, size=(3, 1)).operands())


def test_export_with_offsets_of_a_convolution(implementation):
    """Whose symbolic size, as JAX has it, is 0 where ours would be negative: max(h - 2, 0)."""
    operands = Case("valid", c_in=4, padding=(0, 0), mask=False, bias=False).operands()
    kernel, weight = np.resize(operands["weight"], (18, 4, 3, 3)), operands["weight"]

    def f(x):
        offset = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID")
        return jax_dcn.deform_conv2d(x, offset, weight)

    n, h, w = export.symbolic_shape("n, h, w")
    artefact = exported(f, jax.ShapeDtypeStruct((n, 4, h, w), jnp.float64))
    assert_close(artefact.call(operands["x"]), f(operands["x"]))


def test_symbolic_sizes_that_do_not_fit():
    shapes = with_symbolic_sizes(CASE)
    shapes["mask"] = jax.ShapeDtypeStruct((*shapes["mask"].shape[:2], *shapes["x"].shape[2:]), jnp.float64)
    with pytest.raises(ValueError, match=r"mask has spatial size h x w, expected that of the output, h \+ 1 x w - 1"):
        jax.eval_shape(function(), shapes)


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER"])
def test_same_padding_of_symbolic_sizes(padding):
    """It is an attribute of the call, so it must be the same for all sizes."""
    h, w = export.symbolic_shape("h, w")

    def shape(size, out, stride):
        shapes = [(1, 4, *size), (1, 18, *out), (5, 4, 3, 3)]
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        f = functools.partial(jax_dcn.deform_conv2d, stride=stride, padding=padding)
        return jax.eval_shape(f, *operands).shape

    assert shape((h, w), (h, w), 1) == (1, 5, h, w)
    assert shape((2 * h, 6 * w), (h, 2 * w), (2, 3)) == (1, 5, h, 2 * w)
    message = (
        rf"padding '{padding}' with stride \(1, 2\) depends on the image's size, which is symbolic here, h x w: give"
    )
    with pytest.raises(ValueError, match=message):
        shape((h, w), (h, (w + 1) // 2), (1, 2))
