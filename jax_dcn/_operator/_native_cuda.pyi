from collections.abc import Sequence
from typing import Any

def handlers() -> dict[str, dict[str, Any]]:
    """XLA's handlers by target and stage."""

def architectures() -> str: ...
def forward_workspace(
    x: Sequence[int | None], offset: Sequence[int | None], weight: Sequence[int], dtype: str, **attributes: Any
) -> tuple[int, int, int]:
    """The bytes of work space: a constant, and those for each pixel of x and for each of y.

    x, offset and weight are shapes in NHWC and HWIO, that of a weight which is not there (). None is a batch, height or
    width for which the result holds whatever it is; where all are known the constant is exact.
    """

def backward_workspace(
    x: Sequence[int | None], offset: Sequence[int | None], weight: Sequence[int], dtype: str, **attributes: Any
) -> tuple[int, int, int]: ...
