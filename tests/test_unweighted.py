"""dcnv3, dcnv4 and the attention: numbers, gradients, transformations, meshes, hostile values and errors."""

import functools
import json
import re
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import unweighted
from support.cases import DTYPES, DTYPES_OF_16_BITS, OUT_OF_RANGE
from support.processes import run_python
from support.tolerances import TOLERANCES, assert_close

import jax_dcn
from jax_dcn._operator import native

DATA = Path(__file__).parent / "data"
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(range(3), size)]


def golden(name):
    with np.load(DATA / f"{name}.npz") as file:
        arrays = dict(file)
    cases = {}
    for key, array in arrays.items():
        case, name = key.split("/")
        cases.setdefault(case, {})[name] = array
    return cases


DCNV3, MSDA = golden("dcnv3_ops"), golden("msda_ops")


def with_gradients(function, arrays, cotangent):
    """In one jitted program of its own."""

    def call(arrays, cotangent):
        y, vjp = jax.vjp(function, *arrays)
        return y, vjp(cotangent)

    return jax.jit(call)([jnp.asarray(a) for a in arrays], jnp.asarray(cotangent))


def relative_errors(actual, expected):
    (y, grads), (expected_y, expected_grads) = actual, expected
    pairs = [(y, expected_y), *zip(grads, expected_grads, strict=True)]
    return [np.abs(np.asarray(a, np.float64) - e).max(initial=0) / np.abs(e).max(initial=1) for a, e in pairs]


# --- the originals' numbers ---


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", DCNV3)
def test_golden_numbers_of_dcnv3(case, dtype, implementation):
    arrays = DCNV3[case]
    options = json.loads(str(arrays["cfg"]))
    operands = [arrays[name].astype(dtype) for name in ("x", "offset", "mask")]
    actual = with_gradients(lambda *a: jax_dcn.dcnv3(*a, **options), operands, arrays["gy"].astype(dtype))
    expected = arrays["y"], [arrays[f"grad_{name}"] for name in ("x", "offset", "mask")]
    assert max(relative_errors(actual, expected)) < {"float64": 1e-12, "float32": 3e-5}[dtype]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", MSDA)
def test_golden_numbers_of_the_attention(case, dtype, implementation):
    arrays = MSDA[case]
    shapes = arrays["shapes"].tolist()
    operands = [arrays[name].astype(dtype) for name in ("value", "locations", "weights")]
    actual = with_gradients(
        lambda *a: jax_dcn.multi_scale_deformable_attention(a[0], shapes, *a[1:]), operands, arrays["gy"].astype(dtype)
    )
    expected = arrays["y"], [arrays[f"grad_{name}"] for name in ("value", "locations", "weights")]
    assert max(relative_errors(actual, expected)) < {"float64": 1e-12, "float32": 3e-5}[dtype]


# --- the definition ---

SIDES = ((1, 1), (1, 1))
BASE = dict(
    batch=2,
    size=(6, 5),
    channels=4,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=SIDES,
    dilation=(1, 1),
    groups=2,
    offset_scale=1.0,
    remove_center=False,
)
CASES = {
    "plain": {},
    "no_images": dict(batch=0),
    "batch_33": dict(batch=33, size=(3, 2), channels=2, groups=1),
    "one_channel": dict(batch=1, channels=1, groups=1),
    "groups_of_one": dict(channels=17, groups=17, size=(4, 3)),
    "channels_255": dict(batch=1, channels=255, groups=5, size=(3, 4)),
    "one_row": dict(size=(1, 7), stride=(1, 2)),
    "one_column": dict(size=(8, 1), kernel_size=(3, 2), offset_scale=2.0),
    "one_pixel": dict(size=(1, 1), channels=3, groups=1, remove_center=True),
    "kernel_2x4": dict(kernel_size=(2, 4), padding=((1, 0), (0, 3)), stride=(2, 1), offset_scale=0.5),
    "kernel_1x6": dict(kernel_size=(1, 6), padding=((0, 0), (2, 3)), dilation=(3, 1), offset_scale=-1.5),
    "kernel_7": dict(batch=1, kernel_size=(7, 7), padding=((3, 3), (3, 3)), size=(5, 6), remove_center=True),
    "kernel_5_dilated": dict(kernel_size=(5, 5), dilation=(2, 2), padding=((4, 3), (5, 4)), remove_center=True),
    "kernel_4x5": dict(kernel_size=(4, 5), padding=((2, 2), (1, 3)), dilation=(3, 2), size=(9, 8), offset_scale=0.7),
    "kernel_1x1": dict(kernel_size=(1, 1), padding=((0, 0), (0, 0)), offset_scale=0.0),
    "smaller_than_kernel": dict(size=(3, 2), kernel_size=(5, 5), padding=((2, 2), (2, 2)), offset_scale=3.0),
}


