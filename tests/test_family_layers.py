"""The layers of DCNv3, DCNv4 and the attention, for linen and nnx, and InternImage."""

import json
import pathlib
import pickle
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support.tolerances import assert_close, assert_same_arrays

import jax_dcn
from jax_dcn import mmcv
from jax_dcn.models import InternImage

DATA = pathlib.Path(__file__).parent / "data"
H = dict(
    dw_kernel_size=5,
    res_post_norm=True,
    level2_post_norm=True,
    level2_post_norm_block_ids=(0, 1),
    center_feature_scale=True,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def golden(name):
    """The arrays of a layer's file, its arguments, and its state dict."""
    with np.load(DATA / "family_layers.npz") as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    state = {key.removeprefix("state:"): arrays.pop(key) for key in list(arrays) if key.startswith("state:")}
    return arrays, json.loads(str(arrays.pop("cfg"))), state


@pytest.fixture(params=["linen", "nnx"])
def api(request):
    return request.param


def layer(api, name, state_dict, inputs, keywords, **options):
    """A function of the inputs, by a layer of that state dict, or of random parameters that move offsets."""
    if api == "linen":
        module = getattr(jax_dcn, name)(**options)
        variables = module.init(jax.random.key(0), *inputs, **keywords)
        variables = mmcv.load_into(variables, state_dict)
        return lambda *inputs: module.apply(variables, *inputs, **keywords)
    module = getattr(jax_dcn.nnx, name)(**options, rngs=nnx.Rngs(0))
    mmcv.load_into(module, state_dict)
    module.eval()
    return lambda *inputs: module(*inputs, **keywords)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max() / np.abs(expected).max()


# --- numbers of the originals ---


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_attention_gives_mmcvs_numbers(api, implementation, batch_first):
    arrays, cfg, state = golden("msda")
    query, value, pos = (
        arrays[key] if batch_first else arrays[key].swapaxes(0, 1) for key in ("query", "value", "query_pos")
    )
    keywords = dict(
        value=value,
        query_pos=pos,
        key_padding_mask=arrays["key_padding_mask"],
        reference_points=arrays["reference_points"],
        spatial_shapes=arrays["spatial_shapes"],
    )
    cfg = {**cfg, "batch_first": batch_first}
    y = layer(api, "MultiScaleDeformableAttention", state, (query,), keywords, **cfg)(query)
    y = y if batch_first else y.swapaxes(0, 1)
    assert relative_error(y, arrays["y"]) < 1e-5


def test_dcnv4_gives_the_originals_numbers(api, implementation):
    arrays, cfg, state = golden("dcnv4")
    y = layer(api, "DCNv4", state, (arrays["x"],), {}, **cfg)(arrays["x"])
    assert relative_error(y, arrays["y"]) < 1e-5


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
def test_internimage_gives_the_originals_numbers(implementation, data_format):
    config = dict(channels=16, depths=[1, 2, 2, 1], groups=[2, 4, 8, 16], num_classes=7, layer_scale=1.0)
    model = InternImage(**config, data_format=data_format, rngs=nnx.Rngs(0))
    mmcv.load_into(model, DATA / "internimage_narrow.safetensors")
    model.eval()
    with np.load(DATA / "internimage_narrow.npz") as file:
        golden = dict(file)
    axis = data_format.index("C")
    x = np.moveaxis(golden["x"], 1, axis)
    logits, maps = nnx.jit(lambda model, x: (model(x), model.feature_maps(x)))(model, x)
    errors = [relative_error(logits, golden["logits"])]
    errors += [relative_error(jnp.moveaxis(y, axis, 1), golden[f"y{i}"]) for i, y in enumerate(maps)]
    print(f"largest relative error {max(errors):.1e}")
    assert max(errors) < 1e-5


# --- torch's form of each, with all options ---


def random_state(torch_module, seed=0):
    """Of about 1, so that offsets of a pixel or so are predicted."""
    rng = np.random.default_rng(seed)
    state = {}
    for key, value in torch_module.state_dict().items():
        fan_in = np.prod(value.shape[1:]) if value.ndim > 1 else 4
        state[key] = (rng.standard_normal(tuple(value.shape)) / np.sqrt(fan_in)).astype(np.float32)
        if key.endswith("running_var"):
            state[key] = np.abs(state[key]) + 1
        elif value.ndim == 1 and key.endswith("weight"):
            state[key] += 1
        elif key.endswith("num_batches_tracked"):
            state[key] = np.asarray(3)
    return state


LAYERS = {
    "DCNv3": dict(channels=12, group=3),
    "DCNv3 all": dict(
        channels=12, kernel_size=5, dw_kernel_size=3, pad=4, dilation=2, group=2, offset_scale=0.7, remove_center=True
    ),
    "DCNv3 stride": dict(channels=6, group=6, stride=2),
    "DCNv3 center": dict(channels=6, group=2, center_feature_scale=True, dw_kernel_size=5),
    "DCNv4": dict(channels=12, group=3),
    "DCNv4 all": dict(
        channels=12, kernel_size=5, pad=2, group=2, offset_scale=1.5, dw_kernel_size=3, output_bias=False
    ),
    "DCNv4 stride": dict(channels=6, group=1, stride=2, remove_center=True),
    "DCNv4 center": dict(channels=6, group=2, center_feature_scale=True, without_pointwise=True),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_layers_are_torchs_with_their_gradients(api, case):
    torch = pytest.importorskip("torch", reason="no torch")
    from support import torch_family

    name, options = case.split()[0], LAYERS[case]
    original = getattr(torch_family, name)(**options)
    state = random_state(original)
    original.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    x = normal(2, 9, 8, options["channels"])
    y, vjp = jax.vjp(layer(api, name, state, (x,), {}, **options), x)
    there = torch.from_numpy(x).requires_grad_()
    expected = original(there)
    cotangent = normal(*y.shape, seed=1)
    expected.backward(torch.from_numpy(cotangent))
    assert relative_error(y, expected.detach().numpy()) < 1e-5
    assert relative_error(vjp(jnp.asarray(cotangent))[0], there.grad.numpy()) < 3e-5


@pytest.mark.parametrize("points", [2, 4])
def test_the_attention_is_torchs_with_its_gradients(api, points):
    torch = pytest.importorskip("torch", reason="no torch")
    from support import torch_family

    shapes, options = ((5, 7), (3, 2)), dict(embed_dims=12, num_heads=3, num_levels=2, num_points=2)
    original = torch_family.MultiScaleDeformableAttention(**options, value_proj_ratio=0.5)
    state = random_state(original)
    original.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    query, value = normal(2, 9, 12), normal(2, 41, 12, seed=1)
    references = np.random.default_rng(2).uniform(0, 1, (2, 9, 2, points)).astype(np.float32)
    keywords = dict(value=value, reference_points=references, spatial_shapes=shapes)
    options.update(batch_first=True, value_proj_ratio=0.5)
    y, vjp = jax.vjp(layer(api, "MultiScaleDeformableAttention", state, (query,), keywords, **options), query)
    there = torch.from_numpy(query).requires_grad_()
    expected = original(there, torch.from_numpy(value), torch.from_numpy(references), shapes)
    cotangent = normal(*y.shape, seed=3)
    expected.backward(torch.from_numpy(cotangent))
    assert relative_error(y, expected.detach().numpy()) < 1e-5
    assert relative_error(vjp(jnp.asarray(cotangent))[0], there.grad.numpy()) < 3e-5


@pytest.mark.parametrize(
    "options",
    [
        dict(H),
        dict(post_norm=True, layer_scale=0.5, offset_scale=2.0),
        dict(post_norm=True, res_post_norm=True),
        dict(core_op="DCNv4", dw_kernel_size=3, offset_scale=0.5, layer_scale=0.5),
    ],
    ids=["H", "post_norm", "res_post_norm", "flash"],
)
def test_internimage_is_torchs_with_all_options(options):
    torch = pytest.importorskip("torch", reason="no torch")
    from support import torch_family

    original = torch_family.InternImage(**options).eval()
    state = random_state(original)
    original.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    config = dict(channels=16, depths=(1, 1, 2, 1), groups=(2, 4, 8, 16), num_classes=5)
    model = InternImage(**{**config, **options}, rngs=nnx.Rngs(0))
    mmcv.load_into(model, {"model": state})
    model.eval()
    assert_same_arrays(mmcv.to_state_dict(model), {**state, "conv_head.1.0.num_batches_tracked": np.asarray(3)})
    x = normal(2, 3, 40, 50)
    logits, maps = nnx.jit(lambda model, x: (model(x), model.feature_maps(x)))(model, x)
    with torch.no_grad():
        expected, expected_maps = original(torch.from_numpy(x))
    errors = [relative_error(logits, expected.numpy())]
    errors += [relative_error(jnp.moveaxis(y, 1, 3), e.numpy()) for y, e in zip(maps, expected_maps, strict=True)]
    print(f"largest relative error {max(errors):.1e}")
    assert max(errors) < 1e-4


# --- parameters ---


def test_first_values_and_names(api):
    """Offsets and masks are 0 at first; what is missing in linen and nnx alike would show in the torch tests."""
    x = normal(1, 5, 5, 8)
    if api == "nnx":
        state = mmcv.to_state_dict(jax_dcn.nnx.DCNv3(8, group=2, rngs=nnx.Rngs(0)))
    else:
        variables = jax_dcn.linen.DCNv3(8, group=2).init(jax.random.key(0), x)
        names = mmcv.to_state_dict(jax_dcn.nnx.DCNv3(8, group=2, rngs=nnx.Rngs(0)))
        state = mmcv.to_state_dict(variables, names=names)
        assert state.keys() == names.keys()
    for part in ("offset", "mask"):
        assert not state[f"{part}.weight"].any() and not state[f"{part}.bias"].any()
    bound = np.sqrt(6 / 16)
    assert 0.8 * bound < np.abs(state["input_proj.weight"]).max() <= bound
    assert 0 < np.abs(state["dw_conv.0.weight"]).max() <= 1 / 3
    assert state["dw_conv.0.weight"].min() < 0 < state["dw_conv.0.bias"].max() <= 1 / 3


def test_the_attention_looks_in_all_directions_at_first(api):
    options = dict(embed_dims=8, num_heads=4, num_levels=2, num_points=3)
    query, keywords = normal(5, 1, 8), dict(reference_points=normal(1, 5, 2, 2), spatial_shapes=((2, 2), (1, 1)))
    if api == "nnx":
        module = jax_dcn.nnx.MultiScaleDeformableAttention(**options, rngs=nnx.Rngs(0))
        bias = module.sampling_offsets.bias[...]
    else:
        module = jax_dcn.MultiScaleDeformableAttention(**options)
        bias = module.init(jax.random.key(0), query, **keywords)["params"]["sampling_offsets"]["bias"]
    rays = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    expected = [[[[i * x, i * y] for i in (1, 2, 3)]] * 2 for x, y in rays]
    assert_close(bias.reshape(4, 2, 3, 2), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DCNv3", dict(channels=8, group=2, kernel_size=(5, 3), pad="SAME", stride=2, dilation=2)),
        ("DCNv4", dict(channels=8, group=2, kernel_size=1, pad=0)),
        ("MultiScaleDeformableAttention", dict(embed_dims=8, num_heads=2, num_levels=3, batch_first=True)),
        ("MultiScaleDeformableAttention", dict(embed_dims=8, num_heads=2, num_levels=3)),
    ],
)
def test_linen_layers_load_without_inputs(name, options):
    state = random_state_of(name, **options)
    variables = mmcv.load_into(getattr(jax_dcn, name)(**options), state)
    assert_same_arrays(mmcv.to_state_dict(variables, names=state), state)


def test_linen_models_load_with_static_inputs():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, query, reference_points, shapes):
            attention = jax_dcn.MultiScaleDeformableAttention(8, 2, 2, 1, batch_first=True, name="attention")
            return attention(query, reference_points=reference_points, spatial_shapes=shapes)

    state = random_state_of("MultiScaleDeformableAttention", embed_dims=8, num_heads=2, num_levels=2, num_points=1)
    state = {f"attention.{name}": value for name, value in state.items()}
    inputs = (normal(1, 5, 8), normal(1, 5, 2, 2), ((2, 2), (1, 1)))
    variables = mmcv.load_into(Model(), state, inputs=inputs)
    assert_same_arrays(mmcv.to_state_dict(variables, names=state), state)


