# SPDX-License-Identifier: Apache-2.0
"""Trying something out where it touches nothing: in a network namespace that ends with it."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Final

from vgw.errors import VgwError

_CLONE_NEWNET: Final = 0x40000000


def in_own_namespace(attempt: Callable[[], object]) -> str | None:
    """Try something in a network namespace of its own; return why it failed, None if it did not.

    It has a loopback interface and nothing else. The namespace is that of a thread, and ends with
    it.
    """
    refused: list[str] = []

    def run() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
            refused.append(f"no namespace to try it in: {os.strerror(ctypes.get_errno())}")
            return
        try:
            attempt()
        except (VgwError, OSError) as error:
            refused.append(str(error))

    thread = threading.Thread(target=run, name="vgw-attempt")
    thread.start()
    thread.join()
    return refused[0] if refused else None