def drawn(case, dtype="float64"):
    """x, offset, mask and cotangent of a case in CASES, and its arguments. Coordinates are off the lattice lines."""
    options = {**BASE, **CASES[case]}
    batch, size, channels = (options.pop(name) for name in ("batch", "size", "channels"))
    kernel, groups = options["kernel_size"], options["groups"]
    out = [
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, options["padding"], options["dilation"], kernel, options["stride"], strict=True)
    ]
    values = groups * (kernel[0] * kernel[1] - options["remove_center"])
    rng = np.random.default_rng(0)
    x, mask, ct = (
        rng.standard_normal((batch, *shape), np.float32)
        for shape in ((*size, channels), (*out, values), (*out, channels))
    )
    offset = np.round(1024 * rng.standard_normal((batch, *out, 2 * values))) / 512 + 1 / 1024
    return [array.astype(jnp.dtype(dtype)) for array in (x, offset, mask, ct)], options


@functools.cache
def by_definition(case):
    arrays, options = drawn(case)
    return unweighted.dcnv3(*arrays, **options)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_dcnv3_is_the_definition(case, dtype, implementation):
    (*arrays, ct), options = drawn(case, dtype)
    actual = with_gradients(lambda *a: jax_dcn.dcnv3(*a, **options), arrays, ct)
    assert max(relative_errors(actual, by_definition(case))) < TOLERANCES[dtype]


LEVELS = {
    "two_levels": dict(shapes=((3, 4), (2, 5)), queries=5, heads=2, depth=3, points=2),
    "no_images": dict(batch=0, shapes=((3, 4),), queries=5, heads=2, depth=3, points=2),
    "one_query": dict(shapes=((1, 1), (2, 1), (1, 3)), queries=1, heads=3, depth=1, points=1),
    "no_queries": dict(shapes=((2, 2), (1, 1)), queries=0, heads=2, depth=2, points=2),
    "one_pixel": dict(batch=1, shapes=((1, 1),), queries=7, heads=1, depth=17, points=3),
    "batch_33": dict(batch=33, shapes=((2, 3), (1, 2)), queries=3, heads=1, depth=2, points=1),
}


def drawn_attention(case, dtype="float64"):
    """value, locations, weights, cotangent, and the levels."""
    options = {"batch": 2, **LEVELS[case]}
    n, q, heads, points, shapes = (options[name] for name in ("batch", "queries", "heads", "points", "shapes"))
    rng = np.random.default_rng(0)
    pixels = sum(h * w for h, w in shapes)
    value, weights, ct = (
        rng.standard_normal((n, *shape), np.float32)
        for shape in ((pixels, heads, options["depth"]), (q, heads, len(shapes), points), (q, heads * options["depth"]))
    )
    locations = rng.uniform(-0.2, 1.2, (n, q, heads, len(shapes), points, 2)).astype(np.float32)
    return [array.astype(jnp.dtype(dtype)) for array in (value, locations, weights, ct)], shapes


@functools.cache
def attention_by_definition(case):
    (value, locations, weights, ct), shapes = drawn_attention(case)
    return unweighted.attention(value, shapes, locations, weights, ct)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", LEVELS)
def test_the_attention_is_the_definition(case, dtype, implementation):
    (*arrays, ct), shapes = drawn_attention(case, dtype)
    actual = with_gradients(attention(shapes), arrays, ct)
    assert max(relative_errors(actual, attention_by_definition(case))) < TOLERANCES[dtype]


def attention(shapes, **options):
    return lambda value, *rest: jax_dcn.multi_scale_deformable_attention(value, shapes, *rest, **options)


def dcnv3_of(case, **more):
    _, options = drawn(case)
    return lambda *arrays: jax_dcn.dcnv3(*arrays, **options, **more)


@pytest.mark.parametrize("name", ["transformers", "torch"])
def test_the_attention_is_that_of_torch(name):
    """Over grid_sample, as transformers has it and as tests/support has it."""
    torch = pytest.importorskip("torch", reason="no torch")
    from support import torch_family

    (*arrays, _), shapes = drawn_attention("two_levels", "float32")
    value, locations, weights = map(torch.from_numpy, arrays)
    if name == "transformers":
        pytest.importorskip("transformers", reason="no torch with transformers")
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

        expected = MultiScaleDeformableAttention()(
            value, torch.tensor(shapes), list(shapes), torch.tensor([0, 12]), locations, weights, 64
        )
    else:
        expected = torch_family.attention(value, shapes, locations, weights)
    assert_close(attention(shapes)(*arrays), expected.numpy())


