# SPDX-License-Identifier: Apache-2.0
"""The watch over attachments: notices what somebody takes off, replaces, adds or unpins.

The kernel tells of XDP by netlink, qdiscs, filters, names and departures (change_feed.py). Of links
it does not tell: every WATCH_SECONDS the lists of programs at the tc hooks, the links of XDP
programs and the times of the pins' directories are compared with those of the last look; of these
it tells which have to be read again (stamps.py). What changed is looked at closely, under the lock
of changes, by inspection.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from vgw import abi, libbpf
from vgw.controller import links, pinned
from vgw.controller.change_feed import ChangeFeed, Presence
from vgw.controller.paths import Paths
from vgw.controller.pin_tree import PinTree, Place
from vgw.controller.restore import Suspect
from vgw.controller.stamps import Stamp, stamp
from vgw.errors import KernelError, VgwError
from vgw.libbpf import LinkType

#: How often is looked at what the kernel does not tell of.
WATCH_SECONDS: Final = 2.5
#: Within this time what was taken off is back, or there is an alarm.
RESTORE_SECONDS: Final = 5.0
#: How often all interfaces are asked for XDP programs that others attached by links.
_XDP_SECONDS: Final = 10.0
#: Pause between closer looks, in which what comes is gathered.
_PAUSE_SECONDS: Final = 0.2
#: Within this time the thread notices that it shall stop.
_STOP_SECONDS: Final = 0.25
#: Endpoints that are looked at for the first time between two pauses.
_AT_ONCE: Final = 25

_logger = logging.getLogger(__name__)

#: Looks closely at endpoints and puts them right; returns those that are still wrong.
Inspect = Callable[[Sequence[Suspect]], Collection[Suspect]]


class _Watched:
    """One endpoint, and how it was when it was last looked at."""

    def __init__(self, vm: str, interface: str, directory: str) -> None:
        self.key: Place = (vm, interface)
        self.directory = directory
        self.ifindex = 0
        self.presence: Presence | None = None
        self.links: dict[abi.Path, int] = {}
        self.links_of: Stamp | None = None
        self.xdp_links: tuple[int, ...] = ()
        self.seen: object = None

    def hold_links(self) -> None:
        """Hold the links that are pinned now; they and their programs outlive their pins then."""
        changed = stamp(self.directory)
        if changed is None or changed == self.links_of:
            return
        self.release()
        self.links_of = changed
        for path in abi.Path:
            with contextlib.suppress(KernelError):
                self.links[path] = libbpf.get_pinned(links.link_pin(Path(self.directory), path))
        self.xdp_links = tuple(
            fd for fd in self.links.values() if libbpf.link_info(fd).type == LinkType.XDP
        )

    def release(self) -> None:
        """Hold nothing any more."""
        for fd in self.links.values():
            os.close(fd)
        self.links, self.links_of, self.xdp_links = {}, None, ()

    def shape(self, changed: Stamp | None, programs: tuple[bytes, bytes]) -> object:
        """Return what tells of every change that the kernel does not.

        `changed` is the stamp of its directory, `programs` what is at the tc hooks.
        """
        if self.ifindex and not self.xdp_links:
            return changed, programs
        # Of an interface that is elsewhere nothing else says whether it is still there.
        links_to_read = self.xdp_links if self.ifindex else self.links.values()
        infos = [(info.ifindex, info.prog_id) for info in map(libbpf.link_info, links_to_read)]
        return changed, programs, infos


class AttachmentWatch:
    """Watches all endpoints of a host in a thread of its own, once started until stopped."""

    def __init__(
        self, paths: Paths, inspect: Inspect, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Watch what is pinned under `paths`; `alive` is called at every turn."""
        self._inspect = inspect
        self._alive = alive
        self._stop = threading.Event()
        self._watched: dict[Place, _Watched] = {}
        self._tree = PinTree(paths.pins)
        self._first: dict[Place, None] = {}
        self._wrong: set[Place] = set()
        self._xdp: dict[int, int] = {}
        self._xdp_at = 0.0
        self._lists, self._one_list = libbpf.TcxLists(), libbpf.TcxLists()
        self._feed: ChangeFeed
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch, in the network namespace of this thread. Raises OSError."""
        self._feed = ChangeFeed()
        self._thread.start()

    def stop(self) -> None:
        """End the watch and give its descriptors back."""
        self._stop.set()
        self._thread.join()
        self._feed.close()
        self._tree.close()
        for watched in self._watched.values():
            watched.release()

    def _run(self) -> None:
        poll = select.poll()  # select() takes no file beyond the 1,024th
        poll.register(self._feed.fileno(), select.POLLIN)
        scan_at = 0.0
        while not self._stop.is_set():
            self._alive()
            try:
                wait = 0.0 if self._first else max(0.0, scan_at - time.monotonic())
                poll.poll(min(wait, _STOP_SECONDS) * 1000)
                suspects = self._changed()
                if time.monotonic() >= scan_at:
                    scan_at = time.monotonic() + WATCH_SECONDS
                    suspects |= self._scan()
                suspects |= self._take_first()
                if suspects:
                    self._look_closely(suspects)
            except Exception:
                # A bug that one endpoint meets must not end the watch over all.
                _logger.exception("the watch goes on after an internal error")
                self._stop.wait(1)
            self._stop.wait(_PAUSE_SECONDS)

    # --- what may be wrong ----------------------------------------------------------------

    def _changed(self) -> set[Place]:
        """Return the endpoints on whose interfaces the kernel noted changes."""
        changed = self._feed.take()
        if changed is None:
            self._first.update(dict.fromkeys(self._watched))
            return set()
        if not changed:
            return set()
        # One whose interface is not here may be back, with whatever index.
        return {
            key
            for key, watched in self._watched.items()
            if watched.ifindex in changed or not watched.ifindex
        }

    def _scan(self) -> set[Place]:
        """Return the endpoints that are not as they were, and those that were wrong."""
        gone = self._list()
        every = self._watched.values()
        stamps = self._tree.stamps([watched.directory for watched in every])
        programs = self._lists.read([watched.ifindex for watched in every])
        found = {
            watched.key
            for watched, changed, listed in zip(every, stamps, programs, strict=True)
            if watched.shape(changed, listed) != watched.seen
        }
        found -= self._first.keys()
        if time.monotonic() >= self._xdp_at:
            self._xdp_at = time.monotonic() + _XDP_SECONDS
            found |= self._other_xdp()
        return found | gone | (self._wrong & self._watched.keys())

    def _other_xdp(self) -> set[Place]:
        before, self._xdp = self._xdp, libbpf.xdp_programs()
        changed = {index for index, _ in before.items() ^ self._xdp.items()}
        return {key for key, watched in self._watched.items() if watched.ifindex in changed}

    def _take_first(self) -> set[Place]:
        """Return some of the endpoints that have not been looked at yet."""
        some = list(self._first)[:_AT_ONCE]
        for key in some:
            del self._first[key]
        return self._watched.keys() & set(some)

    def _list(self) -> set[Place]:
        """Follow the endpoints that come and go; return those that went."""
        there = self._tree.endpoints()
        for key in there.keys() - self._watched.keys():
            self._watched[key] = _Watched(*key, there[key])
            self._first[key] = None
        gone = self._watched.keys() - there.keys()
        for key in gone:
            self._first.pop(key, None)
        return gone  # those without links are looked at a last time: their alarms end

    # --- looking closely ------------------------------------------------------------------

    def _look_closely(self, keys: Collection[Place]) -> None:
        before = {key: self._glance(self._watched[key]) for key in keys}
        # One that goes while it is inspected is inspected again: its alarms have to end.
        gone = {key for key in keys if stamp(self._watched[key].directory) is None}
        suspects = {key: self._suspect(self._watched[key]) for key in sorted(keys)}
        try:
            still_wrong = self._inspect(list(suspects.values()))
        except VgwError:  # the controller is stopping
            return
        wrong = {(suspect.vm, suspect.interface) for suspect in still_wrong}
        for key in suspects:
            watched = self._watched[key]
            if key in gone and key not in wrong and stamp(watched.directory) is None:
                watched.release()
                del self._watched[key]
                self._wrong.discard(key)
                continue
            if key in wrong:
                self._wrong.add(key)
            else:
                self._wrong.discard(key)
                self._remember(watched)
                if watched.seen != before[key]:  # nobody inspected what it has become since
                    self._first[key] = None

    def _glance(self, watched: _Watched) -> object:
        """Return how an endpoint is before it is inspected."""
        if watched.seen is None:
            watched.ifindex = pinned.present_ifindex(watched.key[1]) or 0
        return self._look(watched)

    def _look(self, watched: _Watched) -> object:
        """Return how an endpoint is now."""
        (programs,) = self._one_list.read([watched.ifindex])
        return watched.shape(stamp(watched.directory), programs)

    def _suspect(self, watched: _Watched) -> Suspect:
        def same(ifindex: int) -> bool:
            known = watched.presence is not None and ifindex == watched.ifindex
            return known and self._feed.presence(ifindex) == watched.presence

        return Suspect(*watched.key, watched.links, same)

    def _remember(self, watched: _Watched) -> None:
        """Take an endpoint that is right as the measure for the next looks."""
        ifindex = pinned.present_ifindex(watched.key[1]) or 0
        presence = self._feed.presence(ifindex)
        with contextlib.suppress(VgwError):
            watched.hold_links()
        watched.ifindex = ifindex
        watched.seen = self._look(watched)
        if ifindex and _is_on(watched, ifindex):
            watched.presence = presence


def _is_on(watched: _Watched, ifindex: int) -> bool:
    directory = Path(watched.directory)
    return any(links.read_attachment(ifindex, path, directory) for path in abi.Path)
