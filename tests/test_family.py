"""What DCNv3, DCNv4 and the attention allow where their originals do not: the rows of the table in docs/family.md."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from support.processes import run_python

import jax_dcn

DOCS = Path(__file__).parents[1] / "docs"
LEVELS = [(2, 3), (4, 1)]


def operands(batch=2, size=(5, 4), channels=6, groups=2, kernel=(3, 3), dtype=np.float64):
    """x, offset and mask of `dcnv3`, with padding that keeps an odd kernel's size."""
    rng = np.random.default_rng(0)
    out = tuple(n + 2 * ((k - 1) // 2) - k + 1 for n, k in zip(size, kernel, strict=True))
    taps = kernel[0] * kernel[1] * groups
    sizes = (batch, *size, channels), (batch, *out, taps * 2), (batch, *out, taps)
    arrays = [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]
    padding = tuple((k - 1) // 2 for k in kernel)
    return arrays, dict(kernel_size=kernel, padding=padding, groups=groups)


def to_v4(offset, mask, groups):
    """`dcnv4`'s one array of both."""
    n, h, w, _ = mask.shape
    by_group = [array.reshape(n, h, w, groups, -1) for array in (offset, mask)]
    both = jnp.concatenate(by_group, -1).reshape(n, h, w, -1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, 0), (0, -both.shape[3] % 8)))


def by_weight(x, offset, mask, kernel_size, padding, groups):
    """`dcnv3` as `modulated_deform_conv2d` with a weight of ones, whose taps and coordinates have another order."""
    kh, kw = kernel_size
    n, h, w, _ = offset.shape
    offset = offset.reshape(n, h, w, groups, kw, kh, 2).swapaxes(4, 5)[..., ::-1].reshape(offset.shape)
    mask = mask.reshape(n, h, w, groups, kw, kh).swapaxes(4, 5).reshape(mask.shape)
    weight = jnp.ones((kh, kw, 1, x.shape[3]), x.dtype)
    return jax_dcn.modulated_deform_conv2d(
        *(x, offset, mask, weight),
        padding=padding,
        groups=x.shape[3],
        deform_groups=groups,
        data_format="NHWC",
    )


def attention(batch=2, dtype=np.float64, **options):
    """The attention as a function of the arrays, and these."""
    rng = np.random.default_rng(0)
    sizes = (batch, 10, 2, 3), (batch, 4, 2, 2, 3, 2), (batch, 4, 2, 2, 3)
    arrays = [jnp.asarray(rng.uniform(size=size), dtype) for size in sizes]
    return lambda v, at, w: jax_dcn.multi_scale_deformable_attention(v, LEVELS, at, w, **options), arrays


@pytest.mark.parametrize(
    "arguments",
    [
        dict(channels=2),
        dict(channels=6),
        dict(kernel=(7, 7), size=(9, 8)),
        dict(kernel=(2, 4)),
        dict(batch=257, size=(2, 3), channels=2),
        dict(batch=4, size=(7, 7)),
    ],
    ids=["1 channel a group", "3 channels a group", "kernel 7", "kernel 2x4", "batch 257", "batch 4 of 7x7"],
)
def test_sizes(arguments, implementation):
    (x, offset, mask), options = operands(**arguments)
    expected = by_weight(x, offset, mask, **options)
    np.testing.assert_allclose(jax_dcn.dcnv3(x, offset, mask, **options), expected, atol=1e-12)
    both = to_v4(offset, mask, options["groups"])
    np.testing.assert_allclose(jax_dcn.dcnv4(x, both, **options), expected, atol=1e-12)


def test_no_images():
    (x, offset, mask), options = operands(batch=0)
    gradients = jax.grad(lambda *arrays: jax_dcn.dcnv3(*arrays, **options).sum(), (0, 1, 2))(x, offset, mask)
    assert [gradient.shape for gradient in gradients] == [x.shape, offset.shape, mask.shape]
    function, arrays = attention(batch=0)
    assert function(*arrays).shape == (0, 4, 6)


def test_batch_of_the_attention():
    function, arrays = attention(batch=65)
    one_by_one = jnp.concatenate([function(*(array[i : i + 1] for array in arrays)) for i in (0, 63, 64)])
    np.testing.assert_allclose(function(*arrays)[jnp.array([0, 63, 64])], one_by_one, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 10), (9, 9)])