# --- dtypes ---


@pytest.mark.parametrize("dtype", DTYPES_OF_16_BITS)
def test_16_bits_are_rounded_once(dtype, implementation):
    """The result and x's gradient; offsets and masks are wider here, and their gradients are not rounded."""
    (x, offset, mask, ct), options = drawn("plain", "float32")
    x, ct = x.astype(jnp.dtype(dtype)), ct.astype(jnp.dtype(dtype))
    y, grads = with_gradients(lambda *a: jax_dcn.dcnv3(*a, **options), [x, offset, mask], ct)
    expected, expected_grads = unweighted.dcnv3(x, offset, mask, ct, **options)
    assert [array.dtype for array in (y, *grads)] == [dtype, dtype, "float32", "float32"]
    assert_close(y, expected)
    for grad, e in zip(grads, expected_grads, strict=True):
        assert_close(grad, e)


@pytest.mark.parametrize("dtype", DTYPES_OF_16_BITS)
def test_16_bits_of_the_attention_are_rounded_once(dtype, implementation):
    """Each level is 1 and a rest that its rounding would lose: together the rests count."""
    levels, rest = 16, 2 ** -(jnp.finfo(dtype).nmant + 3)
    value = jnp.ones((1, levels, 1, 1), dtype)
    weights = jnp.asarray([1.0] + [rest] * (levels - 1), jnp.float32).reshape(1, 1, 1, levels, 1)
    locations = jnp.full((1, 1, 1, levels, 1, 2), 0.5, jnp.float32)
    y = attention([(1, 1)] * levels)(value, locations, weights)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, jnp.asarray(1 + (levels - 1) * rest, dtype))
    assert float(y[0, 0, 0]) > 1


@pytest.mark.parametrize("of_x", DTYPES)
@pytest.mark.parametrize("of_others", DTYPES)
def test_all_dtypes_together(of_x, of_others, implementation):
    (x, offset, mask, ct), options = drawn("plain", of_x)
    (_, offset, mask, _), _ = drawn("plain", of_others)
    y, grads = with_gradients(lambda *a: jax_dcn.dcnv3(*a, **options), [x, offset, mask], ct)
    assert [a.dtype for a in (y, *grads)] == [of_x, of_x, of_others, of_others]
    assert_close(y, unweighted.dcnv3(x, offset, mask, ct, **options)[0])


@pytest.mark.parametrize("dtype", DTYPES_OF_16_BITS)
def test_scaled_offsets_of_16_bits_are_not_rounded(dtype, implementation):
    """Their scale and the grid's are applied in float32."""
    x = jnp.arange(64, dtype=jnp.float32).reshape(1, 1, 64, 1)
    offset, mask = jnp.full((1, 1, 64, 2), 0.5, dtype), jnp.ones((1, 1, 64, 1), dtype)
    offset = offset.at[..., 1].set(0)
    y = jax_dcn.dcnv3(x, offset, mask, kernel_size=1, offset_scale=1 + 2**-12)
    np.testing.assert_array_equal(y[0, 0, :63, 0], jnp.arange(63) + np.float32(0.5 + 2**-13))


@pytest.mark.parametrize("scale", [0.3, 1e8])
def test_no_scale_loses_the_grid(scale, implementation):
    """Offsets that move all taps onto the middle do so whatever the scale."""
    x = jnp.zeros((1, 5, 5, 1), jnp.float32).at[0, 2, 2].set(1)
    back = -jnp.asarray([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], jnp.float32)
    offset = jnp.broadcast_to(back.reshape(1, 1, 1, 18), (1, 3, 3, 18))
    y = jax_dcn.dcnv3(x, offset, jnp.ones((1, 3, 3, 9), jnp.float32), offset_scale=scale)
    assert y[0, 1, 1, 0] == 9


# --- dcnv4 ---


def to_v4(offset, mask, groups, fill=0.0):
    by_group = [array.reshape(*array.shape[:3], groups, -1) for array in (offset, mask)]
    both = jnp.concatenate(by_group, -1).reshape(*mask.shape[:3], -1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, 0), (0, -both.shape[3] % 8)), constant_values=fill)


