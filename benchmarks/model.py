"""Times a whole model, ResNet-50-DCNv2, in jax_dcn and elsewhere.

    python benchmarks/model.py             # a forward pass at 800x1344, a training step at 224x224 with batch 8
    python benchmarks/model.py --quick     # the same at 224x224 with batch 2

The model is also exported to ONNX and run by ONNX Runtime, whose DeformConv shares nothing with jax_dcn; its feature
maps must agree first. There is no PyTorch model with deformable layers to compare with unless torchvision is
installed, so torch runs the same ResNet-50 with plain convolutions, and so does XLA: what the model would cost without
deformation. Every engine has all cores. The competitors take turns; medians and the load of the machine are printed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from competitors import onnxruntime_session
from flax import nnx
from tasks import check, in_turn

from jax_dcn import mmcv
from jax_dcn.models import ResNet

DCN = dict(dcn=dict(type="DCNv2", deform_groups=1), stage_with_dcn=(False, True, True, True))
STRIDES = (1, 2, 2, 2)


def random_state_dict(deformable: bool) -> mmcv.StateDict:
    """Weights of He's initialisation, and offsets of a pixel or so, else no tap would leave its place."""
    model = nnx.eval_shape(lambda: resnet(deformable))
    rng, arrays = np.random.default_rng(0), {}
    for key, array in mmcv.to_state_dict(nnx.clone(filled_with_zeros(model))).items():
        if array.ndim == 4:
            arrays[key] = (rng.normal(size=array.shape) * np.sqrt(1.5 / np.prod(array.shape[1:]))).astype(np.float32)
        elif key.endswith(("running_var", "weight")):
            arrays[key] = np.full(array.shape, 0.3 if ".bn3.weight" in key else 1, np.float32)
        else:
            arrays[key] = array
    return mmcv.load_checkpoint(arrays)


def filled_with_zeros(model: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state))


def resnet(deformable: bool) -> ResNet:
    return ResNet(50, rngs=nnx.Rngs(0), **(DCN if deformable else {}))


def loaded(state_dict: mmcv.StateDict, deformable: bool) -> ResNet:
    model = mmcv.load_into(nnx.eval_shape(lambda: resnet(deformable)), state_dict)
    model.eval()  # norm_eval is mmdet's default, so training uses the running statistics too
    return model


# --- runs: functions without arguments that return the feature maps, or a loss ---


def jax_model(state_dict: mmcv.StateDict, x: np.ndarray, *, deformable: bool, training: bool) -> Callable[[], list]:
    graph, parameters, rest = nnx.split(loaded(state_dict, deformable), nnx.Param, ...)

    def maps(parameters, x):
        return nnx.merge(graph, parameters, rest)(x)

    def step(parameters, x):
        loss, gradients = jax.value_and_grad(lambda p: sum(jnp.mean(y**2) for y in maps(p, x)))(parameters)
        return loss, jax.tree.map(lambda p, g: p - 1e-4 * g, parameters, gradients)

    compiled = jax.jit(step if training else maps).lower(parameters, x).compile()
    x = jnp.asarray(x)
    return lambda: jax.block_until_ready(compiled(parameters, x))


def onnxruntime_model(state_dict: mmcv.StateDict, x: np.ndarray) -> Callable[[], list]:
    from jax2onnx import to_onnx

    from jax_dcn.onnx import infer_shapes

    model = infer_shapes(to_onnx(loaded(state_dict, deformable=True), [x.shape], input_names=["x"]))
    session = onnxruntime_session(model, os.cpu_count())
    return lambda: session.run(None, {"x": x})


def torch_model(state_dict: mmcv.StateDict, x: np.ndarray, *, training: bool) -> Callable[[], list]:
    """ResNet-50 without deformation, in functions of torch."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(os.cpu_count())
    tensors = {key: torch.from_numpy(array) for key, array in state_dict.items()}
    trained = [tensors[key].requires_grad_(training) for key in tensors if key.endswith(("weight", "bias"))]
    image = torch.from_numpy(x)

    def conv_norm(x, conv, norm, stride=1):
        weight = tensors[f"{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        mean, var, scale, bias = (
            tensors[f"{norm}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, bias)

    def maps():
        x, outputs = F.max_pool2d(conv_norm(image, "conv1", "bn1", 2).relu(), 3, 2, 1), []
        for stage, stride in enumerate(STRIDES):
            block = 0
            while (path := f"layer{stage + 1}.{block}") + ".conv1.weight" in tensors:
                step = stride if block == 0 else 1
                y = conv_norm(x, f"{path}.conv1", f"{path}.bn1").relu()
                y = conv_norm(y, f"{path}.conv2", f"{path}.bn2", step).relu()
                y = conv_norm(y, f"{path}.conv3", f"{path}.bn3")
                if block == 0:
                    x = conv_norm(x, f"{path}.downsample.0", f"{path}.downsample.1", step)
                x = (y + x).relu()
                block += 1
            outputs.append(x)
        return outputs

    def run():
        if not training:
            with torch.inference_mode():
                return [y.numpy() for y in maps()]
        gradients = torch.autograd.grad(sum((y**2).mean() for y in maps()), trained)
        with torch.no_grad():
            return [parameter - 1e-4 * gradient for parameter, gradient in zip(trained, gradients, strict=True)]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    deformable, plain = random_state_dict(True), random_state_dict(False)
    rng = np.random.default_rng(0)
    for training in False, True:
        shape = (2, 3, 224, 224) if options.quick else (8, 3, 224, 224) if training else (1, 3, 800, 1344)
        x = rng.normal(size=shape).astype(np.float32)
        runs = {"jax_dcn": jax_model(deformable, x, deformable=True, training=training)}
        if not training:
            runs["ONNX Runtime"] = onnxruntime_model(deformable, x)
        runs["plain convolutions, XLA"] = jax_model(plain, x, deformable=False, training=training)
        runs["plain convolutions, torch"] = torch_model(plain, x, training=training)
        results = {name: run() for name, run in runs.items()}
        for ours, theirs in (("jax_dcn", "ONNX Runtime"), ("plain convolutions, XLA", "plain convolutions, torch")):
            if not training:
                pairs = zip(results[ours], results[theirs], strict=True)
                error = max(check({"y": a}, {"y": b}, 1e-3) for a, b in pairs)
                print(f"{ours} and {theirs} differ by {error:.1e} of the largest value")
        del results
        before = os.getloadavg()[0]
        seconds = in_turn(list(runs.values()), options.rounds, warm_up=False)
        print(f"{'training step' if training else 'forward'}, {shape}, load {before:.1f} to {os.getloadavg()[0]:.1f}:")
        for name, times in zip(runs, seconds, strict=True):
            print(f"  {name:28}{1e3 * np.median(times):10.0f} ms")


if __name__ == "__main__":
    main()
