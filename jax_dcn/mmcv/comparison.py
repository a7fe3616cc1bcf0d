"""A port beside its original in torch: what every submodule returns, and the gradients of the parameters."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jax_dcn._checks import check_data_format
from jax_dcn.mmcv.checkpoint import to_numpy
from jax_dcn.mmcv.convert import to_state_dict
from jax_dcn.mmcv.tree import is_a, nnx_nodes

_LISTED = 10  # names of one kind that the text lists


@dataclasses.dataclass(frozen=True)
class Row:
    """An array of both.

    Attributes:
      name: of the submodule that returned it, or of the parameter; empty for the whole module.
      shape: torch's.
      error: the largest difference, relative to torch's largest absolute value, for a gradient at least a hundredth of
        that of all gradients, since many are zero but for rounding (of a bias before a normalization, say). NaN where
        there is nothing to compare.
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
        among them.
      unmatched: the submodules called in torch that have none of their name here, such as activations.
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
        """The first output that differs: the submodule that is to be looked at."""
        return next(filter(self.differs, self.outputs), None)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.weights and not any(map(self.differs, self.outputs + self.gradients))

    def __str__(self) -> str:
        names = [row.name for row in self.outputs + self.gradients]
        width = max(map(len, ["(the whole)", *names]))
        wide = max(len(str(row.shape)) for row in self.outputs + self.gradients)
        lines = []
        for title, rows in (("outputs, in order of execution", self.outputs), ("gradients", self.gradients)):
            lines.append(f"{title}: relative error")
            for row in rows:
                mark = "*" if self.differs(row) else " "
                error = f"{row.error:.1e}" if row.note == "" else row.note
                first = ", the first that differs" if row is self.first else ""
                lines.append(f"{mark} {row.name or '(the whole)':{width}}  {row.shape!s:{wide}}  {error}{first}")
        for title, listed in (
            ("weights that differ, or that only one of them has", self.weights),
            ("submodules of torch that have none of their name here", self.unmatched),
        ):
            if listed:
                more = f" and {len(listed) - _LISTED} more" * (len(listed) > _LISTED)
                lines.append(f"{title} ({len(listed)}): {', '.join(listed[:_LISTED])}{more}")
        lines.append("nothing differs" if self.agrees else f"*: the error is above {self.tolerance:.0e}, or unknown")
        return "\n".join(lines)


