# SPDX-License-Identifier: Apache-2.0
"""Calls that wait for the kernel, made at the same time so that they wait for the same thing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

_Value = TypeVar("_Value")


def side_by_side(first: Callable[[], object], *others: Callable[[], object]) -> None:
    """Make calls at the same time; return when all have ended.

    Raises what the first of them, in this order, has raised.
    """
    for future in outcomes([first, *others], 1 + len(others)):
        future.result()


def outcomes(calls: Sequence[Callable[[], _Value]], most: int) -> list[Future[_Value]]:
    """Make calls, at most so many at a time, and return what each returned or raised.

    The calling thread makes its share of them: where the host gives no more threads, as few as
    there are do it all.
    """
    with Helpers(min(most, len(calls)) - 1) as helpers:
        return [helpers.begin(call) for call in calls]


class Helpers:
    """Threads that make calls while their owner does something else; use as a context manager.

    When the block ends the owner's thread makes its share of what is left, and waits for the rest.
    """

    def __init__(self, most: int) -> None:
        """Start at most so many threads, or as many as the host gives, when there is work."""
        self._most = most
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Empty):
            while (work := self._waiting.get_nowait()) is not None:
                work()
        for _thread in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def begin(self, call: Callable[[], _Value]) -> Future[_Value]:
        """Have a call made by a thread that has nothing to do, or when the block ends."""
        future: Future[_Value] = Future()
        self._waiting.put(lambda: _make(future, call))
        if len(self._threads) < self._most:
            with contextlib.suppress(RuntimeError, MemoryError):  # no more threads
                thread = threading.Thread(target=self._run, name="vgw-worker")
                thread.start()
                self._threads.append(thread)
        return future

    def _run(self) -> None:
        while (work := self._waiting.get()) is not None:
            work()


def made(call: Callable[[], _Value]) -> Future[_Value]:
    """Make a call and return what it returned or raised."""
    future: Future[_Value] = Future()
    _make(future, call)
    return future


def _make(future: Future[_Value], call: Callable[[], _Value]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)
