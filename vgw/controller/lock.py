# SPDX-License-Identifier: Apache-2.0
"""Locks between processes: one writer and one controller for all who share a bpffs.

A lock is a directory that its holder has locked by flock(2), which bpffs knows too. Only the
holder removes the directory, so a lock is in force exactly as long as it is found in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vgw import files
from vgw.controller.paths import Paths
from vgw.errors import VgwError

#: Seconds to wait for whoever holds the lock; an apply to 200 VMs takes less.
WAIT_SECONDS: Final = 10.0
_PERIOD: Final = 0.02


class DirectoryLock:
    """A lock in the place `path`, where nothing else is; it goes with the process that holds it."""

    def __init__(self, path: Path) -> None:
        """Remember the place; its directory is made when needed."""
        self.path = path
        self._fd = -1

    def acquire(self) -> bool:
        """Take the lock; return False when another one has it. Raises VgwError."""
        while True:
            try:
                fd = self._open()
            except OSError as error:
                if self._was_removed(error):
                    continue
                _remove_if_empty(self.path.parent)
                raise VgwError(
                    f"cannot lock {self.path}: {error.strerror}; {files.advice(error)}choose other "
                    "directories by VGW_BPFFS and VGW_RUN_DIR"
                ) from error
            if not _try_lock(fd):
                os.close(fd)
                return False
            if _is_in_place(fd, self.path):
                self._fd = fd
                return True
            os.close(fd)

    def release(self) -> None:
        """Give the lock back and leave no trace of it."""
        if _is_in_place(self._fd, self.path):
            _remove_if_empty(self.path)
        os.close(self._fd)

    def holder(self) -> int | None:
        """Return the process that has the lock; None when there is none that can be seen."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return None
        device, inode = there.st_dev, there.st_ino
        place = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == place:
                return int(fields[4])
        return None

    def _was_removed(self, error: OSError) -> bool:
        """Tell whether an error only means that the holder removed the directory meanwhile."""
        if isinstance(error, FileNotFoundError):
            return True
        # mkdir() met the directory, and it was gone when mkdir() looked what it had met.
        return isinstance(error, FileExistsError) and not self.path.is_file()

    def _open(self) -> int:
        files.mkdir(self.path, 0o700, exist_ok=True)
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


class WriterLock:
    """The lock for changes, over the processes of a bpffs and over the threads of this one.

    A thread that holds it may take it again.
    """

    def __init__(self, bpffs: Path, wait_seconds: float = WAIT_SECONDS) -> None:
        self._lock = DirectoryLock(bpffs / "writer")
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
                self._acquire(deadline)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._lock.release()
                    _remove_if_empty(self._lock.path.parent)
        finally:
            self._thread_lock.release()

    def _acquire(self, deadline: float) -> None:
        while not self._lock.acquire():
            if time.monotonic() >= deadline:
                raise self._taken(self._lock.holder())
            time.sleep(_PERIOD)

    def _taken(self, pid: int | None) -> VgwError:
        holder = "another process" if pid is None else f"process {pid}"
        return VgwError(
            f"{holder} is changing vgw's endpoints and did not finish within "
            f"{self._wait_seconds:.0f} s "
            f"(lock {self._lock.path}); try again when it is done"
        )


@contextlib.contextmanager
def controller_lock(paths: Paths) -> Iterator[None]:
    """Be the one controller of a socket and of a bpffs for a block.

    Raises VgwError when another controller has one of them.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, paths.bpffs)
        for lock in (DirectoryLock(paths.run_dir / "controller"), _controller_of(paths.bpffs)):
            if not lock.acquire():
                pid = lock.holder()
                shown = "of another container" if pid is None else f"pid {pid}"
                raise VgwError(f"a controller is already running ({shown}); stop it first")
            stack.callback(lock.release)
        yield


def remove_stale(bpffs: Path) -> None:
    """Remove what a controller that was killed left of its lock."""
    lock = _controller_of(bpffs)
    if lock.path.exists() and lock.acquire():
        lock.release()


def _controller_of(bpffs: Path) -> DirectoryLock:
    return DirectoryLock(bpffs / "controller")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_in_place(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        files.rmdir(directory)
