"""CenterNet: mmdet's maps and boxes from mmdet's state dict, training as mmdet trains it, and errors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import models_golden
from support.centernet_golden import BOXES, CONFIG, IMAGES, LABELS, Step
from support.formats import to_nchw, to_nhwc
from support.processes import run_python
from support.tolerances import assert_same_arrays, relative_error

from jax_dcn import mmcv
from jax_dcn.models import (
    CenterNet,
    CenterNetTargets,
    centernet_loss,
    centernet_targets,
    gaussian_focal_loss,
)
from jax_dcn.models.centernet_loss import _radius

DATA = models_golden.PATH.parent

# As mmdet has it, but for the sizes.
MODEL = dict(
    type="CenterNet",
    data_preprocessor=dict(type="DetDataPreprocessor", mean=[123.675, 116.28, 103.53], bgr_to_rgb=True),
    backbone=dict(
        type="ResNet",
        depth=18,
        base_channels=8,
        stem_channels=8,
        norm_eval=False,
        norm_cfg=dict(type="BN"),
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet18"),
    ),
    neck=dict(
        type="CTResNetNeck",
        in_channels=64,
        num_deconv_filters=(32, 16, 16),
        num_deconv_kernels=(4, 4, 4),
        use_dcn=True,
    ),
    bbox_head=dict(
        type="CenterNetHead",
        num_classes=5,
        in_channels=16,
        feat_channels=16,
        loss_center_heatmap=dict(type="GaussianFocalLoss", loss_weight=1.0),
        loss_wh=dict(type="L1Loss", loss_weight=0.1),
        loss_offset=dict(type="L1Loss", loss_weight=1.0),
    ),
    train_cfg=None,
    test_cfg=dict(topk=100, local_maximum_kernel=3, max_per_img=100),
)


def with_entries(part=None, **entries):
    return {**MODEL, **({part: {**MODEL[part], **entries}} if part else entries)}


def build(config=MODEL, **options):
    """Without the time to compile the initialisers."""
    return nnx.eval_shape(lambda: CenterNet(**config, **options, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def state_dict():
    return mmcv.load_checkpoint(DATA / "centernet_r18_dcnv2.safetensors")


def loaded(state_dict, config=MODEL, **options):
    model = mmcv.load_into(build(config, **options), state_dict)
    model.eval()
    return model


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "centernet_r18_dcnv2.npz") as arrays:
        return dict(arrays)


@nnx.jit
def run(model, x):
    return model(x)


@nnx.jit
def predict(model, x):
    return model.predict(x)


# --- mmdet's own numbers ---


def test_mmdets_maps(state_dict, golden):
    """Computed by mmdet 3.3.0's CenterNet itself, with random weights, in float32."""
    model = loaded(state_dict)
    x = jnp.asarray(golden["inputs"])
    maps = nnx.jit(lambda model, x: model.backbone(x))(model, to_nhwc(x))
    neck = nnx.jit(lambda model, x: model.neck(x))(model, maps[-1])
    actual = {f"feat{i}": to_nchw(np.asarray(y)) for i, y in enumerate(maps)} | {"neck": to_nchw(np.asarray(neck))}
    actual |= dict(zip(("heatmap", "wh", "offset"), run(model, x), strict=True))
    errors = {name: relative_error(y, golden[name]) for name, y in actual.items()}
    print(*(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < 1e-5


def assert_same_detections(actual, expected):
    """Whose scores are closer than 1e-5 may have changed places."""
    (boxes, scores, labels), (right_boxes, right_scores, right_labels) = (
        map(np.asarray, a) for a in (actual, expected)
    )
    assert relative_error(scores, right_scores) < 1e-5
    left = list(range(len(right_scores)))
    for box, score, label in zip(boxes, scores, labels, strict=True):
        same = [
            i
            for i in left
            if right_labels[i] == label
            and abs(right_scores[i] - score) < 1e-5
            and np.abs(right_boxes[i] - box).max() < 1e-5 * np.abs(right_boxes).max()
        ]
        assert same, (box, score, label)
        left.remove(same[0])


def test_mmdets_detections(state_dict, golden):
    boxes, scores, labels = predict(loaded(state_dict), jnp.asarray(golden["inputs"]))
    assert boxes.shape == (1, 100, 4) and scores.shape == labels.shape == (1, 100)
    assert boxes.dtype == scores.dtype == jnp.float32 and labels.dtype == jnp.int32
    expected = golden["bboxes"], golden["scores"], golden["labels"]
    assert_same_detections((boxes[0], scores[0], labels[0]), expected)
    for name, actual, right in (("boxes", boxes, expected[0]), ("scores", scores, expected[1])):
        print(f"{name} {relative_error(actual[0], right):.1e}")
    print(f"labels: {(labels[0] == expected[2]).sum()} of 100 in the same place")


def test_back_to_mmdet(state_dict):
    assert_same_arrays(mmcv.to_state_dict(loaded(state_dict)), state_dict)


# --- predictions ---


def test_a_batch(state_dict, golden, data_format):
    """Every image of a batch is detected as alone, in both data formats."""
    x = np.concatenate([golden["inputs"], golden["inputs"][..., ::-1], -golden["inputs"]])
    batch = x if data_format == "NCHW" else to_nhwc(x)
    model = loaded(state_dict, data_format=data_format)
    together = predict(model, jnp.asarray(batch))
    alone = loaded(state_dict)
    for image in range(3):
        assert_same_detections(
            [y[image] for y in together], [y[0] for y in predict(alone, jnp.asarray(x[image][None]))]
        )
    heatmap, wh, offset = run(model, jnp.asarray(batch))
    axis = data_format.index("C")
    assert [y.shape[axis] for y in (heatmap, wh, offset)] == [5, 2, 2]


def test_no_images(state_dict):
    boxes, scores, labels = predict(loaded(state_dict), jnp.zeros((0, 3, 64, 64), jnp.float32))
    assert boxes.shape == (0, 100, 4) and scores.shape == labels.shape == (0, 100)


def detect_by_loops(heatmap, wh, offset, size, topk, kernel):
    """Of one image, (classes, h, w) and (2, h, w), in descending order."""
    classes, height, width = heatmap.shape
    found, reach = [], kernel // 2
    for label in range(classes):
        for i in range(height):
            for j in range(width):
                around = heatmap[label, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
                if heatmap[label, i, j] == around.max():
                    x, y = j + offset[0, i, j], i + offset[1, i, j]
                    w, h = wh[:, i, j] / 2
                    box = np.array([x - w, y - h, x + w, y + h]) * (np.array([size[1] / width, size[0] / height] * 2))
                    found.append((heatmap[label, i, j], label, box))
    return sorted(found, key=lambda row: -row[0])[:topk]


@pytest.mark.parametrize(
    ("topk", "kernel", "count", "size"), [(20, 5, 12, (64, 96)), (9, 1, 20, (32, 64)), (50, 3, 50, (33, 65))]
)
def test_detections_by_loops(topk, kernel, count, size, state_dict):
    """Few maxima, or few that are looked at, leave rows of score 0; sizes that 32 does not divide stretch the boxes."""
    config = with_entries(test_cfg=dict(topk=topk, local_maximum_kernel=kernel, max_per_img=count))
    model = loaded(state_dict, config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, *size)), jnp.float32)
    boxes, scores, labels = map(np.asarray, predict(model, x))
    assert boxes.shape == (2, count, 4)
    for image, maps in enumerate(zip(*map(np.asarray, run(model, x)), strict=True)):
        found = detect_by_loops(*maps, size, min(topk, count), kernel)
        assert (scores[image, len(found) :] == 0).all() and (scores[image, : len(found)] > 0).all()
        expected = [np.stack(column) for column in (list(zip(*found, strict=True))[i] for i in (2, 0, 1))]
        assert_same_detections([y[image, : len(found)] for y in (boxes, scores, labels)], expected)


def test_bfloat16(state_dict, golden):
    """Boxes are computed in float32: in bfloat16 a centre at column 24 would be good to 1/16."""
    model = loaded(state_dict, dtype=jnp.bfloat16)
    x = jnp.asarray(golden["inputs"], jnp.bfloat16)
    heatmap, wh, offset = run(model, x)
    assert heatmap.dtype == wh.dtype == offset.dtype == jnp.bfloat16
    boxes, scores, _ = predict(model, x)
    assert boxes.dtype == scores.dtype == jnp.float32
    centres = np.asarray((boxes[0, :, :2] + boxes[0, :, 2:]) / 2) / 4
    offsets = np.asarray(offset[0].astype(jnp.float32)).reshape(2, -1).T
    pixels = np.stack(np.meshgrid(np.arange(32), np.arange(24)), -1).reshape(-1, 2)
    distance = np.abs((pixels + offsets)[None] - centres[:, None]).max(2).min(1)
    assert distance.max() < 0.01  # of maps that two programs compute


def test_without_dcn():
    names = {
        ".".join(map(str, path))
        for path in dict(nnx.to_flat_state(nnx.state(build(with_entries("neck", use_dcn=False)))))
    }
    assert "neck.deconv_layers.4.conv.kernel" in names and not any("conv_offset" in name for name in names)


def test_initial_values():
    """mmdet's: few centres, small boxes, and a bilinear kernel from all inputs of an upsampling to its first output."""
    model = CenterNet(**with_entries("neck", num_deconv_kernels=(4, 3, 4)), rngs=nnx.Rngs(0))
    head = model.bbox_head
    np.testing.assert_allclose(jax.nn.sigmoid(head.heatmap_head[2].bias[...]), 0.1, rtol=1e-5)
    for branch in (head.wh_head, head.offset_head):
        assert 0.0005 < branch[0].kernel[...].std() < 0.002 and not branch[0].bias[...].any()
        assert not branch[2].bias[...].any()
    for layer, row in ((1, [0.25, 0.75, 0.75, 0.25]), (3, [0.25, 0.75, 0.75])):
        kernel = model.neck.deconv_layers[layer].conv.kernel[...]
        np.testing.assert_allclose(
            kernel[:, :, 0], np.broadcast_to(np.outer(row, row)[..., None], kernel[:, :, 0].shape)
        )
        assert len(np.unique(kernel[:, :, 1])) > 9
    assert not model.neck.deconv_layers[0].conv.conv_offset.kernel[...].any()


# --- training ---


def narrow(state_dict, **options):
    channels, filters, classes = (CONFIG[name] for name in ("channels", "filters", "classes"))
    model = build(
        dict(
            backbone=dict(type="ResNet", depth=18, base_channels=channels, norm_eval=False),
            neck=dict(
                type="CTResNetNeck",
                in_channels=8 * channels,
                num_deconv_filters=filters,
                num_deconv_kernels=(4, 4, 4),
            ),
            bbox_head=dict(
                type="CenterNetHead", num_classes=classes, in_channels=filters[-1], feat_channels=filters[-1]
            ),
        ),
        **options,
    )
    mmcv.load_into(model, state_dict)
    model.train()
    return model


def targets_of(boxes, labels, data_format="NCHW"):
    return centernet_targets(
        boxes, labels, num_classes=CONFIG["classes"], size=(16, 24), image_size=IMAGES[2:], data_format=data_format
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_targets(dtype, data_format):
    step = Step()
    targets = jax.jit(lambda boxes: targets_of(boxes, LABELS, data_format))(BOXES.astype(dtype))
    assert all(y.dtype == dtype for y in targets)
    if data_format == "NHWC":
        targets = [to_nchw(y) for y in targets]
    expected = step.heatmap, *np.split(step.values, [2, 4], axis=1)
    for actual, right in zip(targets, expected, strict=True):
        np.testing.assert_allclose(actual, right, rtol=0, atol=1e-6 if dtype == np.float32 else 1e-12)
    assert (np.asarray(targets[0]) == 1).sum() == 9


def test_labels_that_are_no_objects():
    """Neither are objects whose centre is outside the image; integers are boxes too."""
    boxes = np.array([[[-20, 0, 10, 30], [80, 50, 112, 60], [80, 50, 114, 60], [0, 0, 8, 8], [0, 0, 8, 8]]])
    targets = targets_of(boxes, np.array([[0, 0, 0, -1, 3]], np.int8))
    assert (targets.heatmap == 0).all() and (targets.weight == 0).all()
    assert targets.heatmap.dtype == jnp.float32
    assert (targets_of(boxes[:, :, [1, 0, 3, 2]], np.array([[-1, 0, 0, -1, 2]])).heatmap == 1).sum() == 1
    empty = targets_of(np.zeros((2, 0, 4), np.float32), np.zeros((2, 0), int))
    assert empty.heatmap.shape == (2, 3, 16, 24) and not empty.heatmap.any()


@pytest.mark.parametrize(("dtype", "classes"), [(np.int8, 200), (np.uint8, 256), (np.int64, 3)])
def test_labels_of_any_integers(dtype, classes):
    """The number of classes need not fit into them."""
    sizes = dict(num_classes=classes, size=(16, 24), image_size=(64, 96))
    targets = centernet_targets(BOXES, LABELS.clip(0).astype(dtype), **sizes)
    assert targets.weight.sum() == 9 and (targets.heatmap == 1).sum() == 10  # two have one centre


def test_targets_without_x64():
    """numpy's float64 and int64 are what callers have."""
    with jax.enable_x64(False):
        targets = targets_of(BOXES, LABELS)
    assert all(y.dtype == jnp.float32 for y in targets)


def test_radius():
    """No box that is moved, shrunk or enlarged by the radius overlaps less, and one of them just so."""
    height, width = np.random.default_rng(0).uniform(0.5, 60, (2, 1000))
    radius = np.asarray(_radius(height, width))
    both = (width - radius) * (height - radius)
    overlaps = [
        both / (2 * width * height - both),
        (width - 2 * radius) * (height - 2 * radius) / (width * height),
        width * height / ((width + 2 * radius) * (height + 2 * radius)),
    ]
    np.testing.assert_allclose(np.min(overlaps, axis=0), 0.3, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-6), (jnp.float32, 2e-4)])
