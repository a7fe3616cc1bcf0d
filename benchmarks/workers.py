"""Processes that answer requests, one at a time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any


class Failure(Exception):
    """What a worker could not do."""


class Worker:
    """A process that makes an object and calls its methods. The first request starts it, and the first after `stop`."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any, threads: int | None = None):
        self.name, self.served, self.threads = name, (make, arguments), threads
        self.process: multiprocessing.context.SpawnProcess | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.served), daemon=True)
        with contextlib.nullcontext() if self.threads is None else confined(self.threads):
            self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        if self.process is None:
            self.start()
        try:
            self.connection.send((method, arguments))
            result, failure = self.connection.recv()
        except (EOFError, OSError):
            self.stop()
            raise Failure(f"the process of {self.name} ended") from None
        if failure is not None:
            raise Failure(failure)
        return result

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def ask_all(workers: Sequence[Worker], method: str, *arguments: Any) -> list[Any]:
    """The answers of all, who work at the same time; a Failure in place of one that failed."""

    def answer(worker: Worker) -> Any:
        try:
            return worker.ask(method, *arguments)
        except Failure as failure:
            return failure

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(answer, workers))


def serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answers each (method, arguments) with (result, None) or (None, what went wrong), until the other end closes."""
    served = None
    with contextlib.suppress(EOFError):
        while True:
            method, of_method = connection.recv()
            try:
                served = make(*arguments) if served is None else served
                connection.send((getattr(served, method)(*of_method), None))
            except SystemExit as error:
                connection.send((None, str(error)))
            except Exception as error:  # whatever the libraries have to say
                traceback.print_exc()
                connection.send((None, described(error)))


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"


@contextlib.contextmanager
def confined(threads: int) -> Iterator[None]:
    """Processes started within it have as many cores, where the system can do that, and libraries that use them."""
    # XLA goes by NPROC, OpenMP by its own; KMP_BLOCKTIME ends the spinning of Intel's after 5 ms instead of 200.
    os.environ.update(NPROC=str(threads), OMP_NUM_THREADS=str(threads), KMP_BLOCKTIME="5")
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(available)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, available)
