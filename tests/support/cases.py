"""Geometries worth a test, operands for them, and the library and the definition called on those operands.

All arrays are NCHW.
"""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_dcn
from support import oracle
from support.formats import in_format, to_nchw

# Of the operator, in the order of the kernels' gradients. Those in front have an entry per image.
OPERANDS = ("x", "offset", "mask", "weight", "bias")
PER_IMAGE = OPERANDS[:3]
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(OPERANDS, size)]

DTYPES = ("float64", "float32", "bfloat16", "float16")
DTYPES_OF_16_BITS = DTYPES[2:]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    c_in: int = 4
    c_out: int = 3
    size: tuple[int, int] = (6, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple = (1, 1)  # (height, width), or ((top, bottom), (left, right))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    mask: bool = True
    bias: bool = True

    def __str__(self):
        return self.name

    @property
    def arguments(self):
        """The public functions' arguments that are not arrays."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "deform_groups")}

    @property
    def sides(self):
        """The padding as ((top, bottom), (left, right))."""
        return tuple(p if isinstance(p, tuple) else (p, p) for p in self.padding)

    @property
    def output_size(self):
        return tuple(
            (n + sum(p) - (d * (k - 1) + 1)) // s + 1
            for n, k, s, p, d in zip(self.size, self.kernel, self.stride, self.sides, self.dilation, strict=True)
        )

    def operands(self, dtype="float64", seed=0):
        """Random operands by name.

        float64 and float32 draw the same values. Offsets are multiples of 1/1024, so coordinates are exact in
        float32 too, and all dtypes agree on the side of a lattice line that a sample is on. Some are on the line.
        """
        rng = np.random.default_rng(seed)
        taps = self.deform_groups * self.kernel[0] * self.kernel[1]
        operands = {
            "x": rng.standard_normal((self.batch, self.c_in, *self.size), np.float32),
            "offset": rng.standard_normal((self.batch, 2 * taps, *self.output_size), np.float32),
            "mask": rng.standard_normal((self.batch, taps, *self.output_size), np.float32) if self.mask else None,
            "weight": rng.standard_normal((self.c_out, self.c_in // self.groups, *self.kernel), np.float32),
            "bias": rng.standard_normal(self.c_out, np.float32) if self.bias else None,
        }
        operands["offset"] = np.round(2048 * operands["offset"]) / 1024
        return {name: value.astype(jnp.dtype(dtype)) for name, value in operands.items() if value is not None}

    def smooth_operands(self, dtype="float64", seed=0):
        """Such operands whose samples are all off the lattice lines, where the operator has a kink."""
        operands = self.operands(dtype, seed)
        operands["offset"] += 1 / 2048
        return operands

    def cotangent(self, dtype="float64", seed=1):
        """A random gradient of the result."""
        rng = np.random.default_rng(seed)
        return rng.standard_normal((self.batch, self.c_out, *self.output_size), np.float32).astype(jnp.dtype(dtype))


TORCHVISION = Case(
    "torchvision",
    batch=33,
    c_in=6,
    c_out=2,
    size=(5, 4),
    kernel=(3, 2),
    stride=(2, 1),
    padding=(1, 0),
    dilation=(2, 1),
    groups=2,
    deform_groups=3,
)

# Each breaks something that a kernel may take for granted.
AWKWARD = (
    TORCHVISION,
    dataclasses.replace(TORCHVISION, name="no_images", batch=0),
    Case("one_channel", batch=1, c_in=1, c_out=1, mask=False, bias=False),
    Case("one_row", size=(1, 9), mask=False),
    Case("one_column", size=(8, 1), kernel=(3, 2), stride=(2, 1)),
    Case("one_pixel", size=(1, 1), c_in=17, c_out=1),
    Case("smaller_than_kernel", size=(3, 2), kernel=(5, 4), padding=(2, 3), bias=False),
    Case("padding_per_side", kernel=(2, 4), stride=(2, 1), padding=((1, 0), (0, 3)), deform_groups=2),
    Case("padding_after", size=(4, 3), kernel=(2, 2), padding=((0, 4), (0, 1)), dilation=(3, 2), mask=False),
    Case("kernel_1x1", c_in=5, kernel=(1, 1), padding=(0, 0), deform_groups=5),
    Case("kernel_2x6", kernel=(2, 6), padding=(1, 2), size=(4, 7)),
    Case("kernel_4x5", batch=1, kernel=(4, 5), size=(7, 6), stride=(3, 4), padding=(0, 2), mask=False),
    Case("kernel_7x7", batch=1, c_in=8, kernel=(7, 7), padding=(3, 3), deform_groups=2),
    Case("dilation_18", batch=1, c_in=17, c_out=17, padding=(18, 18), dilation=(18, 18), groups=17, deform_groups=17),
    Case("depthwise", c_in=10, c_out=20, groups=10),
    Case("groups_4_deform_groups_3", c_in=12, c_out=8, groups=4, deform_groups=3),
    Case("groups_5_deform_groups_3", c_in=30, c_out=5, groups=5, deform_groups=3, mask=False),
    Case("c_in_255", batch=1, c_in=255, c_out=34, groups=17, deform_groups=17, mask=False),
    Case("c_in_258", batch=1, c_in=258, c_out=33),
    Case("c_in_128_c_out_100", batch=1, c_in=128, c_out=100, deform_groups=16, bias=False),
)
BY_NAME = {case.name: case for case in AWKWARD}

# Enough output pixels, channels or taps for several of the native kernels' tiles and blocks.
LARGE = (
    Case("many_pixels", c_in=24, c_out=40, size=(37, 29), deform_groups=2),
    Case("many_channels", c_in=320, c_out=130, size=(13, 17), mask=False),
    Case("many_groups", c_in=192, c_out=96, size=(25, 17), groups=6, deform_groups=8, stride=(1, 2)),
    Case("many_taps", batch=1, c_in=40, c_out=36, size=(19, 21), kernel=(7, 7), padding=(3, 3)),
)


# Coordinates that no address may be made of. The powers of two would come back into the image if an integer
# conversion wrapped around.
OUT_OF_RANGE = (np.nan, np.inf, -np.inf, 1e30, -1e30, 1e300, -1e300, 2.0**31, 2.0**32, -(2.0**32), 2.0**63, 2.0**64)

UNUSABLE = Case("unusable_coordinates", c_in=6, size=(7, 6), deform_groups=2)


def unusable_coordinates(offset_dtype):
    """float32 operands for UNUSABLE with OUT_OF_RANGE among the offsets, and which taps, (N, taps, H_out, W_out)."""
    operands = UNUSABLE.operands("float32")
    offset = UNUSABLE.operands()["offset"]
    chosen = np.random.default_rng(2).choice(offset.size, 20 * len(OUT_OF_RANGE), replace=False)
    offset.flat[chosen] = np.tile(OUT_OF_RANGE, 20)
    with np.errstate(over="ignore"):
        operands["offset"] = offset.astype(jnp.dtype(offset_dtype))
    usable = (abs(offset) < 1000).reshape(UNUSABLE.batch, -1, 2, *UNUSABLE.output_size)
    return operands, ~usable.all(2)


ISLAND = Case("island", size=(7, 6), kernel=(1, 1), padding=(0, 0))


def island():
    """Operands for ISLAND whose samples lie between pixels (2, 1) and (5, 4) or outside the image, and which pixels
    they do not touch, (H, W). The first pixel, which a kernel may read in place of one outside, is not touched.
    """
    operands = ISLAND.operands()
    rng = np.random.default_rng(2)
    target = rng.uniform([[[2.1]], [[1.1]]], [[[4.9]], [[3.9]]], (ISLAND.batch, 2, *ISLAND.size))
    target[rng.random(target.shape) < 0.2] = -3
    operands["offset"] = target - np.indices(ISLAND.size)
    untouched = np.ones(ISLAND.size, bool)
    untouched[2:6, 1:5] = False
    return operands, untouched


def tolerance_of_products(dtype, implementation):
    """The name of the tolerance of y and of the weight's gradient in 16 bits, as conftest.py sets the precision.

    The CUDA kernels, on a GPU or emulated by tests/cuda, round samples to 16 bits for the tensor cores.
    """
    on_cuda = jax.default_backend() == "gpu" or "handlers_on_cpu" in sys.modules
    return f"{dtype} samples" if implementation == "native" and on_cuda else dtype


# --- the library ---


def deform_conv2d(case, data_format="NCHW", **arguments):
    """A fresh function of a dict of operands that calls the library with `data_format`."""

    def function(operands):
        operands = in_format(data_format, operands)
        y = jax_dcn.deform_conv2d(**operands, **case.arguments, data_format=data_format, **arguments)
        return y if data_format == "NCHW" else to_nchw(y)

    return function


def forward(case, operands, data_format="NCHW", **arguments):
    return jax.jit(deform_conv2d(case, data_format, **arguments))(operands)


def gradients(case, operands, cotangent, data_format="NCHW"):
    """All gradients by name."""

    def function(operands, cotangent):
        _, vjp = jax.vjp(deform_conv2d(case, data_format), operands)
        return vjp(cotangent)[0]

    return jax.jit(function)(operands, cotangent)


# --- the definition ---


def by_definition(case, operands):
    return oracle.deform_conv2d(**operands, **case.arguments)


def gradients_by_definition(case, operands, cotangent):
    """All gradients by name."""
    return oracle.deform_conv2d_backward(cotangent, **operands, **case.arguments)


# Of the case's own operands and cotangent, which float64 and float32 share.


@functools.cache
def drawn_by_definition(case):
    return by_definition(case, case.operands())


@functools.cache
def drawn_gradients_by_definition(case):
    return gradients_by_definition(case, case.operands(), case.cotangent())