def test_a_step_is_torchs(dtype, tolerance):
    """The losses, the gradient of every parameter and the statistics after it, of torch in float64.

    The file has the gradients in float32. A float32 sum over a batch of normalisations loses some digits.
    """
    step = Step()
    model = narrow(step.state_dict)
    # Flax's running statistics are float32 whatever param_dtype.
    nnx.update(model, jax.tree.map(lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, nnx.state(model)))

    @nnx.jit
    def run(model, images):
        def loss(model):
            losses = centernet_loss(model(images), targets_of(BOXES.astype(dtype), LABELS))
            return sum(losses.values()), losses

        return nnx.grad(loss, has_aux=True)(model)

    grads, losses = run(model, jnp.asarray(step.images, dtype))
    names = "loss_center_heatmap", "loss_wh", "loss_offset"
    np.testing.assert_allclose([losses[name] for name in names], step.losses, rtol=tolerance)
    actual = mmcv.to_state_dict(grads, like=model)
    assert set(actual) == set(step.grads)
    for name, grad in step.grads.items():
        np.testing.assert_allclose(actual[name], grad, rtol=0, atol=tolerance * np.abs(grad).max(), err_msg=name)
    after = mmcv.to_state_dict(model)
    for name, array in step.after.items():
        np.testing.assert_allclose(
            after[name], array, rtol=tolerance, atol=tolerance * np.abs(array).max(), err_msg=name
        )


