"""States of nnx modules under torch's names, and the parts of whole detectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support.state_dicts import layer, messages, normal, pack
from support.tolerances import assert_same_arrays

from jax_dcn import mmcv

# --- states ---


class Ported(nnx.Module):
    """What a state's names leave open: a Sequential, a layer in two places, a norm and a parameter called scale."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.convs = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.relu, nnx.BatchNorm(4, rngs=rngs))
        self.first = self.convs.layers[0]
        self.scale = nnx.Param(jnp.ones(4))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.convs(x) * self.scale[...].reshape(1, 1, 1, 4)


NAMES = {"scale": np.ones(4)}  # which torch calls so too


def test_gradients_have_the_modules_names():
    module = Ported()
    grads = nnx.grad(lambda module: module(jnp.ones((1, 5, 5, 3), jnp.float32)).sum())(module)
    actual = mmcv.to_state_dict(grads, "head", names=NAMES, like=module)
    params = mmcv.to_state_dict(module, "head", names=NAMES)
    assert {key: array.shape for key, array in actual.items()} == {
        key: array.shape for key, array in params.items() if "running" not in key
    }
    kernel = grads["convs"]["layers"][0]["kernel"][...]
    np.testing.assert_array_equal(actual["head.convs.0.weight"], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(actual["head.first.weight"], actual["head.convs.0.weight"])


def test_a_whole_state():
    module = Ported()
    for state in (nnx.state(module), nnx.to_pure_dict(nnx.state(module))):
        assert_same_arrays(mmcv.to_state_dict(state, names=NAMES, like=module), mmcv.to_state_dict(module, names=NAMES))


def test_masked_moments_of_an_optimizer():
    """Which has none for what it does not move."""
    optax = pytest.importorskip("optax")
    module = Ported()
    params = nnx.state(module, nnx.Param)
    only_scale = jax.tree.map_with_path(lambda path, _: "'scale'" in jax.tree_util.keystr(path[:1]), params)
    moments = optax.masked(optax.trace(0.9), only_scale).init(params).inner_state.trace
    assert set(mmcv.to_state_dict(moments, names=NAMES, like=module)) == {"scale"}


def test_a_state_alone_is_refused():
    module = Ported()
    with pytest.raises(TypeError, match=r"an nnx\.State does not say what its names mean: pass like=module"):
        mmcv.to_state_dict(nnx.state(module))
    with pytest.raises(TypeError, match=r"module must be the module itself, got its nnx\.State"):
        mmcv.load_into(nnx.state(module), {})
    with pytest.raises(TypeError, match=r"like is for the state of a module, got Ported"):
        mmcv.to_state_dict(module, like=module)
    with pytest.raises(TypeError, match=r"like must be an nnx module, got State"):
        mmcv.to_state_dict(nnx.state(module), like=nnx.state(module))


def test_the_state_of_another_module():
    module = Ported()
    with pytest.raises(ValueError, match=r"^the state has first\.gamma, which Ported has not$"):
        mmcv.to_state_dict({"first": {"gamma": np.ones(1)}}, like=module)
    with pytest.raises(ValueError, match=r"^the state has convs\.layers\.0, which Ported has not$"):
        mmcv.to_state_dict({"convs": {"layers": {0: np.ones(1)}}}, like=module)
    with pytest.raises(ValueError, match=r"^the state's scale has shape \(3,\), expected \(4,\)$"):
        mmcv.to_state_dict({"scale": np.ones(3)}, like=module)


# --- whole detectors ---


def detector():
    """Its checkpoint, and a backbone and a neck to be filled."""
    backbone, neck = layer(), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    old = {key.replace("conv_offset", "conv_offset_mask"): array for key, array in pack("backbone.").items()}
    norm = {f"neck.{name}": np.abs(normal(3)) for name in ("weight", "bias", "running_mean", "running_var")}
    head = {"bbox_head.cls.weight": normal(3, 3, 1, 1), "bbox_head.cls.bias": normal(3)}
    arrays = old | norm | {"neck.num_batches_tracked": np.array(7)} | head
    return {"state_dict": arrays, "meta": {}}, backbone, neck


@pytest.mark.parametrize("dot", ["", "."])
def test_parts(dot):
    checkpoint, backbone, neck = detector()
    left = mmcv.load_parts({f"backbone{dot}": backbone, f"neck{dot}": neck}, checkpoint)
    assert left == ["bbox_head.cls.weight", "bbox_head.cls.bias"]
    assert_same_arrays(mmcv.to_state_dict(backbone), pack())
    np.testing.assert_array_equal(neck.var[...], checkpoint["state_dict"]["neck.running_var"])


def test_parts_of_data_parallel():
    checkpoint, backbone, neck = detector()
    arrays = {f"module.{key}": array for key, array in checkpoint["state_dict"].items()}
    assert len(mmcv.load_parts({"backbone": backbone, "neck": neck}, arrays)) == 2
    assert_same_arrays(mmcv.to_state_dict(backbone), pack())


def test_parts_are_filled_all_or_none(caplog):
    checkpoint, backbone, neck = detector()
    arrays = checkpoint["state_dict"]
    del arrays["neck.bias"]
    arrays["backbone.fc.weight"] = normal(2)
    parts = {"backbone": backbone, "neck": neck}
    before = mmcv.to_state_dict(backbone)
    with pytest.raises(mmcv.StateDictError) as caught:
        mmcv.load_parts(parts, checkpoint)
    assert (caught.value.missing, caught.value.unexpected) == (("neck.bias",), ("backbone.fc.weight",))
    assert_same_arrays(mmcv.to_state_dict(backbone), before)
    left = mmcv.load_parts(parts, checkpoint, strict=False)
    assert left == ["bbox_head.cls.weight", "bbox_head.cls.bias", "backbone.fc.weight"]
    assert_same_arrays(mmcv.to_state_dict(backbone), pack())
    assert messages(caplog)[-2:] == [
        "1 arrays keep their values: neck.bias",
        "1 arrays are skipped: backbone.fc.weight",
    ]


def test_parts_that_cannot_be():
    checkpoint, backbone, neck = detector()
    with pytest.raises(ValueError, match=r"^no key starts with 'body\.'; the keys start with backbone\., bbox_head\."):
        mmcv.load_parts({"body": backbone, "neck": neck}, checkpoint)
    with pytest.raises(ValueError, match=r"^load_parts: two parts have one prefix, got 'neck', 'neck\.'$"):
        mmcv.load_parts({"neck": backbone, "neck.": neck}, checkpoint)
    with pytest.raises(TypeError, match=r"^load_parts: parts must be a dict of modules by prefix, got list$"):
        mmcv.load_parts([("neck", neck)], checkpoint)


def test_a_part_that_is_no_module():
    with pytest.raises(TypeError, match=r"load_parts: 'neck\.' must be an nnx module, got Dense"):
        mmcv.load_parts({"neck": linen.Dense(3)}, {})
