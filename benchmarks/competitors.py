"""What benchmarks/run.py measures: jax_dcn, XLA's and torch's plain convolutions, and what other libraries have."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import numpy as np
from jax_runs import conv_run, gather_run, jax_dcn_run
from report import kernels, versions
from tasks import Competitor, Results, Run, Task, check, stopwatch
from torch_runs import torch_run
from workers import described
from workloads import WORKLOADS, Operands

# --- inference engines: the weight is a constant, as in a deployed model, so they may repack it beforehand ---


def onnxruntime_run(task: Task) -> Run:
    from onnx import TensorProto, helper, numpy_helper

    workload = task.workload
    names = {"X": "x", "W": "weight", "offset": "offset", "": "bias", "mask": "mask"}
    feeds = {theirs: task.arrays[ours] for theirs, ours in names.items() if ours in task.arrays}
    inputs = list(names) if workload.modulated else list(feeds)
    attributes = {"kernel_shape": [workload.kernel] * 2, "strides": [workload.stride] * 2}
    attributes |= {"pads": [workload.padding] * 4, "dilations": [workload.dilation] * 2}
    attributes |= {"group": workload.groups, "offset_group": workload.deform_groups}
    node = helper.make_node("DeformConv", inputs, ["Y"], **attributes)
    weight = numpy_helper.from_array(feeds.pop("W"), "W")
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in side] for side in (feeds, ["Y"])
    ]
    graph = helper.make_graph([node], "graph", *values, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime_session(model, task.threads)
    return Run(lambda: [{"y": session.run(None, feeds)[0]}])


def onnxruntime_session(model: Any, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def openvino_run(task: Task) -> Run:
    import openvino
    from openvino import opset8

    workload, operands = task.workload, dict(task.arrays)
    del operands["grad_y"]
    weight = opset8.constant(operands.pop("weight"))
    parameters = {name: opset8.parameter(operand.shape, np.float32) for name, operand in operands.items()}
    stride, padding, dilation = ([n] * 2 for n in (workload.stride, workload.padding, workload.dilation))
    node = opset8.deformable_convolution(
        *(parameters["x"], parameters["offset"], weight),
        *(stride, padding, padding, dilation),
        parameters.get("mask"),
        group=workload.groups,
        deformable_group=workload.deform_groups,
        bilinear_interpolation_pad=True,
    )
    model = openvino.Model([node], list(parameters.values()))
    # On some processors it would compute in bfloat16 otherwise.
    settings = {"INFERENCE_NUM_THREADS": task.threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    inputs = list(operands.values())
    return Run(lambda: [{"y": request.infer(inputs, share_inputs=True, share_outputs=True)[0]}])


# --- frameworks ---


def torch_conv_run(task: Task) -> Run:
    import torch

    torch.set_num_threads(task.threads)
    workload = task.workload

    def function(operands: dict[str, Any]) -> Any:
        sizes = (workload.stride, workload.padding, workload.dilation, workload.groups)
        return torch.conv2d(operands["x"], operands["weight"], None, *sizes)

    return torch_run(function, task, {name: task.arrays[name] for name in ("x", "weight", "grad_y")}, "cpu")


def paddle_run(task: Task) -> Run:
    import paddle

    sizes = task.workload.sizes
    paddle.set_device("cpu")
    tensors = {
        name: paddle.to_tensor(operand, stop_gradient=not task.backward) for name, operand in task.arrays.items()
    }
    grad_y = tensors.pop("grad_y")

    def start() -> list[Results]:
        y = paddle.vision.ops.deform_conv2d(
            *(tensors["x"], tensors["offset"], tensors["weight"]),
            mask=tensors.get("mask"),
            deformable_groups=sizes["deform_groups"],
            **{name: sizes[name] for name in ("stride", "padding", "dilation", "groups")},
        )
        gradients = paddle.grad([y], list(tensors.values()), [grad_y]) if task.backward else ()
        return [{"y": y.detach(), **dict(zip(tensors, gradients, strict=task.backward))}]

    return Run(start, fetch=lambda results: {name: array.numpy() for name, array in results.items()})


# --- who takes part ---


FLOAT32, BOTH = ("float32",), ("float32", "bfloat16")
REFERENCE = "XLA gather"
COMPETITORS = {
    # The reference comes first: it checks the others.
    REFERENCE: Competitor(gather_run, FLOAT32, "NHWC", few_threads=False),
    "jax_dcn NHWC": Competitor(jax_dcn_run, BOTH, "NHWC"),
    "XLA conv NHWC": Competitor(conv_run, BOTH, "NHWC", deformable=False),
    "jax_dcn NCHW": Competitor(jax_dcn_run, BOTH),
    "XLA conv NCHW": Competitor(conv_run, BOTH, deformable=False),
    "torch conv": Competitor(torch_conv_run, FLOAT32, packages=("torch",), deformable=False, few_threads=False),
    "ONNX Runtime": Competitor(onnxruntime_run, FLOAT32, packages=("onnxruntime", "onnx"), backward=False),
    "OpenVINO": Competitor(openvino_run, FLOAT32, packages=("openvino",), backward=False),
    "Paddle": Competitor(paddle_run, FLOAT32, packages=("paddlepaddle",), few_threads=False),
}


# --- measuring ---


# Largest error against the plain-XLA form in float32, relative to the largest value. float32: a few hundred roundings.
# bfloat16: the rounding of the result, since everything up to it is in float32, but where the samples are rounded too.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2.0**-8}
if kernels("cpu").startswith("kernels for avx512bf16 "):
    TOLERANCE["bfloat16"] *= 2

# A run beyond so many seconds is measured once, in float32 with all threads only.
SLOW = 2.0


class Key(NamedTuple):
    dtype: str
    competitor: str


class Competition:
    """The competitors with one number of threads. Its public methods are what benchmarks/run.py asks for."""

    def __init__(self, threads: int, all_threads: bool):
        self.threads, self.all_threads = threads, all_threads
        self.runs: dict[Key, Run] = {}

    def versions(self) -> dict[str, str]:
        return versions(["jax", *(name for competitor in COMPETITORS.values() for name in competitor.packages)])

    def prepare(self, name: str, backward: bool, dtypes: list[str], left_out: set[str]) -> dict[Key, float]:
        """Builds the competitors and returns the seconds that their first runs took.

        With all threads the plain-XLA form takes part, and the others' results are compared with its own; and so does
        bfloat16, since a run would take too long otherwise. A competitor that turns out to be slow is left out with the
        next dtypes.
        """
        workload = WORKLOADS[name]
        operands = Operands(workload.operands())
        self.runs.clear()
        seconds = {}
        expected = None
        for label, competitor in COMPETITORS.items():
            for dtype in dtypes if label != REFERENCE else ["float32"]:
                if label in left_out or not competitor.takes_part(dtype, backward):
                    continue
                if not self.all_threads and (dtype != "float32" or not competitor.few_threads):
                    continue
                key = Key(dtype, label)
                task = Task(workload, backward, dtype, competitor.data_format, operands, threads=self.threads)
                try:
                    self.runs[key] = run = competitor.build(task)
                    seconds[key], results = stopwatch(run)
                    if SLOW < seconds[key] < 4 * SLOW:  # perhaps only because it was the first
                        seconds[key], results = stopwatch(run)
                    if seconds[key] > SLOW:
                        left_out.add(label)
                    if self.all_threads and competitor.deformable:
                        results = task.nhwc(run.fetch(results[0]))
                        expected = results if expected is None else expected
                        check(results, expected, TOLERANCE[dtype])
                except ImportError as error:  # it is installed, but not with all that it needs
                    left_out.add(label)
                    print(f"{label} is left out: {described(error)}", file=sys.stderr, flush=True)
                except Exception as error:
                    raise RuntimeError(f"{name}, {label}, {dtype}: {described(error)}") from error
        return seconds

    def timed(self, key: Key, warm_up: bool) -> float:
        # Idle threads of the competitor before may spin for some milliseconds before they sleep.
        time.sleep(0.01)
        if warm_up:
            self.runs[key]()
        return stopwatch(self.runs[key])[0]
