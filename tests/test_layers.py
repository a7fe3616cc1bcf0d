"""The Flax layers: parameters, initial values, results, transformations and errors, the same for linen and nnx."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.nn import initializers
from support.formats import DATA_FORMATS, to_nchw, to_nhwc
from support.processes import run_python

import jax_dcn

LAYERS = ("DeformConv2d", "ModulatedDeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2dPack")
PACKS = LAYERS[2:]

# No two arguments alike, and a partition of the channels for each kind of group.
KERNEL, STRIDE, PADDING, DILATION, GROUPS, DEFORM_GROUPS = (3, 2), (2, 1), (1, 2), (2, 1), 2, 3
C_IN, C_OUT = 6, 4
IMAGE, OUT = (9, 8), (4, 11)
OPTIONS = dict(
    in_channels=C_IN,
    out_channels=C_OUT,
    kernel_size=KERNEL,
    stride=STRIDE,
    padding=PADDING,
    dilation=DILATION,
    groups=GROUPS,
    deform_groups=DEFORM_GROUPS,
    bias=True,
    precision="highest",  # else a GPU would round the plain convolutions to TF32
)
MASK_CHANNELS = DEFORM_GROUPS * math.prod(KERNEL)


# --- one interface to both APIs: the parameters as a dict, and a function of them and the inputs ---


def linen_layer(name, inputs, **options):
    layer = getattr(jax_dcn.linen, name)(**options)
    params = layer.init(jax.random.key(0), *inputs)["params"]
    return params, lambda params, *inputs: layer.apply({"params": params}, *inputs)


def nnx_layer(name, inputs, **options):
    graph, state = nnx.split(getattr(jax_dcn.nnx, name)(**options, rngs=nnx.Rngs(0)))

    def apply(params, *inputs):
        given = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(given, params)
        return nnx.merge(graph, given)(*inputs)

    return nnx.to_pure_dict(state), apply


APIS = {"linen": linen_layer, "nnx": nnx_layer}


@pytest.fixture(params=APIS)
def api(request):
    return request.param


def construct(api, name, *arguments, **options):
    rngs = {"rngs": nnx.Rngs(0)} if api == "nnx" else {}
    return getattr(getattr(jax_dcn, api), name)(*arguments, **options, **rngs)


# --- random data, and what the layers should give ---


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), jnp.float32)


def inputs_of(name, data_format="NCHW", batch=2, c_in=C_IN, mask_channels=MASK_CHANNELS, image=IMAGE, out=OUT):
    """x, and for the layers that take them an offset and a mask."""
    inputs = [normal(batch, c_in, *image, seed=1)]
    if name not in PACKS:
        inputs.append(normal(batch, mask_channels * 2, *out, seed=2, scale=2))
        if name == "ModulatedDeformConv2d":
            inputs.append(normal(batch, mask_channels, *out, seed=3))
    return inputs if data_format == "NCHW" else [to_nhwc(a) for a in inputs]


def random_params(params):
    """Parameters of the same shapes, none of them zero."""
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([normal(*leaf.shape, seed=10 + i, scale=0.3) for i, leaf in enumerate(leaves)])


def plain_convolution(x, kernel, bias, groups):
    """The NCHW convolution with an HWIO kernel."""
    y = lax.conv_general_dilated(
        x,
        kernel,
        STRIDE,
        [(p, p) for p in PADDING],
        rhs_dilation=DILATION,
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
        feature_group_count=groups,
        precision="highest",
    )
    return y + bias[None, :, None, None]


def expected(name, params, inputs):
    """What an NCHW layer with a bias should give, by the functions."""
    x, *samples = inputs
    if name in PACKS:
        samples = [plain_convolution(x, params["conv_offset"]["kernel"], params["conv_offset"]["bias"], 1)]
    if name == "ModulatedDeformConv2dPack":
        first, second, third = jnp.split(samples[0], 3, axis=1)
        samples = [jnp.concatenate([first, second], axis=1), jax.nn.sigmoid(third)]
    function = jax_dcn.modulated_deform_conv2d if name.startswith("Modulated") else jax_dcn.deform_conv2d
    return function(
        x,
        *samples,
        to_nchw(params["kernel"], "weight"),
        bias=params["bias"],
        stride=STRIDE,
        padding=PADDING,
        dilation=DILATION,
        groups=GROUPS,
        deform_groups=DEFORM_GROUPS,
        precision="highest",
    )


def assert_close(actual, desired, tolerance=1e-5):
    assert actual.shape == desired.shape
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(desired, np.float64), rtol=tolerance, atol=tolerance
    )


# --- parameters and initial values ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_parameters(api, name, data_format, bias):
    options = dict(OPTIONS, bias=bias, data_format=data_format)
    params, _ = APIS[api](name, inputs_of(name, data_format), **options)
    shapes = {"kernel": (*KERNEL, C_IN // GROUPS, C_OUT)}
    if bias:
        shapes["bias"] = (C_OUT,)
    if name in PACKS:
        channels = MASK_CHANNELS * (3 if name.startswith("Modulated") else 2)
        shapes["conv_offset"] = {"kernel": (*KERNEL, C_IN, channels), "bias": (channels,)}
    assert jax.tree.map(jnp.shape, params) == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", LAYERS)
def test_bias_by_default(api, name):
    inputs = inputs_of(name, c_in=1, mask_channels=1, image=(2, 2), out=(2, 2))
    params, _ = APIS[api](name, inputs, in_channels=1, out_channels=1, kernel_size=1)
    assert ("bias" in params) == name.startswith("Modulated")


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_initial_values(api, name, groups):
    c_in, c_out, taps = 16, 64, 3 * 2
    inputs = inputs_of(name, c_in=c_in, mask_channels=taps, image=(3, 2), out=(1, 1))
    options = dict(in_channels=c_in, out_channels=c_out, kernel_size=(3, 2), groups=groups, bias=True)
    params, _ = APIS[api](name, inputs, **options)
    bound = 1 / math.sqrt(c_in * taps) if name.startswith("Modulated") else math.sqrt(6 / (c_in / groups * taps))
    kernel = np.asarray(params["kernel"]) / bound
    assert np.abs(kernel).max() <= 1
    # Uniform: at least 1536 values, so both ends are nearly reached, and the variance is 1/3.
    assert kernel.max() > 0.99
    assert kernel.min() < -0.99
    assert kernel.var() == pytest.approx(1 / 3, rel=0.1)
    assert not any(leaf.any() for leaf in jax.tree.leaves([params["bias"], params.get("conv_offset")]))


@pytest.mark.parametrize("name", LAYERS)
def test_initialisers_reach_only_the_layers_own_parameters(api, name):
    inits = dict(kernel_init=initializers.constant(2.0), bias_init=initializers.constant(3.0))
    params, _ = APIS[api](name, inputs_of(name), **OPTIONS, **inits)
    assert (params["kernel"] == 2).all()
    assert (params["bias"] == 3).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves(params.get("conv_offset")))


# --- results ---


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_result(api, name, data_format):
    inputs = inputs_of(name, data_format)
    params, apply = APIS[api](name, inputs, **OPTIONS, data_format=data_format)
    params = random_params(params)
    y = apply(params, *inputs)
    desired = expected(name, params, inputs_of(name))
    assert_close(y, desired if data_format == "NCHW" else to_nhwc(desired))


@pytest.mark.parametrize("name", LAYERS)
def test_linen_and_nnx_agree(name):
    inputs = inputs_of(name)
    params, linen_apply = linen_layer(name, inputs, **OPTIONS)
    params = random_params(params)
    _, nnx_apply = nnx_layer(name, inputs, **OPTIONS)
    assert_close(linen_apply(params, *inputs), nnx_apply(params, *inputs), 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_without_bias(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **dict(OPTIONS, bias=False))
    params = random_params(params)
    assert_close(apply(params, *inputs), expected(name, {**params, "bias": jnp.zeros(C_OUT, jnp.float32)}, inputs))


@pytest.mark.parametrize("name", PACKS)
def test_new_pack_is_a_plain_convolution(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS)
    factor = 0.5 if name.startswith("Modulated") else 1.0  # sigmoid(0)
    plain = plain_convolution(*inputs, params["kernel"] * factor, params["bias"], GROUPS)
    assert_close(apply(params, *inputs), plain)


@pytest.mark.parametrize("padding", [((0, 2), (1, 0)), "SAME", "same_lower", "VALID"], ids=str)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("name", PACKS)
def test_padding_of_a_pack(api, name, data_format, padding):
    """Of the layer and of its conv_offset."""
    (x,) = inputs_of(name, data_format)
    options = dict(OPTIONS, padding=padding, dilation=1, data_format=data_format)
    params, apply = APIS[api](name, [x], **options)
    plain = lax.conv_general_dilated(
        x,
        params["kernel"] * (0.5 if name.startswith("Modulated") else 1.0),
        STRIDE,
        padding,
        dimension_numbers=(data_format, "HWIO", data_format),
        feature_group_count=GROUPS,
        precision="highest",
    )
    assert_close(apply(params, x), plain)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_leading_axes(api, name, data_format, leading):
    """As with Flax's Conv, any number of axes stand for the batch."""
    inputs = inputs_of(name, data_format, batch=math.prod(leading))
    params, apply = APIS[api](name, inputs, **OPTIONS, data_format=data_format)
    params = random_params(params)
    y = apply(params, *(a.reshape(*leading, *a.shape[1:]) for a in inputs))
    assert y.shape[:-3] == leading
    assert_close(y.reshape(-1, *y.shape[-3:]), apply(params, *inputs), 0)


