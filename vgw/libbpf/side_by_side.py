# SPDX-License-Identifier: Apache-2.0
"""Calls that wait for the kernel, made at the same time so that they wait for the same thing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

from vgw.threads import Call, NoThreadError, start_thread

_Value = TypeVar("_Value")


def side_by_side(first: Callable[[], object], *others: Callable[[], object]) -> None:
    """Make calls at the same time; return when all have ended.

    Raises what the first of them, in this order, has raised.
    """
    for call in outcomes([first, *others], 1 + len(others)):
        call.result()


def outcomes(functions: Sequence[Callable[[], _Value]], most: int) -> list[Call[_Value]]:
    """Call functions, at most so many at a time, and return the calls when all are made.

    The calling thread makes its share of them: where the host gives no more threads, as few as
    there are do it all.
    """
    with Helpers(min(most, len(functions)) - 1) as helpers:
        return [helpers.begin(function) for function in functions]


class Helpers:
    """Threads that make calls while their owner does something else; use as a context manager.

    When the block ends the owner's thread makes its share of what is left, and waits for the rest.
    """

    def __init__(self, most: int) -> None:
        """Start at most so many threads, or as many as the host gives, when there is work."""
        self._most = most
        self._calls: list[Call[object]] = []
        self._waiting: SimpleQueue[Call[object] | None] = SimpleQueue()
        self._threads = 0

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        for call in self._calls:
            call.make()
        for call in self._calls:
            call.wait()
        for _thread_of_ours in range(self._threads):
            self._waiting.put(None)

    def begin(self, function: Callable[[], _Value]) -> Call[_Value]:
        """Have a function called by a thread that has nothing to do, or when the block ends."""
        call = Call(function)
        self._calls.append(call)
        self._waiting.put(call)
        if self._threads < self._most:
            with contextlib.suppress(NoThreadError):
                start_thread(self._run)
                self._threads += 1
        return call

    def _run(self) -> None:
        while (call := self._waiting.get()) is not None:
            call.make()


def made(function: Callable[[], _Value]) -> Call[_Value]:
    """Call a function, and return the call that was made."""
    call = Call(function)
    call.make()
    return call
