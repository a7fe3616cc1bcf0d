"""What is computed, checked and timed, whoever computes it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from report import installed
from workloads import Arrays, Operands, Workload, to_nhwc

Results = dict[str, Any]  # "y", and the gradients by the operands' names


class Task(NamedTuple):
    """What a competitor has to compute."""

    workload: Workload
    backward: bool  # y and the gradients of all operands, else y alone
    dtype: str  # of x, weight and y; coordinates need float32, so offset and mask keep it
    data_format: str
    operands: Operands
    precision: str | None = None  # "highest": no TF32
    sets: int = 1  # copies of the operands; a run computes once with each
    threads: int = 1  # of a library that has to be told
    few_tiles: bool = False  # deformops tries some of its tiles only
    only: str | None = None  # backward: the gradient of this operand alone, without y

    @property
    def arrays(self) -> Arrays:
        return self.operands.nchw if self.data_format == "NCHW" else self.operands.nhwc

    def nhwc(self, results: Results) -> Results:
        return to_nhwc(results) if self.data_format == "NCHW" else results

    def wanted(self, results: Results) -> Results:
        """Those of y and all gradients that are the task's."""
        if self.only is None and self.backward:
            return results
        name = self.only if self.backward else "y"
        return {name: results[name]}


class Run(NamedTuple):
    """A competitor with a task, to be called any number of times: the results of each set."""

    start: Callable[[], list[Results]]  # they may be under way
    wait: Callable[[list[Results]], Any] = lambda results: results  # until the last ones started are there
    fetch: Callable[[Results], Results] = lambda results: results  # one set's as arrays of NumPy or JAX

    def __call__(self) -> list[Results]:
        results = self.start()
        self.wait(results)
        return results


class Competitor(NamedTuple):
    build: Callable[[Task], Run]
    modes: tuple[str, ...]
    data_format: str = "NCHW"
    packages: tuple[str, ...] = ()  # that it needs besides JAX
    deformable: bool = True
    backward: bool = True
    only: str | None = None  # it takes part in the backward pass, for the gradient of this operand alone
    few_threads: bool = True  # else measured with all threads only

    def takes_part(self, mode: str, backward: bool) -> bool:
        direction = self.backward if backward else self.only is None
        return mode in self.modes and direction and all(map(installed, self.packages))


# --- checking ---


@functools.partial(jax.jit, static_argnames="norm")
def errors(actual: Results, expected: Results, norm: bool) -> dict[str, jax.Array]:
    """Of each result, relative to the largest value, or in the norm."""

    def size(array: jax.Array) -> jax.Array:
        size = jnp.linalg.norm(array.ravel()) if norm else jnp.abs(array).max()
        return jnp.where(jnp.isnan(array).any(), jnp.nan, size)  # on CPUs XLA's maximum passes over them

    return {name: size(actual[name] - array) / size(array) for name, array in expected.items()}


def check(actual: Results, expected: Results, allowed: float, norm: bool = False) -> float:
    """The error of the worst result. A ValueError if one is too large, or NaN."""
    actual = {name: jnp.asarray(array, jnp.float32) for name, array in actual.items()}
    shapes = [{name: results[name].shape for name in sorted(results)} for results in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"has {shapes[0]}, expected {shapes[1]}")
    found = {name: float(error) for name, error in errors(actual, expected, norm).items()}
    for name, error in found.items():
        if not error <= allowed:
            what = "result" if name == "y" else f"gradient of {name}"
            raise ValueError(f"the {what} is off by {error:.1e}, allowed is {allowed:.1e}")
    return max(found.values())


# --- timing ---


def stopwatch(call: Callable[[], Any]) -> tuple[float, Any]:
    """Its seconds and result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def in_turn(calls: list[Callable[[], Any]], rounds: int, warm_up: bool = True) -> list[list[float]]:
    """The seconds of calls, round by round. `warm_up`: every turn has an untimed call first, for the caches."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            if warm_up:
                call()
            times.append(stopwatch(call)[0])
    return seconds
