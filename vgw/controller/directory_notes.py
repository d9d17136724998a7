# SPDX-License-Identifier: Apache-2.0
"""Which directories changed: the kernel's own notes (inotify), so that nobody need look at each.

The kernel notes what is made in a directory, removed from it, or moved, on every mount of it, and
that the directory itself went. Python has no binding of it; the C library has.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from ctypes import c_char_p, c_int, c_uint32
from typing import Final, NamedTuple

#: struct inotify_event: watch, mask, cookie, length of the name behind it.
_EVENT: Final = struct.Struct("=iIII")
_BUFFER_BYTES: Final = 1 << 16

_MOVED_FROM: Final = 0x40
_MOVED_TO: Final = 0x80
_CREATE: Final = 0x100
_DELETE: Final = 0x200
_DELETE_SELF: Final = 0x400
_MOVE_SELF: Final = 0x800
_UNMOUNT: Final = 0x2000
_OVERFLOW: Final = 0x4000
_IGNORED: Final = 0x8000
_ONLY_DIRECTORIES: Final = 0x01000000
_WANTED: Final = (
    _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF | _ONLY_DIRECTORIES
)


class Note(NamedTuple):
    """What the kernel noted of a directory: of itself ("") or of what is called `name` in it.

    `ended`: it is watched no more.
    """

    watch: int
    name: str
    ended: bool


class DirectoryNotes:
    """Notes about directories that are watched; for one thread at a time."""

    def __init__(self) -> None:
        """Begin to listen, or be of no use where the kernel or a limit does not allow it."""
        library = ctypes.CDLL(None, use_errno=True)
        self._add = library.inotify_add_watch
        self._add.argtypes = (c_int, c_char_p, c_uint32)
        self._remove = library.inotify_rm_watch
        self._remove.argtypes = (c_int, c_int)
        self._fd: int = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        #: Ends the notes, also when nobody has them any more: a user may have few of them.
        self._end = weakref.finalize(self, os.close, self._fd) if self._fd >= 0 else None

    def close(self) -> None:
        """Watch nothing any more."""
        if self._end is not None:
            self._end()
        self._fd = -1

    def watch(self, directory: str) -> int | None:
        """Watch a directory; the number is the same for the same directory under another name.

        None where it cannot be watched: it is not there, or there is a limit.
        """
        number: int = self._add(self._fd, os.fsencode(directory), _WANTED)
        return None if number < 0 else number

    def ignore(self, watch: int) -> None:
        """Watch a directory no more."""
        self._remove(self._fd, watch)

    def take(self) -> list[Note] | None:
        """Return the notes since the last call; None: there may have been any."""
        notes: list[Note] = []
        if self._fd < 0:
            return notes
        complete = True
        while True:
            try:
                data = os.read(self._fd, _BUFFER_BYTES)
            except BlockingIOError:
                return notes if complete else None
            start = 0
            while start < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, start)
                start += _EVENT.size
                name = data[start : start + length].rstrip(b"\0")
                start += length
                complete &= not mask & (_OVERFLOW | _UNMOUNT)
                notes.append(Note(watch, os.fsdecode(name), bool(mask & _IGNORED)))
