"""What models share: their images, which of their parameters are trained, and what config dicts mean."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jax_dcn._checks import to_array
from jax_dcn.mmcv.nn import BatchNorm2d
from jax_dcn.mmcv.nn.parameters import freeze_parameters

_Module = TypeVar("_Module", bound=nnx.Module)

_NORMS = ("BN", "BN2d", "SyncBN")


def to_nhwc(name: str, x: Any, data_format: str, channels: int) -> jax.Array:
    """A model's images, checked, with their channels last."""
    x, axis = to_array(name, "x", x), data_format.index("C")
    if x.ndim != 4 or x.shape[axis] != channels:
        raise ValueError(f"{name}: x has shape {x.shape}, expected {data_format} with {channels} channels")
    return jnp.moveaxis(x, axis, 3)


def freeze(module: nnx.Module) -> None:
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            freeze_parameters(node)
        if isinstance(node, BatchNorm2d):
            node.norm_eval = True


def trains_norms(name: str, norm_cfg: Mapping[str, Any] | None) -> bool:
    """Whether the normalisations' parameters are trained."""
    if norm_cfg is not None and not isinstance(norm_cfg, Mapping):
        raise TypeError(f"{name}: norm_cfg must be a dict, got {norm_cfg!r}")
    norm_cfg = {"type": "BN", **(norm_cfg or {})}
    if norm_cfg["type"] not in _NORMS or set(norm_cfg) - {"type", "requires_grad"}:
        raise ValueError(
            f"{name}: norm_cfg must be dict(type={' or '.join(map(repr, _NORMS))}, requires_grad=...), got {norm_cfg}"
        )
    return norm_cfg.get("requires_grad", True)


def to_entries(name: str, cfg: Any, known: Iterable[str]) -> dict[str, Any]:
    """A config dict's entries, if all are known."""
    if not isinstance(cfg, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(cfg).__name__}")
    if unknown := set(cfg) - set(known):
        raise TypeError(f"{name} has unknown entries {sorted(map(str, unknown))}, expected some of {sorted(known)}")
    return dict(cfg)


def from_config(
    name: str, cfg: Any, cls: type[_Module], unused: Iterable[str], only: Mapping[str, Any], **options: Any
) -> _Module:
    """What mmdet's config dict describes, a module of a class.

    Args:
      name: what errors call the dict.
      cfg: its type must be the class's name. Its other entries are arguments.
      cls: the class.
      unused: entries without effect.
      only: entries of which one value is built.
      **options: further arguments, which do not come from the dict.
    """
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    arguments = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in options}
    entries = to_entries(name, cfg, {"type", *arguments, *unused, *only})
    if entries.get("type") != cls.__name__:
        raise ValueError(f"{name}'s type must be {cls.__name__!r}, got {entries.get('type')!r}")
    for entry, value in only.items():
        if entries.get(entry, value) != value:
            raise ValueError(f"{name}'s {entry} must be {value}, got {entries[entry]!r}: nothing else is built")
    required = [argument for argument, default in arguments.items() if default is inspect.Parameter.empty]
    if missing := [argument for argument in required if argument not in entries]:
        raise TypeError(f"{name} lacks the entries {missing}")
    return cls(**{entry: value for entry, value in entries.items() if entry in arguments}, **options)