def compare(
    module: Any,
    torch_module: Any,
    *inputs: Any,
    data_format: str | None = None,
    training: bool = False,
    tolerance: float = 1e-4,
) -> Comparison:
    """Runs a port and its original on the same input, and compares what every submodule of the same name returns.

        print(compare(model, torch_model, np.random.default_rng(0).normal(size=(1, 3, 65, 97)).astype("float32")))

    Both are copied, so neither is changed, and run operation by operation. A submodule that is called several times is
    compared call by call. Then comes the gradient of the sum of all outputs with random weights, the same in both.

    Args:
      module: an nnx module.
      torch_module: the original, with the same weights: what differs in them is listed.
      *inputs: what both take, in torch's layout: arrays of numpy, JAX or torch, lists, tuples or dicts of them, or
        anything else as it is.
      data_format: that of the module's inputs with four axes (default that of its attribute `data_format`, or "NHWC").
        The layout of what submodules return is settled by its shape; where both fit, by which is closer.
      training: whether both are compared in training (default False). A dropout then makes both random.
      tolerance: the relative error above which something counts as different.

    Raises:
      ImportError: torch is missing.
      TypeError: a module of another kind, or an abstract one.
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

    def to_jax(array: np.ndarray) -> jax.Array:
        return jnp.asarray(_channels_last(array) if array.ndim == 4 and data_format == "NHWC" else array)

    device = next((parameter.device for parameter in torch_module.parameters()), None)
    y, torch_calls = _run_torch(torch_module, _mapped(lambda a: torch.tensor(a, device=device), inputs))
    ours, calls = _run_nnx(module, _mapped(to_jax, inputs), torch_calls)

    outputs: list[Row] = []
    unmatched: list[str] = []
    counts = collections.Counter(name for name, _ in torch_calls)
    done: collections.Counter[str] = collections.Counter()
    for name, arrays in torch_calls:
        call, of_ours = done[name], calls.get(name, [])
        done[name] += 1
        if not of_ours:
            unmatched.append(name)
            continue
        label = f"{name} (call {call + 1})" if counts[name] > 1 else name
        outputs += _rows(label, arrays, of_ours[call] if call < len(of_ours) else None)

    rng = np.random.default_rng(0)
    cotangents = [rng.normal(size=array.shape) for array in map(_numpy, y)]
    gradients: list[Row] = []
    if len(ours) == len(y) and all(_layouts(a, c.shape) for a, c in zip(ours, cotangents, strict=True)):
        torch_grads = _torch_gradients(torch_module, y, cotangents)
        # In the layout in which the outputs were closer.
        moved = [_closer(a, _numpy(t))[1] for a, t in zip(map(np.asarray, ours), y, strict=True)]
        weighted = [_channels_last(c) if move else c for c, move in zip(cotangents, moved, strict=True)]

        def loss(module: Any) -> jax.Array:
            arrays = _arrays(module(*_mapped(to_jax, inputs)))
            return sum((jnp.sum(a * c.astype(a.dtype)) for a, c in zip(arrays, weighted, strict=True)), jnp.zeros(()))

        grads = to_state_dict(nnx.grad(loss)(nnx.clone(module)), names=torch_grads, like=module)
        floor = 0.01 * max((float(np.abs(grad).max(initial=0)) for grad in torch_grads.values()), default=0)
        for name, expected in torch_grads.items():
            gradients += _rows(name, [expected], [grads[name]] if name in grads else None, floor)
    return Comparison(tuple(outputs), tuple(gradients), weights, tuple(dict.fromkeys(unmatched)), tolerance)


def _run_torch(module: Any, inputs: Sequence[Any]) -> tuple[list[Any], list[tuple[str, list[np.ndarray]]]]:
    """The outputs, and what every call of a submodule returned, by its name, in order."""
    calls = []

    def record(name: str, result: Any) -> None:
        # Copies: an activation may work in place.
        calls.append((name, [_numpy(array) for array in _arrays(result)]))

    handles = [
        child.register_forward_hook(lambda _, inputs, result, name=name: record(name, result))
        for name, child in module.named_modules()
    ]
    y = _arrays(module(*inputs))
    for handle in handles:
        handle.remove()
    return y, calls


def _torch_gradients(module: Any, y: Sequence[Any], cotangents: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained or not any(array.requires_grad for array in y):
        return {}
    loss = sum((array * torch.tensor(c).to(array)).sum() for array, c in zip(y, cotangents, strict=True))
    grads = torch.autograd.grad(loss, trained.values(), allow_unused=True)
    return {
        name: np.zeros(parameter.shape, np.float32) if grad is None else _numpy(grad)
        for (name, parameter), grad in zip(trained.items(), grads, strict=True)
    }


def _run_nnx(
    module: Any, inputs: Sequence[Any], torch_calls: Sequence[tuple[str, Any]]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """The outputs, and what every call of a submodule returned, by its name in torch."""
    wanted = {name for name, _ in torch_calls}
    names, classes = {}, set()
    for _, node, aliases in nnx_nodes(module):
        if is_a("nnx", "Module", node):
            classes.add(type(node))
            # What is in several places has one name in torch.
            known = wanted.intersection(".".join(map(str, alias)) for alias in aliases)
            names[id(node)] = next(iter(known), None)
    calls: dict[str, list[Any]] = {}

    def record(node: Any, result: Any) -> None:
        if (name := names.get(id(node))) is not None:
            calls.setdefault(name, []).append(_arrays(result))

    with _watched(classes, record):
        y = _arrays(module(*inputs))
    return y, calls


@contextlib.contextmanager
def _watched(classes: set[type], record: Callable[[Any, Any], None]) -> Iterator[None]:
    """Tells `record` of every call of an object of the classes, and its result."""
    # How many calls of an object are under way: its class calls that of a base.
    inside: collections.Counter[int] = collections.Counter()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(self: Any, *arguments: Any, **keywords: Any) -> Any:
            inside[id(self)] += 1
            try:
                result = call(self, *arguments, **keywords)
            finally:
                inside[id(self)] -= 1
            if not inside[id(self)]:
                record(self, result)
            return result

        return wrapper

    with contextlib.ExitStack() as patches:
        for cls in {base for derived in classes for base in derived.__mro__ if "__call__" in vars(base)}:
            patches.enter_context(mock.patch.object(cls, "__call__", watched(cls.__call__)))
        yield


def _weights_that_differ(module: Any, torch_module: Any, tolerance: float) -> tuple[str, ...]:
    expected = {name: _numpy(array) for name, array in torch_module.state_dict().items()}
    actual = to_state_dict(module, names=expected)
    either = {name for name in [*expected, *actual] if not name.endswith("num_batches_tracked")}
    return tuple(
        name
        for name in dict.fromkeys([*expected, *actual])
        if name in either
        and not (
            name in expected
            and name in actual
            and expected[name].shape == actual[name].shape
            and _error(actual[name], expected[name]) <= tolerance
        )
    )


def _rows(name: str, expected: Sequence[np.ndarray], actual: Sequence[Any] | None, floor: float = 0) -> Iterator[Row]:
    for index, array in enumerate(expected):
        label = f"{name}[{index}]" if len(expected) > 1 else name
        if actual is None:
            yield Row(label, array.shape, float("nan"), "nothing here")
        elif len(actual) != len(expected):
            yield Row(label, array.shape, float("nan"), f"{len(actual)} arrays here, {len(expected)} in torch")
        elif isinstance(actual[index], jax.core.Tracer):
            yield Row(label, array.shape, float("nan"), "not seen, inside of a transformation")
        elif not _layouts(actual[index], array.shape):
            yield Row(label, array.shape, float("nan"), f"shape {tuple(actual[index].shape)} here")
        else:
            yield Row(label, array.shape, _closer(np.asarray(actual[index]), array, floor)[0])


def _layouts(array: Any, shape: tuple[int, ...]) -> list[bool]:
    """Whether the channels must move for torch's shape: neither, one or both."""
    moved = (*array.shape[:-3], array.shape[-1], *array.shape[-3:-1]) if array.ndim >= 4 else None
    return [move for move, its in ((False, tuple(array.shape)), (True, moved)) if its == tuple(shape)]


