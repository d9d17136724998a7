# SPDX-License-Identifier: Apache-2.0
"""The log as a file of JSON lines, with a rotation of its own.

`events.jsonl` becomes `events.jsonl.1` when it is full, that becomes `.2`, and so on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from vgw.controller.log_sink import Entry, Written
from vgw.errors import VgwError

_MODE: Final = 0o640


def rotated(path: Path, number: int) -> Path:
    """Return where a log file is after so many rotations."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


class FileSink:
    """Appends records to a file.

    What cannot be written is lost: a full disk must not fill the memory too. The next records are
    tried again.
    """

    kind = "file"

    def __init__(self, path: Path, max_bytes: int = 0, keep: int = 1) -> None:
        """Open the file, mode 0640, and make its directory.

        With `max_bytes` it is rotated before a record would make it longer, and `keep` older ones
        stay. Raises VgwError when it cannot be opened.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._reopen = False
        self._trouble: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._open()
        except OSError as error:
            raise VgwError(
                f"cannot write the log {path}: {error.strerror}; choose another by VGW_LOG"
            ) from error

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return str(self._path)

    def write(self, entries: Sequence[Entry]) -> Written:
        """Write entries, first to a new file if there is to be one."""
        if self._reopen:
            self._reopen = False
            self._switch_file()
        lost = 0
        self._trouble = None
        for part in self._parts([entry.line for entry in entries]):
            lost += self._append(part)
        return Written(len(entries), lost, self._trouble)

    def reopen(self) -> None:
        """Go on in a new file of the same name: this one was rotated away."""
        self._reopen = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _parts(self, lines: list[str]) -> Iterator[list[str]]:
        """Yield lines that fit into the file as it is then; it is rotated between two of them."""
        if not self._max_bytes:
            yield lines
            return
        part: list[str] = []
        room = self._max_bytes - os.fstat(self._fd).st_size
        for line in lines:  # of ASCII, so a character is a byte
            if len(line) > room and (part or room < self._max_bytes):
                yield part
                part = []
                self._rotate()
                room = self._max_bytes - os.fstat(self._fd).st_size
            room -= len(line)
            part.append(line)
        yield part

    def _rotate(self) -> None:
        """Make room under the file's name. Where that cannot be done it grows on."""
        with contextlib.suppress(OSError):
            if self._keep == 0:
                self._path.unlink(missing_ok=True)
            for number in range(self._first_free(), 0, -1):
                rotated(self._path, number - 1).replace(rotated(self._path, number))
        self._switch_file()

    def _first_free(self) -> int:
        """Return the number of the file that those before it are moved up to."""
        number = 1
        while number < self._keep and rotated(self._path, number).exists():
            number += 1
        return min(number, self._keep)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._path, flags, _MODE)
        size = os.fstat(fd).st_size
        # A file that ends inside a line was left so by a writer that died: begin a new line.
        self._torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        return fd

    def _switch_file(self) -> None:
        try:
            fresh = self._open()
        except OSError:
            return  # the old file is still good to write to
        os.close(self._fd)
        self._fd = fresh

    def _append(self, lines: Sequence[str]) -> int:
        """Write lines; return how many could not be."""
        if not lines:
            return 0
        begin = b"\n" if self._torn else b""
        data = memoryview(begin + "".join(lines).encode())
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            self._trouble = error.strerror
            whole = bytes(data[len(begin) : written]).count(b"\n")
            self._torn = self._torn or written > 0
            return len(lines) - whole
        self._torn = False
        return 0


def open_rotated(path: Path) -> list[BinaryIO]:
    """Open what was rotated away from a log file, oldest first; the caller closes them.

    Files that cannot be read are left out. The newest are opened first, so that a rotation
    meanwhile hides none, and one that is met twice is taken once.
    """
    found: list[BinaryIO] = []
    seen: set[tuple[int, int]] = set()
    number = 1
    with contextlib.suppress(OSError):
        while True:
            file = rotated(path, number).open("rb", buffering=0)
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) in seen:
                file.close()
            else:
                seen.add((status.st_dev, status.st_ino))
                found.append(file)
            number += 1
    return found[::-1]