@pytest.mark.parametrize("name", PACKS)
def test_input_smaller_than_the_kernel(api, name):
    x = normal(2, 3, 2, 1)
    options = dict(in_channels=3, out_channels=5, kernel_size=3, padding=1, precision="highest")
    params, apply = APIS[api](name, [x], **options)
    kernel = random_params(params)["kernel"]
    y = apply({**params, "kernel": kernel}, x)
    plain = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW"), precision="highest"
    )
    assert_close(y, plain * (0.5 if name.startswith("Modulated") else 1.0))


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(api, name):
    params, apply = APIS[api](name, inputs_of(name), **OPTIONS)
    assert apply(params, *inputs_of(name, batch=0)).shape == (0, C_OUT, *OUT)


@pytest.mark.parametrize("name", ["DeformConv2d", "DeformConv2dPack"])
def test_im2col_step_changes_nothing(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS)
    _, apply_with_step = APIS[api](name, inputs, **OPTIONS, im2col_step=3)
    np.testing.assert_array_equal(apply(params, *inputs), apply_with_step(params, *inputs))


# --- dtypes ---


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_with_float32_parameters(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    # conv_offset rounds the offsets too, so they are to be small.
    params = jax.tree.map(lambda leaf: leaf / 8, random_params(params))
    y = apply(params, *inputs)
    assert y.dtype == jnp.bfloat16
    assert_close(y, expected(name, params, inputs), 0.03)


@pytest.mark.parametrize("name", ["DeformConv2d", "ModulatedDeformConv2d"])
def test_offset_and_mask_keep_a_wider_dtype(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS, dtype=jnp.bfloat16)
    params = random_params(params)
    y = apply(params, *inputs)

    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    x, *samples = inputs
    x = x.astype(jnp.bfloat16)
    assert_close(y, expected(name, rounded, [x, *samples]), 0)
    assert (y != expected(name, rounded, [x, *(a.astype(jnp.bfloat16) for a in samples)])).any()


@pytest.mark.parametrize("name", LAYERS)
def test_param_dtype_and_promotion(api, name):
    inputs = inputs_of(name)
    with jax.numpy_dtype_promotion("standard"):
        params, apply = APIS[api](name, inputs, **OPTIONS, param_dtype=jnp.bfloat16)
        y = apply(params, *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert y.dtype == jnp.float32
    assert_close(y, expected(name, jax.tree.map(lambda a: a.astype(jnp.float32), params), inputs))


# --- transformations ---


@pytest.mark.parametrize("name", PACKS)
def test_gradient_reaches_a_new_conv_offset(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS)
    grads = jax.jit(jax.grad(lambda params: (apply(params, *inputs) ** 2).sum()))(params)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    for grad in jax.tree.leaves(grads):
        assert jnp.isfinite(grad).all()
        # In every output channel: of conv_offset, the dy, the dx and the mask of every tap.
        assert (jnp.abs(grad).reshape(-1, grad.shape[-1]).max(0) > 0).all()


@pytest.mark.parametrize("name", PACKS)
def test_gradients(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS)
    params = random_params(params)
    grad_y = normal(2, C_OUT, *OUT, seed=4)

    def gradients(function):
        return jax.jit(jax.grad(lambda params, inputs: (function(params, inputs) * grad_y).sum(), (0, 1)))(
            params, inputs
        )

    actual = gradients(lambda params, inputs: apply(params, *inputs))
    desired = gradients(lambda params, inputs: expected(name, params, inputs))
    jax.tree.map(lambda a, d: assert_close(a, d, 1e-4), actual, desired)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode(api, name):
    """The derivative along a direction is the gradient times it, which without forward_mode is all there is."""
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS, forward_mode=True)
    _, without = APIS[api](name, inputs, **OPTIONS)
    at = random_params(params), *inputs
    along = jax.tree.map(lambda a: normal(*a.shape, seed=a.ndim), at)
    grad_y = normal(2, C_OUT, *OUT, seed=4)

    _, derivative = jax.jit(lambda at, along: jax.jvp(apply, at, along))(at, along)
    gradients = jax.jit(jax.grad(lambda at: (without(*at) * grad_y).sum()))(at)
    products = jax.tree.map(jnp.vdot, gradients, along)
    np.testing.assert_allclose(jnp.vdot(derivative, grad_y), sum(jax.tree.leaves(products)), rtol=1e-4)
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        jax.jvp(without, at, along)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_of_an_nnx_layer_is_set_later(name):
    inputs = inputs_of(name)
    layer = construct("nnx", name, **OPTIONS)
    layer.forward_mode = True
    y, derivative = jax.jvp(lambda *inputs: layer(*inputs), inputs, inputs)
    assert derivative.shape == y.shape


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("name", PACKS)
def test_export_for_any_size(api, name, data_format):
    """With the gradients of all parameters, for every platform."""
    options = dict(OPTIONS, stride=1, padding="SAME", data_format=data_format)
    (x,) = inputs_of(name, data_format)
    params, apply = APIS[api](name, [x], **options)
    params = random_params(params)

    n, h, w = jax.export.symbolic_shape("n, h, w")
    symbolic = (n, C_IN, h, w) if data_format == "NCHW" else (n, h, w, C_IN)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    exported = jax.export.export(
        jax.jit(apply),
        platforms=("cpu", "cuda", "tpu", "rocm"),
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(target)
            for target in ("jax_dcn_deform_conv2d", "jax_dcn_deform_conv2d_backward")
        ],
    )(shapes, jax.ShapeDtypeStruct(symbolic, jnp.float32))
    exported = jax.export.deserialize(exported.serialize(vjp_order=1))
    for batch, *size in (1, 1, 1), (2, 3, 8), (3, 11, 4):
        (x,) = inputs_of(name, data_format, batch=batch, image=size)
        (y, vjp), (desired, desired_vjp) = (jax.vjp(f, params, x) for f in (exported.call, apply))
        assert_close(y, desired)
        jax.tree.map(lambda a, d: assert_close(a, d, 1e-4), vjp(y), desired_vjp(y))


