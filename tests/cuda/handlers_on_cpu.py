"""A pytest plugin: what the tests compute on the CPU goes through the CUDA lowering, handlers and emulated kernels.

test_handlers_on_cpu.py builds the module, in the folder that CUDA_HANDLERS_ON_CPU names, and runs some of the tests so.
"""

import ctypes
import importlib.util
import os

import jax
from jax.interpreters import mlir

from jax_dcn._operator import lowering, native, primitives

spec = importlib.util.spec_from_file_location("_native_cuda", os.environ["CUDA_HANDLERS_ON_CPU"])
native._native_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native._native_cuda)
native.CUDA_MISSING = None
library = ctypes.CDLL(spec.origin)
library.jax_dcn_launched.restype = ctypes.c_char_p
calls = 0

for target, handler in native._native_cuda.handlers().items():
    jax.ffi.register_ffi_target(f"{target}_on_cpu", handler, platform="cpu")


def call(target, results, operands, attributes):
    global calls
    calls += 1
    return call_handler(f"{target}_on_cpu", results, operands, attributes)


def launched(device=0):
    """The mangled names of the kernels that an emulated device has run."""
    return set(library.jax_dcn_launched(device).decode().split())


call_handler, native.call = native.call, call
for primitive, kernel, xla in (
    (primitives.deform_conv2d_p, lowering.deform_conv2d_cuda, lowering.deform_conv2d_xla),
    (
        primitives.deform_conv2d_tangent_p,
        lowering.tangent_by(lowering.deform_conv2d_cuda),
        lowering.deform_conv2d_tangent_xla,
    ),
    (primitives.deform_conv2d_backward_p, lowering.deform_conv2d_backward_cuda, lowering.deform_conv2d_backward_xla),
):
    rule = lowering.choosing(xla, kernel)
    mlir.register_lowering(primitive, mlir.lower_fun(rule, multiple_results=True), platform="cpu")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"CUDA handlers on the CPU: {calls} calls lowered")
