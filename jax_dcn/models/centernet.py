"""mmdet's CenterNet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jax_dcn._checks import check_bool, check_data_format, to_count
from jax_dcn.mmcv.nn import Conv2d, ConvModule, Sequential, max_pool2d
from jax_dcn.mmcv.nn.parameters import torchs_kernel_init
from jax_dcn.models.common import from_config, to_entries, to_nhwc
from jax_dcn.models.resnet import ResNet

# What mmdet initialises a heatmap's bias for: the share of centres among its pixels.
_PRIOR = 0.1


class CTResNetNeck(nnx.Module):
    """mmdet's CTResNetNeck: n convolutions, perhaps deformable, each before a transposed one of stride 2. NHWC."""

    def __init__(
        self,
        in_channels: int,
        num_deconv_filters: Sequence[int],
        num_deconv_kernels: Sequence[int],
        use_dcn: bool = True,
        **options: Any,
    ):
        name = type(self).__name__
        check_bool(name, "use_dcn", use_dcn)
        for argument, sizes in (("num_deconv_filters", num_deconv_filters), ("num_deconv_kernels", num_deconv_kernels)):
            if not isinstance(sizes, (tuple, list)):
                raise TypeError(f"{name}: {argument} must be a sequence of integers, got {sizes!r}")
        if not num_deconv_filters or len(num_deconv_filters) != len(num_deconv_kernels):
            raise ValueError(
                f"{name}: num_deconv_filters and num_deconv_kernels must have one entry each for every transposed "
                f"convolution, got {num_deconv_filters} and {num_deconv_kernels}"
            )
        self.in_channels, self.out_channels = to_count(name, "in_channels", in_channels), num_deconv_filters[-1]
        conv: dict[str, Any] = dict(padding=1, norm_cfg=dict(type="BN"), **options)
        upsample = dict(stride=2, conv_cfg=dict(type="deconv"), kernel_init=_upsampling_init, **conv)
        # mmdet leaves DCNv2's initial values alone, and gives torch's to the plain convolution.
        conv |= dict(conv_cfg=dict(type="DCNv2")) if use_dcn else dict(kernel_init=torchs_kernel_init)
        layers, channels = [], self.in_channels
        for filters, kernel in zip(num_deconv_filters, num_deconv_kernels, strict=True):
            layers.append(ConvModule(channels, filters, 3, **conv))
            layers.append(ConvModule(filters, filters, kernel, **upsample))
            channels = filters
        self.deconv_layers = Sequential(*layers)

    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, in_channels) -> (N, 2**n*H, 2**n*W, out_channels)
        return self.deconv_layers(x)


def _upsampling_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """torch's, but that every input reaches the first output through a bilinear kernel, as in mmdet."""
    rows, columns, _, _ = shape
    factor = math.ceil(rows / 2)
    centre = (2 * factor - 1 - factor % 2) / (2 * factor)
    row, column = (1 - np.abs(np.arange(size) / factor - centre) for size in (rows, columns))
    kernel = torchs_kernel_init(key, shape, dtype)
    return kernel.at[:, :, 0].set(jnp.asarray(np.outer(row, column)[..., None], dtype))


class CenterNetHead(nnx.Module):
    """mmdet's CenterNetHead. NHWC."""

    def __init__(self, in_channels: int, feat_channels: int, num_classes: int, **options: Any):
        name = type(self).__name__
        self.in_channels = to_count(name, "in_channels", in_channels)
        self.num_classes = to_count(name, "num_classes", num_classes)

        def branch(channels: int, first: Mapping[str, Any], last: Mapping[str, Any]) -> Sequential:
            return Sequential(
                Conv2d(in_channels, feat_channels, 3, padding=1, **first, **options),
                nnx.relu,
                Conv2d(feat_channels, channels, 1, **last, **options),
            )

        prior = dict(bias_init=nnx.initializers.constant(math.log(_PRIOR / (1 - _PRIOR))))
        small = dict(kernel_init=nnx.initializers.normal(0.001), bias_init=nnx.initializers.zeros)
        self.heatmap_head = branch(self.num_classes, {}, prior)
        self.wh_head, self.offset_head = branch(2, small, small), branch(2, small, small)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:  # of num_classes, 2 and 2 channels
        return nnx.sigmoid(self.heatmap_head(x)), self.wh_head(x), self.offset_head(x)