@pytest.mark.parametrize("case", ["plain", "kernel_7", "one_channel", "kernel_2x4"])
def test_dcnv4_is_dcnv3_of_one_array(case, implementation):
    """What follows the last group is ignored, NaN too, and has zero gradient."""
    (x, offset, mask, ct), options = drawn(case)
    both = to_v4(offset, mask, options["groups"], fill=np.nan)
    y, (grad_x, grad_both) = with_gradients(lambda *a: jax_dcn.dcnv4(*a, **options), [x, both], ct)
    expected, (expected_x, grad_offset, grad_mask) = by_definition(case)
    assert_close(y, expected)
    assert_close(grad_x, expected_x)
    assert_close(grad_both, to_v4(jnp.asarray(grad_offset), jnp.asarray(grad_mask), options["groups"]))


# --- hostile values ---


def test_hostile_offsets_are_no_samples(implementation):
    """Nor is their mask, even an infinite one."""
    (x, offset, mask, ct), options = drawn("plain", "float32")
    hostile = offset.copy()
    at = np.random.default_rng(1).choice(offset.size, 4 * len(OUT_OF_RANGE), replace=False)
    with np.errstate(over="ignore"):
        hostile.flat[at] = np.tile(OUT_OF_RANGE, 4)
    taps = (hostile != offset).reshape(*mask.shape, 2).any(-1)
    hostile_mask = np.where(taps, np.inf, mask)
    y, (grad_x, grad_offset, grad_mask) = with_gradients(
        lambda *a: jax_dcn.dcnv3(*a, **options), [x, hostile, hostile_mask], ct
    )
    expected, (expected_x, *_) = unweighted.dcnv3(x, offset, np.where(taps, 0, mask), ct, **options)
    assert_close(y, expected)
    assert_close(grad_x, expected_x)
    assert not grad_mask[taps].any()
    assert not grad_offset.reshape(*mask.shape, 2)[taps].any()
    assert np.isfinite(grad_offset).all()


def test_hostile_locations_are_no_samples(implementation):
    (value, locations, weights, ct), shapes = drawn_attention("two_levels", "float32")
    hostile = locations.copy()
    at = np.random.default_rng(1).choice(locations.size, 2 * len(OUT_OF_RANGE), replace=False)
    with np.errstate(over="ignore"):
        hostile.flat[at] = np.tile(OUT_OF_RANGE, 2)
    points = (hostile != locations).any(-1)
    y, grads = with_gradients(attention(shapes), [value, hostile, np.where(points, np.inf, weights)], ct)
    expected, (expected_value, *_) = unweighted.attention(value, shapes, locations, np.where(points, 0, weights), ct)
    assert_close(y, expected)
    assert_close(grads[0], expected_value)
    assert not grads[1][points].any() and not grads[2][points].any()


def test_the_removed_center_is_not_read(implementation):
    """Even where the image is infinite or NaN."""
    offset, mask = np.zeros((1, 1, 1, 16)), np.ones((1, 1, 1, 8))
    x = np.zeros((1, 5, 5, 1))
    x[0, ::2, ::2, 0] = np.arange(9).reshape(3, 3)
    x[0, 2, 2] = np.nan
    options = dict(remove_center=True, dilation=2)
    y, grads = with_gradients(lambda *a: jax_dcn.dcnv3(*a, **options), [x, offset, mask], np.ones((1, 1, 1, 1)))
    assert y[0, 0, 0, 0] == 32
    assert grads[0][0, 2, 2, 0] == 0 and grads[0].sum() == 8
    np.testing.assert_array_equal(grads[2][0, 0, 0], [0, 3, 6, 1, 7, 2, 5, 8])  # the width is the slower index


def test_derivatives_on_the_lattice(implementation):
    """To the right, and 0 where the sample is not valid, at exactly -1 and at the size."""
    x = jnp.asarray([1.0, 3.0, 7.0, 8.0]).reshape(1, 1, 4, 1)
    at = jnp.asarray([-1.0, -0.5, 0, 1, 2, 3, 3.5, 4])
    expected = [0, 1, 2, 4, 1, -8, -8, 0]
    locations = jnp.stack([(at + 0.5) / 4, jnp.full(8, 0.5)], -1).reshape(1, 8, 1, 1, 1, 2)
    value, weights = x[:, 0, :, None], jnp.ones((1, 8, 1, 1, 1))
    grad = jax.grad(lambda locations: attention([(1, 4)])(value, locations, weights).sum())(locations)
    np.testing.assert_array_equal(grad[0, :, 0, 0, 0, 0] / 4, expected)

    offset = jnp.stack([at, jnp.zeros(8)], -1).reshape(8, 1, 1, 2)
    images = jnp.broadcast_to(x, (8, 1, 4, 1))

    def first_pixel(offset):
        return jax_dcn.dcnv3(images, offset, jnp.ones((8, 1, 1, 1)), kernel_size=1, stride=4).sum()

    np.testing.assert_array_equal(jax.grad(first_pixel)(offset)[:, 0, 0, 0], expected)