@pytest.mark.parametrize("name", LAYERS)
def test_jit_and_vmap(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS)
    params = random_params(params)
    y = apply(params, *inputs)
    assert_close(jax.jit(apply)(params, *inputs), y)

    models = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), params)
    ys = jax.jit(jax.vmap(apply, (0, *(None for _ in inputs))))(models, *inputs)
    assert_close(ys[0], y)
    assert_close(ys[1], apply(jax.tree.map(lambda leaf: leaf / 2, params), *inputs))

    batches = [a[:, None] for a in inputs]
    ys = jax.jit(jax.vmap(apply, (None, *(0 for _ in inputs))))(params, *batches)
    assert_close(ys[:, 0], y)


@pytest.mark.parametrize("name", LAYERS)
def test_nnx_transformations_of_the_module(name):
    inputs = inputs_of(name)
    layer = construct("nnx", name, **dict(OPTIONS, kernel_size=list(KERNEL), bias=False))
    assert layer.bias is None
    y = layer(*inputs)
    assert_close(nnx.jit(lambda layer, *inputs: layer(*inputs))(layer, *inputs), y)
    grads = nnx.jit(nnx.grad(lambda layer: layer(*inputs).sum()))(layer)
    assert (grads["kernel"][...] != 0).any()
    assert_close(nnx.clone(layer)(*inputs), y)


