"""The parameters of a Flax module or tree: their names in a state dict, and their layouts.

mmcv, PyTorch                            Flax
weight (C_out, C_in/groups, kh, kw)      kernel (kh, kw, C_in/groups, C_out)
weight (C_out, C_in)                     kernel (C_in, C_out)
weight (C,) of a norm                    scale (C,)
running_mean, running_var                mean, var
bias, and every other name               the same
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter of a module or tree, under the name that it has in a state dict."""

    key: str
    flax_key: str  # where the last name is Flax's
    leaf: str  # the last name in Flax, which decides the layout; empty where torch has the same parameter by that name
    path: tuple[Any, ...]  # the same for all names of an nnx variable
    array: Any
    variable: Any = None  # nnx's


def entries_of(source: Any) -> Iterator[Entry]:
    if is_a("nnx", "Module", source):
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
        yield Entry(key, flax_key, str(leaf) if key != flax_key or leaf != "kernel" else "", path, array, variable)


def entries_of_state(state: Mapping[Any, Any], module: Any) -> Iterator[Entry]:
    """The entries of the nnx module that a state of it has, with the state's arrays.

    Raises:
      ValueError: a name or a shape that the module has not.
    """
    # Their numbers in lists are nnx's, or strings as from `convert_state_dict`.
    leaves = {
        tuple(map(str, path)): leaf.get_value() if is_a("nnx", "Variable", leaf) else leaf
        for path, leaf in _flat(state)
    }
    # An optimizer leaves out what it does not move.
    arrays = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "shape")}
    nodes = {tuple(map(str, path)): node for path, node, _ in nnx_nodes(module)}
    known = {path for path, node in nodes.items() if is_a("nnx", "Variable", node) or _is_array(node)}
    if unknown := [".".join(path) for path in arrays if path not in known]:
        raise ValueError(f"the state has {', '.join(unknown)}, which {type(module).__name__} has not")
    for entry in entries_of(module):
        array = arrays.get(tuple(map(str, entry.path)))
        if array is not None:
            if tuple(array.shape) != tuple(entry.array.shape):
                raise ValueError(
                    f"the state's {entry.flax_key} has shape {tuple(array.shape)}, expected {tuple(entry.array.shape)}"
                )
            yield dataclasses.replace(entry, array=array)


def plain_arrays(module: Any) -> set[str]:
    """The names of an nnx module's arrays that are no variables."""
    arrays = (names for _, node, names in nnx_nodes(module) if _is_array(node))
    return {".".join(map(str, name)) for names in arrays for name in names}


def named(entries: Iterable[Entry], names: Iterable[str], *, joined: bool) -> Iterator[Entry]:
    """The entries under those of the names that mean them.

    Where only the name in Flax is among them, it is not one of Flax's own parameters, whose names torch does not use.
    """
    wanted = {joined_name(name) if joined else name: name for name in names}
    for entry in entries:
        if entry.key in wanted:
            yield dataclasses.replace(entry, key=wanted[entry.key])
        elif entry.flax_key in wanted:
            yield dataclasses.replace(entry, key=wanted[entry.flax_key], leaf="")
        else:
            yield entry


def nnx_nodes(module: Any) -> Iterator[tuple[tuple[Any, ...], Any, list[tuple[Any, ...]]]]:
    """The path of every node of an nnx module, the node, and the names that it has in torch, one for each place."""
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

    def name(path: tuple[Any, ...]) -> tuple[Any, ...]:
        # torch's Sequential numbers its layers itself, nnx's keeps them in a list `layers`.
        return tuple(part for depth, part in enumerate(path) if not (part == "layers" and path[:depth] in sequential))

    for path, node in nodes.items():
        yield path, node, [name(alias) for alias in dict.fromkeys(all_paths(path))]


def _nnx_leaves(module: Any) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], Any, Any]]:
    from flax import nnx

    for path, node, names in nnx_nodes(module):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            for name in names:
                yield name, path, node.get_value(), node


def _flat(tree: Mapping[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def replaced(tree: Mapping[str, Any], arrays: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> Any:
    return {
        name: replaced(value, arrays, (*path, name)) if isinstance(value, Mapping) else arrays.get((*path, name), value)
        for name, value in tree.items()
    }


def joined_name(key: str) -> str:
    """A state dict's name as linen would have it: the numbers of lists joined to the name before."""
    *parents, leaf = key.split(".")
    names: list[str] = []
    for name in parents:
        if name.isdigit() and names:
            names[-1] += f"_{name}"
        else:
            names.append(name)
    return ".".join([*names, leaf])


def to_flax(leaf: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (0, 1), (-1, -2)) if leaf == "kernel" and array.ndim > 1 else array


def to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    moved = np.moveaxis(array, (-1, -2), (0, 1)) if leaf == "kernel" and array.ndim > 1 else array
    return np.array(moved, order="C")


def torch_shape(entry: Entry) -> tuple[int, ...]:
    shape = tuple(entry.array.shape)
    return (shape[-1], shape[-2], *shape[:-2]) if entry.leaf == "kernel" and len(shape) > 1 else shape


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def is_counter(key: str) -> bool:
    """Whether it is the name of BatchNorm's counter.

    mmcv and torch count batches for a momentum that they do not use, load checkpoints without it, and old checkpoints
    have none.
    """
    return key.split(".")[-1] == COUNTER


def is_a(api: str, name: str, value: Any) -> bool:
    """Whether a value is of Flax's class. Flax is loaded if it is."""
    flax = sys.modules.get(f"flax.{api}")
    return flax is not None and isinstance(value, getattr(flax, name))
