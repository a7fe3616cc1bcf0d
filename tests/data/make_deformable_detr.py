"""Makes deformable_detr.npz with torch and transformers: python tests/data/make_deformable_detr.py"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import deformable_detr


def main():
    layer = deformable_detr.original()
    x, mask, positions, points, shapes, *rest = deformable_detr.random_inputs()
    x, positions = (torch.tensor(array, requires_grad=True) for array in (x, positions))
    out = layer(x, torch.tensor(mask), positions, torch.tensor(points), torch.tensor(shapes), *rest)
    ct = torch.tensor(np.random.default_rng(1).normal(size=out.shape).astype(np.float32))
    named = {"in0": x, "in2": positions, **dict(layer.named_parameters())}
    grads = torch.autograd.grad((out * ct).sum(), list(named.values()))
    arrays = {f"state:{name}": array for name, array in layer.state_dict().items()}
    arrays |= {"ct": ct, "out": out} | {f"grad:{name}": grad for name, grad in zip(named, grads, strict=True)}
    path = Path(__file__).with_name("deformable_detr.npz")
    np.savez_compressed(path, **{name: array.detach().numpy() for name, array in arrays.items()})


if __name__ == "__main__":
    main()
