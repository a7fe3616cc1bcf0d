"""The layers for flax.linen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_dcn._layers import attention, conv, dcnv3, parts

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    raise ImportError("jax_dcn.linen needs Flax: pip install jax_dcn[flax]") from error

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
]


class _Named:
    """Errors begin with the class and the path within the model."""

    @property
    def _name(self) -> str:
        name = type(self).__name__
        # A module outside of init and apply has no path. The class is for the type checker.
        path = self.path if isinstance(self, nn.Module) and getattr(self, "scope", None) else ()
        return f"{name} {'/'.join(path)}" if path else name


class DeformConv2d(_Named, conv.DeformConv2d, nn.Module):
    """Deformable convolution with given offsets (DCNv1, Dai et al. 2017, https://arxiv.org/abs/1703.06211).

    The layer of `mmcv.ops.DeformConv2d` over `jax_dcn.deform_conv2d`, which gives the formula and the shapes.

    Parameters, of `param_dtype`, whatever the data format:
      kernel  (kh, kw, in_channels/groups, out_channels)
      bias    (out_channels,), with bias=True

    Attributes:
      in_channels: channels of the input.
      out_channels: channels of the output.
      kernel_size, stride (default 1), dilation (1): an int or a pair (height, width).
      padding: an int (default 0), a pair, pairs ((top, bottom), (left, right)), or "SAME", "SAME_LOWER" or "VALID", as
        in `jax_dcn.deform_conv2d`.
      groups: weight groups (default 1). in_channels and out_channels must be multiples.
      deform_groups: groups of input channels with offsets of their own (default 1). in_channels must be a multiple.
      bias: whether to add a learnable bias (default False; mmcv refuses True).
      im2col_step: accepted for mmcv's sake (default 32); it changes nothing, see `jax_dcn.deform_conv2d`.
      dtype: the dtype to which x, kernel and bias are cast, and that of the result (default: to which they promote).
      param_dtype: the dtype of the parameters (default float32).
      precision: as in `jax.lax.conv_general_dilated` (default None).
      kernel_init: default None, which is mmcv's: uniform within sqrt(6 / fan_in), fan_in = in_channels/groups*kh*kw.
      bias_init: default zeros.
      data_format: "NCHW" (default, mmcv's) or "NHWC" (Flax's), that of x, offset and the result.
      forward_mode: whether `jax.jvp` and what is made of it may differentiate the layer (default False): see
        `jax_dcn.deform_conv2d`.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: arguments that do not fit one another.
    """

    def __post_init__(self) -> None:
        self._check_arguments(self.bias)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, offset: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
          x: (N, in_channels, H, W), or (N, H, W, in_channels) for NHWC. In place of N there may be any number of axes,
            or none, here and in all that follows, as in Flax's Conv.
          offset: (N, deform_groups*kh*kw*2, H_out, W_out), or with the channels last for NHWC. It keeps its dtype,
            which may be wider than x's.

        Returns:
          (N, out_channels, H_out, W_out), or (N, H_out, W_out, out_channels) for NHWC.
        """
        return self._convolve(*_promoted(self, x), offset)


class DeformConv2dPack(DeformConv2d):
    """`DeformConv2d` that computes its offsets from its input, as `mmcv.ops.DeformConv2dPack` does.

    The submodule `conv_offset` is a plain convolution with the layer's kernel size, stride, padding and dilation, but
    groups 1 and always a bias. It is all zeros at first, so the layer begins as a plain convolution; kernel_init and
    bias_init do not reach it. It computes in the layer's dtype, so the offsets have that dtype too.

    Parameters, besides those of `DeformConv2d`, whose attributes it has as well:
      conv_offset/kernel  (kh, kw, in_channels, deform_groups*kh*kw*2)
      conv_offset/bias    (deform_groups*kh*kw*2,)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # as in mmcv
        """Applies the layer to x, whose shape and the result's are as in `DeformConv2d`."""
        return self._convolve(*_promoted(self, x), *self._predict(_conv_offset(self), x))


class ModulatedDeformConv2d(_Named, conv.ModulatedDeformConv2d, nn.Module):
    """Modulated deformable convolution (DCNv2, Zhu et al. 2018, https://arxiv.org/abs/1811.11168).

    The layer of `mmcv.ops.ModulatedDeformConv2d` over `jax_dcn.modulated_deform_conv2d`. Its parameters and
    attributes are those of `DeformConv2d`, except:

    Attributes:
      bias: default True.
      im2col_step: does not exist.
      kernel_init: default None, which is mmcv's: uniform within 1 / sqrt(in_channels*kh*kw).
    """

    def __post_init__(self) -> None:
        self._check_arguments(self.bias)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, offset: jax.Array, mask: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
          x, offset: as in `DeformConv2d`.
          mask: (N, deform_groups*kh*kw, H_out, W_out), or with the channels last for NHWC. It multiplies the
            samples as it is: a sigmoid, if any, is the caller's. It keeps its dtype, which may be wider than x's.

        Returns:
          (N, out_channels, H_out, W_out), or (N, H_out, W_out, out_channels) for NHWC.
        """
        return self._convolve(*_promoted(self, x), offset, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """`ModulatedDeformConv2d` that computes offsets and mask itself, as `mmcv.ops.ModulatedDeformConv2dPack` does.

    The submodule `conv_offset` is as in `DeformConv2dPack`, but with deform_groups*kh*kw*3 channels: the first two
    thirds are the offset, the sigmoid of the last third is the mask. It is all zeros at first, so the layer begins
    as half a plain convolution.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # as in mmcv
        """Applies the layer to x, whose shape and the result's are as in `DeformConv2d`."""
        return self._convolve(*_promoted(self, x), *self._predict(_conv_offset(self), x))


class DCNv3(_Named, dcnv3.DCNv3, nn.Module):
    """InternImage's layer (Wang et al. 2022, https://arxiv.org/abs/2211.05778), over `jax_dcn.dcnv3`.

    A depthwise convolution, a normalization and an activation of x predict offsets and, by a softmax over a group's
    taps, masks; the operator reads a projection of x, and what it gives is projected again. The submodules have the
    original's names, numbers joined as linen does: dw_conv_0, dw_conv_1_1, offset, mask, input_proj and output_proj.
    Offsets and mask logits are 0 at first.

    Attributes:
      channels: of x and of the result (default 64), a multiple of group.
      kernel_size (default 3), stride (1), dilation (1): an int or a pair (height, width).
      dw_kernel_size: of the depthwise convolution, with the layer's stride (default kernel_size).
      pad: as `padding` in `jax_dcn.dcnv3` (default 1). It must give the output the size of the depthwise convolution's,
        which is padded by (dw_kernel_size - 1) // 2. (The original does not check it, and has no stride there.)
      group: groups of channels with offsets of their own (default 4).
      offset_scale, remove_center: as in `jax_dcn.dcnv3`.
      act_layer: "GELU" (default), "ReLU" or "SiLU".
      norm_layer: "LN".
      center_feature_scale: mixes the operator's input into its result, which must be of its size, by a predicted share
        for each group (default False). Its parameters are center_feature_scale_proj_weight (group, channels) and
        center_feature_scale_proj_bias (group,).
      dtype: the dtype of the computation (default: to which x and the parameters promote).
      param_dtype, precision: of the parameters (default float32), and of the projections and the convolution.
      forward_mode: as in `jax_dcn.dcnv3` (default False).

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: arguments that do not fit one another.
    """

    def __post_init__(self) -> None:
        self._check_arguments()
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x, (N, H, W, channels), with any axes in place of N: (N, H_out, W_out, channels)."""
        return self._over_images(lambda x: self._run(x, _built(self)), x)


class DCNv4(_Named, dcnv3.DCNv4, nn.Module):
    """FlashInternImage's layer (DCNv4, Xiong et al. 2024, https://arxiv.org/abs/2401.06197), over `jax_dcn.dcnv4`.

    A linear layer of x predicts offsets and masks, without a softmax. The submodules have the original's names:
    offset_mask, value_proj, output_proj and, if wanted, offset_mask_dw. x and the result are (N, H, W, channels), where
    the original flattens height and width. What is not listed is as in `DCNv3`.

    Attributes:
      dw_kernel_size: of a depthwise convolution before the linear layer (default None: there is none).
      output_bias: whether output_proj has a bias (default True).
      without_pointwise: leaves value_proj and output_proj out (default False).
    """

    def __post_init__(self) -> None:
        self._check_arguments()
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, with the shapes of `DCNv3`."""
        return self._over_images(lambda x: self._run(x, _built(self)), x)


class MultiScaleDeformableAttention(_Named, attention.MultiScaleDeformableAttention, nn.Module):
    """Deformable DETR's attention (Zhu et al. 2020, https://arxiv.org/abs/2010.04159).

    The layer of `mmcv.ops.MultiScaleDeformableAttention`, over `jax_dcn.multi_scale_deformable_attention`, with mmcv's
    submodules sampling_offsets, attention_weights, value_proj and output_proj, and its initial values.

    Attributes:
      embed_dims: channels of the query, the value and the result (default 256), a multiple of num_heads.
      num_heads (default 8), num_levels (4), num_points (4): heads, levels, and samples of a head in every level.
      im2col_step: accepted for mmcv's sake (default 64); there is no buffer for it to bound.
      dropout: the rate, before identity is added (default 0.1), unless `deterministic`, which is True by default.
      batch_first: whether query and value are (N, length, embed_dims), not (length, N, embed_dims), which is mmcv's
        default.
      norm_cfg, init_cfg: accepted, and dropped.
      value_proj_ratio: channels that are sampled, as a multiple of embed_dims (default 1).
      dtype, param_dtype, precision, forward_mode: as in `DCNv3`. Locations are float32 at least.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: arguments that do not fit one another.
    """

    def __post_init__(self) -> None:
        self._check_arguments(self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array | None = None,
        value: jax.Array | None = None,
        identity: jax.Array | None = None,
        query_pos: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        reference_points: jax.Array | None = None,
        spatial_shapes: Sequence[Sequence[int]] | None = None,
        level_start_index: Any = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Applies the layer.

        Args:
          query: (length, N, embed_dims), or (N, length, embed_dims) with batch_first.
          key: accepted, and unused, as in mmcv.
          value: likewise, of the pixels of all levels one after another, in rows (default the query).
          identity: what the result is added to (default the query, before query_pos).
          query_pos: added to the query.
          key_padding_mask: (N, length of value), True where value counts as 0 after its projection.
          reference_points: (N, length, num_levels, 2), each (x, y) in [0, 1], which the predicted offsets move by
            pixels of the level; or (..., 4), boxes (x, y, width, height), within which they move.
          spatial_shapes: the size (height, width) of every level, static integers.
          level_start_index: accepted, and unused: it follows from spatial_shapes.
          deterministic: whether there is no dropout (default True).

        Returns:
          The shape of the query.
        """
        y = self._run(_built(self), query, value, query_pos, key_padding_mask, reference_points, spatial_shapes)
        return nn.Dropout(self.dropout, deterministic=deterministic)(y) + self._like_query(
            "identity", query if identity is None else identity, query
        )


_Layer = DeformConv2d | ModulatedDeformConv2d


def _promoted(layer: _Layer, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """x, kernel and bias in the dtype of the computation."""
    kernel_init = layer.kernel_init or layer._default_kernel_init
    kernel = layer.param("kernel", kernel_init, layer._kernel_shape, layer.param_dtype)
    bias = layer.param("bias", layer.bias_init, (layer.out_channels,), layer.param_dtype) if layer.bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=layer.dtype)
    return x, kernel, bias


def _conv_offset(layer: _Layer) -> nn.Conv:
    return nn.Conv(layer._conv_offset_channels, name="conv_offset", **layer._conv_offset_options)


def _built(layer: DCNv3 | DCNv4 | MultiScaleDeformableAttention) -> parts.Built:
    options: dict[str, Any] = dict(dtype=layer.dtype, param_dtype=layer.param_dtype)

    def build(name: str, part: parts.Part) -> Any:
        name = name.replace(".", "_")
        if isinstance(part, parts.Zeros):
            return layer.param(name, nn.initializers.zeros, part.shape, layer.param_dtype)
        if isinstance(part, parts.LayerNorm):
            return nn.LayerNorm(part.epsilon, use_fast_variance=False, name=name, **options)
        if isinstance(part, parts.Linear):
            return nn.Dense(
                part.out_features,
                use_bias=part.bias,
                kernel_init=part.kernel_init,
                bias_init=part.bias_init,
                precision=layer.precision,
                name=name,
                **options,
            )
        return nn.Conv(
            part.channels,
            part.kernel_size,
            part.stride,
            part.padding,
            feature_group_count=part.channels,
            kernel_init=part.init,
            bias_init=part.init,
            precision=layer.precision,
            name=name,
            **options,
        )

    return {name: build(name, part) for name, part in layer._parts.items()}
