"""EDVR's alignment of video frames (Wang et al. 2019, https://arxiv.org/abs/1905.02716) with jax_dcn.

The PCD module aligns the features of a neighbouring frame to those of a reference frame: on three levels of a pyramid,
from coarse to fine, a deformable convolution samples the neighbour where convolutions of both frames say. The names are
those of the PyTorch code (BasicSR), so its weights load, if torch is there to read them:

    python examples/edvr.py EDVR_M_x4_SR_REDS.pth

Without a file it trains for a moment to undo random shifts of noise. It draws where one pixel samples, as edvr.png.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from jax_dcn import mmcv, plot
from jax_dcn import nnx as dcn
from jax_dcn.mmcv.nn import Conv2d, interpolate

LEVELS = ("l3", "l2", "l1")  # from coarse to fine


class DCNv2Pack(dcn.ModulatedDeformConv2dPack):
    """A deformable layer whose offsets and mask come from a feature of their own."""

    def sampling(self, feature: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = self.conv_offset(feature)
        offset, mask = jnp.split(out, [out.shape[-1] // 3 * 2], -1)
        return offset, nnx.sigmoid(mask)

    def __call__(self, x: jax.Array, feature: jax.Array) -> jax.Array:
        return dcn.ModulatedDeformConv2d.__call__(self, x, *self.sampling(feature))


class PCDAlignment(nnx.Module):
    """Aligns three levels of features, NHWC inside and out, each half the size of the one before.

    `num_feat` and `deform_groups` are 64 and 8 in EDVR-M, 128 and 8 in EDVR-L.
    """

    def __init__(self, num_feat: int = 64, deform_groups: int = 8, *, rngs: nnx.Rngs):
        def conv(frames: int = 1) -> Conv2d:
            return Conv2d(frames * num_feat, num_feat, 3, padding=1, rngs=rngs)

        def pack() -> DCNv2Pack:
            return DCNv2Pack(num_feat, num_feat, 3, 1, 1, 1, 1, deform_groups, data_format="NHWC", rngs=rngs)

        self.offset_conv1 = nnx.Dict({level: conv(2) for level in LEVELS})
        self.offset_conv2 = nnx.Dict({level: conv(1 if level == "l3" else 2) for level in LEVELS})
        self.offset_conv3 = nnx.Dict({level: conv() for level in LEVELS[1:]})
        self.dcn_pack = nnx.Dict({level: pack() for level in LEVELS})
        self.feat_conv = nnx.Dict({level: conv(2) for level in LEVELS[1:]})
        self.cas_offset_conv1, self.cas_offset_conv2 = conv(2), conv()
        self.cas_dcnpack = pack()

    def __call__(self, neighbour: list[jax.Array], reference: list[jax.Array]) -> jax.Array:
        """Levels 1 (the finest) to 3 of both frames -> the neighbour's features, aligned, of level 1's shape."""
        feature, _ = self.pyramid(neighbour, reference)
        offset = lrelu(self.cas_offset_conv1(concatenate(feature, reference[0])))
        return lrelu(self.cas_dcnpack(feature, lrelu(self.cas_offset_conv2(offset))))

    def pyramid(self, neighbour: list[jax.Array], reference: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The features aligned by the pyramid alone, and the feature of the finest level's offsets."""
        offset = feature = None
        for level, x, ref in zip(LEVELS, neighbour[::-1], reference[::-1], strict=True):
            below, feature_below = offset, feature
            offset = lrelu(self.offset_conv1[level](concatenate(x, ref)))
            if below is not None:  # offsets are in pixels, of which there are twice as many now
                offset = concatenate(offset, 2 * upsample(below))
            offset = lrelu(self.offset_conv2[level](offset))
            if below is not None:
                offset = lrelu(self.offset_conv3[level](offset))
            feature = self.dcn_pack[level](x, offset)
            if below is not None:
                feature = self.feat_conv[level](concatenate(feature, upsample(feature_below)))
            if level != "l1":
                feature = lrelu(feature)
        return feature, offset


def lrelu(x: jax.Array) -> jax.Array:
    return nnx.leaky_relu(x, 0.1)


def concatenate(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays, -1)


def upsample(x: jax.Array) -> jax.Array:
    return interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def shifted_noise(rng: np.random.Generator, channels: int, size: int = 32) -> tuple[list, list]:
    """Pyramids of smooth noise, and of the same noise shifted by up to 3 pixels. Averages stand in for features."""
    noise = rng.normal(size=(2, size // 4 + 4, size // 4 + 4, channels))
    noise = np.asarray(jax.image.resize(jnp.asarray(noise, jnp.float32), (2, size + 16, size + 16, channels), "cubic"))
    dy, dx = rng.integers(5, 12, 2)
    frames = noise[:, dy : dy + size, dx : dx + size], noise[:, 8 : 8 + size, 8 : 8 + size]
    return tuple([nnx.avg_pool(jnp.asarray(f), (k, k), (k, k)) for k in (1, 2, 4)] for f in frames)


def train(model: PCDAlignment, channels: int, steps: int) -> list[float]:
    """Trains the model to align shifted noise. Returns the losses."""
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    rng, losses = np.random.default_rng(0), []

    @nnx.jit
    def step(model: PCDAlignment, optimizer: nnx.Optimizer, neighbour: list, reference: list) -> jax.Array:
        def loss(model: PCDAlignment) -> jax.Array:
            return jnp.abs(model(neighbour, reference) - lrelu(reference[0])).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    for _ in tqdm(range(steps), "training"):
        losses.append(step(model, optimizer, *shifted_noise(rng, channels)).item())
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="EDVR's, as BasicSR publishes them, of 64 channels")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="edvr.png")
    options = parser.parse_args(arguments)
    channels = 64 if options.checkpoint else 8
    model = PCDAlignment(channels, rngs=nnx.Rngs(0))
    if options.checkpoint:
        mmcv.load_into(model, mmcv.load_checkpoint(options.checkpoint), prefix="pcd_align")
    else:
        losses = train(model, channels, options.steps)
        print(f"mean error of the alignment: {losses[0]:.3f} at first, {np.mean(losses[-10:]):.3f} at last")
    neighbour, reference = shifted_noise(np.random.default_rng(1), channels)
    offset, mask = model.dcn_pack["l1"].sampling(model.pyramid(neighbour, reference)[1])
    axes = plot.sampling_points(neighbour[0][0, ..., 0], offset[:1], mask=mask[:1], data_format="NHWC")
    axes.figure.savefig(options.output)
    print(f"Where one pixel samples the neighbouring frame: {options.output}")


if __name__ == "__main__":
    main()
