"""DyHead (Dai et al. 2021, https://arxiv.org/abs/2106.08322) with jax_dcn.

mmdet's neck of that name: every level of a pyramid is mixed with its neighbours by deformable convolutions, which all
use the offsets of that level, then weighted by attention over levels and over channels. The names are mmdet's, so its
weights load:

    python examples/dyhead.py atss_r50_fpn_dyhead_4x4_1x_coco.pth

A .pth takes torch to read. Without a file the weights are random. It draws where one pixel of the second level samples
the first, as dyhead.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_dcn import mmcv, plot
from jax_dcn.mmcv.nn import (
    Conv2d,
    ConvModule,
    GroupNorm,
    Sequential,
    adaptive_avg_pool2d,
    build_activation_layer,
    interpolate,
    reread,
)
from jax_dcn.nnx import ModulatedDeformConv2d

HSIGMOID = dict(type="HSigmoid", bias=3.0, divisor=6.0)


def mean(x: jax.Array) -> jax.Array:
    return adaptive_avg_pool2d(x, 1)


class DyDCNv2(nnx.Module):
    """A deformable convolution with given offsets and mask, and GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, rngs: nnx.Rngs):
        options = dict(bias=False, data_format="NHWC", kernel_init=nnx.initializers.normal(0.01), rngs=rngs)
        self.conv = ModulatedDeformConv2d(in_channels, out_channels, 3, stride, 1, **options)
        self.norm = GroupNorm(16, out_channels, rngs=rngs)

    def __call__(self, x: jax.Array, offset: jax.Array, mask: jax.Array) -> jax.Array:
        return self.norm(self.conv(x, offset, mask))


class DyReLU(nnx.Module):
    """The larger of two lines of every channel, whose slopes and intercepts depend on the whole map."""

    def __init__(self, channels: int, ratio: int = 4, *, rngs: nnx.Rngs):
        self.conv1 = ConvModule(channels, channels // ratio, 1, rngs=rngs)
        self.conv2 = ConvModule(channels // ratio, channels * 4, 1, act_cfg=HSIGMOID, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        a1, b1, a2, b2 = jnp.split(self.conv2(self.conv1(mean(x))) - 0.5, 4, -1)
        return jnp.maximum(x * (a1 * 2 + 1) + b1, x * (a2 * 2) + b2)


class DyHeadBlock(nnx.Module):
    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.spatial_conv_high = DyDCNv2(in_channels, out_channels, rngs=rngs)
        self.spatial_conv_mid = DyDCNv2(in_channels, out_channels, rngs=rngs)
        self.spatial_conv_low = DyDCNv2(in_channels, out_channels, 2, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.spatial_conv_offset = Conv2d(in_channels, 27, 3, padding=1, kernel_init=zeros, bias_init=zeros, rngs=rngs)
        conv = Conv2d(out_channels, 1, 1, kernel_init=nnx.initializers.normal(0.01), bias_init=zeros, rngs=rngs)
        self.scale_attn_module = Sequential(mean, conv, nnx.relu, build_activation_layer(HSIGMOID))
        self.task_attn_module = DyReLU(out_channels, rngs=rngs)

    def sampling(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The offset and the mask of a level."""
        offset, mask = jnp.split(self.spatial_conv_offset(x), [18], -1)
        return offset, nnx.sigmoid(mask)

    def __call__(self, levels: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        outs = []
        for level, x in enumerate(levels):
            offset, mask = self.sampling(x)
            features = [self.spatial_conv_mid(x, offset, mask)]
            if level > 0:
                features.append(self.spatial_conv_low(levels[level - 1], offset, mask))
            if level < len(levels) - 1:
                above = levels[level + 1]
                # The level above is smaller than its offsets, which mmcv reads as they lie in memory.
                offset, mask = (reread(array, above.shape[1:3]) for array in (offset, mask))
                high = self.spatial_conv_high(above, offset, mask)
                features.append(interpolate(high, x.shape[1:3], mode="bilinear", align_corners=True))
            weighted = sum(feature * self.scale_attn_module(feature) for feature in features)
            outs.append(self.task_attn_module(weighted / len(features)))
        return tuple(outs)


class DyHead(nnx.Module):
    """mmdet's DyHead, of a pyramid from fine to coarse, each level half the size of the one before. NHWC."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int = 6, *, rngs: nnx.Rngs):
        channels = [in_channels] + [out_channels] * (num_blocks - 1)
        self.dyhead_blocks = Sequential(*(DyHeadBlock(c_in, out_channels, rngs=rngs) for c_in in channels))

    def __call__(self, levels: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Maps (N, H, W, in_channels) -> as many maps (N, H, W, out_channels)."""
        return self.dyhead_blocks(levels)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="a detector of mmdet with DyHead of six blocks behind its FPN")
    parser.add_argument("--output", default="dyhead.png")
    options = parser.parse_args(arguments)
    if options.checkpoint:
        channels, head = 256, nnx.eval_shape(lambda: DyHead(256, 256, rngs=nnx.Rngs(0)))
        mmcv.load_into(head, mmcv.load_checkpoint(options.checkpoint), prefix="neck.1")
    else:
        channels, head = 32, DyHead(32, 32, 2, rngs=nnx.Rngs(0))
        # Offsets begin at zero, which would make no picture.
        head.dyhead_blocks[0].spatial_conv_offset = Conv2d(32, 27, 3, padding=1, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    levels = [jnp.asarray(rng.normal(size=(1, 20 // n, 28 // n, channels)), jnp.float32) for n in (1, 2, 4)]
    outs = nnx.jit(lambda head, levels: head(levels))(head, levels)
    print("levels", *(out.shape for out in outs))
    offset, mask = head.dyhead_blocks[0].sampling(levels[1])
    axes = plot.sampling_points(levels[0][0, ..., 0], offset, mask=mask, stride=2, data_format="NHWC")
    axes.figure.savefig(options.output)
    print(f"Where the pixel at the centre of the second level samples the first: {options.output}")


if __name__ == "__main__":
    main()