def test_loss_weights_and_data_format():
    step = Step()
    outputs = run(narrow(step.state_dict), jnp.asarray(step.images))
    plain = centernet_loss(outputs, targets_of(BOXES, LABELS))
    weighted = centernet_loss(
        tuple(map(to_nhwc, outputs)),
        targets_of(BOXES, LABELS, "NHWC"),
        heatmap_weight=2.0,
        wh_weight=0.3,
        offset_weight=0.5,
    )
    for name, factor in (("loss_center_heatmap", 2), ("loss_wh", 3), ("loss_offset", 0.5)):
        np.testing.assert_allclose(weighted[name], factor * plain[name], rtol=1e-6)


def test_loss_without_objects():
    """Divided by one, and without gradients of width, height and offset."""
    step = Step()
    outputs = run(narrow(step.state_dict), jnp.asarray(step.images))
    targets = targets_of(BOXES, np.full_like(LABELS, -1))
    losses = centernet_loss(outputs, targets)
    expected = (-np.log1p(-np.asarray(outputs[0], np.float64)) * np.asarray(outputs[0], np.float64) ** 2).sum()
    np.testing.assert_allclose(losses["loss_center_heatmap"], expected, rtol=1e-5)
    assert losses["loss_wh"] == losses["loss_offset"] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_focal_loss_at_its_ends(dtype):
    """Where the sigmoid is 0 or 1 the loss and its gradient are finite, compiled too; an error there costs 27.6."""
    logits = jnp.array([-200.0, -20.0, 18.0, 200.0], dtype)

    @jax.jit
    def run(logits, target):
        return jax.value_and_grad(lambda z: gaussian_focal_loss(jax.nn.sigmoid(z), jnp.full_like(z, target)).sum())(
            logits
        )

    for target in (0.0, 0.5, 1.0):
        value, grad = run(logits, target)
        assert value.dtype == jnp.float32 and jnp.isfinite(value) and jnp.isfinite(grad).all()
    wrong = jax.jit(gaussian_focal_loss)(jnp.array([1, 0], dtype), jnp.array([0, 1], dtype))
    np.testing.assert_allclose(wrong, -np.log(1e-12), rtol=1e-5)


