"""A port beside its original in torch: what every submodule returns, and the gradients of the parameters."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dcn._checks import check_data_format
from jax_dcn.mmcv.checkpoint import to_numpy, to_tensor
from jax_dcn.mmcv.convert import to_state_dict
from jax_dcn.mmcv.tree import is_a, is_counter, nnx_nodes

Arrays = dict[str, Any]  # by their place in what was returned

_PATCHING = threading.Lock()  # while classes have other `__call__`s

_LISTED = 10  # names of one kind that the text lists


@dataclasses.dataclass(frozen=True)
class Row:
    """An array of both.

    Attributes:
      name: of the submodule that returned it, or of the parameter, and its place among several, such as "[0]"; without
        a submodule's name for what the whole module returned.
      shape: torch's.
      error: the largest difference, relative to torch's largest absolute value, for a gradient at least a hundredth of
        that of all gradients, since many are zero but for rounding (of a bias before a normalization, say). Infinite
        where one has infinities or NaNs and the other has not, NaN where there is nothing to compare.
      note: why not.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` has found. As a string it is a table.

    Attributes:
      outputs: what the submodules returned, in the order in which torch's were done.
      gradients: those of torch's parameters.
      weights: the names of parameters and statistics whose values differ, which one of them has and the other has not
        among them; in training also those that differ only afterwards.
      unmatched: the submodules called in torch that have none of their name here, such as activations, and those
        without parameters of their own that are not called here, such as containers.
      tolerance: of the relative error, above which something differs.
    """

    outputs: tuple[Row, ...]
    gradients: tuple[Row, ...]
    weights: tuple[str, ...]
    unmatched: tuple[str, ...]
    tolerance: float

    def differs(self, row: Row) -> bool:
        """Whether a row's error is above the tolerance, or not known."""
        return not row.error <= self.tolerance

    @property
    def first(self) -> Row | None:
        """The first output that differs: its submodule is to be looked at."""
        return next(filter(self.differs, self.outputs), None)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.weights and not any(map(self.differs, self.outputs + self.gradients))

    def __str__(self) -> str:
        rows = self.outputs + self.gradients
        width = max((len(_printed(row)) for row in rows), default=0)
        wide = max((len(str(row.shape)) for row in rows), default=0)
        lines = []
        for title, rows in (("outputs, in order of execution", self.outputs), ("gradients", self.gradients)):
            lines.append(f"{title}: relative error")
            for row in rows:
                mark = "*" if self.differs(row) else " "
                first = ", the first that differs" if row is self.first else ""
                lines.append(
                    f"{mark} {_printed(row):{width}}  {row.shape!s:{wide}}  {row.note or f'{row.error:.1e}'}{first}"
                )
        for title, listed in (
            ("weights that differ, or that only one of them has", self.weights),
            ("submodules of torch without a counterpart here", self.unmatched),
        ):
            if listed:
                more = f" and {len(listed) - _LISTED} more" * (len(listed) > _LISTED)
                lines.append(f"{title} ({len(listed)}): {', '.join(listed[:_LISTED])}{more}")
        lines.append("nothing differs" if self.agrees else f"*: the error is above {self.tolerance:.0e}, or unknown")
        return "\n".join(lines)


def _printed(row: Row) -> str:
    return f"(the whole){row.name}" if row.name == "" or row.name.startswith("[") else row.name


def compare(
    module: Any,
    torch_module: Any,
    *inputs: Any,
    data_format: str | None = None,
    training: bool = False,
    tolerance: float = 1e-4,
) -> Comparison:
    """Runs a port and its original on the same input, and compares what every submodule of the same name returns.

        print(compare(model, torch_model, np.random.default_rng(0).normal(size=(1, 3, 65, 97))))

    Both are copied, so neither is changed, and run operation by operation. A submodule that is called several times is
    compared call by call. Then comes the gradient of the sum of all outputs with random weights, the same in both, with
    respect to the parameters. If the port raises an error, that says how far both agreed.

    Args:
      module: an nnx module.
      torch_module: the original, with the same weights: what differs in them is listed.
      *inputs: what both take, in torch's layout: arrays of numpy, JAX or torch, lists, tuples or dicts of them, or
        anything else as it is. Floating-point ones take the dtype of torch's parameters.
      data_format: that of the module's inputs with four axes (default that of its attribute `data_format`, or "NHWC").
        The layout of what submodules return is settled by its shape; where both fit, by which is closer.
      training: whether both are compared in training (default False). A dropout then makes both random.
      tolerance: the relative error above which something counts as different.

    Raises:
      ImportError: torch is missing.
      TypeError: a module of another kind, or an abstract one, or an original that returns no arrays.
      ValueError: another data_format.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("compare needs torch: pip install torch") from error
    if not is_a("nnx", "Module", module):
        raise TypeError(f"compare: module must be an nnx module, got {type(module).__name__}")
    if not isinstance(torch_module, torch.nn.Module):
        raise TypeError(f"compare: torch_module must be a torch.nn.Module, got {type(torch_module).__name__}")
    from flax import nnx

    data_format = getattr(module, "data_format", "NHWC") if data_format is None else data_format
    check_data_format("compare", data_format)
    module, torch_module = nnx.clone(module), copy.deepcopy(torch_module).train(training)
    (module.train if training else module.eval)()
    weights = _weights_that_differ(module, torch_module, tolerance)
    floating = next((p for p in torch_module.parameters() if p.is_floating_point()), torch.zeros(()))

    def to_torch(array: Any) -> Any:
        tensor = to_tensor(torch, _numpy(array))
        return tensor.to(floating.device, floating.dtype if tensor.is_floating_point() else None)

    def to_jax(array: Any) -> jax.Array:
        array = _numpy(to_torch(array))
        return jnp.asarray(_channels_last(array) if array.ndim == 4 and data_format == "NHWC" else array)

    expected, torch_calls = _run_torch(torch_module, [_mapped(to_torch, value) for value in inputs])
    if not expected:
        raise TypeError("compare: torch_module must return arrays, in lists, tuples or dicts if there are several")
    ours = [_mapped(to_jax, value) for value in inputs]
    parts = dict(torch_module.named_modules())
    calls = _room_for_calls(module, {name for name, part in parts.items() if _has_forward(part)})
    weighty = {name for name, part in parts.items() if [*part.parameters(recurse=False), *part.buffers(recurse=False)]}

    def so_far(torch_calls: Sequence[tuple[str, Arrays]]) -> Comparison:
        rows, unmatched = _output_rows(torch_calls, calls, weighty)
        return Comparison(tuple(rows), (), weights, tuple(unmatched), tolerance)

    try:
        with _PATCHING, _recorded(module, calls):
            actual = _arrays(module(*ours))
    except Exception as error:
        error.add_note(f"compare: this is the port's. What it had done before:\n{so_far(_reached(torch_calls, calls))}")
        raise
    if training:
        weights = tuple(dict.fromkeys([*weights, *_weights_that_differ(module, torch_module, tolerance)]))
    comparison = so_far(torch_calls)
    if actual.keys() != expected.keys() or not all(_layouts(actual[key], a.shape) for key, a in expected.items()):
        return comparison

    rng = np.random.default_rng(0)
    factors = {key: rng.normal(size=array.shape) for key, array in expected.items()}
    # In the layout in which the outputs were closer.
    moved = {key: _closer(np.asarray(actual[key]), _numpy(array))[1] for key, array in expected.items()}
    weighted = {key: _channels_last(factor) if moved[key] else factor for key, factor in factors.items()}

    def loss(module: Any) -> jax.Array:
        arrays = _arrays(module(*ours))
        return sum((jnp.sum(a * weighted[key].astype(a.dtype)) for key, a in arrays.items()), jnp.zeros(()))

    try:
        torch_grads = _torch_gradients(torch_module, expected, factors)
        state = nnx.grad(loss)(nnx.clone(module)) if torch_grads else {}
    except Exception as error:
        error.add_note(f"compare: this is of the gradients. What came before:\n{comparison}")
        raise
    # What only the port has is among the weights that differ.
    names = torch_module.state_dict()
    grads = {name: grad for name, grad in to_state_dict(state, names=names, like=module).items() if name in names}
    return dataclasses.replace(comparison, gradients=tuple(_gradient_rows(torch_grads, grads)))


def _has_forward(part: Any) -> bool:
    """A ModuleList has none."""
    import torch

    return type(part).forward is not torch.nn.Module.forward


def _run_torch(module: Any, inputs: Sequence[Any]) -> tuple[Arrays, list[tuple[str, Arrays]]]:
    """The outputs, and what every call of a submodule returned, by its name, in order."""
    import torch

    calls = []

    def record(name: str, result: Any) -> None:
        # Copies: an activation may work in place.
        calls.append((name, {key: _numpy(array) for key, array in _arrays(result).items()}))

    for name, child in module.named_modules():
        child.register_forward_hook(lambda _, inputs, result, name=name: record(name, result))
    with torch.enable_grad():
        return _arrays(module(*inputs)), calls


def _torch_gradients(module: Any, outputs: Arrays, factors: Arrays) -> dict[str, np.ndarray]:
    import torch

    # Under all of their names, as the port's.
    named = module.named_parameters(remove_duplicate=False)
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    with torch.enable_grad():
        terms = [(a * torch.tensor(factors[key]).to(a)).sum() for key, a in outputs.items() if a.requires_grad]
        if not trained or not terms:
            return {}
        grads = torch.autograd.grad(sum(terms), trained.values(), allow_unused=True)
    return {
        name: np.zeros(parameter.shape, np.float32) if grad is None else _numpy(grad)
        for (name, parameter), grad in zip(trained.items(), grads, strict=True)
    }


def _room_for_calls(module: Any, wanted: Set[str]) -> dict[str, list[Arrays]]:
    """Room for what the calls of the submodules return, by those names in torch that can be called here."""
    return {
        name: []
        for _, node, aliases in nnx_nodes(module)
        if is_a("nnx", "Module", node) and callable(node)
        for name in _name_in_torch(aliases, wanted)
    }


def _name_in_torch(aliases: Sequence[tuple[Any, ...]], wanted: Set[str]) -> list[str]:
    """What is in several places has one name in torch."""
    return [name for name in (".".join(map(str, alias)) for alias in aliases) if name in wanted][:1]


@contextlib.contextmanager
def _recorded(module: Any, calls: dict[str, list[Arrays]]) -> Iterator[None]:
    """Puts what every call of a submodule returns to the others of its name."""
    nodes = [(node, aliases) for _, node, aliases in nnx_nodes(module) if is_a("nnx", "Module", node)]
    names = {id(node): name for node, aliases in nodes for name in _name_in_torch(aliases, calls.keys())}
    # How many calls of an object are under way: its class calls that of a base.
    inside: collections.Counter[int] = collections.Counter()

    def recorded(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(self: Any, *arguments: Any, **keywords: Any) -> Any:
            inside[id(self)] += 1
            try:
                result = call(self, *arguments, **keywords)
            finally:
                inside[id(self)] -= 1
            if not inside[id(self)] and id(self) in names:
                calls[names[id(self)]].append(_arrays(result))
            return result

        return wrapper

    own: dict[Any, Callable[..., Any]] = {
        base: vars(base)["__call__"] for node, _ in nodes for base in type(node).__mro__ if "__call__" in vars(base)
    }
    try:
        for cls, call in own.items():
            cls.__call__ = recorded(call)
        yield
    finally:
        for cls, call in own.items():
            cls.__call__ = call


def _weights_that_differ(module: Any, torch_module: Any, tolerance: float) -> tuple[str, ...]:
    expected = {name: _numpy(array) for name, array in torch_module.state_dict().items()}
    actual = to_state_dict(module, names=expected)

    def same(name: str) -> bool:
        if name not in expected or name not in actual or expected[name].shape != actual[name].shape:
            return is_counter(name)
        return _error(actual[name], expected[name]) <= tolerance

    return tuple(name for name in dict.fromkeys([*expected, *actual]) if not same(name))


def _reached(
    torch_calls: Sequence[tuple[str, Arrays]], calls: Mapping[str, Sequence[Arrays]]
) -> list[tuple[str, Arrays]]:
    """Those of torch's calls that the port has come to."""
    done: collections.Counter[str] = collections.Counter()
    reached = []
    for name, arrays in torch_calls:
        done[name] += 1
        if done[name] <= len(calls.get(name, ())):
            reached.append((name, arrays))
    return reached


def _output_rows(
    torch_calls: Sequence[tuple[str, Arrays]], calls: Mapping[str, Sequence[Arrays]], weighty: Set[str]
) -> tuple[list[Row], list[str]]:
    """The rows, call by call, and the names without a counterpart. `weighty` have parameters of their own."""
    rows: list[Row] = []
    unmatched: dict[str, None] = {}
    counts = collections.Counter(name for name, _ in torch_calls)
    done: collections.Counter[str] = collections.Counter()
    for name, arrays in torch_calls:
        done[name] += 1
        if name not in calls or (not calls[name] and name not in weighty):
            unmatched[name] = None
            continue
        label = f"{name} (call {done[name]})" if counts[name] > 1 else name
        if done[name] <= len(calls[name]):
            rows += _rows(label, arrays, calls[name][done[name] - 1])
        else:
            shape = next((array.shape for array in arrays.values()), ())
            rows.append(Row(label, shape, math.nan, "not called here, or inside of a transformation"))
        if done[name] == counts[name] and len(calls[name]) > counts[name]:
            rows.append(Row(label, (), math.nan, f"called {len(calls[name])} times here, {counts[name]} in torch"))
    only_here = [name for name in calls if calls[name] and not counts[name] and name in weighty]
    rows += [Row(name, (), math.nan, "not called in torch") for name in only_here]
    return rows, list(unmatched)


def _gradient_rows(expected: Arrays, actual: Arrays) -> Iterator[Row]:
    finite = [np.abs(grad[np.isfinite(grad)]).max(initial=0) for grad in expected.values()]
    floor = 0.01 * float(max(finite, default=0))
    for name in dict.fromkeys([*expected, *actual]):
        grad, of_ours = expected.get(name), actual.get(name)
        if grad is None or of_ours is None:
            note = "not trained in torch" if grad is None else "not trained here"
            yield Row(name, {**actual, **expected}[name].shape, math.nan, note)
        elif of_ours.shape != grad.shape:
            yield Row(name, grad.shape, math.nan, f"shape {of_ours.shape} here")
        else:
            yield Row(name, grad.shape, _error(of_ours, grad, floor))


def _rows(name: str, expected: Arrays, actual: Arrays) -> Iterator[Row]:
    for key in dict.fromkeys([*expected, *actual]):
        array, of_ours = expected.get(key), actual.get(key)
        shape, error, note = tuple({**actual, **expected}[key].shape), math.nan, ""
        if array is None:
            note = "nothing in torch"
        elif of_ours is None:
            note = "nothing here"
        elif isinstance(of_ours, jax.core.Tracer):
            note = "not seen, inside of a transformation"
        elif not _layouts(of_ours, array.shape):
            note = f"shape {tuple(of_ours.shape)} here"
        else:
            error, _ = _closer(np.asarray(of_ours), array)
        yield Row(name + key, shape, error, note)


def _layouts(array: Any, shape: tuple[int, ...]) -> list[bool]:
    """Whether the channels must move for torch's shape: neither, one or both."""
    moved = (*array.shape[:-3], array.shape[-1], *array.shape[-3:-1]) if array.ndim >= 4 else None
    return [move for move, its in ((False, tuple(array.shape)), (True, moved)) if its == tuple(shape)]


def _closer(actual: np.ndarray, expected: np.ndarray) -> tuple[float, bool]:
    """The error, and whether the channels have moved, in the layout where it is smaller."""
    return min(
        (_error(np.moveaxis(actual, -1, -3) if move else actual, expected), move)
        for move in _layouts(actual, expected.shape)
    )


def _error(actual: np.ndarray, expected: np.ndarray, floor: float = 0) -> float:
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(np.where(finite, 0, expected), np.where(np.isfinite(actual), 0, actual), equal_nan=True):
        return math.inf
    actual, expected = actual[finite], expected[finite]
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / (max(np.abs(expected).max(), floor) or 1.0))


def _arrays(value: Any) -> Arrays:
    """The arrays in nested lists, tuples and dicts by their place, such as "[0]"; a single one by ""."""
    arrays = dict(_located(value, ""))
    return dict(zip([""], arrays.values(), strict=True)) if len(arrays) == 1 else arrays


def _located(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Mapping, tuple, list)):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            yield from _located(entry, f"{place}[{key}]")
    elif _is_array(value):
        yield place, value


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested lists, tuples and dicts with their arrays replaced."""
    if isinstance(value, Mapping):
        return {key: _mapped(function, entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [_mapped(function, entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return function(value) if _is_array(value) else value


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _numpy(array: Any) -> np.ndarray:
    return to_numpy("an array", array)


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -3, -1)
