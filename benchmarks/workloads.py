"""The shapes of well-known models with deformable convolutions, at their usual input sizes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

DIRECTIONS = ("forward", "both")  # y alone, or y and the gradients of all operands

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    model: str
    batch: int
    c_in: int
    c_out: int
    height: int
    width: int
    modulated: bool
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    deform_groups: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """The keyword arguments of `deform_conv2d` that are not arrays."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "deform_groups")}

    @property
    def output_size(self) -> tuple[int, int]:
        extent = self.dilation * (self.kernel - 1) + 1
        return tuple((n + 2 * self.padding - extent) // self.stride + 1 for n in (self.height, self.width))

    @property
    def multiply_adds(self) -> int:
        """Of the forward product. The backward pass has two of this size."""
        h_out, w_out = self.output_size
        return self.batch * h_out * w_out * self.kernel**2 * self.c_in // self.groups * self.c_out

    def operands(self) -> Arrays:
        """Random NHWC operands and the cotangent `grad_y`, float32.

        Offsets have a standard deviation of 2 pixels and are odd multiples of 1/1024: coordinates are then exact in
        float32 and never on a lattice line, where gradients jump and libraries differ in their conventions. All but
        offset and mask have values that bfloat16 holds too, so one reference serves both dtypes.
        """
        rng = np.random.default_rng(0)
        out = (self.batch, *self.output_size)
        taps = self.kernel**2
        fan_in = taps * self.c_in // self.groups
        shapes = {
            "x": (self.batch, self.height, self.width, self.c_in),
            "weight": (self.kernel, self.kernel, self.c_in // self.groups, self.c_out),
            "grad_y": (*out, self.c_out),
        }
        operands = {name: _bfloat16(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
        operands["weight"] = _bfloat16(operands["weight"] * fan_in**-0.5)
        offset = 2 * rng.standard_normal((*out, self.deform_groups * taps * 2), np.float32)
        operands["offset"] = (np.floor(offset * 512) + np.float32(0.5)) / 512
        if self.modulated:
            operands["mask"] = rng.random((*out, self.deform_groups * taps), np.float32)
        return operands


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """Cut to the upper half of the bits, which is what bfloat16 keeps of a float32."""
    return (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def to_nchw(arrays: Arrays) -> Arrays:
    axes = {name: (3, 2, 0, 1) if name == "weight" else (0, 3, 1, 2) for name in arrays}
    return {name: np.ascontiguousarray(array.transpose(axes[name])) for name, array in arrays.items()}


def to_nhwc(arrays: Arrays) -> Arrays:
    """Of arrays of NumPy or JAX."""
    axes = {name: (2, 3, 1, 0) if name == "weight" else (0, 2, 3, 1) for name in arrays}
    return {name: array.transpose(axes[name]) for name, array in arrays.items()}


class Operands:
    """Those of a workload, with grad_y, in either data format."""

    def __init__(self, nhwc: Arrays):
        self.nhwc = nhwc

    @functools.cached_property
    def nchw(self) -> Arrays:
        return to_nchw(self.nhwc)


WORKLOADS = {
    "r50_c3": Workload("ResNet-50 DCNv2, c3", 1, 128, 128, 100, 168, True),
    "r50_c4": Workload("ResNet-50 DCNv2, c4", 1, 256, 256, 50, 84, True),
    "r50_c5": Workload("ResNet-50 DCNv1, c5", 1, 512, 512, 25, 42, False),
    "r50_c4_s2": Workload("ResNet-50 DCNv2, first block of c4", 1, 256, 256, 100, 168, True, stride=2),
    "edvr_m": Workload("EDVR-M, PCD alignment, training", 4, 64, 64, 64, 64, True, deform_groups=8),
    "basicvsrpp": Workload("BasicVSR++, training", 2, 128, 64, 64, 64, True, deform_groups=16),
    "x101": Workload("ResNeXt-101 32x4d DCNv1", 1, 256, 256, 50, 84, False, groups=32),
    "bevdepth": Workload("BEVDepth, depth net", 6, 512, 512, 16, 44, False, groups=4),
    "dekr": Workload("DEKR", 1, 255, 255, 64, 64, False, groups=17, deform_groups=17),
    "train": Workload("none in particular: small maps, training", 8, 256, 256, 14, 14, True),
    "r50_c4_dg4": Workload("ResNet-50 mdconv group4", 1, 256, 256, 50, 84, True, deform_groups=4),
    "tood": Workload("TOOD, deform_sampling", 1, 4, 4, 100, 168, False, kernel=1, padding=0, groups=4, deform_groups=4),
    "posewarper": Workload("PoseWarper", 1, 17, 17, 96, 72, False, padding=12, dilation=12, deform_groups=17),
    "solov2": Workload("SOLOv2, odd channel count", 1, 258, 256, 40, 40, True),
    "edvr_test": Workload("EDVR, a frame at test", 1, 64, 64, 180, 320, True, deform_groups=8),
    "centerpoint": Workload("CenterPoint", 1, 64, 64, 128, 128, False, groups=4),
    "centernet_b16": Workload("CenterNet R18 neck, training", 16, 64, 64, 64, 64, True),
    "reppoints_p7": Workload("RepPoints, coarsest level: few pixels", 1, 256, 256, 7, 11, False),
}

# Those of the GPU's benchmark, which has two more: the case that docs/cuda.md reckons with, and its depthwise form.
GPU_WORKLOADS = {
    **WORKLOADS,
    "r50_c4_76": Workload("ResNet-50 DCNv2, c4 of a narrower image", 1, 256, 256, 50, 76, True),
    "depthwise": Workload("none in particular: depthwise", 1, 256, 256, 50, 76, True, groups=256),
}
