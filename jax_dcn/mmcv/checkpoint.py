"""Files: a checkpoint becomes a state dict of numpy arrays, and the other way round."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_dcn.mmcv.rules import apply_rules

_LOG = logging.getLogger("jax_dcn.mmcv")

# Under these names a checkpoint holds its state dict: mmcv's; BasicSR's, of which the smoothed is the better; and many
# others'.
_WRAPPERS = ("state_dict", "params_ema", "params", "model")

_TORCH_SUFFIXES = (".pth", ".pt")


class StateDict(dict[str, np.ndarray]):
    """A state dict, and what the renaming rules have changed in it.

    Attributes:
      renamed: for every rule that fired, its name and the changes "old -> new".
    """

    renamed: dict[str, list[str]]

    def __init__(self, arrays: Mapping[str, np.ndarray], renamed: dict[str, list[str]]):
        super().__init__(arrays)
        self.renamed = renamed


def load_checkpoint(
    source: str | os.PathLike | Mapping[str, Any],
    prefix: str = "",
    *,
    progress: Callable[[int], None] | None = None,
) -> StateDict:
    """Reads a checkpoint into a flat dict of numpy arrays, under mmcv's current names.

    A `.pth` is read with weights only: no code in it runs, and objects other than arrays (training states, say) come
    back empty. The state dict is unwrapped (`state_dict`, or BasicSR's `params_ema` and `params`, or `model`), the
    prefix stripped, and the rules of `jax_dcn.mmcv.rules` applied. Which of them fired is in the result's `renamed`,
    and in the log "jax_dcn.mmcv" at level INFO.

    Args:
      source: a file `.pth`, `.pt` (needs torch) or `.safetensors` (needs safetensors), or a mapping from names to
        arrays of numpy, JAX or torch, itself perhaps wrapped.
      prefix: such as "backbone.": only the names below it are kept, without it. The last dot may be left out.
      progress: called with the bytes of each array once it is read.

    Returns:
      The arrays in the checkpoint's layouts, dtypes and order, as copies.

    Raises:
      ImportError: the format's package is missing.
      TypeError: an entry that is not an array.
      ValueError: another kind of file, one that cannot be read safely, no state dict in it, or no name with the prefix.
    """
    with contextlib.ExitStack() as files:
        entries = _unwrap(source if isinstance(source, Mapping) else _open(Path(source), files))
        kept = dict(strip_prefix(entries, prefix))
        arrays = {}
        for key, value in kept.items():
            arrays[key] = _to_numpy(key, value() if callable(value) else value)
            if progress:
                progress(arrays[key].nbytes)
    arrays, renamed = apply_rules(arrays)
    for rule, changes in renamed.items():
        _LOG.info("rule %r fired %d times, first %s", rule, len(changes), changes[0])
    return StateDict(arrays, renamed)


def save_checkpoint(state_dict: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a state dict as a `.safetensors`, or as a `.pth` or `.pt` that mmcv and torch load.

    Args:
      state_dict: arrays of numpy, JAX or torch by name. A `.pth` holds them under `state_dict`, as mmcv's do.
      path: where to. An existing file is replaced.

    Raises:
      ImportError: the format's package is missing.
      TypeError: an entry that is not an array.
      ValueError: another suffix.
    """
    path = Path(path)
    arrays = {key: _to_numpy(key, value) for key, value in state_dict.items()}
    if path.suffix == ".safetensors":
        _import("safetensors", path).numpy.save_file(arrays, path)
    elif path.suffix in _TORCH_SUFFIXES:
        torch = _import("torch", path)
        torch.save({"meta": {}, "state_dict": {key: _to_torch(torch, array) for key, array in arrays.items()}}, path)
    else:
        raise ValueError(_unknown_suffix(path))


def strip_prefix(entries: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The entries below a prefix, without it."""
    if prefix and not prefix.endswith("."):
        prefix += "."
    if prefix and not any(key.startswith(prefix) for key in entries):
        starts = ", ".join(sorted({key.split(".")[0] + "." for key in entries}))
        raise ValueError(f"no key starts with {prefix!r}; the keys start with {starts}")
    return ((key.removeprefix(prefix), value) for key, value in entries.items() if key.startswith(prefix))


def _unwrap(entries: Any) -> Mapping[str, Any]:
    while isinstance(entries, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(entries.get(name), Mapping)), None)
        if wrapper is None:
            if not entries or isinstance(next(iter(entries)), str):
                return entries
            break
        entries = entries[wrapper]
    raise ValueError(f"the checkpoint holds no state dict, but {type(entries).__name__}")


def _open(path: Path, files: contextlib.ExitStack) -> Any:
    """What the file holds, the arrays not yet read where the format allows: tensors in mapped memory, or functions."""
    if path.suffix == ".safetensors":
        file = files.enter_context(_import("safetensors", path).safe_open(path, framework="np"))
        return {key: lambda key=key: file.get_tensor(key) for key in file.keys()}
    if path.suffix in _TORCH_SUFFIXES:
        return _open_torch(path)
    raise ValueError(_unknown_suffix(path))


class _Inert:
    """Stands for every object in a checkpoint that is not an array. Nothing of the object's own class runs."""

    def __init__(self, *arguments: Any, **keywords: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _open_torch(path: Path) -> Any:
    torch = _import("torch", path)
    # Files of torch before 1.6 are not archives: torch neither maps them into memory nor lists the classes in them.
    archive = zipfile.is_zipfile(path)
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
    with torch.serialization.safe_globals([(_Inert, name) for name in classes]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        except Exception as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(f"{path} cannot be read safely: {str(error).splitlines()[0]}") from error


def _to_numpy(key: str, value: Any) -> np.ndarray:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{key} is not an array but {type(value).__name__}")
    if hasattr(value, "detach"):  # torch's
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has none of its own
            import torch

            return np.array(value.view(torch.int16).numpy(), order="C").view(jnp.bfloat16)
        value = value.numpy()
    return np.array(value, order="C")


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _import(package: str, path: Path) -> Any:
    try:
        if package == "torch":
            import torch

            return torch
        import safetensors.numpy

        return safetensors
    except ModuleNotFoundError as error:
        raise ImportError(f"{path.name} needs {package}: pip install {package}") from error


def _unknown_suffix(path: Path) -> str:
    return f"{path.name} must end in {', '.join(_TORCH_SUFFIXES)} or .safetensors"
