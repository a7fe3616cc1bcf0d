"""mmdet's ResNet and ResNeXt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_dcn._checks import check_data_format, to_count, to_integer
from jax_dcn.mmcv.nn import BatchNorm2d, Conv2d, Sequential, max_pool2d
from jax_dcn.mmcv.nn.parameters import freeze_parameters, kaiming_init
from jax_dcn.models.common import freeze, to_nhwc, trains_norms
from jax_dcn.nnx import DeformConv2dPack, ModulatedDeformConv2dPack

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_BASIC = (18, 34)  # the depths of BasicBlocks
_DCN = {"DCN": DeformConv2dPack, "DCNv2": ModulatedDeformConv2dPack}


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    **options: Any,
) -> Conv2d:
    """Padded to keep the size, without a bias."""
    return Conv2d(
        *(in_channels, out_channels, kernel_size, stride, dilation * (kernel_size // 2), dilation, groups),
        bias=False,
        kernel_init=kaiming_init(),
        **options,
    )


def _last_scale(zero_init_residual: bool) -> nnx.Initializer:
    return nnx.initializers.zeros if zero_init_residual else nnx.initializers.ones


def _shortcut(in_channels: int, out_channels: int, stride: int, *, norm_eval: bool, **options: Any) -> Sequential:
    """What brings a block's input to the size of its output, or nothing."""
    if stride == 1 and in_channels == out_channels:
        return Sequential()
    return Sequential(
        _conv(in_channels, out_channels, 1, stride, **options),
        BatchNorm2d(out_channels, norm_eval=norm_eval, **options),
    )


class BasicBlock(nnx.Module):
    """A residual block: two convolutions of 3x3 taps. NHWC."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        zero_init_residual: bool,
        norm_eval: bool,
        **options: Any,
    ):
        self.conv1 = _conv(in_channels, planes, 3, stride, dilation, **options)
        self.bn1 = BatchNorm2d(planes, norm_eval=norm_eval, **options)
        self.conv2 = _conv(planes, planes, 3, **options)
        self.bn2 = BatchNorm2d(planes, scale_init=_last_scale(zero_init_residual), norm_eval=norm_eval, **options)
        self.downsample = _shortcut(in_channels, planes, stride, norm_eval=norm_eval, **options)

    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, in_channels) -> (N, H/stride, W/stride, planes)
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self.downsample(x))


class Bottleneck(nnx.Module):
    """A residual block: convolutions of 1x1, 3x3 (perhaps deformable) and 1x1 taps. NHWC."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        width: int,
        stride: int,
        dilation: int,
        style: str,
        groups: int,
        dcn: Mapping[str, Any] | None,
        zero_init_residual: bool,
        norm_eval: bool,
        **options: Any,
    ):
        stride1, stride2 = (1, stride) if style == "pytorch" else (stride, 1)
        out_channels = planes * self.expansion
        self.conv1 = _conv(in_channels, width, 1, stride1, **options)
        self.bn1 = BatchNorm2d(width, norm_eval=norm_eval, **options)
        if dcn is None:
            self.conv2 = _conv(width, width, 3, stride2, dilation, groups, **options)
        else:
            self.conv2 = _DCN[dcn["type"]](
                *(width, width, 3, stride2, dilation, dilation, groups, dcn["deform_groups"]),
                bias=False,
                data_format="NHWC",
                **options,
            )
        self.bn2 = BatchNorm2d(width, norm_eval=norm_eval, **options)
        self.conv3 = _conv(width, out_channels, 1, **options)
        self.bn3 = BatchNorm2d(out_channels, scale_init=_last_scale(zero_init_residual), norm_eval=norm_eval, **options)
        self.downsample = _shortcut(in_channels, out_channels, stride, norm_eval=norm_eval, **options)

    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, in_channels) -> (N, H/stride, W/stride, 4*planes)
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + self.downsample(x))