# --- what Flax's layers do ---


@pytest.mark.parametrize("name", ["DCNv3", "DCNv4"])
def test_any_batch_axes(api, name):
    state = random_state_of(name, channels=8, group=2)
    x = normal(2, 3, 6, 5, 8)
    apply = layer(api, name, state, (x,), {}, channels=8, group=2)
    assert_close(apply(x), np.stack([apply(image) for image in x]))
    assert_close(apply(x)[1, 2], apply(x[1, 2]))


def random_state_of(name, **options):
    """Of a layer's names and shapes."""
    module = getattr(jax_dcn.nnx, name)(**options, rngs=nnx.Rngs(0))
    return {key: normal(*value.shape, seed=i) / 4 for i, (key, value) in enumerate(mmcv.to_state_dict(module).items())}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("DCNv3", dict(center_feature_scale=True)),
        ("DCNv4", {}),
        ("DCNv4", dict(without_pointwise=True, center_feature_scale=True)),
    ],
)
def test_dtypes(api, name, more):
    options = dict(channels=8, group=2, **more)
    state, x = random_state_of(name, **options), normal(2, 6, 5, 8)
    y = layer(api, name, state, (x,), {}, **options, dtype=jnp.bfloat16)(x)
    assert y.dtype == jnp.bfloat16
    exact = layer(api, name, state, (x,), {}, **options)(x)
    assert exact.dtype == layer(api, name, state, (x,), {}, **options)(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert relative_error(y, exact) < 0.1


def test_precision_reaches_every_product():
    module = jax_dcn.nnx.DCNv3(8, group=2, center_feature_scale=True, precision="highest", rngs=nnx.Rngs(0))
    text = str(jax.make_jaxpr(module)(normal(1, 5, 5, 8)))
    assert text.count("dot_general[") == 5 and "precision=None" not in text


def test_layers_copy_and_map():
    module = jax_dcn.nnx.DCNv3(8, group=2, rngs=nnx.Rngs(0))
    x = normal(2, 5, 4, 8)
    for copy in (pickle.loads(pickle.dumps(module)), deepcopy(module), nnx.clone(module)):
        assert_close(copy(x), module(x))
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = nnx.vmap(lambda key: jax_dcn.nnx.DCNv3(8, group=2, rngs=nnx.Rngs(key)))(keys)
    assert nnx.vmap(lambda module, x: module(x), in_axes=(0, None))(ensemble, x).shape == (3, *x.shape)
    assert module(x[:0]).shape == (0, 5, 4, 8)
    attention = jax_dcn.nnx.MultiScaleDeformableAttention(**ATTENTION, dropout=0.0, rngs=nnx.Rngs(params=0))
    assert not jax.tree.leaves(nnx.state(attention, nnx.RngState))
    hash(jax_dcn.MultiScaleDeformableAttention(**ATTENTION, norm_cfg=dict(type="LN"), init_cfg=[{}]))


def test_16_bits_of_the_attention_have_exact_locations(api):
    """On a level of 200 pixels, locations of bfloat16 would be some tenths of a pixel off."""
    shapes = ((1, 200),)
    options = dict(embed_dims=8, num_heads=2, num_levels=1, num_points=1, batch_first=True)
    state = random_state_of("MultiScaleDeformableAttention", **options)
    state["sampling_offsets.weight"][:], state["sampling_offsets.bias"][:] = 0, 0.25
    query, ramp = np.zeros((1, 9, 8), np.float32), np.arange(200, dtype=np.float32)
    value = np.broadcast_to(ramp[None, :, None], (1, 200, 8))
    references = np.stack([np.linspace(0.1, 0.9, 9), np.full(9, 0.5)], -1)[None, :, None].astype(np.float32)
    keywords = dict(value=value, reference_points=references, spatial_shapes=shapes)
    exact, rounded = (
        layer(api, "MultiScaleDeformableAttention", state, (query,), keywords, **options, dtype=dtype)(query)
        for dtype in (None, jnp.bfloat16)
    )
    assert relative_error(rounded, exact) < 0.02


def test_dropout():
    options = dict(embed_dims=8, num_heads=2, num_levels=1, num_points=1, batch_first=True, dropout=0.5)
    query = normal(1, 50, 8)
    keywords = dict(reference_points=np.full((1, 50, 1, 2), 0.5, np.float32), spatial_shapes=((10, 5),))
    module = jax_dcn.nnx.MultiScaleDeformableAttention(**options, rngs=nnx.Rngs(0))
    identity = np.zeros_like(query)
    train = module(query, identity=identity, **keywords)
    module.eval()
    whole = module(query, identity=identity, **keywords)
    dropped = np.asarray(train) == 0
    assert 0.3 < dropped.mean() < 0.7
    assert_close(np.where(dropped, 0, train), np.where(dropped, 0, 2 * whole))
    assert_close(module(query, **keywords) - query, whole)

    module = jax_dcn.MultiScaleDeformableAttention(**options)
    variables = module.init(jax.random.key(0), query, **keywords)
    whole = module.apply(variables, query, identity=identity, **keywords)
    train = module.apply(
        variables, query, identity=identity, deterministic=False, rngs={"dropout": jax.random.key(1)}, **keywords
    )
    assert 0.3 < (np.asarray(train) == 0).mean() < 0.7
    assert np.asarray(whole).all()


SMALL = dict(channels=4, depths=(1, 2), groups=(1, 2), num_classes=3)


def test_internimage_trains():
    """Every parameter has a gradient, by kernels and norms alike, and memory is saved without another number."""
    x = normal(2, 3, 16, 16)

    def gradients(**options):
        model = InternImage(**SMALL, drop_path_rate=0.0, layer_scale=0.5, rngs=nnx.Rngs(0), **options)
        # At first all offsets are 0, whatever predicts them.
        mmcv.load_into(model, {name: value + 0.1 for name, value in mmcv.to_state_dict(model).items()})
        return nnx.to_pure_dict(nnx.jit(nnx.grad(lambda model: (model(x) ** 2).sum()))(model))

    plain = gradients()
    for path, gradient in jax.tree.leaves_with_path(plain):
        assert np.asarray(gradient).any(), path
    jax.tree.map(assert_close, gradients(with_cp=True), plain)


def test_stochastic_depth_drops_whole_images():
    model = InternImage(**SMALL, drop_path_rate=1.0, drop_path_type="uniform", rngs=nnx.Rngs(0))
    x = normal(2, 3, 16, 16)
    dropped = model.levels[0].blocks[0](jnp.asarray(normal(2, 4, 4, 4)))
    assert_close(dropped, normal(2, 4, 4, 4))
    model.eval()
    assert np.abs(model.levels[0].blocks[0](jnp.asarray(normal(2, 4, 4, 4))) - normal(2, 4, 4, 4)).max() > 0.1
    linear = InternImage(**SMALL, drop_path_rate=0.2, rngs=nnx.Rngs(0))
    rates = [layer.drop_path.rate for level in linear.levels for layer in level.blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2])
    assert linear(x).shape == (2, 3)


