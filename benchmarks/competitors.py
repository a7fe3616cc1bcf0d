"""What is measured: jax_dcn, XLA's and torch's plain convolutions, and the deformable ones of other libraries.

A competitor's `build` makes a `Run` for a problem: it computes, waits for the results, and returns them by name, "y"
and the gradients, in the competitor's data format.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from workloads import Arrays, Case

import jax_dcn

Run = Callable[[], dict[str, Any]]
Operands = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    case: Case
    backward: bool  # y and the gradients of all operands, else y alone
    dtype: str  # of x, weight and y; coordinates need float32, so offset and mask keep it
    threads: int
    operands: Arrays  # in the competitor's format, without grad_y
    grad_y: np.ndarray


# --- jax ---


def jax_run(function: Callable[[Operands], jax.Array], problem: Problem, names: tuple[str, ...]) -> Run:
    """`function` of the operands with these names, compiled when built."""
    dtypes = {"offset": "float32", "mask": "float32"}
    operands = {name: jnp.asarray(problem.operands[name], dtypes.get(name, problem.dtype)) for name in names}
    grad_y = jnp.asarray(problem.grad_y, problem.dtype)

    def forward(operands, grad_y):
        return {"y": function(operands)}

    def forward_and_backward(operands, grad_y):
        y, vjp = jax.vjp(function, operands)
        return {"y": y, **vjp(grad_y)[0]}

    compiled = jax.jit(forward_and_backward if problem.backward else forward).lower(operands, grad_y).compile()
    return lambda: jax.block_until_ready(compiled(operands, grad_y))


def jax_dcn_run(problem: Problem, *, data_format: str) -> Run:
    def function(operands):
        return jax_dcn.deform_conv2d(**operands, **problem.case.sizes, data_format=data_format)

    return jax_run(function, problem, tuple(problem.operands))


def gather_run(problem: Problem, *, data_format: str) -> Run:
    os.environ["JAX_DCN_IMPLEMENTATION"] = "xla"  # read when traced
    try:
        return jax_dcn_run(problem, data_format=data_format)
    finally:
        del os.environ["JAX_DCN_IMPLEMENTATION"]


def xla_conv_run(problem: Problem, *, data_format: str) -> Run:
    case = problem.case

    def function(operands):
        return lax.conv_general_dilated(
            operands["x"],
            operands["weight"],
            window_strides=(case.stride,) * 2,
            padding=((case.padding,) * 2,) * 2,
            rhs_dilation=(case.dilation,) * 2,
            dimension_numbers=(data_format, {"NHWC": "HWIO", "NCHW": "OIHW"}[data_format], data_format),
            feature_group_count=case.groups,
        )

    return jax_run(function, problem, ("x", "weight"))


# --- inference engines: the weight is a constant, as in a deployed model, so they may repack it beforehand ---


def onnxruntime_run(problem: Problem, *, data_format: str) -> Run:
    import onnx
    import onnxruntime

    case = problem.case
    names = {"X": "x", "W": "weight", "offset": "offset", "": "bias", "mask": "mask"}
    feeds = {theirs: problem.operands[ours] for theirs, ours in names.items() if ours in problem.operands}
    inputs = list(names) if case.modulated else list(feeds)
    node = onnx.helper.make_node(
        "DeformConv",
        inputs,
        ["Y"],
        kernel_shape=[case.kernel] * 2,
        strides=[case.stride] * 2,
        pads=[case.padding] * 4,
        dilations=[case.dilation] * 2,
        group=case.groups,
        offset_group=case.deform_groups,
    )
    weight = onnx.numpy_helper.from_array(feeds.pop("W"), "W")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in [*feeds, "Y"]]
    graph = onnx.helper.make_graph([node], "deform_conv", values[:-1], values[-1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: {"y": session.run(None, feeds)[0]}


def openvino_run(problem: Problem, *, data_format: str) -> Run:
    import openvino
    from openvino import opset8

    case, operands = problem.case, dict(problem.operands)
    weight = opset8.constant(operands.pop("weight"))
    parameters = {name: opset8.parameter(operand.shape, np.float32) for name, operand in operands.items()}
    node = opset8.deformable_convolution(
        parameters["x"],
        parameters["offset"],
        weight,
        [case.stride] * 2,
        [case.padding] * 2,
        [case.padding] * 2,
        [case.dilation] * 2,
        parameters.get("mask"),
        group=case.groups,
        deformable_group=case.deform_groups,
        bilinear_interpolation_pad=True,
    )
    model = openvino.Model([node], list(parameters.values()))
    # On some processors it would compute in bfloat16 otherwise.
    settings = {"INFERENCE_NUM_THREADS": problem.threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    inputs = list(operands.values())
    return lambda: {"y": request.infer(inputs, share_inputs=True, share_outputs=True)[0]}


# --- frameworks ---


def torch_conv_run(problem: Problem, *, data_format: str) -> Run:
    import torch

    torch.set_num_threads(problem.threads)
    case = problem.case
    tensors = {
        name: torch.from_numpy(problem.operands[name]).requires_grad_(problem.backward) for name in ("x", "weight")
    }
    grad_y = torch.from_numpy(problem.grad_y)

    def run():
        y = torch.conv2d(*tensors.values(), None, case.stride, case.padding, case.dilation, case.groups)
        gradients = torch.autograd.grad(y, list(tensors.values()), grad_y) if problem.backward else ()
        return {"y": y.detach(), **dict(zip(tensors, gradients, strict=problem.backward))}

    return run


def paddle_run(problem: Problem, *, data_format: str) -> Run:
    import paddle

    case = problem.case
    paddle.set_device("cpu")
    tensors = {
        name: paddle.to_tensor(operand, stop_gradient=not problem.backward)
        for name, operand in problem.operands.items()
    }
    grad_y = paddle.to_tensor(problem.grad_y)

    def run():
        y = paddle.vision.ops.deform_conv2d(
            tensors["x"],
            tensors["offset"],
            tensors["weight"],
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            deformable_groups=case.deform_groups,
            groups=case.groups,
            mask=tensors.get("mask"),
        )
        gradients = paddle.grad([y], list(tensors.values()), [grad_y]) if problem.backward else ()
        return {"y": y.detach(), **dict(zip(tensors, gradients, strict=problem.backward))}

    return run


# --- all of them ---


@dataclasses.dataclass(frozen=True)
class Competitor:
    name: str
    make: Callable[..., Run]
    data_format: str = "NCHW"
    modules: tuple[str, ...] = ("jax",)  # takes part if these can be imported
    deformable: bool = True
    backward: bool = True
    dtypes: tuple[str, ...] = ("float32",)
    few_threads: bool = True  # else measured with all threads only

    def build(self, problem: Problem) -> Run:
        return self.make(problem, data_format=self.data_format)

    def takes_part(self, backward: bool, dtype: str, all_threads: bool) -> bool:
        """bfloat16 is measured with all threads only: a run would take too long otherwise."""
        return (
            (self.backward or not backward)
            and dtype in self.dtypes
            and (all_threads or (self.few_threads and dtype == "float32"))
            and None not in map(imported, self.modules)
        )


@functools.cache
def imported(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


BOTH = ("float32", "bfloat16")
REFERENCE = "XLA gather"
COMPETITORS = [
    # The reference comes first: it checks the others.
    Competitor(REFERENCE, gather_run, "NHWC", few_threads=False),
    Competitor("jax_dcn NHWC", jax_dcn_run, "NHWC", dtypes=BOTH),
    Competitor("XLA conv NHWC", xla_conv_run, "NHWC", dtypes=BOTH, deformable=False),
    Competitor("jax_dcn NCHW", jax_dcn_run, "NCHW", dtypes=BOTH),
    Competitor("XLA conv NCHW", xla_conv_run, "NCHW", dtypes=BOTH, deformable=False),
    Competitor("torch conv", torch_conv_run, modules=("torch",), deformable=False, few_threads=False),
    Competitor("ONNX Runtime", onnxruntime_run, modules=("onnxruntime", "onnx"), backward=False),
    Competitor("OpenVINO", openvino_run, modules=("openvino",), backward=False),
    Competitor("Paddle", paddle_run, modules=("paddle",), few_threads=False),
]
