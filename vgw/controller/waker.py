# SPDX-License-Identifier: Apache-2.0
"""A thread that calls back at a time that may be moved again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

#: The longest wait before the callback: the clock that waits stands still while the host sleeps.
_LONGEST_SECONDS: Final = 60.0


class Waker:
    """Calls back once after each `wake_in`; use as a context manager, which starts the thread."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._condition = threading.Condition()
        self._deadline: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="waker", daemon=True)

    def __enter__(self) -> Waker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join()

    def wake_in(self, seconds: float | None) -> None:
        """Call back in so many seconds instead of when it was said before; None: never.

        It may call earlier: whoever is called looks if it is time, and says when to call again.
        """
        with self._condition:
            if seconds is None:
                self._deadline = None
            else:
                self._deadline = time.monotonic() + min(seconds, _LONGEST_SECONDS)
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._stopped:
                    return
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is None or left > 0:
                    self._condition.wait(left)
                    continue
                self._deadline = None
            self._callback()
