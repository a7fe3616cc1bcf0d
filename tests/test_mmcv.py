"""State dicts: names, layouts, and the errors that say what does not fit."""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support.formats import to_nchw, to_nhwc
from support.state_dicts import C_IN, C_OUT, layer, messages, normal, pack
from support.tolerances import assert_same_arrays

import jax_dcn
from jax_dcn import mmcv

# --- names ---


def test_mappings_are_unwrapped():
    arrays = pack()
    for checkpoint in (
        arrays,
        {"state_dict": arrays, "meta": {}},
        {"params": {}, "params_ema": arrays},
        {"model": {"state_dict": arrays}},
        {"params": arrays, "params_ema": {}},
    ):
        assert_same_arrays(mmcv.load_checkpoint(checkpoint), arrays)
    loaded = mmcv.load_checkpoint(arrays)
    loaded["weight"][...] = 0
    assert arrays["weight"].any()


@pytest.mark.parametrize("prefix", ["backbone", "backbone."])
def test_prefix(prefix):
    arrays = {f"backbone.{key}": array for key, array in pack().items()} | {"neck.a": np.ones(1)}
    assert_same_arrays(mmcv.load_checkpoint(arrays, prefix), pack())
    with pytest.raises(ValueError, match=r"no key starts with 'body\.'; the keys start with backbone\., neck\."):
        mmcv.load_checkpoint(arrays, "body")


@pytest.mark.parametrize("prefix", ["backbone", "module.backbone."])
def test_prefix_below_data_parallel(prefix):
    arrays = {f"module.backbone.{key}": array for key, array in pack().items()} | {"module.neck.a": np.ones(1)}
    assert_same_arrays(mmcv.load_checkpoint(arrays, prefix), pack())


def test_prefix_beside_other_objects():
    arrays = {f"backbone.{key}": array for key, array in pack().items()} | {"epoch": 3, "backbone_name": "ResNet"}
    assert_same_arrays(mmcv.load_checkpoint(arrays, "backbone"), pack())


@pytest.mark.parametrize("start", ["", "module."])
def test_prefix_of_one_version_1_layer(start):
    old = pack(f"{start}backbone.layer2.0.conv2.") | {f"{start}backbone.layer2.0.conv1.weight": normal(2, 2)}
    old = {key.replace(".conv2.conv_offset.", ".conv2_offset."): array for key, array in old.items()}
    module = mmcv.load_into(layer(), old, prefix="backbone.layer2.0.conv2")
    assert_same_arrays(mmcv.to_state_dict(module), pack())


@pytest.mark.parametrize("channels", [18, 27, 2 * 27])
def test_version_1(channels):
    old = pack("layer2.0.conv2.", channels=channels)
    old["layer2.0.conv2_offset.weight"] = old.pop("layer2.0.conv2.conv_offset.weight")
    old["layer2.0.conv2_offset.bias"] = old.pop("layer2.0.conv2.conv_offset.bias")
    loaded = mmcv.load_checkpoint(old)
    assert_same_arrays(loaded, pack("layer2.0.conv2.", channels=channels))
    assert loaded.renamed == {
        "version 1 offset": [
            f"layer2.0.conv2_offset.{leaf} -> layer2.0.conv2.conv_offset.{leaf}" for leaf in ("weight", "bias")
        ]
    }


def test_version_1_weight_and_bias_separately():
    mixed = pack("conv2.")
    mixed["conv2_offset.bias"] = mixed.pop("conv2.conv_offset.bias")
    assert_same_arrays(mmcv.load_checkpoint(mixed), pack("conv2."))
    present = pack("conv2.") | {"conv2_offset.bias": np.zeros(27, np.float32)}
    assert_same_arrays(mmcv.load_checkpoint(present), present)


def test_other_layers_called_offset_keep_their_name():
    heads = {"reg.weight": normal(4, 8, 3, 3), "reg_offset.weight": normal(4, 8, 1, 1), "reg_offset.bias": normal(4)}
    alone = {"pts_offset.weight": normal(18, 8, 3, 3)}
    small = {"reg.weight": normal(4, 8, 1, 1), "reg_offset.weight": normal(2, 8, 1, 1)}
    taps = {"reg.weight": normal(6, 4, 3, 3), "reg_offset.weight": normal(36, 4, 1, 1), "reg_offset.bias": normal(36)}
    inputs = {"reg.weight": normal(6, 4, 3, 3), "reg_offset.weight": normal(36, 6, 3, 3)}
    bias = {"reg.weight": normal(6, 4, 3, 3), "reg_offset.bias": normal(18)}
    for arrays in heads, alone, small, taps, inputs, bias:
        loaded = mmcv.load_checkpoint(arrays)
        assert_same_arrays(loaded, arrays)
        assert loaded.renamed == {}


