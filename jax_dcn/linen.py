"""The layers for flax.linen."""

from __future__ import annotations

import jax

from jax_dcn._layers import conv

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    raise ImportError("jax_dcn.linen needs Flax: pip install jax_dcn[flax]") from error

__all__ = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"]


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
