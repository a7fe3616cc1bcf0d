"""Files: a checkpoint becomes a state dict of numpy arrays, and the other way round."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

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
    rules: bool = True,
    progress: Callable[[int], None] | None = None,
) -> StateDict:
    """Reads a checkpoint into a flat dict of numpy arrays, under mmcv's current names.

    A `.pth` is read with weights only: no code in it runs. torch's and numpy's arrays are read, and objects of other
    classes (training states, say) come back empty. A file with a list or dict of a class of its own, a defaultdict say,
    is refused, as torch refuses it, and so is one of torch before 1.6 with any object of another class. The state dict
    is unwrapped (`state_dict`, or BasicSR's `params_ema` and `params`, or `model`), the rules of `jax_dcn.mmcv.rules`
    are applied, and the prefix is stripped. Which rules fired is in the result's `renamed`, and in the log
    "jax_dcn.mmcv" at level INFO.

    Args:
      source: a file `.pth`, `.pt` (needs torch) or `.safetensors` (needs safetensors), or a mapping from names to
        arrays of numpy, JAX or torch, itself perhaps wrapped.
      prefix: such as "backbone.": only the names below it are kept, without it. The last dot may be left out.
      rules: False leaves all names and arrays as they are, for a module with the names of another code base. They are
        not applied a second time to a `StateDict`.
      progress: called with the bytes of each array once it is read.

    Returns:
      The arrays in the checkpoint's layouts, dtypes and order, as copies.

    Raises:
      ImportError: the format's package is missing.
      TypeError: another source, or an entry that is not an array.
      ValueError: another kind of file, one that cannot be read safely, no state dict in it, or no name with the prefix.
    """
    return read_checkpoint(source, prefix, (lambda name: False) if rules else (lambda name: True), progress)


def read_checkpoint(
    source: Any,
    prefix: str,
    keep: Callable[[str], bool],
    progress: Callable[[int], None] | None = None,
) -> StateDict:
    """`load_checkpoint`, where the rules leave the names below the prefix alone for which `keep` is true."""
    prefix = prefix and prefix.removesuffix(".") + "."
    if not isinstance(source, (str, os.PathLike, Mapping)):
        hint = ": give its state_dict()" if hasattr(source, "state_dict") else ""
        raise TypeError(f"a state dict must be a path or a dict of arrays, got {type(source).__name__}{hint}")
    with contextlib.ExitStack() as files:
        entries = _unwrap(source if isinstance(source, Mapping) else _open(Path(source), files))
        # The rules may bring names below the prefix that do not start with it: module.backbone., and backbone.conv2_
        # offset. for backbone.conv2.
        starts = tuple(
            start + end for start in ("", "module.") for end in (prefix, prefix and prefix[:-1] + "_offset.")
        )
        arrays = {}
        for key, value in entries.items():
            if key.startswith(starts):
                arrays[key] = to_numpy(key, value() if callable(value) else value)
                if progress:
                    progress(arrays[key].nbytes)
    if isinstance(source, StateDict):
        renamed = dict(source.renamed)
    else:
        arrays, renamed = apply_rules(arrays, lambda name: keep(name.removeprefix(prefix)))
        for rule, changes in renamed.items():
            _LOG.info("rule %r fired %d times, first %s", rule, len(changes), changes[0])

    def below(start: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(start): array for key, array in arrays.items() if key.startswith(start)}

    kept = below(prefix) or below(prefix.removeprefix("module."))  # which a rule may have taken off
    if prefix and not kept:
        raise ValueError(no_key_starts_with(prefix, entries))
    return StateDict(kept, renamed)


def no_key_starts_with(prefix: str, keys: Iterable[str]) -> str:
    firsts = ", ".join(sorted({key.split(".")[0] + "." for key in keys}))
    return f"no key starts with {prefix!r}; the keys start with {firsts}"


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
    arrays = {key: to_numpy(key, value) for key, value in state_dict.items()}
    if path.suffix == ".safetensors":
        _import("safetensors", path).numpy.save_file(arrays, path)
    elif path.suffix in _TORCH_SUFFIXES:
        torch = _import("torch", path)
        torch.save({"meta": {}, "state_dict": {key: to_tensor(torch, array) for key, array in arrays.items()}}, path)
    else:
        raise ValueError(_unknown_suffix(path))


def _unwrap(entries: Any) -> Mapping[str, Any]:
    while isinstance(entries, Mapping):
        wrapped = [entries[name] for name in _WRAPPERS if isinstance(entries.get(name), Mapping)]
        if not wrapped:
            if not entries or isinstance(next(iter(entries)), str):
                return entries
            break
        entries = next(filter(None, wrapped), wrapped[0])
    raise ValueError(f"the checkpoint holds no state dict, but {type(entries).__name__}")


def _open(path: Path, files: contextlib.ExitStack) -> Any:
    """What the file holds, the arrays not yet read where the format allows: tensors in mapped memory, or functions."""
    if path.suffix == ".safetensors":
        safetensors = _import("safetensors", path)
        try:
            file = files.enter_context(safetensors.safe_open(path, framework="np"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
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


# Pickled numpy arrays are decoded here: numpy's own functions trust what a pickle says about a dtype.


class _NumpyDtype(_Inert):
    order: Any = "="

    def __init__(self, code: Any = None, *arguments: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, order, *_):
                self.order = order

    def decode(self, data: bytes, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray | None:
        """The array, unless it is of something else than numbers, or not as numpy writes it."""
        if not isinstance(self.code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)", self.code):
            return None
        try:
            dtype = np.dtype(self.code).newbyteorder(self.order)
            return np.frombuffer(data, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))
        except (TypeError, ValueError):
            return None


class _NumpyArray(_Inert):
    array: np.ndarray | None = None  # None if it is not of numbers

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, shape, _NumpyDtype() as dtype, is_fortran, data):
                self.array = dtype.decode(data, shape, "F" if is_fortran else "C")


def _numpy_scalar(dtype: Any, data: Any = None) -> _NumpyArray:
    scalar = _NumpyArray()
    if isinstance(dtype, _NumpyDtype):
        scalar.array = dtype.decode(data, (), "C")
    return scalar


_NumpyArray.__name__ = "ndarray"  # in errors


def _no_bytes(*arguments: Any) -> bytes:
    """An empty array's, for which torch's pickles call `bytes`. That itself would take 100 GB for `bytes(10**11)`."""
    return b""


_NUMPY = {"numpy.dtype": _NumpyDtype, "builtins.bytes": _no_bytes} | {
    f"numpy.{core}.multiarray.{name}": stand_in
    for core in ("core", "_core")
    for name, stand_in in (("_reconstruct", _NumpyArray), ("scalar", _numpy_scalar))
}


def _stand_in(name: str) -> Any:
    """What is made instead of an object of a class, or the result of a function."""
    module, _, last = name.rpartition(".")
    # A class of its own, since torch's errors name it.
    return _NUMPY.get(name) or type(last, (_Inert,), {"__module__": module})


def _open_torch(path: Path) -> Any:
    torch = _import("torch", path)
    with path.open("rb"):  # its errors are the user's, those of torch's reader are the file's
        pass
    try:
        # Files of torch before 1.6 are not archives: torch neither maps them into memory nor lists the classes in them.
        archive = zipfile.is_zipfile(path)
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else [*_NUMPY, "numpy.ndarray"]
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in classes]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except MemoryError:
        raise
    except Exception as error:
        # Not chained: torch's message begins with the advice to load the file unsafely.
        raise ValueError(f"{path} cannot be read safely: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """What torch says is wrong, in a line, without its advice."""
    if isinstance(error, pickle.UnpicklingError | RuntimeError | ValueError):
        message = str(error).rpartition("WeightsUnpickler error:")[2]
        for line in message.splitlines():
            if line.strip() and "weights_only" not in line:
                return line.partition("Please use")[0].strip()
    return type(error).__name__


def to_numpy(key: str, value: Any) -> np.ndarray:
    """A copy of an array of numpy, JAX or torch. Errors name it by its key."""
    if isinstance(value, _NumpyArray) and value.array is not None:
        value = value.array
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{key} is not an array of numbers but {type(value).__name__}")
    if hasattr(value, "detach"):  # torch's
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has none of its own
            import torch

            return np.array(value.view(torch.int16).numpy(), order="C").view(jnp.bfloat16)
        value = value.numpy()
    return np.array(value, order="C")


def to_tensor(torch: Any, array: np.ndarray) -> Any:
    """torch's, over the same memory."""
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
