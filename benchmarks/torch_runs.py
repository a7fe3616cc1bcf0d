"""What is measured through torch, on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax_runs import WIDE
from tasks import Results, Run, Task
from workloads import Arrays


def torch_run(
    function: Callable[[dict[str, Any]], Any], task: Task, arrays: Arrays, device: str, wide: tuple[str, ...] = WIDE
) -> Run:
    """`function` of a dict of operands once per set, on the default stream. `wide`: those in float32 in any case.

    No CUDA graph: one that is captured on another stream lacks the kernels of torchvision, which launches them on the
    default one whatever the current stream is.
    """
    import torch

    dtypes = {name: torch.float32 if name in wide else getattr(torch, task.dtype) for name in arrays}
    first = {name: torch.from_numpy(array).to(device, dtypes[name]) for name, array in arrays.items()}
    grad_y = first.pop("grad_y")
    sets = [
        {name: array.clone().requires_grad_(task.backward) for name, array in first.items()} for _ in range(task.sets)
    ]

    def one(operands: dict[str, Any]) -> Results:
        y = function(operands)
        gradients = torch.autograd.grad(y, list(operands.values()), grad_y) if task.backward else ()
        return {"y": y.detach(), **dict(zip(operands, gradients, strict=task.backward))}

    def wait(_: list[Results]) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def fetch(results: Results) -> Results:
        return {name: jnp.asarray(array.float().contiguous().cpu().numpy()) for name, array in results.items()}

    return Run(lambda: [one(operands) for operands in sets], wait, fetch)
