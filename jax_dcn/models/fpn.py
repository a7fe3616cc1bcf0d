"""mmdet's feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_dcn._checks import check_data_format
from jax_dcn.mmcv.nn import ConvModule, interpolate


class FPN(nnx.Module):
    """mmdet's feature pyramid (Lin et al. 2016, https://arxiv.org/abs/1612.03144), without normalisation.

    Args:
      in_channels: channels of every input map.
      out_channels: channels of every output map.
      num_outs: number of output maps.
      start_level: index of the first input map used (default 0).
      end_level: index of the last one (default -1, the last there is).
      add_extra_convs: where the outputs beyond the inputs come from: False (default), by subsampling the last output;
        "on_input" or True, "on_lateral" or "on_output", by convolutions of stride 2, first of the last input, of its
        lateral convolution or of the last output, then of one another.
      relu_before_extra_convs: whether a ReLU comes before the second and the further extra convolutions (default
        False).
      data_format: "NCHW" (default) or "NHWC", that of all maps.
      dtype, param_dtype, rngs: as in `ResNet`.

    Raises:
      ValueError: arguments that do not fit one another.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        *,
        data_format: str = "NCHW",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_data_format("FPN", data_format)
        last = len(in_channels) - 1
        end = last if end_level == -1 else end_level
        if not 0 <= start_level <= end <= last:
            raise ValueError(
                f"FPN: start_level ({start_level}) and end_level ({end_level}) must be inputs, from 0 to {last}"
            )
        levels = end - start_level + 1
        if num_outs < levels or (end < last and num_outs != levels):
            raise ValueError(
                f"FPN: num_outs is {num_outs}, expected {levels} = levels from start_level to end_level"
                + " or more" * (end == last)
            )
        if add_extra_convs not in (False, True, "on_input", "on_lateral", "on_output"):
            raise ValueError(
                "FPN: add_extra_convs must be False, True, 'on_input', 'on_lateral' or 'on_output', "
                f"got {add_extra_convs!r}"
            )
        self.data_format, self.in_channels, self.num_outs = data_format, tuple(in_channels), num_outs
        self.start_level, self.end_level = start_level, end
        self.add_extra_convs = "on_input" if add_extra_convs is True else add_extra_convs
        self.relu_before_extra_convs = relu_before_extra_convs

        options: dict[str, Any] = dict(act_cfg=None, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        options["kernel_init"] = nnx.initializers.xavier_uniform()
        self.lateral_convs = nnx.List(
            ConvModule(in_channels[level], out_channels, 1, **options) for level in range(start_level, end + 1)
        )
        self.fpn_convs = nnx.List(
            ConvModule(out_channels, out_channels, 3, padding=1, **options) for _ in range(levels)
        )
        for extra in range(num_outs - levels if self.add_extra_convs else 0):
            channels = in_channels[end] if extra == 0 and self.add_extra_convs == "on_input" else out_channels
            self.fpn_convs.append(ConvModule(channels, out_channels, 3, 2, 1, **options))

    def __call__(self, inputs: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Computes the pyramid.

        Args:
          inputs: maps (N, in_channels[i], H_i, W_i), or (N, H_i, W_i, in_channels[i]) for NHWC.

        Returns:
          num_outs maps (N, out_channels, H, W), or with the channels last for NHWC: the first of the sizes of the
          inputs used, then each of half the size before.

        Raises:
          ValueError: another number of inputs.
        """
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"FPN: got {len(inputs)} inputs, expected {len(self.in_channels)}")
        axis = self.data_format.index("C")
        inputs = [jnp.moveaxis(x, axis, 3) for x in inputs[self.start_level : self.end_level + 1]]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] += interpolate(laterals[level], laterals[level - 1].shape[1:3])
        outs = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=False)]
        x = {"on_input": inputs[-1], "on_lateral": laterals[-1]}.get(str(self.add_extra_convs), outs[-1])
        for level in range(len(laterals), self.num_outs):
            if self.add_extra_convs:
                if self.relu_before_extra_convs and level > len(laterals):
                    x = nnx.relu(x)
                x = self.fpn_convs[level](x)
            else:
                x = x[:, ::2, ::2]
            outs.append(x)
        return tuple(jnp.moveaxis(out, 3, axis) for out in outs)
