"""mmcv's ConvModule, and what its config dicts mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_dcn._checks import PaddingLike, check_bool, check_data_format
from jax_dcn._layers.arguments import MmcvArguments
from jax_dcn.mmcv.nn.linear import Conv2d, ConvTranspose2d
from jax_dcn.mmcv.nn.normalization import BatchNorm2d, GroupNorm, LayerNorm
from jax_dcn.mmcv.nn.parameters import freeze_parameters, kaiming_init
from jax_dcn.nnx import DeformConv2dPack, ModulatedDeformConv2dPack

Config = Mapping[str, Any]
Conv = Conv2d | ConvTranspose2d | DeformConv2dPack | ModulatedDeformConv2dPack
Norm = BatchNorm2d | GroupNorm | LayerNorm

_RELU: Config = {"type": "ReLU"}

_CONVS = {
    "Conv2d": Conv2d,
    "Conv": Conv2d,
    "deconv": ConvTranspose2d,
    "DCN": DeformConv2dPack,
    "DCNv2": ModulatedDeformConv2dPack,
}

_NORMS = {
    **dict.fromkeys(("BN", "BN2d", "SyncBN"), ("bn", BatchNorm2d)),
    "GN": ("gn", GroupNorm),
    "LN": ("ln", LayerNorm),
}


def _hsigmoid(x: jax.Array, *, bias: float, divisor: float, min_value: float, max_value: float) -> jax.Array:
    return jnp.clip((x + bias) / divisor, min_value, max_value)


# By mmcv's names: the function, and its arguments with torch's and mmcv's defaults.
_ACTIVATIONS: dict[str, tuple[Callable[..., jax.Array], dict[str, Any]]] = {
    "ReLU": (jax.nn.relu, {}),
    "LeakyReLU": (jax.nn.leaky_relu, {"negative_slope": 0.01}),
    "ReLU6": (jax.nn.relu6, {}),
    "ELU": (jax.nn.elu, {"alpha": 1.0}),
    "Sigmoid": (jax.nn.sigmoid, {}),
    "Tanh": (jnp.tanh, {}),
    "GELU": (functools.partial(jax.nn.gelu, approximate=False), {}),
    "SiLU": (jax.nn.silu, {}),
    "Swish": (jax.nn.silu, {}),
    "Mish": (jax.nn.mish, {}),
    "HSigmoid": (_hsigmoid, {"bias": 3.0, "divisor": 6.0, "min_value": 0.0, "max_value": 1.0}),
    "HSwish": (jax.nn.hard_swish, {}),
}


def build_conv_layer(cfg: Config | None, *arguments: Any, **options: Any) -> Conv:
    """mmcv's build_conv_layer.

    Args:
      cfg: None for `Conv2d`, or dict(type=...): "Conv2d" or "Conv", "deconv", "DCN", "DCNv2". Its other entries are
        arguments of the layer, such as deform_groups.
      *arguments, **options: those of the layer: in_channels, out_channels and so on, data_format and rngs.

    Raises:
      ValueError: another type.
    """
    cls, more = _of_type("conv_cfg", _CONVS, {"type": "Conv2d"} if cfg is None else cfg)
    if cls in (DeformConv2dPack, ModulatedDeformConv2dPack):
        options = {"data_format": "NHWC", **options}
    return cls(*arguments, **options, **more)


def build_norm_layer(cfg: Config, num_features: int, postfix: int | str = "", **options: Any) -> tuple[str, Norm]:
    """mmcv's build_norm_layer.

    Args:
      cfg: dict(type=...): "BN", "BN2d" or "SyncBN", "GN" with num_groups, or "LN", which normalizes the last axis.
        Further entries are the layer's arguments, such as eps, and requires_grad, which if False makes `FrozenParam`s
        of scale and bias.
      num_features: channels.
      postfix: what the name ends in.
      **options: those of the layer: data_format (but for "LN"), dtype, param_dtype, rngs.

    Returns:
      mmcv's name for it, "bn", "gn" or "ln" and the postfix, and the layer.

    Raises:
      ValueError: another type, or "GN" without num_groups.
    """
    (name, cls), more = _of_type("norm_cfg", _NORMS, cfg)
    trains = more.pop("requires_grad", True)
    if cls is GroupNorm:
        if "num_groups" not in more:
            raise ValueError(f"norm_cfg must have num_groups for GN, got {dict(cfg)}")
        layer = cls(num_channels=num_features, **more, **options)
    else:
        layer = cls(num_features, **more, **options)
    if not trains:
        freeze_parameters(layer)
    return f"{name}{postfix}", layer


def build_activation_layer(cfg: Config) -> Callable[[jax.Array], jax.Array]:
    """mmcv's build_activation_layer: a function, the same one for equal dicts.

    Args:
      cfg: dict(type=...): "ReLU", "LeakyReLU" (negative_slope=0.01), "ReLU6", "ELU" (alpha=1.0), "Sigmoid", "Tanh",
        "GELU" (by erf, as torch's), "SiLU" or "Swish", "Mish", "HSigmoid" (bias=3.0, divisor=6.0, min_value=0.0,
        max_value=1.0) or "HSwish". `inplace` is accepted, without effect.

    Raises:
      ValueError: another type, or another entry.
    """
    (function, defaults), more = _of_type("act_cfg", _ACTIVATIONS, cfg)
    more.pop("inplace", None)
    if unknown := set(more) - set(defaults):
        raise ValueError(
            f"act_cfg has unknown entries {sorted(unknown)} for {cfg['type']}, expected {sorted(defaults)}"
        )
    return _partial(function, tuple(sorted({**defaults, **more}.items())))


@functools.cache
def _partial(function: Callable[..., jax.Array], arguments: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
    return functools.partial(function, **dict(arguments)) if arguments else function


def _of_type(argument: str, known: Mapping[str, Any], cfg: Config) -> tuple[Any, dict[str, Any]]:
    """What stands for a config's type, and its other entries."""
    if not isinstance(cfg, Mapping):
        raise TypeError(f"{argument} must be a dict, got {cfg!r}")
    if not isinstance(cfg.get("type"), str) or cfg["type"] not in known:
        raise ValueError(f"{argument}'s type must be one of {tuple(known)}, got {cfg.get('type')!r}")
    return known[cfg["type"]], {name: value for name, value in cfg.items() if name != "type"}


