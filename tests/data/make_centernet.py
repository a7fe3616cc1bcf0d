"""Makes centernet_step.npz with torch, in float64: python tests/data/make_centernet.py

One step of training of a narrow CenterNet, written after mmdet 3.3.0 with its names: the targets, the losses, the
gradient of their sum for every parameter, and the running statistics after it. The weights follow from the names.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))
from make_models import DeformConv, ResNet
from support import centernet_golden, models_golden


class CenterNet(nn.Module):
    def __init__(self, *, channels, filters, classes):
        super().__init__()
        self.backbone = ResNet(depth=18, base_channels=channels)

        def module(conv, c_out):
            return nn.ModuleDict({"conv": conv, "bn": nn.BatchNorm2d(c_out)})

        layers, c_in = [], 8 * channels
        for c_out in filters:
            layers.append(module(DeformConv(c_in, c_out, 3), c_out))
            layers.append(module(nn.ConvTranspose2d(c_out, c_out, 4, 2, 1, bias=False), c_out))
            c_in = c_out
        self.neck = nn.ModuleDict({"deconv_layers": nn.ModuleList(layers)})

        def branch(c_out):
            return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=1), nn.ReLU(), nn.Conv2d(c_in, c_out, 1))

        heads = {"heatmap_head": branch(classes), "wh_head": branch(2), "offset_head": branch(2)}
        self.bbox_head = nn.ModuleDict(heads)

    def forward(self, x):
        x = self.backbone(x)[-1]
        for layer in self.neck["deconv_layers"]:
            x = layer["bn"](layer["conv"](x)).relu()
        heatmap, wh, offset = (branch(x) for branch in self.bbox_head.values())
        return heatmap.sigmoid(), wh, offset


def radius_of(height, width, overlap=0.3):
    """The largest radius at which boxes overlap enough, by bisection on the overlaps themselves."""

    def enough(r):
        moved = (width - r) * (height - r) / (2 * width * height - (width - r) * (height - r))
        smaller = (width - 2 * r) * (height - 2 * r) / (width * height)
        larger = width * height / ((width + 2 * r) * (height + 2 * r))
        return min(moved, smaller, larger) >= overlap

    low, high = 0.0, min(height, width) / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def targets_of(boxes, labels, shape, stride):
    """By loops over images, objects and pixels."""
    images, _, height, width = shape
    heatmap, values = np.zeros(shape), np.zeros((images, 5, height, width))
    for image in range(images):
        for (x1, y1, x2, y2), label in zip(boxes[image] / stride, labels[image], strict=True):
            if label < 0:
                continue
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            column, row = int(cx), int(cy)
            radius = int(radius_of(y2 - y1, x2 - x1))
            for i in range(max(row - radius, 0), min(row + radius + 1, height)):
                for j in range(max(column - radius, 0), min(column + radius + 1, width)):
                    sigma = (2 * radius + 1) / 6
                    value = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
                    heatmap[image, label, i, j] = max(heatmap[image, label, i, j], value)
            values[image, :, row, column] = x2 - x1, y2 - y1, cx - column, cy - row, 1
    return heatmap, values


def losses_of(outputs, heatmap, values):
    probability, wh, offset = outputs
    heatmap, values = torch.from_numpy(heatmap), torch.from_numpy(values)
    objects = max(1, int((heatmap == 1).sum()))
    eps = 1e-12
    there = -(probability + eps).log() * (1 - probability) ** 2 * (heatmap == 1)
    elsewhere = -(1 - probability + eps).log() * probability**2 * (1 - heatmap) ** 4
    weight = values[:, 4:]
    return [
        (there + elsewhere).sum() / objects,
        0.1 * ((wh - values[:, :2]).abs() * weight).sum() / (2 * objects),
        ((offset - values[:, 2:4]).abs() * weight).sum() / (2 * objects),
    ]


def main():
    model = CenterNet(**centernet_golden.CONFIG).double().train()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    weights = centernet_golden.random_state_dict(shapes)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    (images,) = models_golden.random_inputs("centernet", [centernet_golden.IMAGES])
    outputs = model(torch.from_numpy(images).double())
    heatmap, values = targets_of(centernet_golden.BOXES, centernet_golden.LABELS, outputs[0].shape, 4)
    losses = losses_of(outputs, heatmap, values)
    sum(losses).backward()
    arrays = {
        "shapes": np.array(json.dumps(shapes)),
        "heatmap": heatmap,
        "values": values,
        "losses": np.array([loss.item() for loss in losses]),
    }
    arrays |= {f"grad:{key}": p.grad.numpy().astype(np.float32) for key, p in model.named_parameters()}
    after = {key: value.numpy() for key, value in model.state_dict().items() if "running" in key or "num_" in key}
    arrays |= {f"after:{key}": value.astype(np.float32) for key, value in after.items()}
    np.savez_compressed(centernet_golden.PATH, **arrays)
    print("losses", *arrays["losses"], "objects", int((heatmap == 1).sum()))
    print("largest of each map", *(float(y.detach().abs().max()) for y in outputs))


if __name__ == "__main__":
    main()
