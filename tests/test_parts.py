"""jax_dcn.mmcv.nn: the numbers, names, defaults and initial values of torch and mmcv."""

import inspect
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.parts_golden import CASES, FUNCTIONS, LAYERS, PATH, GoldenPart
from support.tolerances import assert_close, assert_same_arrays

import jax_dcn
from jax_dcn import mmcv
from jax_dcn.mmcv.nn import (
    BatchNorm2d,
    Conv2d,
    ConvModule,
    ConvTranspose2d,
    FrozenParam,
    GroupNorm,
    LayerNorm,
    Linear,
    ModuleList,
    Scale,
    Sequential,
    adaptive_avg_pool2d,
    build_activation_layer,
    build_conv_layer,
    build_norm_layer,
    interpolate,
    max_pool2d,
    reread,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Image:
    """torch's arrays in a data format, and back."""

    def __init__(self, part, data_format):
        self.moves = data_format == "NHWC" and (part.images or part.name == "Conv2d")
        self.options = {"data_format": data_format} if part.name not in ("Linear", "LayerNorm") else {}

    def enter(self, array):
        return jnp.asarray(np.moveaxis(array, -3, -1) if self.moves else array)

    def leave(self, array):
        return np.moveaxis(np.asarray(array), -1, -3) if self.moves else np.asarray(array)


# --- numbers ---


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer(case, data_format):
    golden = GoldenPart(case)
    image = Image(golden.part, data_format)
    cls = getattr(mmcv.nn, golden.part.name)
    layer = cls(*golden.part.arguments, **golden.part.options, **image.options, rngs=nnx.Rngs(0))
    mmcv.load_into(layer, golden.state_dict)
    assert_same_arrays(mmcv.to_state_dict(layer), golden.state_dict)
    (layer.train if golden.part.training else layer.eval)()
    gy = image.enter(golden.gy)

    def loss(layer, x):
        y = layer(x)
        return (y * gy).sum(), y

    graph, params, rest = nnx.split(layer, nnx.Any(nnx.Param, FrozenParam), ...)

    @jax.jit
    def run(params, x):
        def of(params, x):
            layer = nnx.merge(graph, params, rest, copy=True)
            value, y = loss(layer, x)
            return value, (y, nnx.state(layer))

        return jax.grad(of, (0, 1), has_aux=True)(params, x)

    (grads, grad_x), (y, after) = run(params, image.enter(golden.x))
    assert_close(image.leave(y), golden.y, "float32", "y")
    assert_close(image.leave(grad_x), golden.grads.pop("x"), "float32", "the gradient of x")
    nnx.update(layer, grads)
    actual = mmcv.to_state_dict(layer)
    for name, expected in golden.grads.items():
        assert_close(actual[name], expected, "float32", f"the gradient of {name}")
    nnx.update(layer, after)
    actual = mmcv.to_state_dict(layer)
    for name, expected in golden.after.items():
        assert_close(actual[name], expected, "float32", name)


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function(case, data_format):
    golden = GoldenPart(case)
    image = Image(golden.part, data_format)

    def function(x):
        return getattr(mmcv.nn, golden.part.name)(x, *golden.part.arguments, **golden.part.options, **image.options)

    y, vjp = jax.vjp(jax.jit(function), image.enter(golden.x))
    assert_close(image.leave(y), golden.y)
    assert_close(image.leave(vjp(image.enter(golden.gy))[0]), golden.grads["x"])


@pytest.mark.parametrize("case", CASES)
def test_these_numbers_are_torchs(case):
    pytest.importorskip("torch")
    from support import torch_parts

    with warnings.catch_warnings(), np.load(PATH) as stored:
        warnings.simplefilter("ignore")  # torch's, of padding="same" with even kernels
        actual, _ = torch_parts.compute(case)
        for name, array in actual.items():
            assert_close(array, stored[f"{case}/{name}"], "float32", name)


@pytest.mark.parametrize(
    "name",
    [
        *("Conv2d", "ConvTranspose2d", "Linear", "BatchNorm2d", "GroupNorm", "LayerNorm"),
        *("interpolate", "max_pool2d", "adaptive_avg_pool2d"),
    ],
)
def test_arguments_are_torchs(name):
    """In torch's order, with its defaults, as far as they exist here."""
    torch = pytest.importorskip("torch")
    original = getattr(torch.nn, name, None) or getattr(torch.nn.functional, name)
    if name == "max_pool2d":  # which is a dispatcher
        original = torch.nn.functional.max_pool2d_with_indices
    positional = [
        parameter
        for parameter in inspect.signature(getattr(mmcv.nn, name)).parameters.values()
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    ]
    expected = list(inspect.signature(original).parameters.values())[: len(positional)]
    assert [parameter.name.replace("x", "input") for parameter in positional[:1]] + [
        parameter.name for parameter in positional[1:]
    ] == [parameter.name for parameter in expected]
    assert [parameter.default for parameter in positional] == [parameter.default for parameter in expected]


def test_dtypes():
    """16-bit images are resized and averaged in float32, and rounded once."""
    x = jnp.asarray(normal(2, 33, 41, 3))
    for function in (
        lambda x: interpolate(x, 50, mode="bilinear"),
        lambda x: interpolate(x, scale_factor=1.3),
        lambda x: adaptive_avg_pool2d(x, 1),
        lambda x: adaptive_avg_pool2d(x, (3, 4)),
        lambda x: max_pool2d(x, 3),
        Scale(1.7),
    ):
        y = function(x.astype(jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        assert_close(y.astype(jnp.float32), function(x.astype(jnp.bfloat16).astype(jnp.float32)), "bfloat16")
        assert function(x.astype(jnp.float64)).dtype == jnp.float64
    for layer in (
        Conv2d(3, 4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        ConvTranspose2d(3, 4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        ConvModule(3, 4, 3, norm_cfg=dict(type="BN"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    ):
        assert layer(x).dtype == jnp.bfloat16
        assert all(param.dtype == jnp.float32 for param in jax.tree.leaves(nnx.state(layer, nnx.Param)))


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_batch_axes(leading):
    x = jnp.asarray(normal(*leading, 5, 6, 4))
    for function in (
        Conv2d(4, 2, 3, padding=1, rngs=nnx.Rngs(0)),
        ConvTranspose2d(4, 2, 3, stride=2, rngs=nnx.Rngs(0)),
        ConvModule(4, 2, 3, rngs=nnx.Rngs(0)),
        lambda x: interpolate(x, 3, mode="bilinear"),
        lambda x: max_pool2d(x, 2),
        lambda x: adaptive_avg_pool2d(x, (2, 1)),
        lambda x: reread(x, 2),
    ):
        y = function(x)
        one = jax.eval_shape(function, jnp.zeros((1, 5, 6, 4)))
        assert y.shape == (*leading, *one.shape[1:])
        if 0 not in leading and leading:
            expected = function(x.reshape(-1, 5, 6, 4)).reshape(y.shape)
            np.testing.assert_array_equal(y, expected)


def test_symbolic_sizes():
    """Whole factors of the nearest neighbour, pooling and convolutions take them, what cannot says so."""
    h, w = jax.export.symbolic_shape("h, w")
    layers = ConvModule(4, 4, 3, padding=1, norm_cfg=dict(type="GN", num_groups=2), rngs=rngs())
    transpose = ConvTranspose2d(4, 4, 4, stride=2, padding=1, rngs=rngs())

    def function(x):
        y = interpolate(transpose(max_pool2d(layers(x), 2)), scale_factor=2)
        return interpolate(y, (8 * h, 8 * w)) * adaptive_avg_pool2d(x, 1)

    exported = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct((1, 4 * h, 4 * w, 4), jnp.float32))
    x = jnp.asarray(normal(1, 8, 12, 4))
    assert exported.call(x).shape == (1, 16, 24, 4)

    def numeric(x):
        y = interpolate(transpose(max_pool2d(layers(x), 2)), scale_factor=2)
        return y * adaptive_avg_pool2d(x, 1)

    assert_close(exported.call(x), jax.jit(numeric)(x))
    for call, message in (
        (lambda x: interpolate(x, 7), "interpolate: a symbolic size can only be multiplied by an integer"),
        (lambda x: interpolate(x, scale_factor=2, mode="bilinear"), "interpolate: a symbolic size can only be"),
        (
            lambda x: interpolate(x, scale_factor=1.5),
            "interpolate: a symbolic size, h, can only be",
        ),
        (lambda x: adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d: a symbolic size, h, can only be averaged whole"),
        (lambda x: reread(x, 3), "reread: height and width must not be symbolic, got h x w"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, jax.ShapeDtypeStruct((1, h, w, 4), jnp.float32))


def test_neighbours_of_labels():
    """Integers have neighbours, but no means."""
    labels = np.arange(6, dtype=np.int32).reshape(1, 2, 3, 1)
    assert interpolate(labels, (4, 3))[0, :, 0, 0].tolist() == [0, 0, 3, 3]
    assert interpolate(labels, (1, 2)).dtype == jnp.int32
    for function in (
        lambda x: interpolate(x, 4, mode="bilinear"),
        lambda x: adaptive_avg_pool2d(x, 1),
        lambda x: max_pool2d(x, 2),
    ):
        with pytest.raises(TypeError, match="x has dtype int32, expected one of float32"):
            function(labels)


def test_16_bit_batch_norm_keeps_its_dtype():
    norm = BatchNorm2d(3, param_dtype=jnp.bfloat16, rngs=rngs())
    x = jnp.asarray(normal(2, 4, 4, 3)).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    norm.eval()
    assert norm(x).dtype == jnp.bfloat16
    assert norm(x.astype(jnp.float32)).dtype == jnp.float32


def test_training_at_any_size():
    norm = BatchNorm2d(4, rngs=rngs())
    n, h, w = jax.export.symbolic_shape("n, h, w")
    x = jax.ShapeDtypeStruct((n, h, w, 4), jnp.float32)
    assert nnx.eval_shape(lambda norm, x: norm(x), norm, x).shape == (n, h, w, 4)


def test_a_batch_of_nothing_leaves_no_statistics():
    norm = BatchNorm2d(3, rngs=rngs())
    before = mmcv.to_state_dict(norm)
    assert norm(jnp.zeros((0, 4, 4, 3), jnp.float32)).shape == (0, 4, 4, 3)
    assert_same_arrays(mmcv.to_state_dict(norm), before)


def test_sizes_of_jax_and_numpy():
    conv = Conv2d(np.int64(4), jnp.int32(2), 3, groups=jnp.int32(2), rngs=rngs())
    assert nnx.jit(lambda conv, x: conv(x))(conv, jnp.ones((1, 5, 5, 4))).shape == (1, 3, 3, 2)


def test_large_means_do_not_drown_the_variance():
    """Flax's default, the mean of squares less the square of the mean, keeps one digit here."""
    x = jnp.asarray(1e3 + normal(2, 5, 6, 8))
    exact = np.asarray(x, np.float64)
    grouped = exact.reshape(2, 30, 2, 4)
    expected = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
    assert_close(GroupNorm(2, 8, rngs=nnx.Rngs(0))(x), expected.reshape(x.shape), "tf32")
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    assert_close(LayerNorm(8, rngs=nnx.Rngs(0))(x), expected, "tf32")
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    assert_close(BatchNorm2d(8, rngs=nnx.Rngs(0))(x), expected, "tf32")


# --- initial values ---


@pytest.mark.parametrize(
    ("build", "fan_in"),
    [
        (lambda rngs: Conv2d(32, 64, (3, 2), groups=2, rngs=rngs), 16 * 6),
        (lambda rngs: ConvTranspose2d(64, 128, 3, groups=2, rngs=rngs), 64 * 9),
        (lambda rngs: Linear(100, 300, rngs=rngs), 100),
    ],
)
def test_initial_values_are_torchs(build, fan_in):
    """Uniform within 1 / sqrt(fan_in), the bias too."""
    layer = build(nnx.Rngs(0))
    bound = 1 / np.sqrt(fan_in)
    for values in (layer.kernel[...], layer.bias[...]):
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.95 * bound
        np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.15)


@pytest.mark.parametrize(
    ("options", "variance"),
    [
        ({}, 2 / (64 * 9)),
        ({"act_cfg": dict(type="LeakyReLU", negative_slope=0.5)}, 2 / 1.25 / (64 * 9)),
        ({"act_cfg": dict(type="LeakyReLU")}, 2 / 1.0001 / (64 * 9)),
        ({"conv_cfg": dict(type="deconv")}, 2 / (32 * 9)),
        ({"conv_cfg": dict(type="DCN")}, 2 / (64 * 9)),
        ({"conv_cfg": dict(type="DCNv2")}, 1 / 3 / (32 * 9)),
    ],
    ids=str,
)
def test_initial_values_of_conv_module_are_mmcvs(options, variance):
    conv = ConvModule(32, 64, 3, **options, rngs=nnx.Rngs(0)).conv
    np.testing.assert_allclose(conv.kernel[...].var(), variance, rtol=0.05)
    assert not conv.bias[...].any()


# --- ConvModule ---


@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_deformable_conv_module(name):
    cfg = dict(type=name, deform_groups=2)
    module = ConvModule(4, 6, 3, 2, 1, groups=2, conv_cfg=cfg, norm_cfg=dict(type="GN", num_groups=3), rngs=nnx.Rngs(0))
    cls = {"DCN": jax_dcn.nnx.DeformConv2dPack, "DCNv2": jax_dcn.nnx.ModulatedDeformConv2dPack}[name]
    assert type(module.conv) is cls
    assert module.conv.bias is None
    x = jnp.asarray(normal(2, 7, 8, 4))
    np.testing.assert_array_equal(module(x), nnx.relu(module.gn(module.conv(x))))
    channels = {"DCN": 36, "DCNv2": 54}[name]
    assert {key: array.shape for key, array in mmcv.to_state_dict(module).items()} == {
        "conv.weight": (6, 2, 3, 3),
        "conv.conv_offset.weight": (channels, 4, 3, 3),
        "conv.conv_offset.bias": (channels,),
        "gn.weight": (6,),
        "gn.bias": (6,),
    }
    nchw = ConvModule(4, 6, 3, conv_cfg=cfg, data_format="NCHW", rngs=nnx.Rngs(0))
    assert nchw(jnp.ones((1, 4, 5, 5))).shape == (1, 6, 3, 3)


def test_what_conv_module_says_of_itself():
    module = ConvModule(4, 4, 3, norm_cfg=dict(type="GN", num_groups=2), act_cfg=None, data_format="NCHW", rngs=rngs())
    assert module.norm is module.gn
    assert (module.with_norm, module.with_activation, module.data_format) == (True, False, "NCHW")
    plain = ConvModule(4, 4, 3, rngs=rngs())
    assert (plain.norm, plain.with_norm, plain.with_activation) == (None, False, True)
    conv = Conv2d(4, 6, 3, 2, groups=2, rngs=rngs())
    assert (conv.in_channels, conv.out_channels, conv.stride, conv.dilation, conv.groups) == (4, 6, (2, 2), (1, 1), 2)


def test_names_of_normalizations():
    name, layer = build_norm_layer(dict(type="BN"), 4, postfix=1, rngs=rngs())
    assert (name, type(layer)) == ("bn1", BatchNorm2d)
    name, layer = build_norm_layer(dict(type="LN", eps=1e-6), 4, rngs=rngs())
    assert (name, type(layer), layer.epsilon) == ("ln", LayerNorm, 1e-6)


def test_conv_module_in_parts():
    x = jnp.asarray(normal(1, 5, 5, 4))
    module = ConvModule(4, 4, 3, norm_cfg=dict(type="BN"), rngs=nnx.Rngs(0))
    module.eval()
    np.testing.assert_array_equal(module(x, activate=False), module.bn(module.conv(x)))
    np.testing.assert_array_equal(module(x, norm=False), nnx.relu(module.conv(x)))


def test_frozen_normalizations():
    for cfg in (dict(type="BN", requires_grad=False), dict(type="GN", num_groups=2, requires_grad=False)):
        name, layer = build_norm_layer(cfg, 4, rngs=nnx.Rngs(0))
        assert name == cfg["type"].lower()
        assert isinstance(layer.scale, FrozenParam)
        assert isinstance(layer.bias, FrozenParam)


def test_equal_activations_are_one_function():
    """So that equal modules are of one graph, and compiled once."""
    cfg = dict(type="LeakyReLU", negative_slope=0.2, inplace=True)
    assert build_activation_layer(cfg) is build_activation_layer(dict(cfg))
    graphs = [nnx.graphdef(ConvModule(2, 2, 1, act_cfg=cfg, rngs=nnx.Rngs(0))) for _ in range(2)]
    assert graphs[0] == graphs[1]


# --- containers ---


def test_sequential():
    layers = Sequential(Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu, Linear(3, 1, rngs=nnx.Rngs(1)))
    assert list(mmcv.to_state_dict(layers)) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    x = jnp.asarray(normal(4, 2))
    np.testing.assert_array_equal(layers(x), layers[2](nnx.relu(layers[0](x))))
    assert len(layers) == 3
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layers, x), layers(x))
    assert Sequential()(x) is x


def test_a_tuple_stays_one_argument():
    """Flax's own unpacks it."""
    pair = (lambda x: (x, x + 1), lambda both: both[1])
    assert Sequential(*pair)(1) == 2
    with pytest.raises(TypeError):
        nnx.Sequential(*pair)(1)


def test_module_list_and_scale():
    class Model(nnx.Module):
        def __init__(self):
            self.scales = ModuleList([Scale(2.0), Scale()])

    model = Model()
    assert {key: array.shape for key, array in mmcv.to_state_dict(model).items()} == {
        "scales.0.scale": (),
        "scales.1.scale": (),
    }
    mmcv.load_into(model, {"scales.0.scale": np.float32(3), "scales.1.scale": np.float32(5)})
    assert model.scales[1](jnp.ones(2)).tolist() == [5, 5]


# --- what mmcv's version 2 reads ---


def test_reread(data_format):
    x = normal(2, 18, 5, 7)
    expected = x.reshape(2, -1)[:, : 18 * 12].reshape(2, 18, 3, 4)
    given = x if data_format == "NCHW" else x.transpose(0, 2, 3, 1)
    y = reread(jnp.asarray(given), (3, 4), data_format=data_format)
    np.testing.assert_array_equal(y if data_format == "NCHW" else y.transpose(0, 3, 1, 2), expected)
    with pytest.raises(ValueError, match="reread: size 6 x 6 has more pixels than the maps, 5 x 7"):
        reread(jnp.asarray(given), 6, data_format=data_format)


# --- errors ---


def rngs():
    return nnx.Rngs(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Conv2d(4, 2, 3, strides=2, rngs=rngs()), TypeError, "Conv2d: the argument strides is called stride"),
        (lambda: ConvModule(4, 2, 3, use_bias=True, rngs=rngs()), TypeError, "ConvModule: .* use_bias is called bias"),
        (lambda: Conv2d(4, 2, 3, 2, "same", rngs=rngs()), ValueError, "padding='same' with stride .* is not torch's"),
        (lambda: Conv2d(4, 2, 3, padding_mode="edge", rngs=rngs()), ValueError, "padding_mode must be one of"),
        (lambda: Conv2d(4, 2, 3, groups=3, rngs=rngs()), ValueError, r"in_channels \(4\) must be a multiple of groups"),
        (lambda: Conv2d(4, 2, 3, bias=1, rngs=rngs()), TypeError, "bias must be a bool"),
        (
            lambda: Conv2d(4, 2, 3, rngs=rngs())(jnp.ones((1, 4, 5, 6))),
            ValueError,
            r"^Conv2d: x has 6 channels, expected 4 = in_channels; .* would fit with data_format='NCHW'$",
        ),
        (
            lambda: ConvTranspose2d(4, 2, 3, data_format="NCHW", rngs=rngs())(jnp.ones((1, 5, 6, 4))),
            ValueError,
            r"^ConvTranspose2d: x has 5 channels, expected 4 = in_channels; .* would fit with data_format='NHWC'$",
        ),
        (lambda: ConvTranspose2d(4, 2, 3, 2, 0, 2, rngs=rngs()), ValueError, r"output_padding .* must be less than"),
        (
            lambda: Conv2d(4, 2, 3, rngs=rngs())(jnp.ones((5, 4))),
            ValueError,
            r"^Conv2d: x has 2 dimensions, expected 3 or more, in shape \(5, 4\)$",
        ),
        (
            lambda: BatchNorm2d(4, rngs=rngs())(jnp.ones((1, 4, 5, 6))),
            ValueError,
            r"^BatchNorm2d: x has 6 channels, expected 4 = num_features; .* would fit with data_format='NCHW'$",
        ),
        (
            lambda: GroupNorm(2, 4, rngs=rngs())(jnp.ones((1, 4, 5, 6))),
            ValueError,
            r"^GroupNorm: x has 6 channels, expected 4 = num_channels; .* would fit with data_format='NCHW'$",
        ),
        (
            lambda: LayerNorm(4, rngs=rngs())(jnp.ones((1, 5))),
            ValueError,
            r"^LayerNorm: x has shape \(1, 5\), expected 4 = normalized_shape last$",
        ),
        (lambda: BatchNorm2d(4, affine=None, rngs=rngs()), TypeError, "BatchNorm2d: affine must be a bool"),
        (lambda: LayerNorm(4, bias=None, rngs=rngs()), TypeError, "LayerNorm: bias must be a bool"),
        (lambda: GroupNorm(2, 4, affine=1, rngs=rngs()), TypeError, "GroupNorm: affine must be a bool"),
        (
            lambda: BatchNorm2d(4, rngs=rngs())(jnp.ones((1, 1, 1, 4))),
            ValueError,
            "BatchNorm2d: in training x must have more than one pixel",
        ),
        (
            lambda: Conv2d(4, 2, 5, rngs=rngs())(jnp.ones((1, 3, 6, 4))),
            ValueError,
            "Conv2d: the output would have no pixels, its size would be 0 x 2 for an input of 3 x 6",
        ),
        (
            lambda: ConvTranspose2d(4, 2, 1, padding=3, rngs=rngs())(jnp.ones((1, 3, 9, 4))),
            ValueError,
            "ConvTranspose2d: the output would have no pixels, its size would be -3 x 3 for an input of 3 x 9",
        ),
        (lambda: max_pool2d(jnp.ones((1, 3, 3, 4)), 5), ValueError, "max_pool2d: the output would have no pixels"),
        (
            lambda: Conv2d(4, 2, 3, padding=3, padding_mode="reflect", rngs=rngs())(jnp.ones((1, 3, 9, 4))),
            ValueError,
            r"Conv2d: padding \(\(3, 3\), \(3, 3\)\) is too large for padding_mode 'reflect' and an image of 3 x 9",
        ),
        (
            lambda: Conv2d(4, 2, 7, padding=1, padding_mode="reflect", rngs=rngs())(jnp.ones((1, 3, 9, 4))),
            ValueError,
            "Conv2d: the output would have no pixels, its size would be 0 x 5 for an input of 3 x 9",
        ),
        (
            lambda: Conv2d(4, 2, 3, padding=2, rngs=rngs())(jnp.ones((1, 0, 3, 4))),
            ValueError,
            "Conv2d: x has no pixels, its spatial size is 0 x 3",
        ),
        (lambda: interpolate(jnp.ones((1, 0, 3, 4)), 5), ValueError, "interpolate: x has no pixels"),
        (
            lambda: BatchNorm2d(4, affine=False, rngs=rngs())(jnp.ones((1, 2, 2, 4), jnp.int32)),
            TypeError,
            "BatchNorm2d: x has dtype int32, expected one of float32",
        ),
        (lambda: Conv2d(4, 2, 3, deformable_groups=2, rngs=rngs()), TypeError, "unexpected keyword argument"),
        (lambda: Conv2d(4, 2, 3, padding_mode=[1], rngs=rngs()), ValueError, "padding_mode must be one of"),
        (lambda: Conv2d(4, 2, 3, rngs=rngs())(None), TypeError, "Conv2d: x must be an array, got NoneType"),
        (lambda: max_pool2d([1.0], 2), TypeError, "max_pool2d: x must be an array, got list"),
        (lambda: interpolate(jnp.ones((1, 2, 2, 1)), scale_factor=True), ValueError, "scale_factor must be a positive"),
        (lambda: interpolate(jnp.ones((1, 2, 2, 1)), scale_factor=math.inf), ValueError, "scale_factor must be a"),
        (lambda: adaptive_avg_pool2d(jnp.ones((1, 2, 2, 1)), 10**12), ValueError, "output_size must be at most"),
        (lambda: BatchNorm2d(4, momentum=None, rngs=rngs()), TypeError, "BatchNorm2d: momentum must be a number"),
        (lambda: BatchNorm2d(4, epsilon=1, rngs=rngs()), TypeError, "BatchNorm2d: .* epsilon is called eps here"),
        (lambda: GroupNorm(2, num_features=4, rngs=rngs()), TypeError, "num_features is called num_channels here"),
        (lambda: LayerNorm(4, use_scale=False, rngs=rngs()), TypeError, "use_scale is called elementwise_affine here"),
        (lambda: Linear(4, 2, use_bias=False, rngs=rngs()), TypeError, "Linear: .* use_bias is called bias here"),
        (lambda: ConvModule(4, 2, 3, act_cfg="ReLU", rngs=rngs()), TypeError, "act_cfg must be a dict, got 'ReLU'"),
        (lambda: ConvModule(4, 2, 3, conv_cfg={}, rngs=rngs()), ValueError, "conv_cfg's type must be one of .* None"),
        (lambda: ConvModule(4, 2, 3, norm_cfg=dict(type="LN"), rngs=rngs()), ValueError, "norm_cfg must be that of"),
        (
            lambda: ConvModule(4, 2, 3, conv_cfg=dict(type="DCN"), padding_mode="reflect", rngs=rngs()),
            ValueError,
            "ConvModule: only Conv2d has a padding_mode",
        ),
        (
            lambda: ConvModule(4, 2, 3, norm_cfg=dict(type="GN", num_groups=1), rngs=rngs())(jnp.ones((5, 5, 4))),
            ValueError,
            "ConvModule: x has 3 dimensions, expected 4",
        ),
        (
            lambda: GroupNorm(4, 6, rngs=rngs()),
            ValueError,
            r"num_channels \(6\) must be a multiple",
        ),
        (lambda: LayerNorm((3, 4), rngs=rngs()), ValueError, "normalized_shape must have one axis"),
        (lambda: BatchNorm2d(4, data_format="CHW", rngs=rngs()), ValueError, "data_format must be one of"),
        (lambda: ConvModule(4, 2, 3, order=("conv", "act"), rngs=rngs()), ValueError, "order must hold"),
        (
            lambda: build_conv_layer(dict(type="CARAFE"), 4, 2, 3, rngs=rngs()),
            ValueError,
            "conv_cfg's type must be",
        ),
        (lambda: build_norm_layer(dict(type="GN"), 4, rngs=rngs()), ValueError, "norm_cfg must have num_groups for GN"),
        (lambda: build_norm_layer("BN", 4, rngs=rngs()), TypeError, "norm_cfg must be a dict, got 'BN'"),
        (
            lambda: build_activation_layer(dict(type="PReLU")),
            ValueError,
            "act_cfg's type must be .* got 'PReLU'",
        ),
        (lambda: build_activation_layer(dict(type="ReLU", slope=1)), ValueError, r"unknown entries \['slope'\]"),
        (lambda: Sequential(nnx.relu, 3), TypeError, "Sequential: entry 1 must be callable, got int"),
        (
            lambda: interpolate(jnp.ones((1, 2, 2, 1)), 3, mode="area"),
            ValueError,
            "mode must be 'nearest' or",
        ),
        (lambda: interpolate(jnp.ones((1, 2, 2, 1))), ValueError, "give either size or scale_factor"),
        (lambda: interpolate(jnp.ones((1, 2, 2, 1)), 3, align_corners=True), ValueError, "align_corners belongs to"),
        (lambda: interpolate(jnp.ones((1, 2, 2, 1)), scale_factor=0.1), ValueError, "the size must be at least 1"),
        (lambda: interpolate(jnp.ones((2, 1)), 3), ValueError, "interpolate: x has 2 dimensions, expected 3 or more"),
        (lambda: max_pool2d(jnp.ones((1, 4, 4, 1)), 2, padding=2), ValueError, "padding .* must be at most half"),
        (lambda: adaptive_avg_pool2d(jnp.ones((1, 4, 4, 1)), 0), ValueError, "output_size must be at least 1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
