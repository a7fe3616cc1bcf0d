"""A state dict becomes Flax's parameters, and the other way round; `tree` says how they differ."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dcn.mmcv.checkpoint import StateDict, load_checkpoint, no_key_starts_with, read_checkpoint
from jax_dcn.mmcv.tree import (
    COUNTER,
    Entry,
    entries_of,
    entries_of_state,
    is_a,
    is_counter,
    joined_name,
    named,
    plain_arrays,
    replaced,
    to_flax,
    to_torch,
    torch_shape,
)

_LOG = logging.getLogger("jax_dcn.mmcv")

_LISTED = 20  # names of one kind that an error lists


class StateDictError(ValueError):
    """A state dict that does not fit a module. The names and shapes are the state dict's.

    Attributes:
      missing: names that the module has and the state dict has not.
      unexpected: names that the state dict has and the module has not.
      misshaped: from names to the shape in the state dict and the shape expected.
      hints: from names to what may be the cause.
    """

    def __init__(
        self,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
        hints: Mapping[str, str] | None = None,
    ):
        self.missing, self.unexpected, self.misshaped = tuple(missing), tuple(unexpected), dict(misshaped)
        self.hints = dict(hints or {})

        def hinted(key: str, text: str = "") -> str:
            return f"{key}{text}: {self.hints[key]}" if key in self.hints else f"{key}{text}"

        shapes = [hinted(key, f" {actual}, expected {expected}") for key, (actual, expected) in self.misshaped.items()]
        kinds = {"missing": self.missing, "unexpected": [*map(hinted, self.unexpected)], "wrong shape": shapes}
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
    a model without lists and batch normalisation that of linen's "params" too. It is made from the arrays alone, so a
    `weight` of two or more axes counts as a kernel (an embedding's does not come out right, and a transposed
    convolution's is that of `jax_dcn.mmcv.nn.ConvTranspose2d`), and one of a single axis as the scale of a norm.
    `load_into` knows the module and decides by it.

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
            array = to_flax(leaf, array)
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


def to_state_dict(
    source: Any, prefix: str = "", *, names: Mapping[str, Any] | None = None, like: Any = None
) -> dict[str, np.ndarray]:
    """The way back: a state dict that mmcv loads, once `save_checkpoint` has written it as a `.pth`.

    Args:
      source: an nnx module, linen variables, or nested dicts as from `convert_state_dict`; or with `like`, an
        `nnx.State` or its nested dicts: gradients, an optimizer's moments, or some of a module's variables.
      prefix: put before every name, such as "backbone.". The last dot may be left out.
      names: a state dict with the names wanted, such as the one loaded, where they do not follow from Flax's. linen
        calls the first of a list `blocks` `blocks_0`; among `names`, that stands for `blocks.0`. And a parameter may be
        called `scale`, `kernel` or `mean` in torch too, with its layout as it is.
      like: the nnx module whose state the source is. Its classes decide about names and layouts, which a state does not
        know.

    Returns:
      Arrays in PyTorch's layouts by mmcv's names. Flax's own BatchNorm has no `num_batches_tracked`, which mmcv does
      not need, so it comes back only from modules that keep it. What an nnx module has in several places is there under
      all of its names, as in torch.

    Raises:
      TypeError: another source, a state without `like`, or an abstract one.
      ValueError: two parameters that would have one name, or a state that is not one of `like`.
    """
    if not isinstance(source, Mapping) and not is_a("nnx", "Module", source):
        raise TypeError(
            f"to_state_dict: source must be an nnx module, linen variables or nested dicts, got {type(source).__name__}"
        )
    if like is None and is_a("nnx", "State", source):
        raise TypeError("to_state_dict: an nnx.State does not say what its names mean: pass like=module")
    if like is not None and not isinstance(source, Mapping):
        raise TypeError(f"to_state_dict: like is for the state of a module, got {type(source).__name__}")
    if like is not None and not is_a("nnx", "Module", like):
        raise TypeError(f"to_state_dict: like must be an nnx module, got {type(like).__name__}")
    prefix = prefix and prefix.removesuffix(".") + "."
    entries = entries_of(source) if like is None else entries_of_state(source, like)
    state_dict = {}
    for entry in named(entries, names or (), joined=like is None and isinstance(source, Mapping)):
        if isinstance(entry.array, jax.ShapeDtypeStruct):
            raise TypeError(f"to_state_dict: source must not be abstract, got only the shape of {entry.key}")
        array = to_torch(entry.leaf, np.asarray(entry.array))
        if entry.leaf == COUNTER:
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
      StateDictError: missing, unexpected or wrongly shaped arrays, all of them in one error, with a likely cause.
      TypeError: a linen module without inputs, something that is not a module (an `nnx.State`, too), or complex numbers
        for real ones.
      ValueError: as in `load_checkpoint`.
    """
    nnx_module = is_a("nnx", "Module", module)
    if is_a("linen", "Module", module):
        module = _linen_variables(module, inputs)
    elif is_a("nnx", "State", module):
        raise TypeError("load_into: module must be the module itself, got its nnx.State")
    elif not nnx_module and not isinstance(module, Mapping):
        raise TypeError(f"load_into: module must be a Flax module or variables, got {type(module).__name__}")
    entries = list(entries_of(module))
    if prefix or not isinstance(state_dict, StateDict):
        own = {name for entry in entries for name in (entry.key, entry.flax_key)}
        state_dict = read_checkpoint(
            state_dict, prefix, keep=lambda name: (name if nnx_module else joined_name(name)) in own
        )
    entries = list(named(entries, state_dict, joined=not nnx_module))
    loaded = _fill(entries, state_dict, plain_arrays(module) if nnx_module else (), strict)
    return module if nnx_module else replaced(module, loaded)


