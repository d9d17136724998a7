# SPDX-License-Identifier: Apache-2.0
"""One writer at a time: the lock that every change to the host's endpoints is made under."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vgw.errors import VgwError

#: Seconds to wait for whoever holds the lock; an apply to 200 VMs takes less.
WAIT_SECONDS: Final = 10.0
_PERIOD: Final = 0.02


class WriterLock:
    """The lock of one host, over its processes and over the threads of this one.

    A thread that holds it may take it again.
    """

    def __init__(self, path: Path, wait_seconds: float = WAIT_SECONDS) -> None:
        self._path = path
        self._wait_seconds = wait_seconds
        self._thread_lock = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for a block. Raises VgwError naming the holder when it stays taken."""
        deadline = time.monotonic() + self._wait_seconds
        if not self._thread_lock.acquire(timeout=self._wait_seconds):
            raise self._taken(os.getpid())
        try:
            if self._depth == 0:
                self._fd = self._acquire(deadline)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    os.close(self._fd)
        finally:
            self._thread_lock.release()

    def _acquire(self, deadline: float) -> int:
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise VgwError(
                f"cannot open the lock {self._path}: {error.strerror}; run vgw as root, or choose "
                "another directory by VGW_RUN_DIR"
            ) from error
        try:
            while not _try_lock(fd):
                if time.monotonic() >= deadline:
                    raise self._taken(_holder(fd))
                time.sleep(_PERIOD)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _taken(self, pid: int | None) -> VgwError:
        holder = "another process" if pid is None else f"process {pid}"
        return VgwError(
            f"{holder} is changing vgw's endpoints and did not finish within "
            f"{self._wait_seconds:.0f} s "
            f"(lock {self._path}); try again when it is done"
        )


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None
