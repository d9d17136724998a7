# SPDX-License-Identifier: Apache-2.0
"""A thread of the controller that looks every second whether something of the policy is due.

That is to go back from a policy that nobody confirmed in time, and to read again a policy file that
could not be read.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Final

from vgw.controller.paths import Paths
from vgw.controller.window import has_record
from vgw.errors import VgwError

#: Seconds between looks.
PERIOD: Final = 1.0
#: Looks between attempts to read a file that cannot be read.
_FILE_EVERY: Final = 5

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def policy_watch(paths: Paths, look: Callable[[], None]) -> Iterator[None]:
    """Have `look` called for a block: soon while a window is open, now and then without."""

    def watch() -> None:
        looks = 0
        while not stop.wait(PERIOD):
            looks += 1
            if not has_record(paths) and looks % _FILE_EVERY:
                continue
            try:
                look()
            except VgwError as error:  # the controller is stopping
                _logger.info("%s", error)
            except Exception:
                _logger.exception("the controller goes on after an internal error")

    stop = threading.Event()
    thread = threading.Thread(target=watch, name="policy-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