def test_stochastic_depth_trains_with_less_memory_too():
    """The random draws are those of the forward pass when it is computed again."""
    x = normal(2, 3, 16, 16)

    def gradients(with_cp):
        model = InternImage(**SMALL, drop_path_rate=0.5, drop_path_type="uniform", with_cp=with_cp, rngs=nnx.Rngs(0))
        loss, gradient = nnx.jit(nnx.value_and_grad(lambda model: (model(x) ** 2).sum()))(model)
        return loss, nnx.to_pure_dict(gradient)

    jax.tree.map(assert_close, gradients(True), gradients(False))


def test_internimage_without_a_head():
    x = normal(1, 3, 16, 16)
    features = InternImage(**{**SMALL, "num_classes": 0}, rngs=nnx.Rngs(0))
    assert features(x).shape == (1, 12)
    maps = InternImage(**{**SMALL, "num_classes": None}, rngs=nnx.Rngs(0))
    assert not any(key.startswith(("conv_head", "head")) for key in mmcv.to_state_dict(maps))
    assert [y.shape for y in maps.feature_maps(x)] == [(1, 4, 4, 4), (1, 8, 2, 2)]
    with pytest.raises(ValueError, match="InternImage: with num_classes=None there are only feature_maps"):
        maps(x)


# --- errors ---

