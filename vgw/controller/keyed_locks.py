# SPDX-License-Identifier: Apache-2.0
"""A lock for each key, so that threads wait only for those that work on the same thing."""

from __future__ import annotations

import threading


class KeyedLocks:
    """Locks by key, made when they are first asked for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def of(self, key: str) -> threading.Lock:
        """Return the lock of a key, always the same one."""
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())
