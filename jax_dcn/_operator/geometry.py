"""Sizes of a deformable convolution."""

from __future__ import annotations

import dataclasses
import math

# The kernels count pixels, and compute regular coordinates, in 32 bits.
MAX_PIXELS = 2**31 - 1

# The CUDA kernels count taps times channels in 32 bits, the channels padded to vectors of up to eight.
MAX_WEIGHTS = 2**27 - 1

# The kernels have room for so many.
MAX_LEVELS = 8

Pair = tuple[int, int]

# (top, bottom), (left, right)
Padding = tuple[Pair, Pair]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is static about a deformable convolution apart from the array shapes.

    Pairs are (height, width). Only the padding before the first pixel moves the grid; that after the last one adds
    outputs. A stride and a dilation of 0 make coordinates of the offsets themselves: without a grid, any number of
    outputs may read any pixels.

    Without a weight the taps may run down the kernel's columns (`x_first`), whose offsets are then (x, y). And x may
    be images of these sizes (`levels`, at most MAX_LEVELS), flattened and one after another in a single row of pixels:
    each column of the kernel reads one of them, at fractions of its size.
    """

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    data_format: str = "NHWC"
    x_first: bool = False
    levels: tuple[Pair, ...] = ()

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in x, offset, mask and y."""
        return self.data_format.index("C")

    @property
    def column_axis(self) -> int:
        """The axis of the columns of these arrays."""
        return self.data_format.index("W")

    @property
    def out_axis(self) -> int:
        """The axis of C_out in the weight: HWIO goes with NHWC, OIHW with NCHW."""
        return 3 if self.data_format == "NHWC" else 0

    @property
    def extent(self) -> Pair:
        """The pixels from a kernel's first tap to its last, both included."""
        height, width = (d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        return height, width

    @property
    def taps(self) -> int:
        """Kernel positions, kh * kw."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def has_grid(self) -> bool:
        return 0 not in (*self.stride, *self.dilation)

    @property
    def mask_channels(self) -> int:
        return self.deform_groups * self.taps

    @property
    def offset_channels(self) -> int:
        return self.mask_channels * 2

    @property
    def units(self) -> int:
        """Into how many equal parts the channels can be cut without cutting a group or a deform group.

        A single deform group may be cut: each part has its offsets.
        """
        return self.groups if self.deform_groups == 1 else math.gcd(self.groups, self.deform_groups)

    def output_size(self, height: int, width: int) -> Pair:
        """(H_out, W_out) for an image of (height, width)."""
        h_out, w_out = (
            (n + sum(p) - e) // s + 1
            for n, p, e, s in zip((height, width), self.padding, self.extent, self.stride, strict=True)
        )
        return h_out, w_out

    def y_shape(self, offset: tuple[int, ...], c_out: int) -> tuple[int, ...]:
        """The shape of the result for that of an offset."""
        shape = list(offset)
        shape[self.channel_axis] = c_out
        return tuple(shape)

    def in_format(self, data_format: str) -> Geometry:
        return dataclasses.replace(self, data_format=data_format)

    def repeat_groups(self, times: int) -> Geometry:
        """The geometry of `times` such convolutions, laid side by side along the channels."""
        return dataclasses.replace(self, groups=self.groups * times, deform_groups=self.deform_groups * times)

    def divide_units(self, parts: int) -> Geometry:
        """The geometry of one of `parts` devices that share the units."""
        deform_groups = max(1, self.deform_groups // parts)
        return dataclasses.replace(self, groups=self.groups // parts, deform_groups=deform_groups)
