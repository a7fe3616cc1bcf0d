"""The native modules: loading them, registering their handlers with XLA, calling these, and telling about them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jaxlib
import numpy as np

from jax_dcn._operator.geometry import Geometry
from jax_dcn._operator.operands import GRADIENTS, OPERANDS
from jax_dcn.version import __version__

# XLA's registry is one per process, so the names carry a prefix.
DEFORM_CONV2D = "jax_dcn_deform_conv2d"
DEFORM_CONV2D_BACKWARD = "jax_dcn_deform_conv2d_backward"


def _load(name: str, platform: str, warning: str) -> tuple[Any, str | None]:
    """A native module with its handlers registered; or None, with a warning, and why."""
    try:
        module = importlib.import_module(f"jax_dcn._operator.{name}")
    except ImportError as error:
        warnings.warn(f"jax_dcn: {warning.format(error=error)}", RuntimeWarning, stacklevel=3)
        return None, str(error)
    for target, handler in module.handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    return module, None


MISSING: str | None
CUDA_MISSING: str | None
if TYPE_CHECKING:
    from jax_dcn._operator import _native, _native_cuda
else:
    _native, MISSING = _load(
        "_native",
        "cpu",
        "the native module could not be loaded ({error}); plain XLA takes its place, which is many times slower. "
        "A source folder has no native module: start Python elsewhere, or install with pip install -e.",
    )
    _native_cuda, CUDA_MISSING = None, "jax_dcn was built without CUDA kernels: docs/cuda.md says how to build them"
    if importlib.util.find_spec("jax_dcn._operator._native_cuda") is not None:
        _native_cuda, CUDA_MISSING = _load(
            "_native_cuda",
            "CUDA",
            "the CUDA kernels could not be loaded ({error}); on GPUs plain XLA takes their place, which is many times "
            "slower.",
        )


def cpu_isas() -> list[str]:
    """The instruction sets for which there are CPU kernels, worst first."""
    return _native.cpu_isas() if MISSING is None else []


def cpu_isa() -> str | None:
    """The one that is used. None if there is none, or JAX_DCN_CPU_ISA names one that was not built or does not run."""
    return _native.cpu_isa() if MISSING is None else None


def cuda_architectures() -> str:
    """Those for which there are CUDA kernels, such as "75 90 90+PTX"."""
    return _native_cuda.architectures() if CUDA_MISSING is None else ""


def attributes(
    operands: dict[str, jax.Array],
    geometry: Geometry,
    *,
    highest_precision: bool,
    deterministic: bool,
    wanted: tuple[str, ...] | None = None,  # gradients, of the backward handler
) -> dict[str, Any]:
    """The attributes of a handler. All are made here, since an int32 in place of an int64 would be another one."""
    flags = {} if wanted is None else {f"grad_{name}": name in wanted for name in GRADIENTS}
    before = [side for side, _ in geometry.padding]
    return dict(
        kernel=np.array(geometry.kernel_size, np.int64),
        stride=np.array(geometry.stride, np.int64),
        padding=np.array(before, np.int64),
        dilation=np.array(geometry.dilation, np.int64),
        levels=np.array(geometry.levels, np.int64).ravel(),
        groups=np.int64(geometry.groups),
        deform_groups=np.int64(geometry.deform_groups),
        nchw=geometry.data_format == "NCHW",
        x_first=geometry.x_first,
        has_weight="weight" in operands,
        has_mask="mask" in operands,
        highest_precision=highest_precision,
        deterministic=deterministic,
        **flags,
    )


def call(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    operands: dict[str, jax.Array],
    attributes: dict[str, Any],
) -> list[jax.Array]:
    """Calls a handler."""
    given = [operands[name] for name in OPERANDS if name in operands]
    return list(jax.ffi.ffi_call(target, results)(*given, **attributes))


def cuda_workspace(target: str, operands: dict[str, jax.Array], attributes: dict[str, Any]) -> jax.ShapeDtypeStruct:
    """The work space that the CUDA handler `target` wants as its last result, of operands in NHWC."""
    formula = {
        DEFORM_CONV2D: _native_cuda.forward_workspace,
        DEFORM_CONV2D_BACKWARD: _native_cuda.backward_workspace,
    }[target]
    # Where the program is exported for any size, the formula holds for all.
    x, offset = ([size if isinstance(size, int) else None for size in operands[name].shape] for name in ("x", "offset"))
    weight = operands["weight"].shape if "weight" in operands else ()
    sizes = formula(x, offset, weight, operands["x"].dtype.name, **attributes)
    n, height, width, _ = operands["x"].shape
    _, h_out, w_out, _ = operands["offset"].shape
    # Rows of 16 bytes, since JAX counts what is symbolic in 32 bits, unless it has x64.
    constant, per_input_pixel, per_output_pixel = (-(-size // 16) for size in sizes)
    # Never an empty result: without a weight the kernels may need none.
    rows = max(constant, 1) + per_input_pixel * (n * height * width) + per_output_pixel * (n * h_out * w_out)
    return jax.ShapeDtypeStruct((rows, 16), np.uint8)


def show_config() -> None:
    """Prints versions, the kernels loaded and, where one is missing, why."""
    print(f"jax_dcn  {__version__}")
    print(f"jax      {jax.__version__}, jaxlib {jaxlib.version.__version__}, python {platform.python_version()}")
    built = ", ".join(cpu_isas())
    if os.environ.get("JAX_DCN_IMPLEMENTATION") == "xla":
        print("cpu      plain XLA: JAX_DCN_IMPLEMENTATION=xla")
    elif MISSING is not None:
        print(f"cpu      plain XLA: the native module could not be loaded: {MISSING}")
    elif cpu_isa() is None:
        asked = os.environ.get("JAX_DCN_CPU_ISA")
        print(f"cpu      none: JAX_DCN_CPU_ISA={asked} was not built or does not run here ({built} built)")
    else:
        print(f"cpu      kernels for {cpu_isa()} ({built} built)")
    if os.environ.get("JAX_DCN_IMPLEMENTATION") == "xla":
        print("cuda     plain XLA: JAX_DCN_IMPLEMENTATION=xla")
    elif CUDA_MISSING is not None:
        print(f"cuda     plain XLA: {CUDA_MISSING}")
    else:
        print(f"cuda     kernels for the architectures {cuda_architectures()}")
