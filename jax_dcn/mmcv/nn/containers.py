"""torch's containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

ModuleList = nnx.List


class Sequential(nnx.List):
    """torch's Sequential: layers or functions one after another, numbered from 0 whether they have parameters or not.

    What one returns is the only argument of the next, where `nnx.Sequential` would unpack a tuple or a dict.

    Args:
      *layers: callables of one argument.
    """

    def __init__(self, *layers: Callable[[Any], Any]):
        for index, layer in enumerate(layers):
            if not callable(layer):
                raise TypeError(f"Sequential: entry {index} must be callable, got {type(layer).__name__}")
        super().__init__(layers)

    def __call__(self, x: Any) -> Any:
        """Applies the layers in order."""
        for layer in self:
            x = layer(x)
        return x