def test_version_1_with_groups():
    """conv_offset has one group, so its weight has more input channels."""
    old = {"conv2.weight": normal(8, 2, 3, 3), "conv2_offset.weight": normal(18, 8, 3, 3)}
    assert set(mmcv.load_checkpoint(old)) == {"conv2.weight", "conv2.conv_offset.weight"}


def test_conv_offset_mask_and_data_parallel():
    arrays = {f"module.{key}": array for key, array in pack("dcn.", "conv_offset_mask", bias=True).items()}
    loaded = mmcv.load_checkpoint(arrays)
    assert_same_arrays(loaded, pack("dcn.", bias=True))
    assert list(loaded.renamed) == ["data parallel", "conv_offset_mask"]
    assert_same_arrays(mmcv.load_checkpoint(pack(offset="conv_offset_mask")), pack())


def test_numbered_offset_convolutions_keep_their_names():
    arrays = {f"deform.conv_offset.{i}.weight": normal(4, 4, 3, 3) for i in (0, 2, 4, 6)}
    assert_same_arrays(mmcv.load_checkpoint(arrays), arrays)


def test_separate_convolutions():
    """BiRefNet's layer: its numbers, as the operator computes them, from a Pack."""
    arrays = {
        "regular_conv.weight": normal(C_OUT, C_IN, 3, 3),
        "offset_conv.weight": 0.1 * normal(18, C_IN, 3, 3, seed=1),
        "offset_conv.bias": 0.1 * normal(18, seed=2),
        "modulator_conv.weight": 0.1 * normal(9, C_IN, 3, 3, seed=3),
        "modulator_conv.bias": 0.1 * normal(9, seed=4),
    }
    layer = jax_dcn.nnx.ModulatedDeformConv2dPack(C_IN, C_OUT, 3, padding=1, bias=False, rngs=nnx.Rngs(0))
    mmcv.load_into(layer, {f"decoder.dcn.{key}": array for key, array in arrays.items()}, "decoder.dcn")
    x = jnp.asarray(normal(1, C_IN, 7, 8, seed=5))

    def convolve(name):
        y = jax.lax.conv_general_dilated(x, arrays[f"{name}.weight"], (1, 1), "SAME")
        return y + arrays[f"{name}.bias"][None, :, None, None]

    offset, mask = convolve("offset_conv"), 2 * jax.nn.sigmoid(convolve("modulator_conv"))
    weight = jnp.asarray(arrays["regular_conv.weight"])
    expected = jax_dcn.modulated_deform_conv2d(x, offset, mask, weight, padding=1)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


class Port(nnx.Module):
    """A module with given names, some of which the rules would change."""

    def __init__(self, **submodules):
        for name, submodule in submodules.items():
            setattr(self, name, submodule)


class LinenPort(linen.Module):
    names: tuple[str, ...]

    @linen.compact
    def __call__(self, x):
        for name in self.names:
            x = linen.Conv(27, (3, 3), name=name)(x)
        return x


