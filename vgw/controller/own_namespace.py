# SPDX-License-Identifier: Apache-2.0
"""Trying something out where it touches nothing: in a network namespace that ends with it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Final

from vgw.errors import VgwError
from vgw.threads import begin_call

_CLONE_NEWNET: Final = 0x40000000


def in_own_namespace(attempt: Callable[[], object]) -> str | None:
    """Try something in a network namespace of its own; return why it failed, None if it did not.

    It has a loopback interface and nothing else. The namespace is that of a thread, and ends with
    it.
    """

    def run() -> str | None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
            return f"no namespace to try it in: {os.strerror(ctypes.get_errno())}"
        attempt()
        return None

    try:
        return begin_call(run).result()
    except (VgwError, OSError) as error:
        return str(error)