def load_parts(
    parts: Mapping[str, Any], state_dict: str | os.PathLike | Mapping[str, Any], *, strict: bool = True
) -> list[str]:
    """Fills the parts of a whole detector from its checkpoint, all of them or, if something does not fit, none.

        left = load_parts({"backbone.": backbone, "neck.": neck}, "detector.pth")

    Args:
      parts: nnx modules, which are changed, by the prefixes of their names. The last dot may be left out.
      state_dict: the whole checkpoint, as in `load_checkpoint`, whose rules apply as in `load_into`.
      strict: as in `load_into`.

    Returns:
      The names that no part has taken, such as those of the head.

    Raises:
      StateDictError: as in `load_into`, with whole names.
      TypeError: a part that is not an nnx module, and as in `load_into`.
      ValueError: as in `load_checkpoint`.
    """
    if not isinstance(parts, Mapping):
        raise TypeError(f"load_parts: parts must be a dict of modules by prefix, got {type(parts).__name__}")
    names = [prefix and prefix.removesuffix(".") + "." for prefix in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"load_parts: two parts have one prefix, got {', '.join(map(repr, parts))}")
    parts = dict(zip(names, parts.values(), strict=True))
    entries: list[Entry] = []
    plain: set[str] = set()
    for prefix, module in parts.items():
        if not is_a("nnx", "Module", module):
            raise TypeError(f"load_parts: {prefix!r} must be an nnx module, got {type(module).__name__}")
        for entry in entries_of(module):
            key, flax_key = prefix + entry.key, prefix + entry.flax_key
            entries.append(dataclasses.replace(entry, key=key, flax_key=flax_key, path=(prefix, *entry.path)))
        plain |= {prefix + name for name in plain_arrays(module)}
    if not isinstance(state_dict, StateDict):
        own = {name for entry in entries for name in (entry.key, entry.flax_key)}
        state_dict = read_checkpoint(state_dict, "", keep=own.__contains__)
    for prefix in parts:
        if not any(key.startswith(prefix) for key in state_dict):
            raise ValueError(no_key_starts_with(prefix, state_dict))
    below = {key: array for key, array in state_dict.items() if key.startswith(tuple(parts))}
    entries = list(named(entries, below, joined=False))
    _fill(entries, below, plain, strict)
    taken = {entry.key for entry in entries}
    return [key for key in state_dict if key not in taken and not (key in below and is_counter(key))]