# --- several devices ---


def test_two_devices_are_one():
    """Losses, gradients, statistics and boxes, to rounding in float64; images and maps are not gathered."""
    printed = run_python(
        """
import re, jax, numpy as np
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import test_centernet as tests

step = tests.Step()
structure, state = nnx.split(tests.narrow(step.state_dict))

def train(state, images, boxes, labels):
    def loss(model):
        return sum(tests.centernet_loss(model(images), tests.targets_of(boxes, labels)).values())

    model = nnx.merge(structure, state)
    return nnx.value_and_grad(loss)(model), nnx.state(model)

def predict(state, images):
    model = nnx.merge(structure, state)
    model.eval()
    return model.predict(images)

mesh = Mesh(np.array(jax.devices()), ("batch",))
everywhere, by_image = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))

def compiled(function, dtype, *data):
    data = jax.tree.map(lambda a: jnp.asarray(a, dtype) if a.dtype.kind == "f" else jnp.asarray(a), (state, *data))
    shared = jax.device_put(data[0], everywhere), *(jax.device_put(a, by_image) for a in data[1:])
    return jax.jit(function).lower(*shared).compile(), shared, data

def compare(function, *data):
    program, shared, data = compiled(function, np.float64, *data)
    for a, b in zip(jax.tree.leaves(jax.jit(function)(*data)), jax.tree.leaves(program(*shared)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * np.abs(a).max())

def gathers(function, *data):
    program, _, _ = compiled(function, np.float32, *data)
    return re.findall("all-gather|all-to-all|collective-permute", program.as_text())

training, images = (step.images, tests.BOXES, tests.LABELS), (step.images,)
compare(train, *training)
compare(predict, *images)
# In float64 XLA's CPU backend gathers for the gradient of max_pool2d.
assert not gathers(train, *training) and not gathers(predict, *images)
print("equal")
""",
        Path(__file__).parent,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    assert "equal" in printed


# --- errors ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            with_entries("backbone", base_channel=8),
            r"backbone has unknown entries \['base_channel'\], expected some of",
        ),
        (with_entries("neck", in_channel=64), r"neck has unknown entries \['in_channel'\]"),
        (with_entries("bbox_head", loss_bbox={}), r"bbox_head has unknown entries \['loss_bbox'\]"),
        (with_entries(test_cfg=dict(nms_pre=100)), r"test_cfg has unknown entries \['nms_pre'\]"),
        (with_entries(test_cfg=[100]), "test_cfg must be a dict, got list"),
        (with_entries(neck=None), "neck must be a dict, got NoneType"),
        (with_entries(bbox_head=dict(type="CenterNetHead", in_channels=16)), r"bbox_head lacks the entries \['feat_ch"),
        (with_entries("neck", use_dcn="DCNv2"), "CTResNetNeck: use_dcn must be a bool"),
        (
            with_entries("neck", num_deconv_filters=32),
            "CTResNetNeck: num_deconv_filters must be a sequence of integers",
        ),
        (with_entries("backbone", groups=2), r"backbone has unknown entries \['groups'\]"),
        (with_entries("backbone", norm_cfg="BN"), "ResNet: norm_cfg must be a dict, got 'BN'"),
        (with_entries(test_cfg=dict(topk=1.5)), "test_cfg: topk must be an integer, got 1.5"),
    ],
)
def test_wrong_entries(config, message):
    with pytest.raises(TypeError, match=message):
        build(config)