class ResNet(nnx.Module):
    """mmdet's ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385) with deformable convolutions in some stages.

    Stage i (0 to 3) is the attribute `layer{i+1}`, a `Sequential` of blocks with mmdet's names. `out_channels` has the
    channels of every map.

    Args:
      depth: 18 or 34, of blocks with two 3x3 convolutions, or 50, 101 or 152, of blocks with one between two of 1x1.
      in_channels: channels of the image (default 3).
      stem_channels: channels after the first convolution (default base_channels).
      base_channels: the width of the first stage, doubled by every later one (default 64). From depth 50 on a stage
        puts out four times its width.
      num_stages: 1 to 4 (default 4).
      strides, dilations: of every stage (default (1, 2, 2, 2) and (1, 1, 1, 1)). Only the first num_stages count.
      out_indices: the stages whose maps are returned (default all).
      style: "pytorch" (default) puts a block's stride on its 3x3 convolution, "caffe" on its first 1x1 convolution.
        Below depth 50 both put it on the first 3x3 convolution, as in mmdet.
      frozen_stages: the last stage that is not trained, counted from 1; 0 freezes only the stem, -1 (default) nothing.
        Frozen parameters are `FrozenParam`s, and their normalisations keep their statistics.
      norm_cfg: `dict(type="BN", requires_grad=True)`; requires_grad=False freezes the scales and biases of all
        normalisations. "SyncBN" and "BN2d" are the same here.
      norm_eval: whether the normalisations keep their statistics in training (default True, as in mmdet).
      dcn: None, or dict(type="DCN" or "DCNv2", deform_groups=1, fallback_on_stride=False), for the 3x3 convolution of
        the blocks, from depth 50 on. mmdet takes fallback_on_stride out of the dict when the first block reads it, so
        True leaves only the first block of the first deformable stage with a plain convolution, whatever its stride; so
        it is here.
      stage_with_dcn: for every stage, whether it uses dcn (default no).
      groups: groups of the 3x3 convolutions (default 1), more of which make it a ResNeXt, from depth 50 on.
      base_width: with groups, a block of a stage with `planes` channels is floor(planes * base_width / base_channels) *
        groups wide (default 4).
      zero_init_residual: whether the last normalisation of a block begins with a scale of 0 (default True).
      data_format: "NCHW" (default) or "NHWC", that of the image and the maps.
      dtype: of the computation (default: to which image and parameters promote). The offsets come out of convolutions
        of this dtype, so bfloat16 rounds one of 2 to 4 pixels to 1/64; coordinates are computed in float32.
      param_dtype: of parameters and statistics (default float32).
      rngs: as in `nnx.Conv`.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """

    _depths: ClassVar[tuple[int, ...]] = tuple(_BLOCKS)
    # mmdet's ResNeXt looks for fallback_on_stride once its base class has taken it out.
    _falls_back = True

    def __init__(
        self,
        depth: int,
        *,
        in_channels: int = 3,
        stem_channels: int | None = None,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: str = "pytorch",
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool = True,
        dcn: Mapping[str, Any] | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        groups: int = 1,
        base_width: int = 4,
        zero_init_residual: bool = True,
        data_format: str = "NCHW",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        check_data_format(name, data_format)
        if depth not in self._depths:
            raise ValueError(f"{name}: depth must be one of {self._depths}, got {depth}")
        if style not in ("pytorch", "caffe"):
            raise ValueError(f"{name}: style must be 'pytorch' or 'caffe', got {style!r}")
        if not 1 <= to_integer(name, "num_stages", num_stages) <= 4:
            raise ValueError(f"{name}: num_stages must be from 1 to 4, got {num_stages}")
        for argument, value in (("strides", strides), ("dilations", dilations), ("stage_with_dcn", stage_with_dcn)):
            if len(value) < num_stages:
                raise ValueError(f"{name}: {argument} has {len(value)} entries, expected {num_stages} = num_stages")
        for argument, value in (("strides", strides), ("dilations", dilations)):
            for entry in value[:num_stages]:
                to_count(name, argument, entry)
        for argument, count in (("base_channels", base_channels), ("groups", groups), ("base_width", base_width)):
            to_count(name, argument, count)
        if not out_indices or not all(0 <= index < num_stages for index in out_indices):
            raise ValueError(f"{name}: out_indices must be stages below {num_stages} = num_stages, got {out_indices}")
        if not -1 <= to_integer(name, "frozen_stages", frozen_stages) <= num_stages:
            raise ValueError(f"{name}: frozen_stages must be from -1 to {num_stages}, got {frozen_stages}")
        fallback, dcn = _check_dcn(name, dcn)
        basic = depth in _BASIC
        if basic and (groups > 1 or (dcn is not None and any(stage_with_dcn[:num_stages]))):
            raise ValueError(f"{name}: depth {depth} has neither deformable blocks nor groups, as in mmdet")
        norms_trained = trains_norms(name, norm_cfg)
        self.data_format, self.in_channels, self.out_indices = data_format, in_channels, tuple(out_indices)
        options: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        block_options: dict[str, Any] = dict(zero_init_residual=zero_init_residual, norm_eval=norm_eval, **options)

        channels = base_channels if stem_channels is None else stem_channels
        self.conv1 = _conv(in_channels, channels, 7, 2, **options)
        self.bn1 = BatchNorm2d(channels, norm_eval=norm_eval, **options)
        plain_blocks = int(fallback and self._falls_back)  # deformable blocks that are left plain
        stage_channels = []
        for stage in range(num_stages):
            planes = base_channels * 2**stage
            blocks: list[BasicBlock | Bottleneck] = []
            for index in range(_BLOCKS[depth][stage]):
                sizes: dict[str, Any] = dict(stride=strides[stage] if index == 0 else 1, dilation=dilations[stage])
                if basic:
                    blocks.append(BasicBlock(channels, planes, **sizes, **block_options))
                else:
                    deformable = dcn is not None and stage_with_dcn[stage]
                    left_plain = deformable and plain_blocks > 0
                    plain_blocks -= left_plain
                    width = planes if groups == 1 else math.floor(planes * (base_width / base_channels)) * groups
                    block_dcn = dcn if deformable and not left_plain else None
                    blocks.append(
                        Bottleneck(
                            channels,
                            planes,
                            width=width,
                            style=style,
                            groups=groups,
                            dcn=block_dcn,
                            **sizes,
                            **block_options,
                        )
                    )
                channels = planes * blocks[-1].expansion
            stage_channels.append(channels)
            setattr(self, f"layer{stage + 1}", Sequential(*blocks))

        self.out_channels = tuple(stage_channels[index] for index in self.out_indices)
        if frozen_stages >= 0:
            freeze(self.conv1)
            freeze(self.bn1)
        for stage in range(frozen_stages):
            freeze(self._stage(stage))
        if not norms_trained:
            for _, node in nnx.iter_graph(self):
                if isinstance(node, BatchNorm2d):
                    freeze_parameters(node)

    def _stage(self, stage: int) -> Sequential:
        return getattr(self, f"layer{stage + 1}")

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Computes the feature maps.

        Args:
          x: images (N, in_channels, H, W), or (N, H, W, in_channels) for NHWC, of a floating-point dtype.

        Returns:
          For every stage i of out_indices a map (N, base_channels * 2**(i + 2), H_i, W_i), below depth 50 with a
          quarter of these channels, or with the channels last for NHWC. H_i is about H / 2**(i + 2).

        Raises:
          TypeError, ValueError: x of another dtype, rank or number of channels.
        """
        x = to_nhwc(type(self).__name__, x, self.data_format, self.in_channels)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in range(max(self.out_indices) + 1):
            x = self._stage(stage)(x)
            maps.append(x)
        axis = self.data_format.index("C")
        return tuple(jnp.moveaxis(maps[stage], 3, axis) for stage in self.out_indices)


class ResNeXt(ResNet):
    """mmdet's ResNeXt (Xie et al. 2016, https://arxiv.org/abs/1611.05431): `ResNet` with groups and base_width.

    "32x4d" is groups=32, base_width=4. The arguments, shapes and errors are those of `ResNet`, but in mmdet's ResNeXt
    fallback_on_stride has no effect, so it has none here. Its depths are 50, 101 and 152.
    """

    _depths = (50, 101, 152)
    _falls_back = False


def _check_dcn(name: str, dcn: Mapping[str, Any] | None) -> tuple[bool, dict[str, Any] | None]:
    """fallback_on_stride, and the type and deform_groups of dcn."""
    if dcn is None:
        return False, None
    if not isinstance(dcn, Mapping):
        raise TypeError(f"{name}: dcn must be a dict, got {type(dcn).__name__}")
    if dcn.get("type") not in _DCN:
        raise ValueError(f"{name}: dcn's type must be one of {tuple(_DCN)}, got {dcn.get('type')!r}")
    known = {"type", "fallback_on_stride", "deform_groups", "deformable_groups"}
    if unknown := set(dcn) - known:
        raise ValueError(f"{name}: dcn has unknown entries {sorted(unknown)}")
    # mmcv's old configs say deformable_groups.
    deform_groups = dcn.get("deform_groups", dcn.get("deformable_groups", 1))
    return dcn.get("fallback_on_stride", False), dict(type=dcn["type"], deform_groups=deform_groups)
