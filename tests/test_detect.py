"""The detector's example: what it makes of an image is mmdet's, and two processes train what one does."""

import sys

import detect
import jax
import numpy as np
import pytest
from PIL import Image
from scenes import Scenes, average_precision, load_digits, make_scenes, overlaps
from support.models_golden import PATH
from support.processes import run_example

DATA = PATH.parent


@pytest.fixture(autouse=True)
def as_the_example_runs():
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "centernet_r18_dcnv2.npz") as arrays:
        arrays = dict(arrays)
    # Of one image, which mmdet reads as BGR.
    return arrays | {"image": np.ascontiguousarray(arrays["image"][0, ::-1].transpose(1, 2, 0))}


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(False):
        return detect.load(DATA / "centernet_r18_dcnv2.safetensors")


# --- an image ---


def test_the_config_is_that_of_the_checkpoint(model):
    assert (model.bbox_head.num_classes, model.neck.in_channels, len(model.neck.deconv_layers)) == (5, 64, 6)


def test_another_checkpoint():
    with pytest.raises(SystemExit, match="Only checkpoints of CenterNet on ResNet-18 or 34"):
        detect.load(DATA / "resnet50_dcnv2.safetensors")


def test_normalisation_is_mmdets(golden):
    images = golden["image"][None].astype(np.float32)
    np.testing.assert_allclose(detect.normalized(images).transpose(0, 3, 1, 2), golden["inputs"], atol=1e-5)


@pytest.mark.parametrize("size", [(96, 128), (95, 127), (33, 64), (1, 31)])
def test_padding(size):
    """Each side becomes (n | 31) + 1, which is one of 32 more for a multiple of 32; the image is in the middle."""
    image = np.random.default_rng(0).integers(1, 256, (*size, 3), np.uint8)
    inside, (top, left) = detect.padded(image)
    assert inside.shape[:2] == tuple((side // 32 + 1) * 32 for side in size)
    assert np.array_equal(inside[top : top + size[0], left : left + size[1]], image)
    assert (inside != 0).sum() == image.size
    assert all(abs((inside.shape[axis] - size[axis]) / 2 - start) < 1 for axis, start in enumerate((top, left)))


def test_border_is_taken_off_the_boxes(model, golden):
    """An image that was padded by hand beforehand has the same boxes, moved by where it then begins."""
    image = golden["image"][:95, :120]
    boxes, scores, _ = detect.detect_image(model, image)
    inside = np.pad(image, ((1, 0), (4, 4), (0, 0)))
    raw, raw_scores, _ = (np.asarray(y)[0] for y in detect.predict(model, inside[None].astype(np.float32)))
    assert np.array_equal(scores, raw_scores)
    np.testing.assert_allclose(boxes + np.array([4, 1, 4, 1]), raw, atol=1e-5)


def test_command(golden, tmp_path, monkeypatch, capsys):
    Image.fromarray(golden["image"]).save(tmp_path / "image.png")
    checkpoint = str(DATA / "centernet_r18_dcnv2.safetensors")
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(
        sys, "argv", ["detect.py", "--checkpoint", checkpoint, str(tmp_path / "image.png"), "--output", str(picture)]
    )
    detect.main()
    assert picture.stat().st_size > 1000 and str(picture) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["detect.py", "--checkpoint", checkpoint])
    with pytest.raises(SystemExit):
        detect.main()
    assert "belong together" in capsys.readouterr().err


# --- scenes ---


def test_scenes():
    digits, held_out = load_digits()
    assert len(digits.images) == 4000 and len(held_out.images) == 1000
    scenes = make_scenes(digits, 20, size=128, objects=(6, 9), rng=np.random.default_rng(0))
    assert scenes.images.shape == (20, 128, 128, 3) and 0 <= scenes.images.min() and scenes.images.max() <= 255
    for boxes, labels in zip(scenes.boxes, scenes.labels, strict=True):
        there = boxes[labels >= 0]
        assert 2 <= len(there) <= 9 and (there >= 0).all() and (there <= 128).all()
        assert (there[:, 2:] > there[:, :2]).all()
        for index, box in enumerate(there):
            assert (overlaps(box, there[:index]) < 0.3).all()


def test_average_precision():
    """1 of what is right, 0 of another class, and between for boxes that overlap by two thirds."""
    boxes = np.array([[[0, 0, 20, 20], [30, 30, 60, 50], [0, 0, 0, 0]]], np.float32)
    labels = np.array([[3, 7, -1]])
    scenes = Scenes(np.zeros((1, 64, 64, 3)), boxes, labels)
    scores = np.array([0.9, 0.8], np.float32)
    assert average_precision(scenes, [(boxes[0, :2], scores, labels[0, :2])]) == pytest.approx((1, 1))
    assert average_precision(scenes, [(boxes[0, :2], scores, labels[0, 1::-1])]) == (0, 0)
    larger = boxes[0, :2] * [1, 1, 1, 1.5] - [0, 0, 0, 15] * (np.arange(2) == 1)[:, None]
    both, at_half = average_precision(scenes, [(larger, scores, labels[0, :2])])
    assert at_half == pytest.approx(1) and both == pytest.approx(0.4)  # at 0.5, 0.55, 0.6 and 0.65 of ten


# --- training ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process and two print in a few steps, and the detectors that they save."""
    folder, outputs = tmp_path_factory.mktemp("detect"), []
    for processes in 1, 2:
        paths = f"--output={folder / 'detect.png'}", f"--save={folder / f'{processes}.safetensors'}"
        outputs.append(run_example("detect", "--steps=8", "--scenes=8", f"--processes={processes}", *paths))
    assert (folder / "detect.png").stat().st_size > 10_000
    return folder, outputs


def test_two_processes_train_the_detectors_of_one(runs):
    """The losses are those of one process: normalisations and targets are those of the whole batch.

    Adam makes steps of one size of gradients of any size, so what rounding makes of those near zero shows after some.
    """
    _, outputs = runs
    losses = [
        np.array([line.split()[-2:] for line in output.splitlines() if line.startswith(("plain", "deformable"))], float)
        for output in outputs
    ]
    assert losses[0].shape == (2, 2) and (losses[0][:, 1] < losses[0][:, 0]).all()
    np.testing.assert_allclose(losses[1][:, 0], losses[0][:, 0], rtol=1e-4)
    np.testing.assert_allclose(losses[1][:, 1], losses[0][:, 1], rtol=1e-2)


def test_a_saved_detector_detects(runs):
    folder, _ = runs
    one, two = (detect.load(folder / f"{processes}.safetensors") for processes in (1, 2))
    image = make_scenes(load_digits()[1], 1, size=100, objects=(2, 3), rng=np.random.default_rng(0)).images[0]
    boxes, scores, _ = detect.detect_image(one, image)
    assert boxes.shape == (100, 4) and (np.diff(scores) <= 0).all()
    assert scores[0] == pytest.approx(detect.detect_image(two, image)[1][0], rel=0.05)