def test_unknown_argument():
    with pytest.raises(TypeError, match="roi_head"):
        build(with_entries(roi_head=None))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_entries(type="FCOS"), "CenterNet: type must be 'CenterNet', got 'FCOS'"),
        (with_entries("backbone", type="DLANet"), "CenterNet: backbone's type must be 'ResNet', got 'DLANet'"),
        (with_entries(neck=dict(type="FPN")), "CenterNet: neck's type must be 'CTResNetNeck', got 'FPN'"),
        (with_entries("bbox_head", type="CenterNetUpdateHead"), "bbox_head's type must be 'CenterNetHead'"),
        (
            with_entries("backbone", deep_stem=True),
            "backbone's deep_stem must be False, got True: nothing else is built",
        ),
        (with_entries("backbone", with_cp=True), "backbone's with_cp must be False, got True"),
        (with_entries("backbone", depth=20), "ResNet: depth must be one of"),
        (with_entries("backbone", norm_cfg=dict(type="GN", num_groups=2)), "ResNet: norm_cfg must be"),
        (
            with_entries("backbone", dcn=dict(type="DCN"), stage_with_dcn=(False, True, True, True)),
            "neither deformable",
        ),
        (with_entries("neck", in_channels=512), "neck's in_channels is 512, expected 64 = the backbone's last map"),
        (with_entries("bbox_head", in_channels=64), "bbox_head's in_channels is 64, expected 16 = the neck's last"),
        (with_entries("neck", num_deconv_kernels=(4, 4)), "CTResNetNeck: num_deconv_filters and num_deconv_kernels"),
        (with_entries("bbox_head", num_classes=0), "CenterNetHead: num_classes must be at least 1, got 0"),
        (with_entries(test_cfg=dict(topk=0)), "test_cfg: topk must be at least 1, got 0"),
        (with_entries(test_cfg=dict(local_maximum_kernel=4)), "local_maximum_kernel must be odd, got 4"),
    ],
)
def test_wrong_values(config, message):
    with pytest.raises(ValueError, match=message):
        build(config)