def convolution(out_channels=27):
    return nnx.Conv(C_IN, out_channels, (3, 3), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("start", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize(
    "names",
    [("module",), ("dcn", "dcn_offset"), ("conv_offset_mask",), ("regular_conv", "offset_conv", "modulator_conv")],
)
def test_names_that_the_module_has_itself_stay(tmp_path, names, start):
    pytest.importorskip("safetensors")
    module = Port(**{name: convolution() for name in names})
    arrays = mmcv.to_state_dict(module, start)
    assert_same_arrays(mmcv.to_state_dict(mmcv.load_into(module, arrays, start)), mmcv.to_state_dict(module))
    mmcv.save_checkpoint(arrays, tmp_path / "a.safetensors")
    loaded = mmcv.load_checkpoint(tmp_path / "a.safetensors", rules=False)
    assert loaded.renamed == {}
    assert_same_arrays(loaded, arrays)
    mmcv.load_into(module, loaded, start)
    variables = LinenPort(names).init(jax.random.key(0), jnp.zeros((1, 4, 4, 27)))
    mmcv.load_into(variables, mmcv.to_state_dict(variables, start), start)


def test_offset_layer_beside_its_user():
    """Not a Pack: a layer that is given offsets, and the convolution that computes them."""
    module = Port(conv=jax_dcn.nnx.DeformConv2d(C_IN, C_OUT, 3, rngs=nnx.Rngs(0)), conv_offset=convolution(18))
    arrays = mmcv.to_state_dict(module)
    assert set(arrays) == {"conv.weight", "conv_offset.weight", "conv_offset.bias"}
    mmcv.load_into(module, arrays)
    mmcv.load_into(module, mmcv.load_checkpoint(arrays, rules=False))


def test_rules_are_logged(caplog):
    with caplog.at_level(logging.INFO, "jax_dcn.mmcv"):
        mmcv.load_checkpoint(pack(offset="conv_offset_mask"))
    assert messages(caplog) == [
        "rule 'conv_offset_mask' fired 2 times, first conv_offset_mask.weight -> conv_offset.weight"
    ]


# --- layouts ---


def test_converted_layouts():
    arrays = {
        "conv.weight": normal(6, 4, 3, 2),
        "linear.weight": normal(5, 7),
        "bn.weight": normal(6),
        "bn.bias": normal(6),
        "bn.running_mean": normal(6),
        "bn.running_var": normal(6),
        "bn.num_batches_tracked": np.array(5),
        "layers.0.conv1d.weight": normal(3, 2, 5),
        "moment_transfer": normal(2),
        "scale.scale": np.array(2.0),
    }
    tree = mmcv.convert_state_dict(arrays)
    assert jax.tree.map(jnp.shape, tree) == {
        "conv": {"kernel": (3, 2, 4, 6)},
        "linear": {"kernel": (7, 5)},
        "bn": {"scale": (6,), "bias": (6,), "mean": (6,), "var": (6,), "num_batches_tracked": ()},
        "layers": {"0": {"conv1d": {"kernel": (5, 2, 3)}}},
        "moment_transfer": (2,),
        "scale": {"scale": ()},
    }
    np.testing.assert_array_equal(tree["conv"]["kernel"], to_nhwc(arrays["conv.weight"], "weight"))
    assert_same_arrays(mmcv.to_state_dict(tree), arrays)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.weight", "x.scale"], r"x\.scale and x\.weight have no room in one tree, at x/scale"),
        (["x.running_mean", "x.mean"], r"x\.mean and x\.running_mean have no room"),
        (["x", "x.y"], r"x\.y and another name have no room in one tree, at x/y"),
        (["x.y", "x"], r"x and another name have no room in one tree, at x"),
        (["x", "x.y.z"], r"x\.y\.z and another name have no room in one tree, at x/y/z"),
    ],
)
def test_names_that_become_one(names, message):
    with pytest.raises(ValueError, match=f"^convert_state_dict: {message}"):
        mmcv.convert_state_dict({name: normal(3) for name in names})


class Parameters(nnx.Module):
    def __init__(self, **shapes):
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.asarray(normal(*shape, seed=len(name)))))


OWN_NAMES = {
    "a.scale": (3,),
    "b.kernel": (2, 3, 4),
    "c.mean": (3,),
    "c.var": (3,),
    "d.embedding": (4, 3),
    "e.weight": (3,),
    "e.kernel": (3, 2),
    "e.scale": (3,),
}


def test_parameters_with_names_of_flax():
    """In a module of one's own they have them in torch too, and its layout."""
    arrays = {key: normal(*shape, seed=i) for i, (key, shape) in enumerate(OWN_NAMES.items())}
    shapes = {}
    for key, shape in OWN_NAMES.items():
        parent, name = key.split(".")
        shapes.setdefault(parent, {})[name] = shape
    module = Port(**{parent: Parameters(**names) for parent, names in shapes.items()})
    mmcv.load_into(module, arrays)
    np.testing.assert_array_equal(module.b.kernel[...], arrays["b.kernel"])
    assert_same_arrays(mmcv.to_state_dict(module, names=arrays), arrays)
    tree = mmcv.convert_state_dict({key: arrays[key] for key in arrays if not key.startswith("e.")})
    assert set(mmcv.to_state_dict(tree)) == {"a.weight", "b.weight", "c.running_mean", "c.running_var", "d.weight"}
    np.testing.assert_array_equal(tree["b"]["kernel"], arrays["b.kernel"])
    np.testing.assert_array_equal(mmcv.to_state_dict(tree, names=arrays)["b.kernel"], arrays["b.kernel"])
    linen_arrays = mmcv.to_state_dict(mmcv.load_into({"params": tree}, {"a.scale": arrays["a.scale"]}, strict=False))
    np.testing.assert_array_equal(linen_arrays["a.weight"], arrays["a.scale"])


