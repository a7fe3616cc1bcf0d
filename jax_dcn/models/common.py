"""What models share: which of their parameters are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jax_dcn.mmcv.nn import BatchNorm2d
from jax_dcn.mmcv.nn.parameters import freeze_parameters

_NORMS = ("BN", "BN2d", "SyncBN")


def freeze(module: nnx.Module) -> None:
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            freeze_parameters(node)
        if isinstance(node, BatchNorm2d):
            node.norm_eval = True


def trains_norms(name: str, norm_cfg: Mapping[str, Any] | None) -> bool:
    """Whether the normalisations' parameters are trained."""
    norm_cfg = {"type": "BN", **(norm_cfg or {})}
    if norm_cfg["type"] not in _NORMS or set(norm_cfg) - {"type", "requires_grad"}:
        raise ValueError(
            f"{name}: norm_cfg must be dict(type={' or '.join(map(repr, _NORMS))}, requires_grad=...), got {norm_cfg}"
        )
    return norm_cfg.get("requires_grad", True)