def test_what_is_not_built_may_be_named():
    """Entries with the value that is built, and those that only train."""
    config = with_entries("backbone", deep_stem=False, avg_down=False, conv_cfg=None, plugins=None, with_cp=False)
    config["backbone"]["pretrained"] = "torchvision://resnet18"
    config["bbox_head"] = {**config["bbox_head"], "train_cfg": None, "test_cfg": None, "init_cfg": None}
    build({**config, "init_cfg": None, "test_cfg": None})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            np.ones((1, 32, 32, 3), np.float32),
            ValueError,
            r"x has shape \(1, 32, 32, 3\), expected NCHW with 3 channels",
        ),
        (np.ones((3, 32, 32), np.float32), ValueError, r"x has shape \(3, 32, 32\), expected NCHW"),
        (np.ones((1, 3, 32, 32), np.uint8), TypeError, "x has dtype uint8"),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "predict"])
def test_wrong_images(x, error, message, method, state_dict):
    model = loaded(state_dict)
    with pytest.raises(error, match=f"^CenterNet: {message}"):
        getattr(model, method)(jnp.asarray(x))


def test_wrong_targets():
    boxes, labels = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int32)
    sizes = dict(num_classes=2, size=(8, 8), image_size=(32, 32))
    with pytest.raises(ValueError, match=r"^centernet_targets: boxes and labels have shapes \(2, 3, 4\) and \(2, 4\)"):
        centernet_targets(boxes, np.zeros((2, 4), int), **sizes)
    with pytest.raises(TypeError, match=r"^centernet_targets: labels have dtype float32"):
        centernet_targets(boxes, labels.astype(np.float32), **sizes)
    with pytest.raises(TypeError, match=r"^centernet_targets: boxes must be an array"):
        centernet_targets(boxes.tolist(), labels, **sizes)
    with pytest.raises(ValueError, match=r"^centernet_targets: num_classes must be at least 1"):
        centernet_targets(boxes, labels, **{**sizes, "num_classes": 0})
    targets = centernet_targets(boxes, labels, **sizes)
    assert isinstance(targets, CenterNetTargets)
    outputs = tuple(jnp.ones((2, channels, 8, 8)) for channels in (2, 2, 2))
    with pytest.raises(
        ValueError, match=r"^centernet_loss: wh has shape \(2, 8, 8, 2\), expected its target's, \(2, 2, 8, 8\)"
    ):
        centernet_loss((outputs[0], to_nhwc(outputs[1]), outputs[2]), targets)
    with pytest.raises(ValueError, match=r"^centernet_loss: got 2 outputs, expected 3"):
        centernet_loss(outputs[:2], targets)
