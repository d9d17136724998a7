# SPDX-License-Identifier: Apache-2.0
"""The maps of all endpoints that are looked at again and again, kept open from look to look.

Opening an endpoint and finding out whether it is whole takes longer than reading it. What is kept
holds nothing in force: programs and links are not among it, and the maps of an endpoint that is
gone are closed by the next look, of which the controller has one every few seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vgw.controller import fitness
from vgw.controller.clock import SECOND_NS
from vgw.controller.endpoint import open_endpoint
from vgw.controller.links import Attachment
from vgw.controller.paths import Paths
from vgw.controller.pin_tree import PinTree, Place
from vgw.errors import VgwError
from vgw.maps import EndpointMaps

#: What looks read, in the order in which it is opened.
MAPS: Final = ("active", "configs", "stats", "conntrack_meta", "event_meter", "reject_meter")


@dataclass(slots=True)
class KeptEndpoint:
    """A whole endpoint; `made` differs when it was made anew.

    `attachments` is what a reader found out and what it takes to see that this still holds.
    """

    vm: str
    interface: str
    directory: Path
    made: int
    changed_ns: int
    opened_ns: int
    conntrack_max: int
    maps: EndpointMaps
    attachments: tuple[int, Attachment, Attachment] | None = None

    def is_current(self, status: os.stat_result) -> bool:
        """Tell whether the directory of pins is as it was when they were opened.

        One that changed at that moment may have changed once more in the same tick of its clock.
        """
        settled = self.changed_ns < self.opened_ns - SECOND_NS
        return settled and (status.st_ino, status.st_mtime_ns) == (self.made, self.changed_ns)


class KeptMaps:
    """The endpoints of a host, for use from several threads, one look at a time."""

    def __init__(self, paths: Paths) -> None:
        self._tree = PinTree(paths.pins)
        self._lock = threading.Lock()
        self._kept: dict[Place, KeptEndpoint] = {}

    @contextlib.contextmanager
    def endpoints(self) -> Iterator[list[KeptEndpoint]]:
        """Give the whole endpoints that there are now, in order of their names, for a block."""
        with self._lock, contextlib.ExitStack() as stack:
            yield self._look(stack)

    def close(self) -> None:
        """Close everything; the next look opens it again."""
        with self._lock:
            for endpoint in self._kept.values():
                endpoint.maps.close()
            self._kept.clear()

    def _look(self, stack: contextlib.ExitStack) -> list[KeptEndpoint]:
        """Bring what is kept up to date; what there is no room to keep is closed with `stack`."""
        before, self._kept = self._kept, {}
        room = _room()
        found: list[KeptEndpoint] = []
        try:
            for place, directory in self._tree.endpoints().items():
                try:
                    status = os.stat(directory)  # noqa: PTH116 - a Path takes twice as long
                    endpoint = before.get(place)
                    is_new = endpoint is None or not endpoint.is_current(status)
                    if endpoint is None or is_new:
                        endpoint = _open(*place, Path(directory), status)
                except (OSError, VgwError):
                    continue
                if is_new and len(self._kept) >= room:
                    stack.callback(endpoint.maps.close)
                else:
                    self._kept[place] = endpoint
                found.append(endpoint)
        finally:
            for place, endpoint in before.items():
                if self._kept.get(place) is not endpoint:
                    endpoint.maps.close()
        return found


def _room() -> int:
    """Return how many endpoints may be kept: half of the files that this process may have open."""
    fitness.allow_many_files()
    return fitness.room_for(len(MAPS))


def _open(vm: str, interface: str, directory: Path, status: os.stat_result) -> KeptEndpoint:
    """Open what looks read of an endpoint; raises VgwError when it is not whole."""
    opened_ns = time.time_ns()
    with open_endpoint(vm, interface, directory) as endpoint:
        return KeptEndpoint(
            vm,
            interface,
            directory,
            status.st_ino,
            status.st_mtime_ns,
            opened_ns,
            endpoint.maps.conntrack_max(),
            endpoint.maps.taken(MAPS),
        )