# --- errors ---


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(groups=4), r"in_channels \(6\) must be a multiple of groups \(4\)"),
        (dict(out_channels=5), r"out_channels \(5\) must be a multiple of groups \(2\)"),
        (dict(deform_groups=4), r"in_channels \(6\) must be a multiple of deform_groups \(4\)"),
        (dict(in_channels=0), r"in_channels must be at least 1, got 0"),
        (dict(groups=0), r"groups must be at least 1, got 0"),
        (dict(kernel_size=(3, 0)), r"kernel_size must be at least 1, got \(3, 0\)"),
        (dict(kernel_size=(3, 3, 3)), r"kernel_size must be an integer or a pair \(height, width\), got \(3, 3, 3\)"),
        (dict(stride=0), r"stride must be at least 1, got 0"),
        (dict(padding=-1), r"padding must be at least 0, got -1"),
        (dict(padding="CAUSAL"), r"padding must be an integer, .* or 'VALID', got 'CAUSAL'"),
        (dict(dilation=(1, 0)), r"dilation must be at least 1, got \(1, 0\)"),
        (dict(data_format="CHWN"), r"data_format must be one of \('NCHW', 'NHWC'\), got 'CHWN'"),
    ],
)
def test_wrong_arguments(api, name, options, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        construct(api, name, **dict(OPTIONS, **options))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("argument", ["bias", "forward_mode"])
@pytest.mark.parametrize("value", ["no", None, 1])
def test_no_bool(api, name, argument, value):
    with pytest.raises(TypeError, match=f"^{name}: {argument} must be a bool, got {value!r}"):
        construct(api, name, **dict(OPTIONS, **{argument: value}))


@pytest.mark.parametrize("name", LAYERS)
def test_argument_of_the_wrong_type(api, name):
    with pytest.raises(TypeError, match=f"^{name}: stride must be an integer, got 1.5"):
        construct(api, name, **dict(OPTIONS, stride=1.5))


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_input(api, name, data_format):
    inputs = inputs_of(name, data_format)
    params, apply = APIS[api](name, inputs, **OPTIONS, data_format=data_format)
    x, *samples = inputs
    more_channels = jnp.concatenate([x, x], data_format.index("C"))
    with pytest.raises(ValueError, match=f"^{name}: x has 12 channels, expected 6 = in_channels"):
        apply(params, more_channels, *samples)
    with pytest.raises(ValueError, match=f"^{name}: x has 2 dimensions, expected 3 or more"):
        apply(params, x[0, 0], *samples)
    with pytest.raises(ValueError, match=f"^{name}: the output would have no pixels"):
        apply(params, *inputs_of(name, data_format, image=(2, 8)))
    (other,) = set(DATA_FORMATS) - {data_format}
    with pytest.raises(ValueError, match=rf"^{name}: x has . channels, .* would fit with data_format='{other}'"):
        apply(params, jnp.moveaxis(x, data_format.index("C"), other.index("C")), *samples)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("strides", "stride"),
        ("use_bias", "bias"),
        ("features", "out_channels"),
        ("in_features", "in_channels"),
        ("kernel_dilation", "dilation"),
        ("deformable_groups", "deform_groups"),
    ],
)
def test_names_that_others_have_for_an_argument(api, name, given, ours):
    with pytest.raises(TypeError, match=f"^{name}: the argument {given} is called {ours} here, as in torch and mmcv$"):
        construct(api, name, **OPTIONS, **{given: 2})


