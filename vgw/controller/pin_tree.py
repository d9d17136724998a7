# SPDX-License-Identifier: Apache-2.0
"""Which endpoints are pinned, for those who look again and again: only what changed is read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from vgw.controller.paths import unpin_name
from vgw.controller.pins import directories
from vgw.controller.stamps import Stamp, Stamps

#: A directory changed this recently may change again without its time of change showing it.
_SETTLED_NS: Final = 50_000_000
#: What is known of a directory that was listed and has to be listed again.
_UNSETTLED: Final = 0

#: A VM and one of its interfaces.
Place = tuple[str, str]


class PinTree:
    """The directories of endpoints, whole or broken; for use by one thread at a time."""

    def __init__(self, pins: Path) -> None:
        """Look into the directory of all pins."""
        self._pins = os.fspath(pins)
        self._stamps = Stamps(self._pins)
        #: Directory -> when it had changed last as it was listed, and the directories in it.
        self._listed: dict[str, tuple[int, list[str]]] = {}
        self._found: dict[Place, str] = {}

    def close(self) -> None:
        """Give back what it takes to notice changes; a later look is made as the first one."""
        self._stamps.close()

    def endpoints(self) -> Mapping[Place, str]:
        """Return the directory of each endpoint that there is now, in order of their places.

        It is the same object for as long as none came or went.
        """
        changed = self._stamps.refresh()
        if self._pins not in self._listed or any(
            then == _UNSETTLED or (changed and self._changed(directory) != then)
            for directory, (then, _) in self._listed.items()
        ):
            found = self._look()
            if found != self._found:
                self._found = found
        return self._found

    def stamps(self, directories: Iterable[str]) -> list[Stamp | None]:
        """Return the stamps of endpoints' directories as of the last endpoints(), or later."""
        return list(map(self._stamps.of, directories))

    def _changed(self, directory: str) -> int | None:
        stamp = self._stamps.of(directory)
        return None if stamp is None else stamp.changed_ns

    def _look(self) -> dict[Place, str]:
        found: dict[Place, str] = {}
        before, self._listed = self._listed, {}
        for vm_name in self._names(self._pins, before):
            vm = unpin_name(vm_name)
            if vm is not None:
                vm_dir = f"{self._pins}/{vm_name}"
                for name in self._names(vm_dir, before):
                    interface = unpin_name(name)
                    if interface is not None:
                        found[vm, interface] = f"{vm_dir}/{name}"
        return dict(sorted(found.items()))

    def _names(self, directory: str, before: Mapping[str, tuple[int, list[str]]]) -> list[str]:
        """Return the directories in a directory, listed again only when it changed."""
        changed = self._changed(directory)
        if changed is None:
            return []
        known = before.get(directory)
        if known is None or known[0] != changed:
            settled = time.time_ns() - changed > _SETTLED_NS
            known = (changed if settled else _UNSETTLED, directories(directory))
        self._listed[directory] = known
        return known[1]
