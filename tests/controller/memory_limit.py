# SPDX-License-Identifier: Apache-2.0
"""A control group of its own for a process, whose memory the kernel limits: who needs more dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.controller.process import eventually

_MOUNT: Final = Path("/sys/fs/cgroup")
_NAME: Final = f"vgw-test-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group, and what its files are called: those of version 1 or 2 of the interface."""

    directory: Path
    limit: str
    usage: str
    events: str

    def admit(self, process: int) -> None:
        """Put a process into the group; memory that it has already is charged where it was."""
        (self.directory / "cgroup.procs").write_text(str(process))

    def used(self) -> int:
        """Return how many bytes are charged to the group."""
        return int((self.directory / self.usage).read_text())

    def restrict(self, limit: int | None) -> None:
        """Let the group have so many bytes, None: as many as there are."""
        unlimited = "-1" if self.limit == _VERSION_1[0] else "max"
        (self.directory / self.limit).write_text(unlimited if limit is None else str(limit))

    def killed(self) -> int:
        """Return how many processes the kernel has killed for want of memory."""
        lines = (self.directory / self.events).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


_VERSION_1: Final = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"
_VERSION_2: Final = "memory.max", "memory.current", "memory.events"


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Make such a group for a `with` block; skips the test where the host lets nobody make one."""
    version_1 = _MOUNT / "memory"
    parent, files = (version_1, _VERSION_1) if version_1.is_dir() else (_MOUNT, _VERSION_2)
    directory = parent / _NAME
    try:
        if files is _VERSION_2:
            (parent / "cgroup.subtree_control").write_text("+memory")
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"no control group for memory can be made here: {error}")
    try:
        yield MemoryGroup(directory, *files)
    finally:
        eventually("the control group is empty", lambda: _removed(directory))


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:  # a process that was killed is still on its way out
        return False
    return True