# Entries of which one value is built, and entries without effect.
_RESNET_ONLY = dict(deep_stem=False, avg_down=False, conv_cfg=None, plugins=None, with_cp=False)
_HEAD_UNUSED = ("init_cfg", "loss_center_heatmap", "loss_wh", "loss_offset", "train_cfg", "test_cfg")

_TEST_CFG = dict(topk=100, local_maximum_kernel=3, max_per_img=100)


class CenterNet(nnx.Module):
    """mmdet's CenterNet (Zhou et al. 2019, https://arxiv.org/abs/1904.07850) on a ResNet, from images to boxes.

    The arguments are mmdet's config dicts, so `CenterNet(**config["model"], rngs=rngs)` builds what a config describes,
    and `jax_dcn.mmcv.load_into` fills it from mmdet's checkpoint. The parts are the attributes `backbone`, `neck` and
    `bbox_head`.

    Args:
      backbone: dict(type="ResNet", ...), with the arguments of `ResNet`, depth 18 or 34 or deeper.
      neck: dict(type="CTResNetNeck", in_channels=, num_deconv_filters=, num_deconv_kernels=, use_dcn=True): for each
        filter a convolution, DCNv2 with use_dcn, and a transposed one of stride 2.
      bbox_head: dict(type="CenterNetHead", num_classes=, in_channels=, feat_channels=).
      test_cfg: dict(topk=100, local_maximum_kernel=3, max_per_img=100): how many maxima of the heatmap are looked at,
        over how many pixels a side they are maxima, an odd number, and how many boxes `predict` returns.
      train_cfg, data_preprocessor, init_cfg, and in the dicts init_cfg, pretrained and the losses: accepted, unused.
        Images come in normalised; `centernet_loss` is the loss.
      type: "CenterNet".
      data_format: "NCHW" (default) or "NHWC", that of the image and of what the model returns.
      dtype, param_dtype, rngs: as in `ResNet`.

    Raises:
      TypeError: a dict that is none, or with an entry that mmdet does not know, or without one that it needs.
      ValueError: values that do not fit one another, or that are not built.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        neck: Mapping[str, Any],
        bbox_head: Mapping[str, Any],
        train_cfg: Any = None,
        test_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: Any = None,
        init_cfg: Any = None,
        *,
        type: str = "CenterNet",
        data_format: str = "NCHW",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        name = "CenterNet"
        check_data_format(name, data_format)
        if type != name:
            raise ValueError(f"{name}: type must be {name!r}, got {type!r}")
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.backbone = from_config(
            f"{name}: backbone",
            backbone,
            ResNet,
            ("init_cfg", "pretrained"),
            _RESNET_ONLY,
            # Not from the dict: mmdet's ResNet knows neither.
            groups=1,
            base_width=4,
            data_format="NHWC",
            **options,
        )
        self.neck = from_config(f"{name}: neck", neck, CTResNetNeck, ("init_cfg",), {}, **options)
        self.bbox_head = from_config(f"{name}: bbox_head", bbox_head, CenterNetHead, _HEAD_UNUSED, {}, **options)
        channels, filters = self.backbone.out_channels[-1], self.neck.out_channels
        if self.neck.in_channels != channels:
            raise ValueError(
                f"{name}: neck's in_channels is {self.neck.in_channels}, expected {channels} = the backbone's last map"
            )
        if self.bbox_head.in_channels != filters:
            raise ValueError(
                f"{name}: bbox_head's in_channels is {self.bbox_head.in_channels}, expected {filters} = the neck's last"
            )
        self.test_cfg = _check_test_cfg(f"{name}: test_cfg", test_cfg)
        self.data_format = data_format

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The maps of the head.

        Args:
          x: normalised images (N, 3, H, W), or (N, H, W, 3) for NHWC. With H and W multiples of 32, four stages and
            three transposed convolutions of kernel 4 the maps are H/4 by W/4.

        Returns:
          For every pixel of the maps
          heatmap: (N, num_classes, H/4, W/4), or with the channels last for NHWC, the probability that an object of a
            class has its centre there;
          wh: (N, 2, H/4, W/4), its width and height, in pixels of the map;
          offset: likewise, where its centre is, (x, y) from the pixel.

        Raises:
          TypeError, ValueError: x of another dtype, rank or number of channels.
        """
        axis = self.data_format.index("C")
        heatmap, wh, offset = (jnp.moveaxis(y, 3, axis) for y in self._maps(self._images(x)))
        return heatmap, wh, offset

    def predict(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Detects objects, inside `jit` too. As in mmdet, boxes are neither clipped to the image nor suppressed.

        Args:
          x: as above.

        Returns:
          boxes: (N, max_per_img, 4), (x1, y1, x2, y2) in pixels of x, float32, or float64 if that is x's;
          scores: (N, max_per_img), in descending order, of the same dtype. Beyond topk, or where the heatmap has no
            further maxima, they are 0, and boxes and labels mean nothing;
          labels: (N, max_per_img), the classes from 0, int32.

        Raises:
          TypeError, ValueError: as above.
        """
        x = self._images(x)
        return _detections(*self._maps(x), x.shape[1:3], self.test_cfg)

    def _images(self, x: jax.Array) -> jax.Array:
        return to_nhwc("CenterNet", x, self.data_format, self.backbone.in_channels)

    def _maps(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Those of the head, NHWC, as x."""
        return self.bbox_head(self.neck(self.backbone(x)[-1]))


def _check_test_cfg(name: str, cfg: Any) -> dict[str, int]:
    entries = {**_TEST_CFG, **to_entries(name, {} if cfg is None else cfg, _TEST_CFG)}
    test_cfg = {entry: to_count(name, entry, value) for entry, value in entries.items()}
    if test_cfg["local_maximum_kernel"] % 2 == 0:
        raise ValueError(f"{name}: local_maximum_kernel must be odd, got {test_cfg['local_maximum_kernel']}")
    return test_cfg


def _detections(
    heatmap: jax.Array,  # (N, h, w, num_classes)
    wh: jax.Array,  # (N, h, w, 2)
    offset: jax.Array,  # (N, h, w, 2)
    size: Sequence[int],  # of the image
    test_cfg: Mapping[str, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:  # (N, max_per_img, 4), (N, max_per_img), (N, max_per_img)
    batch, height, width, classes = heatmap.shape
    # A bfloat16 has no odd column above 256.
    heatmap, wh, offset = (y.astype(jnp.promote_types(y.dtype, jnp.float32)) for y in (heatmap, wh, offset))
    kernel, count = test_cfg["local_maximum_kernel"], test_cfg["max_per_img"]
    around = max_pool2d(heatmap, kernel, 1, kernel // 2)
    places = height * width * classes
    maxima = jnp.where(around == heatmap, heatmap, 0).reshape(batch, places)
    # With a recall of 1 it is top_k, which XLA does not share among devices: it would gather the maps of all images.
    scores, index = lax.approx_max_k(maxima, min(test_cfg["topk"], count, places), recall_target=1.0)
    pixel, labels = index // classes, index % classes
    values = jnp.concatenate([wh, offset], 3).reshape(batch, height * width, 4)
    at_pixel = jnp.take_along_axis(values, pixel[..., None], axis=1)  # (N, scores, 4)
    centre = jnp.stack([pixel % width, pixel // width], -1) + at_pixel[..., 2:]
    half = at_pixel[..., :2] / 2
    stride = np.array([size[1] / width, size[0] / height] * 2, scores.dtype)
    boxes = jnp.concatenate([centre - half, centre + half], -1) * stride.reshape(1, 1, 4)
    missing = (0, 0), (0, count - scores.shape[1])
    return jnp.pad(boxes, (*missing, (0, 0))), jnp.pad(scores, missing), jnp.pad(labels, missing)
