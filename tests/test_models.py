"""The models: mmdet's numbers from mmdet's state dicts, their arguments, training and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import models_golden
from support.formats import DATA_FORMATS, to_nchw, to_nhwc
from support.models_golden import GoldenModel
from support.processes import run_python
from support.tolerances import assert_close, assert_same_arrays, relative_error

from jax_dcn import mmcv
from jax_dcn.mmcv.nn import max_pool2d
from jax_dcn.models import FPN, BatchNorm, FrozenParam, ResNet, ResNeXt

DATA = models_golden.PATH.parent
DCN = dict(type="DCNv2", deform_groups=2, fallback_on_stride=False)
SMALL = dict(depth=50, base_channels=8, dcn=DCN, stage_with_dcn=(False, True, False, False), num_stages=2)
RESNETS = [
    *("resnet50-v1", "resnet50-caffe-group4", "resnet50-fallback", "resnet50-dilated", "resnet101-c4-c5-caffe"),
    *("resnet152-c5", "resnext50-v1", "resnext50-fallback", "resnet18", "resnet34-dilated"),
]
FPNS = ["fpn", "fpn-on_input", "fpn-on_lateral", "fpn-on_output", "fpn-end_level"]


def build(config, **more):
    config = {"model": "ResNet", **config, **more}
    model = {"ResNet": ResNet, "ResNeXt": ResNeXt}[config.pop("model")]
    if "out_indices" not in config and config.get("num_stages"):
        config["out_indices"] = tuple(range(config["num_stages"]))
    return model(**config, rngs=nnx.Rngs(0))


def abstract(build, *arguments, **options):
    """A module without the time to compile its initialisers."""
    return nnx.eval_shape(lambda: build(*arguments, **options))


def run(model, *inputs):
    return nnx.jit(lambda model, *inputs: model(*inputs))(model, *inputs)


def assert_maps(actual, expected, name, tolerance=1e-5):
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    print(f"{name}: largest relative error {max(errors):.1e}")
    assert max(errors) < tolerance


# --- numbers ---


def mmdet_resnet50():
    pytest.importorskip("safetensors")
    state_dict = mmcv.load_checkpoint(DATA / "resnet50_dcnv2.safetensors")
    config = dict(depth=50, base_channels=8, stem_channels=8, stage_with_dcn=(False, True, True, True))
    model = abstract(build, config, dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False))
    return mmcv.load_into(model, state_dict), state_dict


def test_mmdets_own_feature_maps():
    model, state_dict = mmdet_resnet50()
    with np.load(DATA / "resnet50_dcnv2.npz") as golden:
        model.eval()
        assert_maps(run(model, golden["x"]), [golden[f"y{i}"] for i in range(4)], "mmdet 3.3.0")
    assert_same_arrays(mmcv.to_state_dict(model), state_dict)


@pytest.mark.parametrize("name", RESNETS)
def test_resnet(name):
    golden = GoldenModel(name)
    model = mmcv.load_into(abstract(build, golden.config), golden.state_dict)
    model.eval()
    # Operation by operation: like blocks are compiled once, where the whole of a deep model would be compiled.
    assert_maps(model(*map(jnp.asarray, golden.inputs)), golden.outputs, name)
    assert_same_arrays(mmcv.to_state_dict(model), golden.state_dict)


@pytest.mark.parametrize("name", FPNS)
def test_fpn(name):
    golden = GoldenModel(name)
    model = mmcv.load_into(FPN(**golden.config, rngs=nnx.Rngs(0)), golden.state_dict)
    assert_maps(run(model, golden.inputs), golden.outputs, name)
    assert_same_arrays(mmcv.to_state_dict(model), golden.state_dict)


@pytest.mark.parametrize("size", [(6, 7), (1, 2)])
@pytest.mark.parametrize("levels", [3, 1000])
def test_max_pool_is_flaxs(size, levels):
    """With its gradient, of many equal pixels too, of which the first in the order of rows has it."""
    x = np.random.default_rng(0).integers(0, levels, (2, *size, 3)).astype(np.float64)
    flaxs = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    (y, vjp), (expected, expected_vjp) = (jax.vjp(pool, x) for pool in (lambda x: max_pool2d(x, 3, 2, 1), flaxs))
    cotangent = np.random.default_rng(1).normal(size=y.shape)
    assert_same_arrays({"y": y}, {"y": expected})
    assert_close(vjp(cotangent)[0], expected_vjp(cotangent)[0])


@pytest.fixture(scope="module")
def small_state_dict():
    return mmcv.load_checkpoint(mmcv.to_state_dict(build(SMALL)))


def test_nhwc(small_state_dict):
    x = np.random.default_rng(0).normal(size=(1, 3, 33, 41)).astype(np.float32)
    nchw, nhwc = (
        mmcv.load_into(abstract(build, SMALL, data_format=data_format), small_state_dict)
        for data_format in DATA_FORMATS
    )
    maps = run(nchw, x)
    assert [m.shape for m in maps] == [(1, 32, 9, 11), (1, 64, 5, 6)]
    assert_maps([to_nchw(m) for m in run(nhwc, to_nhwc(x))], maps, "NHWC", 1e-6)
    pyramid = dict(in_channels=(32, 64), out_channels=8, num_outs=3)
    outs = FPN(**pyramid, rngs=nnx.Rngs(0))(maps)
    outs_nhwc = FPN(**pyramid, data_format="NHWC", rngs=nnx.Rngs(0))([to_nhwc(m) for m in maps])
    assert_maps([to_nchw(m) for m in outs_nhwc], outs, "NHWC", 1e-6)


def test_bfloat16(small_state_dict):
    model = mmcv.load_into(abstract(build, SMALL, dtype=jnp.bfloat16), small_state_dict)
    x = np.random.default_rng(0).normal(size=(1, 3, 33, 41)).astype(np.float32)
    expected = run(mmcv.load_into(abstract(build, SMALL), small_state_dict), x)
    maps = run(model, x)
    assert [m.dtype for m in maps] == [jnp.bfloat16] * 2
    assert_maps([m.astype(jnp.float32) for m in maps], expected, "bfloat16", 0.03)


# --- training ---


def parameters(model, kind):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, kind))}


def test_frozen_stages():
    model = abstract(build, SMALL, frozen_stages=1)
    trained = parameters(model, nnx.Param)
    assert all(name.startswith("layer2.") for name in trained)
    frozen = parameters(model, FrozenParam)
    assert {name.split(".")[0] for name in frozen} == {"conv1", "bn1", "layer1"}
    assert parameters(abstract(build, SMALL), nnx.Param) == trained | frozen
    stem = parameters(abstract(build, SMALL, frozen_stages=0), FrozenParam)
    assert stem == {"conv1.kernel", "bn1.scale", "bn1.bias"}


def test_norm_cfg():
    frozen = parameters(abstract(build, SMALL, norm_cfg=dict(type="BN", requires_grad=False)), FrozenParam)
    assert frozen == {
        name for name in parameters(abstract(build, SMALL), nnx.Param) if name.endswith((".scale", ".bias"))
    } - {f"layer2.{i}.conv2.conv_offset.bias" for i in range(4)}


@pytest.mark.parametrize("norm_eval", [True, False])
def test_training_step(norm_eval):
    model = build(SMALL, num_stages=2, frozen_stages=1, norm_eval=norm_eval, zero_init_residual=False)
    model.train()
    before = mmcv.to_state_dict(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 33, 41)), jnp.float32)

    @nnx.jit
    def gradients(model, x):
        return nnx.grad(lambda model: sum(jnp.sum(m**2) for m in model(x)))(model)

    grads = dict(nnx.to_flat_state(gradients(model, x)))
    assert {path[0] for path in grads} == {"layer2"}
    # Also of new deformable layers, whose offsets are zero.
    assert all(jnp.isfinite(g[...]).all() and (g[...] != 0).any() for g in grads.values())
    after = mmcv.to_state_dict(model)
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == set() if norm_eval else {key.split(".")[0] for key in changed} == {"layer2"}
    if not norm_eval:
        assert after["layer2.0.bn1.num_batches_tracked"] == 1


def test_batch_norm_in_training():
    """The running variance is torch's, unbiased."""
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(2, 3, size=(2, 2, 1, 3)).astype(np.float32)
    y = norm(jnp.asarray(x))
    flat = x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(y.reshape(-1, 3), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    assert norm.num_batches_tracked[...] == 1


def test_initial_values():
    model = build(dict(SMALL, base_channels=16))
    kernel = np.asarray(model.layer1[1].conv2.kernel[...])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 16)), rel=0.1)
    assert not model.layer1[0].bn3.scale[...].any()
    assert (model.layer1[0].bn2.scale[...] == 1).all()
    assert not model.layer2[0].conv2.conv_offset.kernel[...].any()