def test_parameters_with_one_name_in_torch():
    with pytest.raises(ValueError, match=r"a\.embedding and a\.kernel would both be a\.weight in a state dict"):
        mmcv.to_state_dict(Port(a=Parameters(embedding=(2, 3), kernel=(2, 3))))


@pytest.mark.parametrize("build", [lambda build: build(), nnx.eval_shape], ids=["concrete", "abstract"])
def test_shared_layers(build):
    """torch's state dict has them under all of their names."""

    class Head(nnx.Module):
        def __init__(self):
            self.convs = nnx.Sequential(convolution(), nnx.relu)
            self.again = self.convs.layers[0]
            self.bn = jax_dcn.models.BatchNorm(3, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self):
            self.a = Head()
            self.b = self.a
            self.tied = Parameters(weight=(3,))
            self.tied.other = self.tied.weight
            self.tied.parent = self  # a cycle has no end of names, of which torch can have none

    arrays = {
        f"{head}.{name}": normal(*shape, seed=1)
        for head in "ab"
        for conv in ("convs.0", "again")
        for name, shape in ((f"{conv}.weight", (27, C_IN, 3, 3)), (f"{conv}.bias", (27,)))
    }
    arrays |= {f"{head}.bn.{name}": normal(3, seed=2) for head in "ab" for name in ("weight", "bias", "running_mean")}
    arrays |= {f"{head}.bn.running_var": normal(3, seed=3) ** 2 for head in "ab"}
    arrays |= {f"{head}.bn.num_batches_tracked": np.array(7) for head in "ab"}
    arrays |= {f"tied.{name}": normal(3, seed=4) for name in ("weight", "other")}
    module = mmcv.load_into(build(Model), arrays)
    assert module.a is module.b and module.tied.weight is module.tied.other
    assert_same_arrays(mmcv.to_state_dict(module), arrays)
    # One of the names is enough.
    some = {key: array for key, array in arrays.items() if key.startswith(("a.convs.", "b.bn.", "tied.other"))}
    assert_same_arrays(mmcv.to_state_dict(mmcv.load_into(build(Model), some)), arrays)
    with pytest.raises(mmcv.StateDictError, match=r"missing \(4\)"):
        mmcv.load_into(build(Model), {key: array for key, array in some.items() if not key.endswith("0.bias")})


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_layers(name):
    arrays = pack(channels=18 if name.startswith("Deform") else 27, bias=True)
    options = dict(in_channels=C_IN, out_channels=C_OUT, kernel_size=3, padding=1, bias=True)
    layer = jax_dcn.nnx.__dict__[name](**options, rngs=nnx.Rngs(0))
    assert mmcv.load_into(layer, arrays) is layer
    assert_same_arrays(mmcv.to_state_dict(layer), arrays)
    linen_layer = getattr(jax_dcn, name)(**options, data_format="NHWC")
    variables = mmcv.load_into(linen_layer, arrays)
    assert_same_arrays(mmcv.to_state_dict(variables, "backbone"), {f"backbone.{k}": v for k, v in arrays.items()})
    x = jnp.asarray(normal(1, C_IN, 5, 6))
    y = linen_layer.apply(variables, to_nhwc(x))
    np.testing.assert_allclose(to_nchw(y), layer(x), atol=1e-5)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, mmcv.convert_state_dict(arrays))


@pytest.mark.parametrize("padding", [1, ((0, 1), (2, 0)), "SAME"], ids=str)
@pytest.mark.parametrize("name", ["DeformConv2d", "ModulatedDeformConv2d"])
def test_linen_layers_with_given_offsets(name, padding):
    """Their parameters are known without inputs, whatever the padding makes of the offset's size."""
    arrays = {"weight": pack()["weight"]}
    layer = getattr(jax_dcn, name)(C_IN, C_OUT, 3, padding=padding, bias=False)
    assert_same_arrays(mmcv.to_state_dict(mmcv.load_into(layer, arrays)), arrays)


