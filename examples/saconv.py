"""DetectoRS' switchable atrous convolution (Qiao et al. 2020, https://arxiv.org/abs/2006.02334) with jax_dcn.

mmcv's SAConv2d convolves twice with nearly the same weight, close by and three times as far apart, and mixes the
results as a map says; with use_deform both convolutions are deformable. The names are mmcv's, so the weights of a
DetectoRS backbone load:

    python examples/saconv.py detectors_cascade_rcnn_r50_1x_coco.pth --layer backbone.layer2.1.conv2

A .pth takes torch to read. Without a file the weights are random. It draws where one pixel samples, as saconv.png: the
small convolution's points orange, the large one's red.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_dcn
from jax_dcn import mmcv, plot
from jax_dcn.mmcv.nn import Conv2d, FrozenParam, adaptive_avg_pool2d


class SAConv2d(nnx.Module):
    """mmcv's SAConv2d with use_deform=True, NHWC inside and out. Its offsets are those of 3x3 taps."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        def conv(c_in: int, c_out: int, size: int, stride: int = 1, bias: float = 0) -> Conv2d:
            zeros, constant = nnx.initializers.zeros, nnx.initializers.constant(bias)
            return Conv2d(c_in, c_out, size, stride, size // 2, kernel_init=zeros, bias_init=constant, rngs=rngs)

        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(nnx.initializers.he_uniform()(rngs.params(), shape, jnp.float32))
        # What is not called kernel keeps torch's layout.
        self.weight_diff = nnx.Param(jnp.zeros((shape[3], shape[2], *shape[:2]), jnp.float32))
        # Buffers in torch.
        self.weight_gamma = FrozenParam(jnp.ones((out_channels, 1, 1, 1), jnp.float32))
        self.weight_beta = FrozenParam(jnp.zeros((out_channels, 1, 1, 1), jnp.float32))
        self.switch = conv(in_channels, 1, 1, stride, bias=1)
        self.pre_context, self.post_context = conv(in_channels, in_channels, 1), conv(out_channels, out_channels, 1)
        self.offset_s, self.offset_l = conv(in_channels, 18, 3, stride), conv(in_channels, 18, 3, stride)

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Those of the small and of the large convolution: standardized, by the unbiased variance as torch's."""
        kernel = self.kernel[...]
        axes = (0, 1, 2)
        deviation = jnp.sqrt(kernel.var(axes, keepdims=True, ddof=1) + 1e-5)
        gamma, beta = self.weight_gamma[...].reshape(1, 1, 1, -1), self.weight_beta[...].reshape(1, 1, 1, -1)
        small = gamma * (kernel - kernel.mean(axes, keepdims=True)) / deviation + beta
        return small, small + self.weight_diff[...].transpose(2, 3, 1, 0)

    def context(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x with its global context, and means over 5x5 pixels of it."""
        x = x + self.pre_context(adaptive_avg_pool2d(x, 1))
        return x, nnx.avg_pool(jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), "reflect"), (5, 5))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, in_channels) -> (N, H_out, W_out, out_channels)."""
        x, means = self.context(x)

        def convolve(offset: jax.Array, weight: jax.Array, scale: int) -> jax.Array:
            geometry = (self.stride, scale * self.padding, scale * self.dilation, self.groups)
            return jax_dcn.deform_conv2d(x, offset, weight, *geometry, data_format="NHWC")

        switch, (small, large) = self.switch(means), self.weights()
        near, far = convolve(self.offset_s(means), small, 1), convolve(self.offset_l(means), large, 3)
        out = switch * near + (1 - switch) * far
        return out + self.post_context(adaptive_avg_pool2d(out, 1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="a DetectoRS detector of mmdet")
    parser.add_argument("--layer", default="backbone.layer2.1.conv2", help="one of stride 1")
    parser.add_argument("--output", default="saconv.png")
    options = parser.parse_args(arguments)
    if options.checkpoint:
        state_dict = mmcv.load_checkpoint(options.checkpoint, options.layer)
        channels, in_channels = state_dict["weight"].shape[:2]
        layer = mmcv.load_into(SAConv2d(in_channels, channels, padding=1, rngs=nnx.Rngs(0)), state_dict)
    else:
        in_channels, layer = 16, SAConv2d(16, 16, padding=1, rngs=nnx.Rngs(0))
        # At first all of the map comes from the small convolution, and offsets are zero.
        layer.switch = Conv2d(16, 1, 1, bias_init=nnx.initializers.constant(0.5), rngs=nnx.Rngs(0))
        layer.offset_s, layer.offset_l = (Conv2d(16, 18, 3, padding=1, rngs=nnx.Rngs(seed)) for seed in (1, 2))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 28, in_channels)), jnp.float32)
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    _, means = layer.context(x)
    print(f"map {y.shape}, {float(layer.switch(means).mean()):.0%} of it from the small convolution")
    axes = plot.sampling_points(x[0, ..., 0], layer.offset_s(means), data_format="NHWC")
    axes.collections[0].set_color("#ff7f0e")  # those of the small convolution
    plot.sampling_points(x[0, ..., 0], layer.offset_l(means), padding=3, dilation=3, axes=axes, data_format="NHWC")
    axes.figure.savefig(options.output)
    print(f"Where the pixel at the centre samples: {options.output}")


if __name__ == "__main__":
    main()
