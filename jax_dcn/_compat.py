"""What differs between jax 0.10 and 0.12, and every import from JAX's private modules."""

from collections.abc import Callable
from typing import Any

from jax._src.dispatch import apply_primitive as apply_primitive
from jax.extend import core
from jax.interpreters import partial_eval as pe


def def_dce_rule(primitive: core.Primitive, rule: Callable[[list[bool], Any], tuple[list[bool], Any]]) -> None:
    """Registers `rule(used_outputs, equation) -> (used_inputs, equation or None)`.

    jax 0.12 passes the live inputs between the two arguments.
    """
    pe.dce_rules[primitive] = lambda used, *rest: rule(used, rest[-1])