ATTENTION = dict(embed_dims=8, num_heads=2, num_levels=2, num_points=1, batch_first=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DCNv3", dict(channels=10, group=4), r"channels \(10\) must be a multiple of group \(4\)"),
        ("DCNv3", dict(kernel_size=4, remove_center=True), "remove_center needs an odd, square kernel_size"),
        ("DCNv3", dict(norm_layer="BN"), "norm_layer must be 'LN'"),
        ("DCNv3", dict(act_layer="Tanh"), "act_layer must be one of GELU, ReLU, SiLU, got 'Tanh'"),
        ("DCNv4", dict(stride=0), "stride must be at least 1, got 0"),
        ("DCNv4", dict(offset_scale=np.nan), "offset_scale must be finite"),
        ("MultiScaleDeformableAttention", dict(num_heads=3), r"embed_dims \(256\) must be a positive multiple of num"),
        ("MultiScaleDeformableAttention", dict(dropout=2), "dropout must be from 0 to 1, got 2"),
        ("MultiScaleDeformableAttention", dict(value_proj_ratio=0.01), r"value_proj_ratio \(2\) must be a positive"),
    ],
)
def test_wrong_arguments(api, name, options, message):
    rngs = {"rngs": nnx.Rngs(0)} if api == "nnx" else {}
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        getattr(getattr(jax_dcn, api), name)(**options, **rngs)