def _fill(
    entries: Sequence[Entry], arrays: Mapping[str, np.ndarray], plain: Collection[str], strict: bool
) -> dict[tuple[Any, ...], jax.Array]:
    """The arrays of a state dict as those of the entries, by their paths. nnx's variables are set to them.

    `plain` are names of arrays of the module that are no variables.
    """
    keys = {entry.key for entry in entries}
    given = {entry.path for entry in entries if entry.key in arrays}
    missing = [entry.key for entry in entries if entry.path not in given and entry.leaf != COUNTER]
    unexpected = [key for key in arrays if key not in keys and not is_counter(key)]
    misshaped = {
        entry.key: (arrays[entry.key].shape, expected)
        for entry in entries
        if entry.key in arrays and arrays[entry.key].shape != (expected := torch_shape(entry))
    }
    # An abstract parameter has no value to keep.
    abstract = {entry.key for entry in entries if isinstance(entry.array, jax.ShapeDtypeStruct)}
    if misshaped or (strict and (missing or unexpected)) or not abstract.isdisjoint(missing):
        hints = {
            key: "the module's array of this name is no nnx.Variable, and only those are seen"
            for key in unexpected
            if key in plain
        }
        for entry in entries:
            if entry.key in misshaped and (hint := _layout_hint(entry, arrays[entry.key])):
                hints[entry.key] = hint
        raise StateDictError(missing, unexpected, misshaped, hints)
    for kind, names in (("keep their values", missing), ("are skipped", unexpected)):
        if names:
            _LOG.warning("%d arrays %s: %s", len(names), kind, ", ".join(names))
    for entry in entries:
        if entry.key in arrays and np.iscomplexobj(arrays[entry.key]) and not jnp.iscomplexobj(entry.array):
            raise TypeError(f"load_into: {entry.key} is complex, expected {entry.array.dtype}")

    loaded = {}
    for entry in entries:
        array = arrays.get(entry.key)
        if entry.leaf == COUNTER and array is not None and jnp.issubdtype(entry.array.dtype, jnp.integer):
            # JAX counts in 32 bits by default. A count this high, or a wrong one, changes no number.
            array = np.minimum(array.astype(np.int64), np.iinfo(entry.array.dtype).max)
        if entry.leaf == COUNTER and entry.path not in given and entry.key in abstract:
            array = np.zeros((), np.int64)
        if array is not None:
            array = to_flax(entry.leaf, array).astype(entry.array.dtype)
            loaded[entry.path] = jax.device_put(array, getattr(entry.array, "sharding", None))
            if entry.variable is not None:
                entry.variable.set_value(loaded[entry.path])
    return loaded


def _layout_hint(entry: Entry, array: np.ndarray) -> str:
    """What is wrong with a shape if it is only the order of the axes."""
    shape = tuple(entry.array.shape)
    if entry.leaf != "kernel" and array.ndim > 1 and to_flax("kernel", array).shape == shape:
        return "the module has it in the layout of a Flax kernel, but only what is called kernel is transposed"
    if entry.leaf == "kernel" and array.shape == shape:
        return "the module has it in torch's layout, but what is called kernel is transposed"
    return ""


def _linen_variables(module: Any, inputs: Sequence[Any] | None) -> Mapping[str, Any]:
    """The abstract variables of a linen module."""
    if inputs is None:
        takes = len(inspect.signature(module).parameters)
        if not hasattr(module, "_smallest_inputs"):
            raise TypeError("load_into: a linen module knows its parameters only from its inputs: pass inputs=(x, ...)")
        inputs = module._smallest_inputs[:takes]

    # What is no array may have to be known while tracing, as the sizes of an attention's levels.
    arrays = {index: value for index, value in enumerate(inputs) if hasattr(value, "shape")}

    def init(key: jax.Array, arrays: Mapping[int, jax.Array]) -> Any:
        return module.init(key, *(arrays.get(index, value) for index, value in enumerate(inputs)))

    return jax.eval_shape(init, jax.random.key(0), arrays)