def test_a_derived_class_may_have_others_names():
    """As adapters of older code do."""

    class Old(jax_dcn.nnx.ModulatedDeformConv2dPack):
        def __init__(self, features, deformable_groups=1, *, rngs):
            super().__init__(features, features, 3, deform_groups=deformable_groups, rngs=rngs)

    assert Old(features=4, deformable_groups=2, rngs=nnx.Rngs(0)).deform_groups == 2

    class Flaxs(jax_dcn.DeformConv2dPack):
        features: int = 3

    assert Flaxs(4, 4, 3, features=5).features == 5
    with pytest.raises(TypeError, match=r"^Flaxs: the argument strides is called stride here"):
        Flaxs(4, 4, 3, strides=2)


def test_linens_errors_name_the_path():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            return jax_dcn.ModulatedDeformConv2dPack(4, 4, 3, name="conv2")(x)

    class Model(linen.Module):
        def setup(self):
            self.blocks = [Block()]

        def __call__(self, x):
            return self.blocks[0](x)

    for x, message in (((1, 5, 6, 4), "x has 5 channels"), ((1, 4, 2, 2), "the output would have no pixels")):
        with pytest.raises(ValueError, match=f"^ModulatedDeformConv2dPack blocks_0/conv2: {message}"):
            Model().init(jax.random.key(0), jnp.ones(x))


