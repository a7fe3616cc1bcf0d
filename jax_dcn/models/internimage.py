"""InternImage, and FlashInternImage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jax_dcn._checks import check_bool, check_data_format, to_count, to_integer, to_scale
from jax_dcn.mmcv.nn import (
    BatchNorm2d,
    Conv2d,
    LayerNorm,
    Linear,
    ModuleList,
    Sequential,
    adaptive_avg_pool2d,
    build_activation_layer,
)
from jax_dcn.models.common import to_nhwc
from jax_dcn.nnx import DCNv3, DCNv4

_CORES = ("DCNv3", "DCNv4")
_ACTIVATIONS = ("GELU", "ReLU", "SiLU")


def _identity(x: jax.Array) -> jax.Array:
    """Stands where the original changes the order of the axes, which is numbered in a Sequential."""
    return x


def _norm(channels: int, *, from_conv: bool = False, **options: Any) -> Sequential:
    """A LayerNorm under the original's name: behind a convolution, whose channels come first there, it is 1, else 0."""
    return Sequential(*[_identity] * from_conv, LayerNorm(channels, eps=1e-6, **options))


def _dropout(rate: float, rngs: nnx.Rngs, **options: Any) -> nnx.Dropout:
    """Without random state of its own where it drops nothing."""
    return nnx.Dropout(rate, rngs=rngs if rate else None, **options)


def _linear(in_features: int, out_features: int, bias: bool = True, **options: Any) -> Linear:
    init = nnx.initializers.normal(0.02)
    return Linear(in_features, out_features, bias, kernel_init=init, bias_init=nnx.initializers.zeros, **options)


