from typing import Any

def handlers() -> dict[str, Any]:
    """XLA's handlers by target."""

def cpu_isa() -> str | None: ...
def cpu_isas() -> list[str]: ...