class Blocks(linen.Module):
    """A linen model with what linen keeps apart: a list, and statistics."""

    def setup(self):
        self.convs = [linen.Conv(3, (3, 3), use_bias=False), linen.Conv(3, (3, 3), use_bias=False)]
        self.bn_1 = linen.BatchNorm(use_running_average=True)

    def __call__(self, x):
        return self.bn_1(self.convs[1](self.convs[0](x)))


def test_linen_lists_and_statistics():
    arrays = {
        "convs.0.weight": normal(3, 2, 3, 3, seed=0),
        "convs.1.weight": normal(3, 3, 3, 3, seed=1),
        **{f"bn_1.{name}": np.abs(normal(3, seed=2)) for name in ("weight", "bias", "running_mean", "running_var")},
    }
    x = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    variables = mmcv.load_into(Blocks(), arrays | {"bn_1.num_batches_tracked": np.array(1)}, inputs=[x])
    assert set(variables) == {"params", "batch_stats"}
    np.testing.assert_array_equal(variables["batch_stats"]["bn_1"]["var"], arrays["bn_1.running_var"])
    assert_same_arrays(mmcv.to_state_dict(variables, names=arrays), arrays)
    with pytest.raises(TypeError, match=r"pass inputs=\(x, ...\)"):
        mmcv.load_into(Blocks(), arrays)


