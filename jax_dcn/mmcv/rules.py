"""The names under which other versions and other code bases keep a deformable layer, brought to mmcv's current ones.

A Pack `<p>` has `<p>.weight`, `<p>.bias` and `<p>.conv_offset.weight`, `<p>.conv_offset.bias`. A rule looks at a whole
state dict and proposes new entries for old ones; a name that is there already is never replaced.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Change:
    """An entry of the state dict under its new name."""

    old: tuple[str, ...]
    new: str
    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rule:
    name: str
    find: Callable[[Arrays], Iterator[Change]]


def apply_rules(
    state_dict: Arrays, keep: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """The state dict under mmcv's names, in its order, and what every rule that fired has changed, "old -> new".

    A name for which `keep` is true stays.
    """
    arrays = dict(state_dict)
    fired: dict[str, list[str]] = {}
    for rule in RULES:
        changes = {}
        for change in rule.find(arrays):
            if change.new not in arrays and not any(map(keep, change.old)):
                changes[change.old[0]] = change
                fired.setdefault(rule.name, []).append(f"{' + '.join(change.old)} -> {change.new}")
        gone = {old for change in changes.values() for old in change.old}
        renamed = {}
        for key, array in arrays.items():
            if key in changes:
                renamed[changes[key].new] = changes[key].array
            elif key not in gone:
                renamed[key] = array
        arrays = renamed
    return arrays, fired


def _data_parallel(arrays: Arrays) -> Iterator[Change]:
    """`module.` before every name, from torch's DataParallel."""
    if arrays and all(key.startswith("module.") for key in arrays):
        for key, array in arrays.items():
            yield Change((key,), key.removeprefix("module."), array)


def _old_offset(arrays: Arrays) -> Iterator[Change]:
    """`<p>_offset.*` beside `<p>.weight`: mmcv's layers before version 2, and old DB and EasyOCR.

    Other layers may have such a name, so its weight must be one that a Pack beside `<p>.weight` has: of the same taps,
    more than one (two channels beside a 1x1 convolution may be anything), of all the groups' input channels, and of
    the channels of an offset, or of an offset and a mask. The bias goes where the weight goes, or is.
    """
    for key, array in arrays.items():
        if match := re.fullmatch(r"(.+)_offset\.(weight|bias)", key):
            layer = arrays.get(f"{match[1]}.weight")
            weight = arrays.get(f"{match[1]}_offset.weight", arrays.get(f"{match[1]}.conv_offset.weight"))
            if layer is not None and weight is not None and _fits_pack(layer, weight):
                if array.shape[:1] == weight.shape[:1]:
                    yield Change((key,), f"{match[1]}.conv_offset.{match[2]}", array)


def _fits_pack(layer: np.ndarray, offset: np.ndarray) -> bool:
    if layer.ndim != 4 or offset.ndim != 4 or layer.shape[2:] != offset.shape[2:]:
        return False
    taps, group_in = layer.shape[2] * layer.shape[3], layer.shape[1]
    if taps <= 1 or group_in < 1 or offset.shape[1] % group_in:
        return False
    return 0 in (offset.shape[0] % (2 * taps), offset.shape[0] % (3 * taps))


def _conv_offset_mask(arrays: Arrays) -> Iterator[Change]:
    """`<p>.conv_offset_mask.*`: CharlesShang's DCNv2 and its descendants, with mmcv's order of the channels."""
    for key, array in arrays.items():
        if match := re.fullmatch(r"(.+\.)?conv_offset_mask\.(weight|bias)", key):
            yield Change((key,), f"{match[1] or ''}conv_offset.{match[2]}", array)


def _separate_convolutions(arrays: Arrays) -> Iterator[Change]:
    """`<p>.offset_conv`, `<p>.modulator_conv` and `<p>.regular_conv`: BiRefNet's layer, over torchvision's operator.

    Its mask is 2 * sigmoid(modulator_conv(x)). A Pack's is a sigmoid, so the 2 goes into the weight, which is exact.
    """
    for key, weight in arrays.items():
        match = re.fullmatch(r"(.+\.)?regular_conv\.weight", key)
        path = (match[1] or "") if match else ""
        if not match or f"{path}offset_conv.weight" not in arrays:
            continue
        modulated = f"{path}modulator_conv.weight" in arrays
        yield Change((key,), f"{path}weight", weight * weight.dtype.type(2) if modulated else weight)
        if (bias := arrays.get(f"{path}regular_conv.bias")) is not None:
            yield Change((f"{path}regular_conv.bias",), f"{path}bias", bias)
        for leaf in ("weight", "bias"):
            keys = [f"{path}offset_conv.{leaf}"] + [f"{path}modulator_conv.{leaf}"] * modulated
            if all(key in arrays for key in keys):
                merged = np.concatenate([arrays[key] for key in keys])
                yield Change(tuple(keys), f"{path}conv_offset.{leaf}", merged)


RULES = (
    Rule("data parallel", _data_parallel),
    Rule("version 1 offset", _old_offset),
    Rule("conv_offset_mask", _conv_offset_mask),
    Rule("offset_conv, modulator_conv, regular_conv", _separate_convolutions),
)
