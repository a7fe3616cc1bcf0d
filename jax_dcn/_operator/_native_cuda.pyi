from collections.abc import Sequence
from typing import Any

def handlers() -> dict[str, dict[str, Any]]:
    """XLA's handlers by target and stage."""

def architectures() -> str: ...
def forward_workspace(
    x: Sequence[int | None], weight: Sequence[int], dtype: str, **attributes: Any
) -> tuple[int, int, int]:
    """The bytes of work space: a constant, and those for each pixel of x and for each of y.

    x and weight are shapes in NHWC and HWIO. None is a batch, height or width for which the result holds whatever it
    is; where all are known the constant is exact.
    """

def backward_workspace(
    x: Sequence[int | None], weight: Sequence[int], dtype: str, **attributes: Any
) -> tuple[int, int, int]: ...