def _closer(actual: np.ndarray, expected: np.ndarray, floor: float = 0) -> tuple[float, bool]:
    """The error, and whether the channels have moved, in the layout where it is smaller."""
    return min(
        (_error(np.moveaxis(actual, -1, -3) if move else actual, expected, floor), move)
        for move in _layouts(actual, expected.shape)
    )


def _error(actual: np.ndarray, expected: np.ndarray, floor: float = 0) -> float:
    if expected.size == 0:
        return 0.0
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return 0.0 if np.array_equal(actual, expected, equal_nan=True) else float("inf")
    return float(np.abs(actual - expected).max() / (max(np.abs(expected).max(), floor) or 1.0))


def _arrays(value: Any) -> list[Any]:
    """The arrays in nested lists, tuples and dicts, in order."""
    if isinstance(value, Mapping):
        return [array for entry in value.values() for array in _arrays(entry)]
    if isinstance(value, (tuple, list)):
        return [array for entry in value for array in _arrays(entry)]
    return [value] if hasattr(value, "shape") and hasattr(value, "dtype") else []


def _mapped(function: Callable[[np.ndarray], Any], value: Any) -> Any:
    """Nested lists, tuples and dicts with their arrays replaced."""
    if isinstance(value, Mapping):
        return {key: _mapped(function, entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, entry) for entry in value)
    return function(_numpy(value)) if hasattr(value, "shape") and hasattr(value, "dtype") else value


def _numpy(array: Any) -> np.ndarray:
    return to_numpy("an array", array)


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -3, -1)