@pytest.mark.parametrize("name", ["DCNv3", "DCNv4"])
def test_stride_of_a_layer(name, size):
    """A new layer's offsets are 0: a layer of stride 2 computes every second pixel of one of stride 1."""
    layers = [getattr(jax_dcn.nnx, name)(6, group=2, stride=stride, rngs=nnx.Rngs(0)) for stride in (1, 2)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 6)), jnp.float32)
    every, second = (layer(x) for layer in layers)
    np.testing.assert_allclose(second, every[:, ::2, ::2], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_16_bits(dtype, implementation):
    arrays, options = operands()
    arrays = [array.astype(dtype) for array in arrays]

    def gradients(arrays):
        return jax.grad(lambda *arrays: (jax_dcn.dcnv3(*arrays, **options) ** 2).sum(), (0, 1, 2))(*arrays)

    for actual, expected in zip(gradients(arrays), gradients([a.astype(jnp.float64) for a in arrays]), strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.astype(float), expected, rtol=0, atol=0.02 * jnp.abs(expected).max())


@pytest.mark.parametrize("name", ["dcnv3", "attention"])
def test_second_order(name):
    """A Hessian times a vector is the difference quotient of the gradients."""
    arrays, options = operands()
    function = lambda *arrays: jax_dcn.dcnv3(*arrays, **options)  # noqa: E731
    if name == "attention":
        function, arrays = attention()
    gradient = jax.grad(lambda *arrays: (function(*arrays) ** 2).sum(), (0, 1, 2))
    rng = np.random.default_rng(1)
    vector = [jnp.asarray(rng.normal(size=array.shape)) for array in arrays]
    _, actual = jax.jvp(gradient, arrays, vector)
    step = 1e-6
    there, back = (gradient(*(a + s * v for a, v in zip(arrays, vector, strict=True))) for s in (step, -step))
    for got, a, b in zip(actual, there, back, strict=True):
        np.testing.assert_allclose(got, (a - b) / (2 * step), rtol=0, atol=1e-5 * np.abs(got).max())


@pytest.mark.parametrize("name", ["dcnv3", "attention"])
def test_forward_mode(name):
    """<ct, J v> by `jvp` is <J^T ct, v> by `vjp`."""
    arrays, options = operands()
    function = lambda *arrays: jax_dcn.dcnv3(*arrays, forward_mode=True, **options)  # noqa: E731
    if name == "attention":
        function, arrays = attention(forward_mode=True)
    rng = np.random.default_rng(1)
    vector = [jnp.asarray(rng.normal(size=array.shape)) for array in arrays]
    y, tangent = jax.jvp(function, arrays, vector)
    ct = jnp.asarray(rng.normal(size=y.shape))
    gradients = jax.vjp(function, *arrays)[1](ct)
    expected = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True))
    np.testing.assert_allclose((tangent * ct).sum(), expected, rtol=1e-9)


def test_vmap():
    (x, offset, mask), options = operands()
    function = lambda x, offset: jax_dcn.dcnv3(x, offset, mask, **options)  # noqa: E731
    xs, offsets = jnp.stack([x, 2 * x, -x]), jnp.stack([offset, -offset, 2 * offset])
    expected = jnp.stack([function(*both) for both in zip(xs, offsets, strict=True)])
    np.testing.assert_allclose(jax.vmap(function)(xs, offsets), expected, atol=1e-12)


def test_offsets_of_another_dtype(implementation):
    """They are not rounded to x's."""
    (x, offset, mask), options = operands(dtype=np.float32)
    x, offset = x.astype(jnp.bfloat16), 9 * offset
    expected = jax_dcn.dcnv3(x.astype(jnp.float32), offset, mask, **options).astype(jnp.bfloat16)
    np.testing.assert_array_equal(jax_dcn.dcnv3(x, offset, mask, **options), expected)


@pytest.mark.parametrize("name", ["dcnv3", "attention"])
def test_two_devices(name):
    flags = "--xla_force_host_platform_device_count=2 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    run_python(
        f"import test_family; test_family.compare_on_two_devices({name!r})", Path(__file__).parent, XLA_FLAGS=flags
    )


def compare_on_two_devices(name):
    """The images of one call, shared by two devices."""
    mesh = jax.make_mesh((2,), ("images",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays, options = operands(dtype=np.float32)
    function = lambda *arrays: jax_dcn.dcnv3(*arrays, **options)  # noqa: E731
    if name == "attention":
        function, arrays = attention(dtype=np.float32)
    sharding = NamedSharding(mesh, PartitionSpec("images"))
    shared = jax.jit(function, in_shardings=(sharding,) * 3, out_shardings=sharding)
    compiled = shared.lower(*arrays).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(*jax.device_put(arrays, sharding)), function(*arrays), atol=1e-5)


def test_export_for_any_size():
    """Of images, and of queries."""
    n, h, w, q = export.symbolic_shape("n, h, w, q")
    checks = [export.DisabledSafetyCheck.custom_call("jax_dcn_deform_conv2d")]
    arrays, options = operands()
    function = jax.jit(lambda *arrays: jax_dcn.dcnv3(*arrays, **options))
    of_attention, others = attention()
    shapes = [(n, h, w, array.shape[3]) for array in arrays], [(n, 10, 2, 3), (n, q, 2, 2, 3, 2), (n, q, 2, 2, 3)]
    for f, given, sizes in zip((function, jax.jit(of_attention)), (arrays, others), shapes, strict=True):
        structs = [jax.ShapeDtypeStruct(size, array.dtype) for size, array in zip(sizes, given, strict=True)]
        exported = export.export(f, platforms=["cpu", "cuda", "tpu"], disabled_checks=checks)(*structs)
        np.testing.assert_allclose(exported.call(*given), f(*given), atol=1e-12)


def test_rows():
    """The page names tests that there are."""
    names = set(re.findall(r"`(test_\w+)`", (DOCS / "family.md").read_text()))
    assert names and names <= set(globals())