def test_debug_nans_finds_none():
    with jax.debug_nans(True):
        for case in ("kernel_5_dilated", "plain"):
            (*arrays, ct), options = drawn(case)
            with_gradients(lambda *a, options=options: jax_dcn.dcnv3(*a, **options), arrays, ct)


# --- transformations ---

FUNCTIONS = {
    "dcnv3": (lambda **more: dcnv3_of("kernel_2x4", **more), lambda: drawn("kernel_2x4")[0]),
    "center": (lambda **more: dcnv3_of("one_pixel", **more), lambda: drawn("one_pixel")[0]),
    "attention": (
        lambda **more: attention(LEVELS["two_levels"]["shapes"], **more),
        lambda: drawn_attention("two_levels")[0],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_and_second_order(name, implementation):
    """J v against J^T ct, and the gradients' JVP against their differences."""
    make, draw = FUNCTIONS[name]
    *arrays, ct = map(jnp.asarray, draw())
    rng = np.random.default_rng(2)
    vector = [jnp.asarray(rng.standard_normal(array.shape)) for array in arrays]

    def gradient(*arrays):
        return jax.grad(lambda *arrays: (jnp.sin(make()(*arrays)) * ct).sum(), (0, 1, 2))(*arrays)

    _, tangent = jax.jit(lambda a, v: jax.jvp(make(forward_mode=True), a, v))(arrays, vector)
    _, grads = with_gradients(make(), arrays, ct)
    np.testing.assert_allclose((tangent * ct).sum(), sum((g * v).sum() for g, v in zip(grads, vector, strict=True)))
    _, second = jax.jit(lambda a, v: jax.jvp(gradient, a, v))(arrays, vector)
    step = 1e-6
    there, back = (gradient(*(a + s * v for a, v in zip(arrays, vector, strict=True))) for s in (step, -step))
    for actual, a, b in zip(second, there, back, strict=True):
        np.testing.assert_allclose(actual, (a - b) / (2 * step), rtol=0, atol=1e-6 * (1 + np.abs(actual).max()))
    grad_of_grad = jax.jit(jax.grad(lambda a: sum((g * v).sum() for g, v in zip(gradient(*a), vector, strict=True))))(
        arrays
    )
    for actual, expected in zip(grad_of_grad, second, strict=True):  # the Hessian is symmetric
        assert_close(actual, expected, "float32")


@pytest.mark.parametrize("name", ["dcnv3", "attention"])
def test_other_transformations(name):
    make, draw = FUNCTIONS[name]
    *arrays, _ = map(jnp.asarray, draw())
    y = make()(*arrays)
    assert jax.eval_shape(make(), *arrays) == jax.ShapeDtypeStruct(y.shape, y.dtype)
    with jax.disable_jit():
        assert_close(make()(*arrays), y)
    assert_close(jax.checkpoint(make())(*arrays), y)
    _, each = jax.lax.scan(lambda carry, x: (carry, make()(x, *arrays[1:])), 0, jnp.stack([arrays[0], -arrays[0]]))
    assert_close(each, jnp.stack([y, -y]))
    tangent = jax.linearize(make(forward_mode=True), *arrays)[1](arrays[0], *map(jnp.zeros_like, arrays[1:]))
    assert_close(tangent, y)  # linear in the image
    assert_close(jax.jacfwd(lambda s: make(forward_mode=True)(arrays[0] * s, *arrays[1:]))(1.0), y)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", ["dcnv3", "attention"])
def test_vmap(name, subset):
    """At any axis, and nested, with gradients."""
    make, draw = FUNCTIONS[name]
    *arrays, ct = draw()
    rng = np.random.default_rng(3)
    axes = [(0, 2, -1)[i] if i in subset else None for i in range(3)]
    stacked = [
        array if axis is None else np.stack([array, rng.permuted(array), -array], axis)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    each = [
        with_gradients(
            make(), [a if axis is None else np.take(a, i, axis) for a, axis in zip(stacked, axes, strict=True)], ct
        )
        for i in range(3)
    ]

    @jax.jit
    def mapped(stacked):
        def one(*arrays):
            y, vjp = jax.vjp(make(), *arrays)
            return y, vjp(jnp.asarray(ct))

        twice = jax.vmap(jax.vmap(make(), axes), tuple(0 if i in subset else None for i in range(3)))
        return jax.vmap(one, axes)(*stacked), twice(*(s[None] if i in subset else s for i, s in enumerate(stacked)))

    actual, nested = mapped(list(map(jnp.asarray, stacked)))
    jax.tree.map(assert_close, actual, jax.tree.map(lambda *values: jnp.stack(values), *each))
    assert_close(nested[0], actual[0])


def test_export_of_the_attention_for_any_size():
    """Of images, levels and queries, with gradients."""
    n, h, w, q = export.symbolic_shape("n, h, w, q")
    shapes = (n, h, w, 6), (n, q, 2, 2, 3, 2), (n, q, 2, 2, 3)

    def gradients(x, locations, weights):
        def loss(x, locations, weights):
            height, width = x.shape[1:3]
            value = jnp.concatenate([x.reshape(x.shape[0], height * width, 2, 3), jnp.ones((x.shape[0], 2, 2, 3))], 1)
            return attention(((height, width), (1, 2)))(value, locations, weights).sum()

        return jax.grad(loss, (0, 1, 2))(x, locations, weights)

    structs = [jax.ShapeDtypeStruct(shape, np.float64) for shape in shapes]
    targets = [
        export.DisabledSafetyCheck.custom_call(name) for name in (native.DEFORM_CONV2D, native.DEFORM_CONV2D_BACKWARD)
    ]
    exported = export.export(jax.jit(gradients), platforms=["cpu", "cuda", "tpu", "rocm"], disabled_checks=targets)(
        *structs
    )
    rng = np.random.default_rng(0)
    for sizes in (dict(n=2, h=3, w=4, q=5), dict(n=1, h=1, w=1, q=1)):
        arrays = [rng.random([sizes.get(str(size), size) for size in shape]) for shape in shapes]
        jax.tree.map(assert_close, exported.call(*arrays), gradients(*arrays))


# --- meshes ---


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["dcnv3", "dcnv4", "attention"])
def test_images_and_groups_are_shared(name, kind):
    run_python(
        f"import test_unweighted; test_unweighted.check_sharing({name!r}, {kind!r})",
        Path(__file__).parent,
        XLA_FLAGS="--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=600",
    )


def check_sharing(name, kind):
    """Each device computes its images and groups, and nothing is exchanged, in the gradients neither."""
    mesh = jax.make_mesh((2, 2), ("images", "groups"), axis_types=(getattr(AxisType, kind),) * 2)
    rng = np.random.default_rng(0)
    if name == "attention":
        shapes = ((3, 4), (2, 2))
        sizes = (4, 16, 4, 3), (4, 7, 4, 2, 3, 2), (4, 7, 4, 2, 3)
        function, spec = attention(shapes), P("images", None, "groups")
    else:
        groups = 8 if name == "dcnv4" else 4  # whose 27 values fill multiples of 8
        sizes = ((4, 6, 5, 16), *((4, 6, 5, groups * n) for n in ((27,) if name == "dcnv4" else (18, 9))))
        function, spec = (
            functools.partial(getattr(jax_dcn, name), padding=1, groups=groups),
            P("images", None, None, "groups"),
        )
    arrays = [rng.standard_normal(size, np.float32) for size in sizes]

    def loss(*arrays):
        y = function(*arrays)
        return jnp.sin(y).sum(), y

    expected = jax.grad(loss, tuple(range(len(arrays))), has_aux=True)(*map(jnp.asarray, arrays))
    sharding = NamedSharding(mesh, spec)
    shared = [jax.device_put(array, sharding) for array in arrays]
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, tuple(range(len(arrays))), has_aux=True)).lower(*shared).compile()
        grads, y = compiled(*shared)
    assert not re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())
    for array in (*grads, y):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec[: array.ndim])), array.ndim)
    jax.tree.map(assert_close, (grads, y), expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_queries_are_shared(kind):
    run_python(
        f"import test_unweighted; test_unweighted.check_sharing_queries({kind!r})",
        Path(__file__).parent,
        XLA_FLAGS="--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=600",
    )


def check_sharing_queries(kind):
    """Each device computes its images and queries, and nothing but the sum of the value's gradient is exchanged."""
    mesh = jax.make_mesh((2, 2), ("images", "queries"), axis_types=(getattr(AxisType, kind),) * 2)
    rng = np.random.default_rng(0)
    sizes = (4, 16, 4, 3), (4, 6, 4, 2, 3, 2), (4, 6, 4, 2, 3)
    specs = P("images"), P("images", "queries"), P("images", "queries")
    arrays = [rng.standard_normal(size, np.float32) for size in sizes]

    def loss(*arrays):
        y = attention(((3, 4), (2, 2)))(*arrays)
        return jnp.sin(y).sum(), y

    gradients = jax.grad(loss, (0, 1, 2), has_aux=True)
    expected = gradients(*map(jnp.asarray, arrays))
    shared = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(*shared).compile()
        grads, y = compiled(*shared)
    collectives = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())
    assert collectives == ["all-reduce"]
    for array, spec in zip((*grads, y), (*specs, specs[1]), strict=True):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)
    jax.tree.map(assert_close, (grads, y), expected)