# --- errors and names ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=26), r"depth must be one of \(18, 34, 50, 101, 152\), got 26"),
        (dict(depth=18), "depth 18 has neither deformable blocks nor groups, as in mmdet"),
        (dict(depth=34, dcn=None, groups=2), "depth 34 has neither deformable blocks nor groups, as in mmdet"),
        (dict(style="tensorflow"), "style must be 'pytorch' or 'caffe', got 'tensorflow'"),
        (dict(num_stages=5), "num_stages must be from 1 to 4, got 5"),
        (dict(stage_with_dcn=(True,)), "stage_with_dcn has 1 entries, expected 2 = num_stages"),
        (dict(out_indices=(0, 2)), r"out_indices must be stages below 2 = num_stages, got \(0, 2\)"),
        (dict(frozen_stages=3), "frozen_stages must be from -1 to 2, got 3"),
        (dict(strides=(1, 0)), "strides must be at least 1, got 0"),
        (dict(dilations=(-1, 1)), "dilations must be at least 1, got -1"),
        (dict(groups=0), "groups must be at least 1, got 0"),
        (dict(dcn=dict(type="DCNv3")), r"dcn's type must be one of \('DCN', 'DCNv2'\), got 'DCNv3'"),
        (dict(dcn=dict(type="DCN", modulated=True)), r"dcn has unknown entries \['modulated'\]"),
        (dict(norm_cfg=dict(type="GN")), r"norm_cfg must be dict\(type='BN' or 'BN2d' or 'SyncBN'"),
        (dict(data_format="CHWN"), "data_format must be one of"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=f"^ResNet: {message}"):
        abstract(build, SMALL, **options)


