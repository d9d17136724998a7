# SPDX-License-Identifier: Apache-2.0
"""Reading the policy's file or directory as it is at one moment, and without waiting for ever.

A source that changes while it is read is read again: never is half of it used. One that gives no
answer (a FIFO without a writer, a dead network file system) is given up after a time; its reading
goes on in a thread by itself, and no second one is begun before that has ended.
"""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path
from typing import Final

from vgw.controller.policy_files import read_sources
from vgw.errors import VgwError
from vgw.policy.parse import digest_of
from vgw.threads import Call, begin_call

#: Seconds that a source may take to be read.
READ_SECONDS: Final = 3.0
#: Seconds without a change after which a file counts as written to its end.
QUIET_SECONDS: Final = 0.1
#: How often a source that changes while it is read is read again.
_TRIES: Final = 10

Texts = list[tuple[str, str]]
#: Name, inode, size, and the times of change of contents and of facts, of each file.
_Snapshot = list[tuple[str, int, int, int, int]]


class SourceHangsError(VgwError):
    """The source gives no answer."""


def read_steadily(path: Path, *, quiet: float = 0.0) -> Texts:
    """Return (name, text) of the files of a policy, all of the same moment.

    With `quiet` a file that was written less than so many seconds ago is looked at again first,
    for it may be half written. Raises what policy_files.read_sources raises, and VgwError when the
    files do not come to rest.
    """
    for _ in range(_TRIES):
        before = _snapshot(path)
        if _is_fresh(before, quiet):
            time.sleep(quiet)
            continue
        try:
            found = read_sources(path)
        except VgwError:
            if _snapshot(path) == before:
                raise
            continue
        if _snapshot(path) == before:
            return found
    raise VgwError(
        f"policy {path} changes while it is read; write its files aside and rename them into place"
    )


class SourceReader:
    """Reads one source, with a limit of time; for use from several threads."""

    def __init__(
        self, path: Path, *, seconds: float = READ_SECONDS, quiet: float = QUIET_SECONDS
    ) -> None:
        """Read `path`, for `seconds` at most; `quiet` is that of read_steadily."""
        self.path = path
        self._seconds = seconds
        self._quiet = quiet
        self._lock = threading.Lock()
        self._reading: Call[Texts] | None = None

    def read(self) -> Texts:
        """Return (name, text) of each file.

        Raises what read_steadily and begin_call raise, and SourceHangsError.
        """
        with self._lock:
            if self.hangs:
                raise self._hangs()
            self._reading = None
            reading = self._reading = begin_call(
                lambda: read_steadily(self.path, quiet=self._quiet)
            )
            if not reading.wait(self._seconds):
                raise self._hangs()
            self._reading = None
        return reading.result()

    def digest(self) -> str | None:
        """Return the digest of the source's texts, valid or not; None when it cannot be read."""
        try:
            return digest_of(self.read())
        except VgwError:
            return None

    @property
    def hangs(self) -> bool:
        """Whether a reading was given up and has not come to an end since."""
        reading = self._reading
        return reading is not None and not reading.is_made

    def _hangs(self) -> SourceHangsError:
        return SourceHangsError(
            f"policy {self.path} gave no answer within {self._seconds:g} s; is it a FIFO, or on a "
            "file system that is away?"
        )


def _snapshot(path: Path) -> _Snapshot:
    """Return what tells whether a source has changed; what is no file, or gone, has nothing."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [(file.name, file.stat()) for file in files if len(files) == 1 or _is_yaml(file)]
    except OSError:
        return []
    return [
        (name, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        for name, facts in found
        if stat.S_ISREG(facts.st_mode)
    ]


def _is_yaml(file: Path) -> bool:
    return file.suffix == ".yaml"


def _is_fresh(snapshot: _Snapshot, quiet: float) -> bool:
    """Tell whether a file was written within the last seconds, by the clock that stamps files."""
    youngest = max((changed for *_, changed, _ in snapshot), default=0)
    return 0 <= time.time_ns() - youngest < quiet * 1e9
