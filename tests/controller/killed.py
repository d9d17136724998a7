# SPDX-License-Identifier: Apache-2.0
"""Changes made by a process that is killed on the way, at any step or at a certain one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from vgw import steps


def killed_after(number: int, change: Callable[[], object]) -> bool:
    """Make a change in a process that dies after so many steps; return whether it finished."""
    left = number
    lock = threading.Lock()

    def count(_: str, __: object) -> int:
        nonlocal left
        with lock:
            if left == 0:
                os._exit(9)
            left -= 1
        return 0

    def counted() -> None:
        with steps.watched_by(count):
            change()

    return _finished(lambda: None, counted)


def killed_at(owner: object, name: str, change: Callable[[], object]) -> None:
    """Make a change in a process that dies where it calls a function, which it has to do."""

    def die(*_: Any, **__: Any) -> None:
        os._exit(9)

    assert not _finished(lambda: setattr(owner, name, die), change), f"{name} was not called"


def _finished(prepare: Callable[[], object], change: Callable[[], object]) -> bool:
    """Make a change in a process of its own; return whether that came to its end."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            change()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0