@pytest.mark.parametrize("argument", ["frozen_stages", "num_stages", "groups", "base_channels", "base_width"])
def test_number_that_is_not_an_integer(argument):
    with pytest.raises(TypeError, match=rf"^ResNet: {argument} must be an integer, got 1\.5"):
        abstract(ResNet, **{**SMALL, "out_indices": (0,), argument: 1.5}, rngs=nnx.Rngs(0))


def test_dcn_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"^ResNet: dcn must be a dict, got str"):
        abstract(build, SMALL, dcn="DCNv2")


def test_old_name_of_deform_groups():
    model = abstract(build, SMALL, dcn=dict(type="DCN", deformable_groups=4))
    assert model.layer2[0].conv2.deform_groups == 4


def test_wrong_image():
    with pytest.raises(ValueError, match=r"^ResNet: x has shape \(1, 33, 41, 3\), expected NCHW with 3 channels"):
        jax.eval_shape(abstract(build, SMALL), jax.ShapeDtypeStruct((1, 33, 41, 3), jnp.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(start_level=2), r"start_level \(2\) and end_level \(-1\) must be inputs, from 0 to 1"),
        (dict(num_outs=1), "num_outs is 1, expected 2 = levels from start_level to end_level or more"),
        (dict(end_level=0), "num_outs is 2, expected 1 = levels from start_level to end_level$"),
        (dict(add_extra_convs="on_top"), "add_extra_convs must be False, True, 'on_input'"),
    ],
)
def test_wrong_arguments_of_the_pyramid(options, message):
    with pytest.raises(ValueError, match=f"^FPN: {message}"):
        FPN(**{**dict(in_channels=[8, 8], out_channels=4, num_outs=2), **options}, rngs=nnx.Rngs(0))


def test_a_pyramid_of_symbolic_sizes():
    """As far as each level is a whole multiple of the next."""
    golden = GoldenModel("fpn")
    model = mmcv.load_into(FPN(**golden.config, rngs=nnx.Rngs(0)), golden.state_dict)
    h, w = jax.export.symbolic_shape("h, w")
    levels = [*zip(golden.config["in_channels"], (8, 4, 2, 1), strict=True)]
    specs = [jax.ShapeDtypeStruct((1, channels, n * h, n * w), jnp.float32) for channels, n in levels]
    exported = jax.export.export(jax.jit(lambda maps: model(maps)))(specs)
    rng = np.random.default_rng(0)
    maps = [jnp.asarray(rng.normal(size=(1, channels, 3 * n, 2 * n)), jnp.float32) for channels, n in levels]
    for actual, expected in zip(exported.call(maps), run(model, maps), strict=True):
        assert_close(actual, expected)


def test_wrong_number_of_maps():
    with pytest.raises(ValueError, match=r"^FPN: got 1 inputs, expected 2"):
        FPN([8, 8], 4, 2, rngs=nnx.Rngs(0))([jnp.zeros((1, 8, 4, 4))])


def test_without_flax():
    run_python("""
import sys
sys.modules["flax"] = None
sys.modules["torch"] = None
import importlib
import jax_dcn.mmcv
for name in ("models", "mmcv.nn"):
    try:
        importlib.import_module(f"jax_dcn.{name}")
    except ImportError as error:
        assert f"jax_dcn.{name} needs Flax: pip install jax_dcn[flax]" == str(error), error
    else:
        raise AssertionError
assert not hasattr(jax_dcn.mmcv, "other")
""")
