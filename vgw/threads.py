# SPDX-License-Identifier: Apache-2.0
"""Threads for calls, where having no thread, or none with memory to begin, is an error.

threading.Thread.start() waits until the new thread says that it runs, and for ever if that finds no
memory for saying so. Nothing here waits for a thread that may be no more.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from vgw.errors import VgwError, out_of_memory

#: Seconds that a thread may take to begin; one that found no memory never does.
BEGIN_SECONDS: Final = 5.0

_Value = TypeVar("_Value")
_Value_co = TypeVar("_Value_co", covariant=True)


class NoThreadError(VgwError):
    """The host gives no more threads."""


def start_thread(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a thread of its own, if that finds the memory. Raises NoThreadError."""
    try:
        _thread.start_new_thread(function, arguments)
    except (RuntimeError, MemoryError) as error:
        raise NoThreadError(
            "this host gives no more threads: free memory, or raise the limits of tasks and of "
            "memory of vgw's control group, and try again"
        ) from error


class Call(Generic[_Value_co]):
    """A call of a function, made once, by the thread that takes it first.

    Memory may run out anywhere. A thread that then ends has not taken the call, or it has made it:
    between the two nothing is allocated, so nobody waits for a thread that is no more.
    """

    def __init__(self, function: Callable[[], _Value_co]) -> None:
        self._function = function
        self._taken = _thread.allocate_lock()
        self._unmade = _thread.allocate_lock()
        self._unmade.acquire()
        self._value: _Value_co
        #: What the call raised; only once it is made.
        self.error: BaseException | None = None

    def make(self) -> None:
        """Make the call, unless a thread has taken it."""
        if not self._taken.acquire(blocking=False):
            return
        try:
            self._value = self._function()
        except BaseException as error:  # raised where the result is asked for
            self.error = error
        finally:
            self._unmade.release()

    def withdraw(self) -> bool:
        """Have nobody make the call; return False if a thread has taken it."""
        return self._taken.acquire(blocking=False)

    @property
    def is_made(self) -> bool:
        """Whether the call is made."""
        return not self._unmade.locked()

    def wait(self, seconds: float = -1) -> bool:
        """Wait until the call is made, -1: however long; return whether it is."""
        if not self._unmade.acquire(timeout=seconds):
            return False
        self._unmade.release()
        return True

    def result(self) -> _Value_co:
        """Wait until the call is made; return what it returned, or raise what it raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._value


def begin_call(function: Callable[[], _Value]) -> Call[_Value]:
    """Have a function called by a thread of its own; return the call as soon as it has begun.

    Raises NoThreadError, and VgwError when the thread finds no memory to begin.
    """
    begun = _thread.allocate_lock()
    begun.acquire()

    def begin() -> _Value:
        begun.release()
        return function()

    call = Call(begin)
    start_thread(call.make)
    if not begun.acquire(timeout=BEGIN_SECONDS) and call.withdraw():
        raise out_of_memory()
    return call
