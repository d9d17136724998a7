# SPDX-License-Identifier: Apache-2.0
"""Calls that wait for the kernel, made at the same time so that they wait for the same thing."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
    futures: list[Future[_Value]] = [Future() for _ in calls]
    waiting = deque(zip(futures, calls, strict=True))

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                _make(*waiting.popleft())

    threads: list[threading.Thread] = []
    with contextlib.suppress(RuntimeError, MemoryError):  # no more threads
        for _ in range(min(most, len(calls)) - 1):
            thread = threading.Thread(target=work, name="vgw-worker")
            thread.start()
            threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    return futures


def _make(future: Future[_Value], call: Callable[[], _Value]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)
