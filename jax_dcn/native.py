"""The native module: loading it, registering its handlers with XLA, calling them, and telling about it."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Sequence

import jax
import jaxlib
import numpy as np

from jax_dcn.geometry import Geometry
from jax_dcn.version import __version__

# XLA's registry is one per process, so the names carry a prefix.
DEFORM_CONV2D = "jax_dcn_deform_conv2d"
DEFORM_CONV2D_BACKWARD = "jax_dcn_deform_conv2d_backward"

try:
    _native = importlib.import_module("jax_dcn._native")
except ImportError as error:
    _native = None
    MISSING: str | None = str(error)
    warnings.warn(
        f"jax_dcn: the native module could not be loaded ({error}); plain XLA takes its place, which is many times "
        "slower. A source folder has no native module: start Python elsewhere, or install with pip install -e.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    MISSING = None
    for _name, _handler in _native.cpu_handlers().items():
        jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


def call(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    operands: dict[str, jax.Array],
    geometry: Geometry,
    **flags: bool,
) -> Sequence[jax.Array]:
    """Calls a handler with the operands, whose order csrc/ffi declares."""
    return jax.ffi.ffi_call(target, results)(
        *operands.values(),
        stride=np.array(geometry.stride, np.int64),
        padding=np.array(geometry.padding, np.int64),
        dilation=np.array(geometry.dilation, np.int64),
        groups=np.int64(geometry.groups),
        deform_groups=np.int64(geometry.deform_groups),
        nchw=geometry.data_format == "NCHW",
        has_mask="mask" in operands,
        **flags,
    )


def show_config() -> None:
    """Prints versions, the kernels loaded and, where one is missing, why."""
    print(f"jax_dcn  {__version__}")
    print(f"jax      {jax.__version__}, jaxlib {jaxlib.__version__}, python {platform.python_version()}")
    built = ", ".join(_native.cpu_isas()) if _native else ""
    if os.environ.get("JAX_DCN_IMPLEMENTATION") == "xla":
        print("cpu      plain XLA: JAX_DCN_IMPLEMENTATION=xla")
    elif MISSING is not None:
        print(f"cpu      plain XLA: the native module could not be loaded: {MISSING}")
    elif _native.cpu_isa() is None:
        asked = os.environ.get("JAX_DCN_CPU_ISA")
        print(f"cpu      none: JAX_DCN_CPU_ISA={asked} was not built or does not run here ({built} built)")
    else:
        print(f"cpu      kernels for {_native.cpu_isa()} ({built} built)")
    print("cuda     plain XLA: this version has no CUDA kernels")
