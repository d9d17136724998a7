# SPDX-License-Identifier: Apache-2.0
"""The maps of all endpoints that are looked at again and again, kept open from look to look.

Opening an endpoint and finding out whether it is whole takes longer than reading it. What is kept
holds nothing in force: programs and links are not among it, and the maps of an endpoint that is
gone are closed by the next look, of which the controller has one every few seconds. The same map of
all endpoints is read in one go.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

from vgw import abi, libbpf
from vgw.controller import fitness
from vgw.controller.clock import SECOND_NS
from vgw.controller.endpoint import open_endpoint
from vgw.controller.links import Attachment
from vgw.controller.paths import Paths
from vgw.controller.pin_tree import PinTree, Place
from vgw.controller.stamps import Stamp
from vgw.errors import VgwError
from vgw.maps import EndpointMaps
from vgw.maps_counters import OpenCounters
from vgw.maps_stats import Stats

#: What looks read, in the order in which it is opened.
MAPS: Final = (
    "active",
    "configs",
    "stats",
    "conntrack_meta",
    "event_meter",
    "reject_meter",
    "rule_counters",
)

_Structure = TypeVar("_Structure", bound=ctypes.Structure)


@dataclass(slots=True, eq=False)
class KeptEndpoint:
    """A whole endpoint; `made` differs when it was made anew.

    `attachments` is what a reader found out and what it takes to see that this still holds,
    `would_drop` are the counters of monitor mode if they stay as they are for as long as this is
    kept: no mode comes into force without a change of the pins.
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
    would_drop: Stats | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the directory of pins had not changed for a while when they were opened.

        One that changed at that moment may have changed once more in the same tick of its clock.
        """
        return self.changed_ns < self.opened_ns - SECOND_NS

    def is_current(self, stamp: Stamp) -> bool:
        """Tell whether the directory of pins is surely as it was when they were opened."""
        return self.is_settled and stamp == (self.made, self.changed_ns)


class KeptLook:
    """The endpoints that a look found; what it reads is written again by the next reading.

    There is one element of each endpoint, in their order. Methods raise KernelError.
    """

    def __init__(self, endpoints: Sequence[KeptEndpoint]) -> None:
        self.endpoints = endpoints
        self.lists = libbpf.TcxLists()

    def configs(self) -> ctypes.Array[abi.EndpointConfig]:
        """Read the configurations in force."""
        return self._configs.read(active.slot for active in self._active.read())

    def metas(self) -> ctypes.Array[abi.ConntrackMeta]:
        """Read the counters of the conntrack tables."""
        return self._metas.read()

    def event_meters(self) -> ctypes.Array[abi.EventMeter]:
        """Read how many events were sent and lost."""
        return self._event_meters.read()

    def reject_meters(self) -> ctypes.Array[abi.RejectMeter]:
        """Read how many answers to rejected packets were sent and not sent."""
        return self._reject_meters.read()

    def _reads(
        self, name: str, structure: type[_Structure], indexes: int = 1
    ) -> libbpf.EntryReads[_Structure]:
        fds = [endpoint.maps.fd(name) for endpoint in self.endpoints]
        return libbpf.EntryReads(fds, structure, indexes)

    @cached_property
    def _active(self) -> libbpf.EntryReads[abi.ActiveSlot]:
        return self._reads("active", abi.ActiveSlot)

    @cached_property
    def _configs(self) -> libbpf.EntryReads[abi.EndpointConfig]:
        return self._reads("configs", abi.EndpointConfig, abi.CONFIG_SLOTS)

    @cached_property
    def _metas(self) -> libbpf.EntryReads[abi.ConntrackMeta]:
        return self._reads("conntrack_meta", abi.ConntrackMeta)

    @cached_property
    def _event_meters(self) -> libbpf.EntryReads[abi.EventMeter]:
        return self._reads("event_meter", abi.EventMeter)

    @cached_property
    def _reject_meters(self) -> libbpf.EntryReads[abi.RejectMeter]:
        return self._reads("reject_meter", abi.RejectMeter)


class KeptMaps:
    """The endpoints of a host, for use from several threads, one look at a time."""

    def __init__(self, paths: Paths) -> None:
        self._tree = PinTree(paths.pins)
        self._lock = threading.Lock()
        self._kept: dict[Place, KeptEndpoint] = {}
        self._last = KeptLook(())

    @contextlib.contextmanager
    def look(self) -> Iterator[KeptLook]:
        """Give the whole endpoints that there are now, in order of their names, for a block."""
        with self._lock, contextlib.ExitStack() as stack:
            found = self._look(stack)
            if found != self._last.endpoints:
                self._last = KeptLook(found)
            yield self._last

    def close(self) -> None:
        """Close everything; the next look opens it again."""
        with self._lock:
            for endpoint in self._kept.values():
                endpoint.maps.close()
            self._kept.clear()
            self._last = KeptLook(())
            self._tree.close()

    def _look(self, stack: contextlib.ExitStack) -> list[KeptEndpoint]:
        """Bring what is kept up to date; what there is no room to keep is closed with `stack`."""
        before, self._kept = self._kept, {}
        room = _room()
        found: list[KeptEndpoint] = []
        try:
            there = self._tree.endpoints()
            stamps = self._tree.stamps(there.values())
            for (place, directory), stamp in zip(there.items(), stamps, strict=True):
                if stamp is None:
                    continue
                endpoint = before.get(place)
                is_new = endpoint is None or not endpoint.is_current(stamp)
                if endpoint is None or is_new:
                    try:
                        endpoint = _open(*place, Path(directory), stamp)
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


def _open(vm: str, interface: str, directory: Path, stamp: Stamp) -> KeptEndpoint:
    """Open what looks read of an endpoint; raises VgwError when it is not whole."""
    opened_ns = time.time_ns()
    with open_endpoint(vm, interface, directory) as endpoint:
        return KeptEndpoint(
            vm,
            interface,
            directory,
            stamp.inode,
            stamp.changed_ns,
            opened_ns,
            endpoint.maps.conntrack_max(),
            endpoint.maps.taken(MAPS, OpenCounters(directory)),
        )