def test_other_names(api):
    rngs = {"rngs": nnx.Rngs(0)} if api == "nnx" else {}
    with pytest.raises(TypeError, match="the argument padding is called pad here"):
        getattr(jax_dcn, api).DCNv3(padding=1, **rngs)
    with pytest.raises(TypeError, match="the argument n_heads is called num_heads here"):
        getattr(jax_dcn, api).MultiScaleDeformableAttention(n_heads=1, **rngs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(spatial_shapes=((2, 2),)), "spatial_shapes has 1 levels, expected 2 = num_levels"),
        (dict(spatial_shapes=((2, 2), (1, 2))), "value has 5 pixels, expected 6"),
        (dict(reference_points=normal(1, 3, 2, 3)), r"reference_points has shape \(1, 3, 2, 3\)"),
        (dict(query=normal(1, 3, 7)), r"query has shape \(1, 3, 7\), expected \(N, length, embed_dims\)"),
        (dict(query_pos=normal(1, 4, 8)), r"query_pos has shape \(1, 4, 8\), expected query's, \(1, 3, 8\)"),
        (dict(value=normal(2, 5, 8)), "value has batch size 2, expected query's, 1"),
        (dict(identity=normal(7, 3, 8)), r"identity has shape \(7, 3, 8\), expected query's, \(1, 3, 8\)"),
        (dict(key_padding_mask=np.zeros((1, 4), bool)), r"key_padding_mask has shape \(1, 4\), expected \(1, 5\)"),
    ],
)
def test_wrong_inputs_of_the_attention(changed, message):
    module = jax_dcn.nnx.MultiScaleDeformableAttention(**ATTENTION, rngs=nnx.Rngs(0))
    inputs = dict(
        query=normal(1, 3, 8),
        value=normal(1, 5, 8),
        reference_points=normal(1, 3, 2, 2),
        spatial_shapes=((2, 2), (1, 1)),
    )
    assert module(**inputs).shape == (1, 3, 8)
    with pytest.raises(ValueError, match=f"MultiScaleDeformableAttention: {message}"):
        module(**{**inputs, **changed})


