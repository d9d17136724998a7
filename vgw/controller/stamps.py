# SPDX-License-Identifier: Apache-2.0
"""When directories last changed, for those who look at many of them again and again.

A directory is looked at once and then only when the kernel noted that it, or one that it is in,
changed. Where the kernel cannot note that, it is looked at each time.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from vgw.controller.directory_notes import DirectoryNotes, Note

#: A directory of an endpoint is so deep below the root.
_DEPTH: Final = 2


class Stamp(NamedTuple):
    """The directory that there is, and when something was last made in or removed from it."""

    inode: int
    changed_ns: int


class Stamps:
    """The stamps of a directory and of those in it, two levels deep; for one thread at a time."""

    def __init__(self, root: str) -> None:
        """Know of nothing yet; `root` is where all the directories are."""
        self._root = root
        self._root_is: tuple[int, int] | None = None
        self._notes: DirectoryNotes | None = None
        self._known: dict[str, Stamp | None] = {}
        self._watches: dict[str, int] = {}
        self._directories: dict[int, str] = {}
        #: Whether no more directories can be watched; asked again at each look.
        self._is_full = False
        #: Whether there are directories of whose changes nobody tells.
        self._is_blind = True

    def close(self) -> None:
        """Know of nothing any more."""
        if self._notes is not None:
            self._notes.close()
        self._notes = None
        self._known.clear()
        self._watches.clear()
        self._directories.clear()

    def refresh(self) -> bool:
        """Begin a look: forget the stamps of what has changed since the last one.

        Return whether anything may have changed.
        """
        was_blind, self._is_blind, self._is_full = self._is_blind, False, False
        # What is mounted over the root, or over what that is in, is noted by nobody.
        root, notes = _identity(self._root), None
        if self._notes is not None and root == self._root_is:
            notes = self._notes.take()
        if notes is None:
            self.close()
            self._root_is, self._notes = root, DirectoryNotes()
            return True
        if notes:
            self._forget(notes)
        return was_blind or bool(notes)

    def of(self, directory: str) -> Stamp | None:
        """Return the stamp of a directory as of the beginning of the look, or later; None: gone.

        Those that it is in have to be asked for too, for only they tell when it is moved with them.
        """
        if directory in self._known:
            return self._known[directory]
        is_noted = self._watch(directory)  # first, for what changes from then on is noted
        found = stamp(directory)
        if is_noted and found is not None:
            self._known[directory] = found
        else:
            self._is_blind = True
        return found

    def _watch(self, directory: str) -> bool:
        if self._notes is None or self._is_full:
            return False
        number = self._notes.watch(directory)
        before = self._watches.pop(directory, None)
        if before is not None and before != number and self._directories.get(before) == directory:
            del self._directories[before]
            self._notes.ignore(before)  # of what was there under this name
        if number is None:
            self._is_full = os.path.isdir(directory)  # noqa: PTH112 - a Path takes twice as long
            return False
        other = self._directories.get(number)
        if other is not None and other != directory:
            self._watches.pop(other, None)  # it was moved from there
        self._watches[directory] = number
        self._directories[number] = directory
        return True

    def _forget(self, notes: list[Note]) -> None:
        changed: set[str] = set()
        for note in notes:
            directory = self._directories.get(note.watch)
            if directory is None:
                continue
            self._known.pop(directory, None)
            if note.name:
                changed.add(f"{directory}/{note.name}")
            elif note.ended:
                del self._directories[note.watch]
                if self._watches.get(directory) == note.watch:
                    del self._watches[directory]
        # What is called so now may be another directory, with others in it.
        for directory in [each for each in self._known if _is_in(each, changed)]:
            del self._known[directory]


def stamp(directory: str) -> Stamp | None:
    """Return the stamp of a directory now; None without one."""
    try:
        status = os.stat(directory)  # noqa: PTH116 - a Path takes twice as long
    except OSError:
        return None
    return Stamp(status.st_ino, status.st_mtime_ns)


def _identity(directory: str) -> tuple[int, int] | None:
    try:
        status = os.stat(directory)  # noqa: PTH116
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_in(directory: str, changed: set[str]) -> bool:
    """Tell whether a directory, or one that it is in, is among those that changed."""
    for _ in range(_DEPTH):
        if directory in changed:
            return True
        directory = directory.rpartition("/")[0]
    return False