class ConvModule(MmcvArguments, nnx.Module):
    """mmcv's ConvModule: a convolution, a normalization and an activation, each of the last two if there is a dict.

    The children are `conv`, and `bn` or `gn` after the normalization's type.

    Args:
      in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in `Conv2d`.
      bias: "auto" (default), which is True without a normalization, or a bool.
      conv_cfg: None (default) for `Conv2d`, or a dict as in `build_conv_layer`.
      norm_cfg: None (default), or a dict as in `build_norm_layer`.
      act_cfg: dict(type="ReLU") by default, None, or a dict as in `build_activation_layer`.
      inplace: accepted for mmcv's sake, without effect.
      padding_mode: as in `Conv2d`, of which only it knows others than "zeros".
      order: in which they come (default ("conv", "norm", "act")).
      data_format: "NHWC" (default) or "NCHW".
      dtype, param_dtype, rngs: as in `Conv2d`.
      kernel_init: of the convolution (default mmcv's: normal, of variance 2 / fan_out, or DCNv2's own).

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: PaddingLike = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = _RELU,
        inplace: bool = True,
        *,
        padding_mode: str = "zeros",
        order: Sequence[str] = ("conv", "norm", "act"),
        data_format: str = "NHWC",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        if sorted(order) != ["act", "conv", "norm"]:
            raise ValueError(f"{name}: order must hold 'conv', 'norm' and 'act', got {tuple(order)}")
        if bias == "auto":
            bias = norm_cfg is None
        check_bool(name, "bias", bias)
        check_data_format(name, data_format)
        self.order, self.data_format = tuple(order), data_format
        options = dict(data_format=data_format, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        conv_options: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias)
        self.activate = None if act_cfg is None else build_activation_layer(act_cfg)
        conv_cls, _ = _of_type("conv_cfg", _CONVS, {"type": "Conv2d"} if conv_cfg is None else conv_cfg)
        if padding_mode != "zeros":
            if conv_cls is not Conv2d:
                raise ValueError(f"{name}: only Conv2d has a padding_mode, got {padding_mode!r} with {conv_cfg}")
            conv_options["padding_mode"] = padding_mode
        if kernel_init is None and conv_cls is not ModulatedDeformConv2dPack:
            slope = act_cfg.get("negative_slope", 0.01) if act_cfg and act_cfg["type"] == "LeakyReLU" else 0
            kernel_init = kaiming_init(slope)
        self.conv = build_conv_layer(
            conv_cfg,
            *(in_channels, out_channels, kernel_size),
            kernel_init=kernel_init,
            bias_init=nnx.initializers.zeros,
            **conv_options,
            **options,
        )
        self.norm_name = None
        if norm_cfg is not None:
            (_, norm_cls), _ = _of_type("norm_cfg", _NORMS, norm_cfg)
            if norm_cls is LayerNorm:  # torch's would normalize rows
                raise ValueError(f"{name}: norm_cfg must be that of BN, SyncBN or GN, got {dict(norm_cfg)}")
            channels = out_channels if order.index("norm") > order.index("conv") else in_channels
            self.norm_name, norm = build_norm_layer(norm_cfg, channels, **options)
            setattr(self, self.norm_name, norm)

    @property
    def norm(self) -> Norm | None:
        """The normalization, whatever its name, or None."""
        return getattr(self, self.norm_name) if self.norm_name else None

    @property
    def with_norm(self) -> bool:
        return self.norm_name is not None

    @property
    def with_activation(self) -> bool:
        return self.activate is not None

    def __call__(self, x: jax.Array, activate: bool = True, norm: bool = True) -> jax.Array:
        """Applies the layers in order, without the activation or the normalization if told so.

        x has any number of batch axes, but with a GroupNorm one.
        """
        if isinstance(self.norm, GroupNorm) and x.ndim != 4:
            raise ValueError(f"{type(self).__name__}: x has {x.ndim} dimensions, expected 4, in shape {x.shape}")
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.norm is not None:
                x = self.norm(x)
            elif layer == "act" and activate and self.activate is not None:
                x = self.activate(x)
        return x


class Scale(nnx.Module):
    """mmcv's Scale: a learnable factor, a number.

    Args:
      scale: its first value (default 1).
      param_dtype: its dtype (default float32).
      rngs: accepted as everywhere, and not needed.
    """

    def __init__(self, scale: float = 1.0, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        self.scale = nnx.Param(jnp.asarray(scale, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product, of x's dtype, as in torch."""
        return x * self.scale[...].astype(x.dtype)
