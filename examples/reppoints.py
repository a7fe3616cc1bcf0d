"""RepPoints' head (Yang et al. 2019, https://arxiv.org/abs/1904.11490) with jax_dcn.

A detection head that brings its own offsets: it predicts nine points of an object at every pixel, and two deformable
convolutions look at exactly these points, to classify the object and to refine the points. The names are mmdet's, so
its weights load:

    python examples/reppoints.py reppoints_moment_r50_fpn_gn-neck+head_1x_coco.pth

A .pth takes torch to read. Without a file the head has random weights. It draws the points of one pixel, as
reppoints.png.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_dcn import mmcv, plot
from jax_dcn.mmcv.nn import Conv2d, ConvModule, Sequential
from jax_dcn.nnx import DeformConv2d

# (dy, dx) of the taps of a 3x3 kernel: what the operator adds to an offset by itself.
GRID = np.array([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], np.float32).reshape(-1)


class RepPointsHead(nnx.Module):
    """What mmdet's RepPointsHead computes of a feature map, NHWC inside and out. The defaults are mmdet's."""

    def __init__(
        self,
        num_classes: int = 80,
        in_channels: int = 256,
        feat_channels: int = 256,
        point_feat_channels: int = 256,
        stacked_convs: int = 3,
        num_groups: int = 32,
        gradient_mul: float = 0.1,
        *,
        rngs: nnx.Rngs,
    ):
        def tower() -> Sequential:
            channels = [in_channels] + [feat_channels] * stacked_convs
            norm_cfg = dict(type="GN", num_groups=num_groups)
            return Sequential(
                *(
                    ConvModule(c_in, feat_channels, 3, padding=1, norm_cfg=norm_cfg, rngs=rngs)
                    for c_in in channels[:stacked_convs]
                )
            )

        def deformable() -> DeformConv2d:
            return DeformConv2d(feat_channels, point_feat_channels, 3, padding=1, data_format="NHWC", rngs=rngs)

        def out(channels: int) -> Conv2d:
            return Conv2d(point_feat_channels, channels, 1, rngs=rngs)

        self.gradient_mul = gradient_mul
        self.cls_convs, self.reg_convs = tower(), tower()
        self.reppoints_cls_conv, self.reppoints_cls_out = deformable(), out(num_classes)
        self.reppoints_pts_init_conv = Conv2d(feat_channels, point_feat_channels, 3, padding=1, rngs=rngs)
        self.reppoints_pts_init_out = out(18)
        self.reppoints_pts_refine_conv, self.reppoints_pts_refine_out = deformable(), out(18)
        self.moment_transfer = nnx.Param(jnp.zeros(2))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A map (N, H, W, in_channels) -> class scores (N, H, W, num_classes), points and refined points (N, H, W, 18).

        Points are (dy, dx) from the pixel, in pixels of the map.
        """
        cls_feat, pts_feat = self.cls_convs(x), self.reg_convs(x)
        points = self.reppoints_pts_init_out(nnx.relu(self.reppoints_pts_init_conv(pts_feat)))
        # The convolutions below teach the points little, their own loss teaches them the rest.
        fixed = jax.lax.stop_gradient(points)
        offset = (1 - self.gradient_mul) * fixed + self.gradient_mul * points - GRID.astype(x.dtype)[None, None, None]
        scores = self.reppoints_cls_out(nnx.relu(self.reppoints_cls_conv(cls_feat, offset)))
        refined = self.reppoints_pts_refine_out(nnx.relu(self.reppoints_pts_refine_conv(pts_feat, offset)))
        return scores, points, refined + fixed

    def boxes(self, points: jax.Array) -> jax.Array:
        """Points (..., 18) -> boxes (..., 4) as x1, y1, x2, y2 from the pixel, by mean and deviation ("moment")."""
        points = points.reshape(*points.shape[:-1], 9, 2)
        centre, spread = points.mean(-2), points.std(-2, ddof=1)
        # mmdet learns the logarithms of the factors for width and height at a hundredth of the rate.
        transfer = self.moment_transfer[...]
        transfer = 0.01 * transfer + 0.99 * jax.lax.stop_gradient(transfer)
        half = spread * jnp.exp(transfer[::-1]).reshape((1,) * (spread.ndim - 1) + (2,))
        return jnp.concatenate([centre - half, centre + half], -1)[..., jnp.array([1, 0, 3, 2])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="a RepPoints detector of mmdet, with GroupNorm in the head")
    parser.add_argument("--output", default="reppoints.png")
    options = parser.parse_args(arguments)
    if options.checkpoint:
        channels, head = 256, nnx.eval_shape(lambda: RepPointsHead(rngs=nnx.Rngs(0)))
        mmcv.load_into(head, mmcv.load_checkpoint(options.checkpoint), prefix="bbox_head")
    else:
        channels, head = 32, RepPointsHead(20, 32, 32, 32, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 30, channels)), jnp.float32)
    scores, points, refined = nnx.jit(lambda head, x: head(x))(head, x)
    print(f"scores {scores.shape}, points {points.shape}, box at the centre {head.boxes(refined)[0, 10, 15]}")
    offset = points - GRID[None, None, None]
    plot.sampling_points(x[0, ..., 0], offset, data_format="NHWC").figure.savefig(options.output)
    print(f"The points of the pixel at the centre: {options.output}")


if __name__ == "__main__":
    main()
