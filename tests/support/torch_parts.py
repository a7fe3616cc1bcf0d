"""The originals in torch of what support/parts_golden.py lists."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from support.parts_golden import CASES, inputs

ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "ReLU6": nn.ReLU6,
    "ELU": nn.ELU,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "HSwish": nn.Hardswish,
}


class HSigmoid(nn.Module):
    """mmcv's."""

    def __init__(self, bias=3.0, divisor=6.0):
        super().__init__()
        self.bias, self.divisor = bias, divisor

    def forward(self, x):
        return ((x + self.bias) / self.divisor).clamp(0, 1)


class ConvModule(nn.Module):
    """mmcv's, for what the cases use of it."""

    def __init__(
        self,
        c_in,
        c_out,
        kernel_size,
        stride=1,
        padding=0,
        *,
        bias="auto",
        conv_cfg=None,
        norm_cfg=None,
        act_cfg=(("type", "ReLU"),),
        padding_mode="zeros",
        order=("conv", "norm", "act"),
    ):
        super().__init__()
        conv = {"deconv": nn.ConvTranspose2d, None: nn.Conv2d}[conv_cfg and conv_cfg["type"]]
        bias = norm_cfg is None if bias == "auto" else bias
        self.conv = conv(c_in, c_out, kernel_size, stride, padding, bias=bias, padding_mode=padding_mode)
        channels = c_out if order.index("conv") < order.index("norm") else c_in
        if norm_cfg and norm_cfg["type"] == "GN":
            self.gn = nn.GroupNorm(norm_cfg["num_groups"], channels)
        elif norm_cfg:
            self.bn = nn.BatchNorm2d(channels)
        if act_cfg:
            options = dict(act_cfg)
            self.activate = {**ACTIVATIONS, "HSigmoid": HSigmoid}[options.pop("type")](**options)
        self.order = order

    def forward(self, x):
        names = {"conv": ("conv",), "norm": ("bn", "gn"), "act": ("activate",)}
        for kind in self.order:
            for name in names[kind]:
                x = getattr(self, name, nn.Identity())(x)
        return x


def original(part):
    """A torch module, or the function of a part's arguments."""
    if part.name == "ConvModule":
        return ConvModule(*part.arguments, **part.options)
    if hasattr(nn, part.name):
        return getattr(nn, part.name)(*part.arguments, **part.options)
    return lambda x: getattr(F, part.name)(x, *part.arguments, **part.options)


def compute(case):
    """What torch makes of a case, in float64, as GoldenPart has it, and the shapes of its state dict.

    A function is computed in float32, in which it finds its neighbours.
    """
    part = CASES[case]
    module = original(part)
    layer = isinstance(module, nn.Module)
    dtype = torch.float64 if layer else torch.float32
    shapes = {}
    if layer:
        shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    with torch.no_grad():
        shape_out = (module.eval() if layer else module)(torch.zeros(part.shape)).shape
    state_dict, x, gy = inputs(case, shapes, tuple(shape_out))
    if layer:
        module.load_state_dict({key: torch.from_numpy(value) for key, value in state_dict.items()})
        module.to(dtype).train(part.training)
    x = torch.from_numpy(x).to(dtype).requires_grad_()
    y = module(x)
    named = {"x": x, **(dict(module.named_parameters()) if layer else {})}
    grads = torch.autograd.grad((y * torch.from_numpy(gy).to(dtype)).sum(), named.values())
    arrays = {"y": y, **{f"grads/{name}": grad for name, grad in zip(named, grads, strict=True)}}
    if part.training:
        arrays |= {f"after/{key}": value for key, value in module.state_dict().items()}
    return {key: np.asarray(value.detach().numpy(), np.float32) for key, value in arrays.items()}, shapes