@pytest.mark.parametrize("name", LAYERS)
def test_missing_x(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS)
    with pytest.raises(TypeError, match=f"^{name}: x must be an array, got None"):
        apply(params, None, *inputs[1:])


def test_missing_mask(api):
    inputs = inputs_of("ModulatedDeformConv2d")
    params, apply = APIS[api]("ModulatedDeformConv2d", inputs, **OPTIONS)
    with pytest.raises(TypeError, match=r"^ModulatedDeformConv2d: mask must be an array, got None"):
        apply(params, *inputs[:2], None)


@pytest.mark.parametrize("name", ["DeformConv2d", "ModulatedDeformConv2d"])
def test_batch_axes_that_differ(api, name):
    inputs = inputs_of(name)
    params, apply = APIS[api](name, inputs, **OPTIONS)
    x, *others, last = inputs
    argument = "mask" if others else "offset"
    with pytest.raises(ValueError, match=f"^{name}: {argument} has 3 dimensions, expected x's, 4, in shape"):
        apply(params, x, *others, last[0])
    with pytest.raises(ValueError, match=rf"^{name}: {argument} has batch axes \(2, 1\), expected x's, \(1, 2\)"):
        apply(params, *(a[None] for a in (x, *others)), last[:, None])


# --- names ---


@pytest.mark.parametrize("name", LAYERS)
def test_positional_arguments_are_mmcvs(api, name):
    arguments = (6, 4, 3, 2, 1, 2, 2, 3, True)
    if not name.startswith("Modulated"):
        arguments = (*arguments, 64)
        assert construct(api, name, *arguments).im2col_step == 64
    layer = construct(api, name, *arguments)
    actual = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.deform_groups)
    assert actual == ((3, 3), (2, 2), (1, 1), (2, 2), 2, 3)
    assert (layer.in_channels, layer.out_channels) == (6, 4)


@pytest.mark.parametrize("name", LAYERS)
def test_linen_layers_are_the_packages(name):
    assert getattr(jax_dcn, name) is getattr(jax_dcn.linen, name)
    assert {name, "linen", "nnx"} <= set(dir(jax_dcn))


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'jax_dcn' has no attribute 'DeformConv3d'"):
        jax_dcn.DeformConv3d  # noqa: B018


def test_flax_is_imported_only_when_used():
    run_python("""
import sys
import jax_dcn
assert "flax" not in sys.modules
jax_dcn.DeformConv2d
assert "flax" in sys.modules
""")


def test_without_flax():
    run_python("""
import importlib
import sys
sys.modules["flax"] = None
import jax.numpy as jnp
import jax_dcn
y = jax_dcn.deform_conv2d(jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3)), jnp.ones((4, 2, 1, 1)))
assert y.shape == (1, 4, 3, 3)
for name in ("linen", "nnx", "DeformConv2d", "ModulatedDeformConv2dPack"):
    try:
        getattr(jax_dcn, name)
    except ImportError as error:
        assert "pip install jax_dcn[flax]" in str(error), error
    else:
        raise AssertionError(name)
try:
    importlib.import_module("jax_dcn.nnx")
except ImportError as error:
    assert "pip install jax_dcn[flax]" in str(error), error
else:
    raise AssertionError("jax_dcn.nnx")
""")