@pytest.mark.parametrize("name", ["dcnv3", "attention"])
def test_a_mesh_of_one_device(name, implementation):
    """With explicit axes, where nothing is left to XLA's partitioner."""
    make, draw = FUNCTIONS[name]
    *arrays, _ = map(jnp.asarray, draw())
    gradient = jax.grad(lambda *a: make()(*a).sum(), (0, 1, 2))
    expected = gradient(*arrays)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        actual = gradient(*(jax.device_put(array, NamedSharding(mesh, P("d"))) for array in arrays))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


def test_explicit_axes_that_cut_groups():
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    code = "import test_unweighted; test_unweighted.check_explicit_axes_that_cut_groups()"
    run_python(code, Path(__file__).parent, XLA_FLAGS=flags)


def check_explicit_axes_that_cut_groups():
    """Where JAX would refuse to reshape what is sharded, it is gathered."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    rng = np.random.default_rng(0)
    channels, one_group = P(None, None, None, "d"), functools.partial(jax_dcn.dcnv3, kernel_size=2)
    sizes_of_attention = (2, 8, 3, 4), (2, 5, 3, 2, 4, 2), (2, 5, 3, 2, 4)
    points = P(None, None, None, None, "d")
    for function, sizes, specs in (
        (one_group, ((2, 5, 4, 4), (2, 4, 3, 8), (2, 4, 3, 4)), (P(), channels, channels)),
        (functools.partial(jax_dcn.dcnv4, padding=1), ((2, 5, 4, 4), (2, 5, 4, 32)), (channels, channels)),
        (attention(((2, 3), (1, 2))), sizes_of_attention, (channels, P(), P())),
        (attention(((2, 3), (1, 2))), sizes_of_attention, (P(None, "d"), points, points)),
    ):
        arrays = [rng.standard_normal(size, np.float32) for size in sizes]
        gradient = jax.jit(jax.grad(lambda *a, f=function: jnp.sin(f(*a)).sum(), tuple(range(len(arrays)))))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
            actual = gradient(*placed)
        for got, expected, given in zip(actual, gradient(*arrays), placed, strict=True):
            assert_close(got, expected)
            assert got.sharding.is_equivalent_to(given.sharding, got.ndim)


# --- errors ---


def sizes_of(**changed):
    """Operands of dcnv3 for x of 6 x 5 pixels and 4 channels, some of another shape or dtype."""
    shapes = {"x": (2, 6, 5, 4), "offset": (2, 6, 5, 36), "mask": (2, 6, 5, 18)}
    return {name: np.zeros(changed.get(name, shape), np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        (dict(x=(2, 6, 5)), {}, "x has 3 dimensions, expected 4, in shape (2, 6, 5)"),
        (dict(x=(2, 6, 5, 3)), {}, "C (3) must be a positive multiple of groups (2)"),
        (dict(x=(2, 0, 5, 4)), {}, "x has no pixels"),
        (dict(offset=(2, 6, 5, 18)), {}, "offset has 18 channels, expected 36 = groups (2) * 9 taps * 2"),
        (dict(mask=(2, 6, 5, 16)), {}, "mask has 16 channels, expected 18 = groups (2) * 9 taps"),
        ({}, dict(remove_center=True), "offset has 36 channels, expected 32 = groups (2) * 8 taps * 2"),
        (dict(offset=(3, 6, 5, 36)), {}, "offset has batch size 3, expected x's, 2"),
        (dict(mask=(2, 5, 6, 18)), {}, "mask has spatial size 5 x 6, expected that of the output, 6 x 5"),
        ({}, dict(stride=2), "offset has spatial size 6 x 5, expected that of the output, 3 x 3"),
        ({}, dict(groups=0), "groups must be at least 1, got 0"),
        ({}, dict(dilation=0), "dilation must be at least 1, got 0"),
        ({}, dict(padding=-1), "padding must be at least 0, got -1"),
        ({}, dict(padding=0, kernel_size=9), "the output would have no pixels"),
        ({}, dict(kernel_size=(3, 5), remove_center=True), "remove_center needs an odd, square kernel_size above 1"),
        ({}, dict(kernel_size=1, remove_center=True), "remove_center needs an odd, square kernel_size above 1"),
        ({}, dict(offset_scale=float("inf")), "offset_scale must be finite, got inf"),
        ({}, dict(offset_scale=10**400), "offset_scale must be finite, got 1000"),
    ],
)
def test_wrong_values_of_dcnv3(changed, options, message):
    with pytest.raises(ValueError, match=re.escape(f"dcnv3: {message}")):
        jax_dcn.dcnv3(**sizes_of(**changed), **{"padding": 1, "groups": 2, **options})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", [[1.0]], "x must be an array, got list"),
        ("offset", np.zeros((2, 6, 5, 36), int), "offset has dtype int64, expected one of float32"),
        ("mask", None, "mask must be an array, got NoneType"),
        ("offset_scale", "1", "offset_scale must be a number, got '1'"),
        ("remove_center", 1, "remove_center must be a bool, got 1"),
        ("forward_mode", None, "forward_mode must be a bool, got None"),
        ("groups", 2.0, "groups must be an integer, got 2.0"),
    ],
)
def test_wrong_types_of_dcnv3(argument, value, message):
    with pytest.raises(TypeError, match=re.escape(f"dcnv3: {message}")):
        jax_dcn.dcnv3(**{**sizes_of(), "padding": 1, "groups": 2, argument: value})


def test_wrong_values_of_dcnv4():
    x = np.zeros((2, 6, 5, 4))
    message = "dcnv4: offset_mask has 54 channels, expected 56 = groups (2) * 9 taps * 3, rounded up to a multiple of 8"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax_dcn.dcnv4(x, np.zeros((2, 6, 5, 54)), groups=2, padding=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(value=(2, 12, 2)), "value has 3 dimensions, expected 4"),
        (dict(value=(2, 13, 2, 3)), "value has 13 pixels, expected 16 = the sum of height * width over spatial_shapes"),
        (
            dict(locations=(2, 5, 2, 3, 2, 2)),
            "sampling_locations has shape (2, 5, 2, 3, 2, 2), expected (2, 5, 2, 2, 2, 2)",
        ),
        (
            dict(locations=(2, 5, 2, 2, 2, 3)),
            "sampling_locations has shape (2, 5, 2, 2, 2, 3), expected (2, 5, 2, 2, 2, 2)",
        ),
        (dict(locations=(2, 5, 2, 2, 0, 2)), "sampling_locations has no points"),
        (dict(weights=(2, 5, 3, 2, 2)), "attention_weights has shape (2, 5, 3, 2, 2), expected (2, 5, 2, 2, 2)"),
        (dict(shapes=()), "spatial_shapes must be a sequence of pairs (height, width)"),
        (dict(shapes=(3, 4)), "spatial_shapes must be a sequence of pairs (height, width)"),
        (dict(shapes=((0, 4), (4, 4))), "spatial_shapes must be at least 1, got ((0, 4), (4, 4))"),
        (dict(value=(2, 16, 2, 0)), "heads * D (0) must be a positive multiple of heads (2)"),
    ],
)
def test_wrong_values_of_the_attention(changed, message):
    shapes = changed.get("shapes", ((3, 4), (2, 2)))
    value = np.zeros(changed.get("value", (2, 16, 2, 3)))
    locations = np.zeros(changed.get("locations", (2, 5, 2, 2, 2, 2)))
    weights = np.zeros(changed.get("weights", (2, 5, 2, 2, 2)))
    with pytest.raises(ValueError, match=re.escape(f"multi_scale_deformable_attention: {message}")):
        jax_dcn.multi_scale_deformable_attention(value, shapes, locations, weights)


def test_the_levels_are_static():
    (value, locations, weights, _), shapes = drawn_attention("two_levels")
    function = jax_dcn.multi_scale_deformable_attention
    expected = function(value, shapes, locations, weights)
    for same in (np.array(shapes), jnp.asarray(shapes), [list(shape) for shape in shapes], list(map(np.array, shapes))):
        assert_close(function(value, same, locations, weights), expected)
        assert_close(jax.jit(lambda *a, same=same: function(a[0], same, *a[1:]))(value, locations, weights), expected)
    message = r"multi_scale_deformable_attention: spatial_shapes must be .* known while tracing .*, got .*Trace"
    with pytest.raises(TypeError, match=message):
        jax.jit(function)(value, jnp.asarray(shapes), locations, weights)
    with pytest.raises(TypeError, match=r"spatial_shapes must be an integer, got 3\.5"):
        function(value, ((3.5, 4), (2, 5)), locations, weights)
