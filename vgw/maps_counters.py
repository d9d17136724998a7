# SPDX-License-Identifier: Apache-2.0
"""Where the maps are kept that an endpoint's rules count in, one for each slot of its policies.

The kernel gives only their ids, and what has an id is opened by CAP_SYS_ADMIN alone. So each is
pinned beside the endpoint before rules count in it; a pin is believed only if it has that id.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from vgw import files, libbpf
from vgw.errors import KernelError


def counters_pin(directory: Path, slot: int) -> Path:
    """Return where the map is pinned that rules of a slot count in."""
    return directory / f"counters_{slot}"


class CounterMaps(Protocol):
    """Keeps maps of rule counters by slot. Methods raise KernelError, or OSError of a file."""

    def keep(self, slot: int, fd: int) -> None:
        """Keep an open map as that of a slot, in place of what was kept before."""

    def keeps(self, slot: int) -> bool:
        """Tell whether anything is kept for a slot."""

    def open(self, slot: int, map_id: int) -> int | None:
        """Return an fd of what is kept for a slot, None when it is not the map with this id."""

    def drop(self, slot: int) -> None:
        """Keep nothing for a slot."""

    def close(self) -> None:
        """Close what is open here; what is pinned stays."""


class PinnedCounters:
    """Maps that are pinned in the directory of an endpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, slot: int, fd: int) -> None:
        """Pin a map."""
        pin = self._pin(slot)
        files.unlink(pin)
        libbpf.pin(fd, pin)

    def keeps(self, slot: int) -> bool:
        """Look for the pin of a slot."""
        return self._pin(slot).exists()

    def open(self, slot: int, map_id: int) -> int | None:
        """Open the pin of a slot."""
        try:
            fd = libbpf.get_pinned(self._pin(slot))
        except KernelError:
            return None
        return _only(fd, map_id)

    def drop(self, slot: int) -> None:
        """Remove the pin of a slot."""
        files.unlink(self._pin(slot))

    def close(self) -> None:
        """Do nothing: pins stay."""

    def _pin(self, slot: int) -> Path:
        return counters_pin(self._directory, slot)


class OpenCounters(PinnedCounters):
    """Maps that are pinned in the directory of an endpoint, and stay open once they were asked for.

    For readers that come again and again.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        #: Slot -> id and fd of its map.
        self._open: dict[int, tuple[int, int]] = {}

    def open(self, slot: int, map_id: int) -> int | None:
        """Open another fd of a map that is open, or the pin of a slot if that has another one."""
        known = self._open.get(slot)
        if known is None or known[0] != map_id:
            self._close(slot)
            fd = super().open(slot, map_id)
            if fd is None:
                return None
            known = self._open[slot] = map_id, fd
        return os.dup(known[1])

    def close(self) -> None:
        """Close what is open here."""
        for slot in list(self._open):
            self._close(slot)

    def _close(self, slot: int) -> None:
        known = self._open.pop(slot, None)
        if known is not None:
            os.close(known[1])


class HeldCounters:
    """Maps of an endpoint that is not pinned: they are open as long as this is."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}

    def keep(self, slot: int, fd: int) -> None:
        """Hold a map open."""
        self.drop(slot)
        self._fds[slot] = os.dup(fd)

    def keeps(self, slot: int) -> bool:
        """Look whether one is held."""
        return slot in self._fds

    def open(self, slot: int, map_id: int) -> int | None:
        """Open another fd of what is held."""
        return _only(os.dup(self._fds[slot]), map_id) if self.keeps(slot) else None

    def drop(self, slot: int) -> None:
        """Close what is held."""
        fd = self._fds.pop(slot, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close all that is held."""
        for slot in list(self._fds):
            self.drop(slot)


def _only(fd: int, map_id: int) -> int | None:
    """Return the fd if it is of the map with an id; otherwise close it."""
    try:
        if libbpf.map_info(fd).id == map_id:
            return fd
    except KernelError:
        pass  # no map at all
    os.close(fd)
    return None