class _Stem(nnx.Module):
    def __init__(self, channels: int, act_layer: str, **options: Any):
        self.conv1 = Conv2d(3, channels // 2, 3, 2, 1, **options)
        self.norm1 = _norm(channels // 2, from_conv=True, **options)
        self.act = build_activation_layer({"type": act_layer})
        self.conv2 = Conv2d(channels // 2, channels, 3, 2, 1, **options)
        self.norm2 = _norm(channels, from_conv=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, 3) -> (N, H/4, W/4, channels)
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class _Downsample(nnx.Module):
    def __init__(self, channels: int, **options: Any):
        self.conv = Conv2d(channels, 2 * channels, 3, 2, 1, bias=False, **options)
        self.norm = _norm(2 * channels, from_conv=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class _MLP(nnx.Module):
    def __init__(self, channels: int, ratio: float, drop: float, act_layer: str, fc2_bias: bool, **options: Any):
        self.fc1 = _linear(channels, int(channels * ratio), **options)
        self.act = build_activation_layer({"type": act_layer})
        self.fc2 = _linear(int(channels * ratio), channels, fc2_bias, **options)
        self.drop = _dropout(drop, options["rngs"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class _Layer(nnx.Module):
    """The operator and a perceptron, each with a norm, a scale and a shortcut."""

    def __init__(
        self,
        core: DCNv3 | DCNv4,
        *,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        act_layer: str,
        post_norm: bool,
        layer_scale: float | None,
        with_cp: bool,
        mlp_fc2_bias: bool,
        res_post_norm: bool,
        **options: Any,
    ):
        channels = core.channels
        self.dcn = core
        self.norm1, self.norm2 = _norm(channels, **options), _norm(channels, **options)
        self.mlp = _MLP(channels, mlp_ratio, drop, act_layer, mlp_fc2_bias, **options)
        # Stochastic depth: one draw for an image.
        self.drop_path = _dropout(drop_path, options["rngs"], broadcast_dims=(1, 2, 3))
        self.layer_scale, self.post_norm, self.res_post_norm = layer_scale is not None, post_norm, res_post_norm
        self.with_cp = with_cp
        if layer_scale is not None:
            self.gamma1 = nnx.Param(jnp.full(channels, layer_scale, options["param_dtype"]))
            self.gamma2 = nnx.Param(jnp.full(channels, layer_scale, options["param_dtype"]))
        if res_post_norm:
            self.res_post_norm1, self.res_post_norm2 = _norm(channels, **options), _norm(channels, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.remat(_Layer._forward)(self, x) if self.with_cp else self._forward(x)

    def _forward(self, x: jax.Array) -> jax.Array:
        for index, branch, norm in ((1, self.dcn, self.norm1), (2, self.mlp, self.norm2)):
            y = norm(branch(x)) if self.post_norm else branch(norm(x))
            if self.layer_scale:
                y = getattr(self, f"gamma{index}")[...].astype(y.dtype)[None, None, None] * y
            elif self.res_post_norm and not self.post_norm:
                y = getattr(self, f"res_post_norm{index}")(y)
            x = x + self.drop_path(y)
        return x


class _Block(nnx.Module):
    """A stage: layers, a norm, and the way to the next stage."""

    def __init__(
        self,
        layers: Sequence[_Layer],
        channels: int,
        *,
        norm: bool,
        post_norm_block_ids: Sequence[int],
        downsample: bool,
        **options: Any,
    ):
        self.blocks = ModuleList(layers)
        self.norm = _norm(channels, **options) if norm else None
        self.post_norm_block_ids = tuple(post_norm_block_ids)
        if post_norm_block_ids:
            self.post_norms = ModuleList([_norm(channels, **options) for _ in post_norm_block_ids])
        self.downsample = _Downsample(channels, **options) if downsample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The map before the downsampling."""
        for index, layer in enumerate(self.blocks):
            x = layer(x)
            if index in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(index)](x)
        return x if self.norm is None else self.norm(x)


class InternImage(nnx.Module):
    """InternImage (Wang et al. 2022, https://arxiv.org/abs/2211.05778), by its own arguments and state-dict names.

    With core_op="DCNv4" it is FlashInternImage (Xiong et al. 2024, https://arxiv.org/abs/2401.06197). InternImage-T is
    the default, with layer_scale=1.0; S, B, L and XL have other channels, depths, groups and scales. H and G have
    dw_kernel_size=5, res_post_norm, level2_post_norm and center_feature_scale besides, and a projector made of CLIP's,
    which is not built: take num_classes=None for their maps.

    Args:
      core_op: "DCNv3" (default) or "DCNv4".
      channels: of the first stage (default 64), doubled by every later one.
      depths, groups: layers, and groups of channels, of every stage (default (3, 4, 18, 5) and (4, 8, 16, 32); the
        original's default groups do not divide its default channels).
      num_classes: of the logits (default 1000); 0 gives the averaged features in their place; None leaves all behind
        the maps out, as detectors do.
      mlp_ratio: of the perceptrons' hidden channels (default 4.0).
      drop_rate: of the dropout behind the stem and in the perceptrons (default 0).
      drop_path_rate: of the stochastic depth (default 0.2), which grows to it layer by layer with
        drop_path_type="linear" (default), and is the same in all with "uniform".
      act_layer: "GELU" (default), "ReLU" or "SiLU".
      norm_layer: "LN".
      layer_scale: the first value of the branches' factors, or None (default) for no factors.
      offset_scale: as in `jax_dcn.dcnv3` (default 1.0, with DCNv4 0.5).
      post_norm: whether the norms come behind the operator and the perceptron (default False).
      cls_scale: channels behind the last stage, as a multiple of its own (default 1.5).
      with_cp: computes the layers again in the backward pass, to save memory (default False).
      dw_kernel_size: of the core operator's depthwise convolution (default its own).
      use_clip_projector: False.
      level2_post_norm, level2_post_norm_block_ids: norms behind these layers of the third stage (default none).
      res_post_norm: norms behind the branches, besides those before (default False).
      center_feature_scale: as in `jax_dcn.nnx.DCNv3` (default False); the original does not hand it to DCNv4.
      mlp_fc2_bias, dcn_output_bias: whether the perceptrons' and the operators' last layers have a bias (default True,
        with DCNv4 False).
      data_format: "NCHW" (default) or "NHWC", of images and maps.
      dtype, param_dtype, rngs: as in `nnx.Conv`. The random depth and dropout need `rngs` too.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """

    def __init__(
        self,
        core_op: str = "DCNv3",
        channels: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        groups: Sequence[int] = (4, 8, 16, 32),
        num_classes: int | None = 1000,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        drop_path_type: str = "linear",
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        layer_scale: float | None = None,
        offset_scale: float | None = None,
        post_norm: bool = False,
        cls_scale: float = 1.5,
        with_cp: bool = False,
        dw_kernel_size: int | None = None,
        use_clip_projector: bool = False,
        level2_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] | None = None,
        res_post_norm: bool = False,
        center_feature_scale: bool = False,
        mlp_fc2_bias: bool | None = None,
        dcn_output_bias: bool | None = None,
        *,
        data_format: str = "NCHW",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        check_data_format(name, data_format)
        for argument, value, known in (
            ("core_op", core_op, _CORES),
            ("act_layer", act_layer, _ACTIVATIONS),
            ("norm_layer", norm_layer, ("LN",)),
            ("drop_path_type", drop_path_type, ("linear", "uniform")),
        ):
            if value not in known:
                raise ValueError(f"{name}: {argument} must be {' or '.join(map(repr, known))}, got {value!r}")
        if use_clip_projector:
            raise ValueError(f"{name}: use_clip_projector must be False: the projector is not built")
        flash = core_op == "DCNv4"
        offset_scale = (0.5 if flash else 1.0) if offset_scale is None else offset_scale
        mlp_fc2_bias = not flash if mlp_fc2_bias is None else mlp_fc2_bias
        dcn_output_bias = not flash if dcn_output_bias is None else dcn_output_bias
        for argument, switch in (
            ("post_norm", post_norm),
            ("with_cp", with_cp),
            ("level2_post_norm", level2_post_norm),
            ("res_post_norm", res_post_norm),
            ("center_feature_scale", center_feature_scale),
            ("mlp_fc2_bias", mlp_fc2_bias),
            ("dcn_output_bias", dcn_output_bias),
        ):
            check_bool(name, argument, switch)
        channels = to_count(name, "channels", channels)
        for argument, sizes in (("depths", depths), ("groups", groups)):
            if not isinstance(sizes, (tuple, list)):
                raise TypeError(f"{name}: {argument} must be a sequence of integers, got {sizes!r}")
        depths = [to_count(name, "depths", depth) for depth in depths]
        groups = [to_count(name, "groups", group) for group in groups]
        if len(depths) != len(groups) or not depths or channels % 2:
            raise ValueError(
                f"{name}: channels must be even, and depths and groups of one length, got channels={channels}, "
                f"depths={depths}, groups={groups}"
            )
        if num_classes is not None and to_integer(name, "num_classes", num_classes) < 0:
            raise ValueError(f"{name}: num_classes must be None or at least 0, got {num_classes}")
        if not flash and not dcn_output_bias:
            raise ValueError(f"{name}: DCNv3 always has an output bias, got dcn_output_bias=False")
        for argument, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= to_scale(name, argument, rate) <= 1:
                raise ValueError(f"{name}: {argument} must be from 0 to 1, got {rate!r}")

        mlp_ratio, cls_scale = to_scale(name, "mlp_ratio", mlp_ratio), to_scale(name, "cls_scale", cls_scale)
        if layer_scale is not None:
            layer_scale = to_scale(name, "layer_scale", layer_scale)
        for argument, factor in (("mlp_ratio", mlp_ratio), ("cls_scale", cls_scale)):
            if channels * factor < 1:
                raise ValueError(f"{name}: channels * {argument} must be at least 1, got {channels * factor}")
        ids = [to_integer(name, "level2_post_norm_block_ids", i) for i in level2_post_norm_block_ids or ()]
        if level2_post_norm and (len(depths) < 3 or len(set(ids)) < len(ids) or not set(ids) <= set(range(depths[2]))):
            raise ValueError(
                f"{name}: level2_post_norm_block_ids must be different layers of the third stage, got {ids} for depths "
                f"{depths}"
            )

        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.data_format, self.num_classes = data_format, num_classes
        self.patch_embed = _Stem(channels, act_layer, **options)
        self.pos_drop = _dropout(drop_rate, rngs)
        if drop_path_type == "linear":
            rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        else:
            rates = iter([drop_path_rate] * sum(depths))

        def core(width: int, group: int) -> DCNv3 | DCNv4:
            common: dict[str, Any] = dict(group=group, offset_scale=offset_scale, dw_kernel_size=dw_kernel_size)
            if flash:
                return DCNv4(width, output_bias=dcn_output_bias, **common, **options)
            return DCNv3(width, act_layer=act_layer, center_feature_scale=center_feature_scale, **common, **options)

        levels = []
        for level, (depth, group) in enumerate(zip(depths, groups, strict=True)):
            width = channels * 2**level
            layers = [
                _Layer(
                    core(width, group),
                    mlp_ratio=mlp_ratio,
                    drop=drop_rate,
                    drop_path=next(rates),
                    act_layer=act_layer,
                    post_norm=post_norm,
                    layer_scale=layer_scale,
                    with_cp=with_cp,
                    mlp_fc2_bias=mlp_fc2_bias,
                    res_post_norm=res_post_norm,
                    **options,
                )
                for _ in range(depth)
            ]
            levels.append(
                _Block(
                    layers,
                    width,
                    norm=not post_norm or center_feature_scale,
                    post_norm_block_ids=ids if level2_post_norm and level == 2 else (),
                    downsample=level < len(depths) - 1,
                    **options,
                )
            )
        self.levels = ModuleList(levels)
        if num_classes is not None:
            features = channels * 2 ** (len(depths) - 1)
            hidden = int(features * cls_scale)
            self.conv_head = Sequential(
                Conv2d(features, hidden, 1, bias=False, **options),
                Sequential(BatchNorm2d(hidden, **options)),
                build_activation_layer({"type": act_layer}),
            )
            if num_classes:
                self.head = _linear(hidden, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits.

        Args:
          x: images (N, 3, H, W), or (N, H, W, 3) for NHWC.

        Returns:
          (N, num_classes), or for num_classes=0 the features, (N, channels of the last stage * cls_scale).

        Raises:
          TypeError, ValueError: x of another dtype, rank or number of channels, or a model without a head.
        """
        if self.num_classes is None:
            raise ValueError(f"{type(self).__name__}: with num_classes=None there are only feature_maps")
        y = adaptive_avg_pool2d(self.conv_head(self._maps(x)[-1]), 1)[:, 0, 0]
        return self.head(y) if self.num_classes else y

    def feature_maps(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The maps of all stages, before they are downsampled.

        Args:
          x: as above.

        Returns:
          For every stage i a map (N, channels * 2**i, H_i, W_i), or with the channels last for NHWC. H_i is about
          H / 2**(i + 2).
        """
        axis = self.data_format.index("C")
        return tuple(jnp.moveaxis(y, 3, axis) for y in self._maps(x))

    def _maps(self, x: jax.Array) -> list[jax.Array]:
        """Those of all stages, NHWC."""
        x = to_nhwc(type(self).__name__, x, self.data_format, 3)
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return maps