def test_nnx_containers_and_random_states():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv_offset = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 1, rngs=rngs))
            self.levels = nnx.Dict(l1=nnx.Linear(2, 2, use_bias=False, rngs=rngs))
            self.embedding = nnx.Embed(5, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    arrays = {
        "conv_offset.0.weight": normal(3, 2),
        "conv_offset.0.bias": normal(3),
        "conv_offset.2.weight": normal(1, 3),
        "conv_offset.2.bias": normal(1),
        "levels.l1.weight": normal(2, 2),
        "embedding.weight": normal(5, 2),
    }
    model = mmcv.load_into(Model(nnx.Rngs(0)), arrays)
    np.testing.assert_array_equal(model.conv_offset.layers[2].kernel[...], arrays["conv_offset.2.weight"].T)
    np.testing.assert_array_equal(model.embedding.embedding[...], arrays["embedding.weight"])
    assert_same_arrays(mmcv.to_state_dict(model), arrays)


@pytest.mark.parametrize("abstract", [False, True])
def test_checkpoints_without_counters(abstract):
    """torch's before 0.4.1, and those converted from Caffe."""
    arrays = {name: normal(3) for name in ("weight", "bias", "running_mean", "running_var")}

    def build():
        return jax_dcn.models.BatchNorm(3, rngs=nnx.Rngs(0))

    norm = mmcv.load_into(nnx.eval_shape(build) if abstract else build(), arrays)
    assert_same_arrays(mmcv.to_state_dict(norm), arrays | {"num_batches_tracked": np.array(0)})


def test_counters_above_32_bits():
    arrays = {name: normal(3) for name in ("weight", "bias", "running_mean", "running_var")}
    norm = jax_dcn.models.BatchNorm(3, rngs=nnx.Rngs(0))
    mmcv.load_into(norm, arrays | {"num_batches_tracked": np.array(2**40)})
    assert norm.num_batches_tracked[...] == 2**31 - 1


def test_complex_numbers():
    before = mmcv.to_state_dict(module := layer())
    with pytest.raises(TypeError, match=r"^load_into: conv_offset\.bias is complex, expected float32$"):
        mmcv.load_into(module, pack() | {"conv_offset.bias": np.ones(27, np.complex64)})
    assert_same_arrays(mmcv.to_state_dict(module), before)


def test_dtype_of_the_module():
    layer = nnx.Conv(C_IN, C_OUT, (3, 3), use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    mmcv.load_into(layer, {"weight": pack()["weight"]})
    assert layer.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer.kernel[0, 0], pack()["weight"][:, :, 0, 0].T.astype(jnp.bfloat16))


# --- errors ---


class Unseen(nnx.Module):
    """What a port may get wrong: a buffer that is no variable, a weight in Flax's layout, a kernel in torch's."""

    def __init__(self):
        self.weight_gamma = jnp.ones((6, 1, 1, 1))
        self.weight_diff = nnx.Param(jnp.zeros((3, 2, 4, 6)))
        self.kernel = nnx.Param(jnp.zeros((6, 4, 3, 2)))


def test_what_a_port_may_get_wrong():
    arrays = {"weight_gamma": normal(6, 1, 1, 1), "weight_diff": normal(6, 4, 3, 2), "weight": normal(6, 4, 3, 2)}
    with pytest.raises(mmcv.StateDictError) as caught:
        mmcv.load_into(Unseen(), arrays)
    assert str(caught.value).splitlines() == [
        "the state dict does not fit the module",
        "unexpected (1):",
        "  weight_gamma: the module's array of this name is no nnx.Variable, and only those are seen",
        "wrong shape (2):",
        "  weight (6, 4, 3, 2), expected (2, 3, 6, 4): the module has it in torch's layout, but what is called kernel "
        "is transposed",
        "  weight_diff (6, 4, 3, 2), expected (3, 2, 4, 6): the module has it in the layout of a Flax kernel, but only "
        "what is called kernel is transposed",
    ]


def test_everything_wrong_in_one_error():
    arrays = pack() | {"fc.weight": normal(2, 2), "conv_offset.bias": normal(18)}
    del arrays["weight"]
    before = mmcv.to_state_dict(module := layer())
    with pytest.raises(mmcv.StateDictError) as caught:
        mmcv.load_into(module, arrays)
    assert str(caught.value).splitlines() == [
        "the state dict does not fit the module",
        "missing (1):",
        "  weight",
        "unexpected (1):",
        "  fc.weight",
        "wrong shape (1):",
        "  conv_offset.bias (18,), expected (27,)",
    ]
    assert caught.value.missing == ("weight",)
    assert caught.value.unexpected == ("fc.weight",)
    assert caught.value.misshaped == {"conv_offset.bias": ((18,), (27,))}
    assert_same_arrays(mmcv.to_state_dict(module), before)


def test_shapes_are_told_in_torchs_layout():
    arrays = pack() | {"weight": normal(C_OUT, C_IN + 1, 3, 3)}
    with pytest.raises(mmcv.StateDictError, match=r"weight \(6, 5, 3, 3\), expected \(6, 4, 3, 3\)"):
        mmcv.load_into(layer(), arrays)


def test_long_errors_are_cut():
    arrays = pack() | {f"head.{i}.weight": normal(1) for i in range(50)}
    with pytest.raises(mmcv.StateDictError, match=r"head\.19\.weight\n  \.\.\. and 30 more$") as caught:
        mmcv.load_into(layer(), arrays)
    assert len(caught.value.unexpected) == 50


def test_not_strict(caplog):
    module = layer()
    mmcv.load_into(module, {"weight": pack()["weight"], "fc.weight": normal(2, 2)}, strict=False)
    assert_same_arrays({"weight": mmcv.to_state_dict(module)["weight"]}, {"weight": pack()["weight"]})
    assert not module.conv_offset.kernel[...].any()
    assert messages(caplog) == [
        "2 arrays keep their values: conv_offset.bias, conv_offset.weight",
        "1 arrays are skipped: fc.weight",
    ]
    # An abstract parameter has no value to keep.
    with pytest.raises(mmcv.StateDictError, match=r"missing \(2\)"):
        mmcv.load_into(nnx.eval_shape(layer), {"weight": pack()["weight"]}, strict=False)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"a": 1}, TypeError, "a is not an array of numbers but int"),
        (3, TypeError, "a state dict must be a path or a dict of arrays, got int$"),
        (linen.Dense(3), TypeError, r"got Dense$"),
        ({0: np.ones(1)}, ValueError, "the checkpoint holds no state dict, but dict"),
        ("model.npz", ValueError, r"model\.npz must end in \.pth, \.pt or \.safetensors"),
    ],
)
def test_not_a_state_dict(source, error, message):
    with pytest.raises(error, match=message):
        mmcv.load_checkpoint(source)


def test_missing_file(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError):
        mmcv.load_checkpoint(tmp_path / "nowhere.pth")


def test_not_a_module():
    with pytest.raises(TypeError, match="module must be a Flax module or variables, got int"):
        mmcv.load_into(3, pack())


def test_comparing_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"^compare needs torch: pip install torch$"):
        mmcv.compare(layer(), None)


@pytest.mark.parametrize("source", [3, linen.Dense(3), None])
def test_not_a_source(source):
    with pytest.raises(TypeError, match=f"source must be an nnx module, .* got {type(source).__name__}$"):
        mmcv.to_state_dict(source)


def test_abstract_source():
    with pytest.raises(TypeError, match=r"source must not be abstract, got only the shape of conv_offset\.bias$"):
        mmcv.to_state_dict(nnx.eval_shape(layer))
