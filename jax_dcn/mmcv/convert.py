"""Layouts: a state dict becomes Flax's parameters, and the other way round.

mmcv, PyTorch                            Flax
weight (C_out, C_in/groups, kh, kw)      kernel (kh, kw, C_in/groups, C_out)
weight (C_out, C_in)                     kernel (C_in, C_out)
weight (C,) of a norm                    scale (C,)
running_mean, running_var                mean, var
bias, and every other name               the same
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dcn.mmcv.checkpoint import StateDict, load_checkpoint, read_checkpoint

_LOG = logging.getLogger("jax_dcn.mmcv")

# mmcv and torch count batches here for a momentum that they do not use, load checkpoints without it, and old
# checkpoints have none.
_COUNTER = "num_batches_tracked"

_LISTED = 20  # names of one kind that an error lists


class StateDictError(ValueError):
    """A state dict that does not fit a module. The names and shapes are the state dict's.

    Attributes:
      missing: names that the module has and the state dict has not.
      unexpected: names that the state dict has and the module has not.
      misshaped: from names to the shape in the state dict and the shape expected.
    """

    def __init__(
        self,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ):
        self.missing, self.unexpected, self.misshaped = tuple(missing), tuple(unexpected), dict(misshaped)
        shapes = [f"{key} {actual}, expected {expected}" for key, (actual, expected) in self.misshaped.items()]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": shapes}
        lines = ["the state dict does not fit the module"]
        for kind, names in kinds.items():
            if names:
                lines.append(f"{kind} ({len(names)}):")
                lines += [f"  {name}" for name in names[:_LISTED]]
                lines += [f"  ... and {len(names) - _LISTED} more"] * (len(names) > _LISTED)
        super().__init__("\n".join(lines))


def convert_state_dict(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A state dict in Flax's names and layouts, as nested dicts of numpy arrays.

    The result has the form of `nnx.to_pure_dict`, with the numbers of a list as strings ("layer2", "0", ...), and for
    a model without batch normalisation that of linen's "params" too. It is made from the arrays alone, so a `weight`
    of two or more axes counts as a kernel (an embedding's does not come out right, nor does a transposed
    convolution's), and one of a single axis as the scale of a norm. `load_into` knows the module and decides by it.

    Args:
      state_dict, prefix: as in `load_checkpoint`, whose rules apply.

    Raises:
      TypeError, ValueError: as in `load_checkpoint`.
      ValueError: two names that would become one, or one that is part of another.
    """
    if prefix or not isinstance(state_dict, StateDict):
        state_dict = load_checkpoint(state_dict, prefix)
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, array in state_dict.items():
        *path, leaf = key.split(".")
        if leaf == "weight":
            leaf = "kernel" if array.ndim > 1 else "scale"
            array = _to_flax(leaf, array)
        leaf = {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        place = "/".join([*path, leaf])
        node: Any = tree
        for name in path:
            node = node.setdefault(name, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf in node:
            other = origins.get(place, "another name")
            raise ValueError(f"convert_state_dict: {key} and {other} have no room in one tree, at {place}")
        node[leaf], origins[place] = array, key
    return tree


def to_state_dict(source: Any, prefix: str = "", *, names: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """The way back: a state dict that mmcv loads, once `save_checkpoint` has written it as a `.pth`.

    Args:
      source: an nnx module, linen variables, or nested dicts as from `convert_state_dict`.
      prefix: put before every name, such as "backbone.". The last dot may be left out.
      names: a state dict with the names wanted, such as the one loaded, where they do not follow from Flax's. linen
        calls the first of a list `blocks` `blocks_0`; among `names`, that stands for `blocks.0`. And a parameter may be
        called `scale`, `kernel` or `mean` in torch too, with its layout as it is.

    Returns:
      Arrays in PyTorch's layouts by mmcv's names. Flax's own BatchNorm has no `num_batches_tracked`, which mmcv does
      not need, so it comes back only from modules that keep it. What an nnx module has in several places is there under
      all of its names, as in torch.

    Raises:
      TypeError: another source, or an abstract one.
      ValueError: two parameters that would have one name.
    """
    if not isinstance(source, Mapping) and not _is_a("nnx", "Module", source):
        raise TypeError(
            f"to_state_dict: source must be an nnx module, linen variables or nested dicts, got {type(source).__name__}"
        )
    prefix = prefix and prefix.removesuffix(".") + "."
    state_dict = {}
    for entry in _named(_entries(source), names or (), joined=isinstance(source, Mapping)):
        if isinstance(entry.array, jax.ShapeDtypeStruct):
            raise TypeError(f"to_state_dict: source must not be abstract, got only the shape of {entry.key}")
        array = _to_torch(entry.leaf, np.asarray(entry.array))
        if entry.leaf == _COUNTER:
            array = array.astype(np.int64)  # which JAX only has with jax_enable_x64
        state_dict[prefix + entry.key] = array
    return state_dict


def load_into(
    module: Any,
    state_dict: Mapping[str, Any],
    prefix: str = "",
    *,
    inputs: Sequence[Any] | None = None,
    strict: bool = True,
) -> Any:
    """Fills a module's parameters and statistics from a state dict.

    The module's attributes must have mmcv's names; a list, or an `nnx.Sequential`, stands for its torch counterpart.
    Every array is cast to the dtype of the parameter that it becomes, and placed where that was. What an nnx module has
    in several places may be under one or all of its names.

    Args:
      module: an nnx module, which is changed, and may be abstract (from `nnx.eval_shape`); or linen variables; or a
        linen module.
      state_dict, prefix: as in `load_checkpoint`, whose rules apply, but not to names that the module has itself. Where
        it has those of another code base, read a file with `load_checkpoint(path, rules=False)`.
      inputs: for a linen module, what its `__call__` takes, arrays or `jax.ShapeDtypeStruct`. A layer of jax_dcn.linen
        needs none.
      strict: if False, names missing from the state dict keep their values and unexpected ones are skipped, with a
        warning in the log "jax_dcn.mmcv": for a plain ResNet's weights in one with deformable layers, say. An array of
        the wrong shape is an error still.

    Returns:
      The nnx module itself, or linen variables.

    Raises:
      StateDictError: missing, unexpected or wrongly shaped arrays, all of them in one error.
      TypeError: a linen module without inputs, something that is not a module, or complex numbers for real ones.
      ValueError: as in `load_checkpoint`.
    """
    nnx_module = _is_a("nnx", "Module", module)
    if _is_a("linen", "Module", module):
        module = _linen_variables(module, inputs)
    elif not nnx_module and not isinstance(module, Mapping):
        raise TypeError(f"load_into: module must be a Flax module or variables, got {type(module).__name__}")
    entries = list(_entries(module))
    if prefix or not isinstance(state_dict, StateDict):
        own = {name for entry in entries for name in (entry.key, entry.flax_key)}
        state_dict = read_checkpoint(
            state_dict, prefix, keep=lambda name: (name if nnx_module else _joined(name)) in own
        )
    arrays = state_dict
    entries = list(_named(entries, arrays, joined=not nnx_module))

    keys = {entry.key for entry in entries}
    given = {entry.path for entry in entries if entry.key in arrays}
    missing = [entry.key for entry in entries if entry.path not in given and entry.leaf != _COUNTER]
    unexpected = [key for key in arrays if key not in keys and key.split(".")[-1] != _COUNTER]
    misshaped = {
        entry.key: (arrays[entry.key].shape, expected)
        for entry in entries
        if entry.key in arrays and arrays[entry.key].shape != (expected := _torch_shape(entry))
    }
    # An abstract parameter has no value to keep.
    abstract = {entry.key for entry in entries if isinstance(entry.array, jax.ShapeDtypeStruct)}
    if misshaped or (strict and (missing or unexpected)) or not abstract.isdisjoint(missing):
        raise StateDictError(missing, unexpected, misshaped)
    for kind, names in (("keep their values", missing), ("are skipped", unexpected)):
        if names:
            _LOG.warning("%d arrays %s: %s", len(names), kind, ", ".join(names))
    for entry in entries:
        if entry.key in arrays and np.iscomplexobj(arrays[entry.key]) and not jnp.iscomplexobj(entry.array):
            raise TypeError(f"load_into: {entry.key} is complex, expected {entry.array.dtype}")

    loaded = {}
    for entry in entries:
        array = arrays.get(entry.key)
        if entry.leaf == _COUNTER and array is not None and jnp.issubdtype(entry.array.dtype, jnp.integer):
            # JAX counts in 32 bits by default. A count this high, or a wrong one, changes no number.
            array = np.minimum(array.astype(np.int64), np.iinfo(entry.array.dtype).max)
        if entry.leaf == _COUNTER and entry.path not in given and entry.key in abstract:
            array = np.zeros((), np.int64)
        if array is not None:
            array = _to_flax(entry.leaf, array).astype(entry.array.dtype)
            loaded[entry.path] = jax.device_put(array, getattr(entry.array, "sharding", None))
            if nnx_module:
                entry.variable.set_value(loaded[entry.path])
    return module if nnx_module else _replaced(module, loaded)


# --- names and layouts ---


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A parameter of a module or tree, under the name that it has in a state dict."""

    key: str
    flax_key: str  # where the last name is Flax's
    leaf: str  # the last name in Flax, which decides the layout; empty where torch has the same parameter by that name
    path: tuple[Any, ...]  # the same for all names of an nnx variable
    array: Any
    variable: Any = None  # nnx's


def _entries(source: Any) -> Iterator[_Entry]:
    if _is_a("nnx", "Module", source):
        leaves = list(_nnx_leaves(source))
    else:
        # linen's collections, "params" and "batch_stats", are no part of a name.
        collections = isinstance(source.get("params"), Mapping)
        leaves = [(path[collections:], path, array, None) for path, array in _flat(source)]
    names = {name for name, *_ in leaves}
    keys: dict[str, str] = {}
    for name, path, array, variable in leaves:
        *parents, leaf = name

        def beside(*others: str, parents: list[Any] = parents) -> bool:
            return any((*parents, other) in names for other in others)

        torch_leaf = leaf
        if leaf in ("kernel", "embedding") and not beside("weight"):
            torch_leaf = "weight"
        elif leaf == "scale" and len(array.shape) == 1 and not beside("weight", "kernel", "embedding"):  # a norm's
            torch_leaf = "weight"
        elif leaf in ("mean", "var") and beside("mean") and beside("var"):
            torch_leaf = f"running_{leaf}"
        key, flax_key = (".".join(map(str, [*parents, last])) for last in (torch_leaf, leaf))
        if key in keys:
            raise ValueError(f"{keys[key]} and {flax_key} would both be {key} in a state dict")
        keys[key] = flax_key
        # A kernel beside a weight is not one of Flax's.
        yield _Entry(key, flax_key, str(leaf) if key != flax_key or leaf != "kernel" else "", path, array, variable)


def _named(entries: Iterable[_Entry], names: Iterable[str], *, joined: bool) -> Iterator[_Entry]:
    """The entries under those of the names that mean them.

    Where only the name in Flax is among them, it is not one of Flax's own parameters, whose names torch does not use.
    """
    wanted = {_joined(name) if joined else name: name for name in names}
    for entry in entries:
        if entry.key in wanted:
            yield dataclasses.replace(entry, key=wanted[entry.key])
        elif entry.flax_key in wanted:
            yield dataclasses.replace(entry, key=wanted[entry.flax_key], leaf="")
        else:
            yield entry


def _nnx_leaves(module: Any) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], Any, Any]]:
    from flax import nnx

    # Each node once. A node that is in several places has the other paths in `shared`; those within itself are cycles.
    nodes = dict(nnx.iter_graph(module))
    shared = [
        (first, other)
        for first, *others in nnx.find_duplicates(module)
        for other in others
        if other[: len(first)] != first
    ]

    def all_paths(path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield path
        for first, other in shared:
            if path[: len(first)] == first:
                yield from all_paths(other + path[len(first) :])

    sequential = {
        alias for path, node in nodes.items() if isinstance(node, nnx.Sequential) for alias in all_paths(path)
    }
    for path, variable in nodes.items():
        if isinstance(variable, nnx.Variable) and not isinstance(variable, nnx.RngState):
            for alias in dict.fromkeys(all_paths(path)):
                # torch's Sequential numbers its layers itself, nnx's keeps them in a list `layers`.
                name = tuple(
                    part for depth, part in enumerate(alias) if not (part == "layers" and alias[:depth] in sequential)
                )
                yield name, path, variable.get_value(), variable


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def _replaced(tree: Mapping[str, Any], arrays: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> Any:
    return {
        name: _replaced(value, arrays, (*path, name))
        if isinstance(value, Mapping)
        else arrays.get((*path, name), value)
        for name, value in tree.items()
    }


def _joined(key: str) -> str:
    """A state dict's name as linen would have it: the numbers of lists joined to the name before."""
    *parents, leaf = key.split(".")
    names = []
    for name in parents:
        if name.isdigit() and names:
            names[-1] += f"_{name}"
        else:
            names.append(name)
    return ".".join([*names, leaf])


def _to_flax(leaf: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (0, 1), (-1, -2)) if leaf == "kernel" and array.ndim > 1 else array


def _to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    moved = np.moveaxis(array, (-1, -2), (0, 1)) if leaf == "kernel" and array.ndim > 1 else array
    return np.array(moved, order="C")


def _torch_shape(entry: _Entry) -> tuple[int, ...]:
    shape = tuple(entry.array.shape)
    return (shape[-1], shape[-2], *shape[:-2]) if entry.leaf == "kernel" and len(shape) > 1 else shape


# --- what is given ---


def _is_a(api: str, name: str, value: Any) -> bool:
    """Whether a value is of Flax's class. Flax is loaded if it is."""
    flax = sys.modules.get(f"flax.{api}")
    return flax is not None and isinstance(value, getattr(flax, name))


def _linen_variables(module: Any, inputs: Sequence[Any] | None) -> Mapping[str, Any]:
    """The abstract variables of a linen module."""
    from jax_dcn import _layers

    if inputs is None:
        if not isinstance(module, _layers.Layer):
            raise TypeError("load_into: a linen module knows its parameters only from its inputs: pass inputs=(x, ...)")
        inputs = module._smallest_inputs[: len(inspect.signature(module).parameters)]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)