def test_wrong_inputs_of_dcnv3():
    module = jax_dcn.nnx.DCNv3(8, group=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="DCNv3: x has 7 channels, expected 8 = channels"):
        module(normal(1, 5, 5, 7))
    same = jax_dcn.nnx.DCNv3(8, group=2, pad=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="DCNv3: offset has spatial size 5 x 5, expected that of the output, 3 x 3"):
        same(normal(1, 5, 5, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(core_op="DCNv2"), "core_op must be 'DCNv3' or 'DCNv4', got 'DCNv2'"),
        (dict(use_clip_projector=True), "use_clip_projector must be False"),
        (dict(norm_layer="BN"), "norm_layer must be 'LN'"),
        (dict(groups=(4, 8)), "depths and groups of one length"),
        (dict(drop_path_rate=-1), "drop_path_rate must be from 0 to 1"),
        (dict(mlp_ratio=0), r"channels \* mlp_ratio must be at least 1, got 0"),
        (dict(layer_scale=np.nan), "layer_scale must be finite, got nan"),
        (dict(level2_post_norm=True, level2_post_norm_block_ids=[99]), "level2_post_norm_block_ids must be different"),
    ],
)
def test_wrong_arguments_of_internimage(options, message):
    with pytest.raises(ValueError, match=f"InternImage: .*{message}"):
        InternImage(**options, rngs=nnx.Rngs(0))
