# SPDX-License-Identifier: Apache-2.0
"""Following the sources of VMs: a thread for each, so that one that hangs keeps nobody waiting.

A source is scanned when its events or the coming of interfaces say so, but only so often: what
comes by thousands costs no more scans than what comes one by one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from vgw.controller.finding.found import Found, FoundVm, Source, SourceError, merged
from vgw.controller.finding.libvirt_domains import LibvirtDomains
from vgw.controller.finding.proxmox import Proxmox
from vgw.controller.finding.qemu_processes import QemuProcesses
from vgw.policy.model import Finder

#: Seconds between two scans of a source: at least, at most, and after one that failed.
LEAST_SECONDS: Final = 0.2
MOST_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 5.0
#: Seconds that an end waits for a scan under way.
_END_SECONDS: Final = 1.0

_logger = logging.getLogger(__name__)

MakeSource = Callable[[Finder], Source]


def make_source(finder: Finder) -> Source:
    """Return the source of a name."""
    sources: dict[Finder, Callable[[], Source]] = {
        Finder.LIBVIRT: LibvirtDomains,
        Finder.QEMU: QemuProcesses,
        Finder.PROXMOX: Proxmox,
    }
    return sources[finder]()


class Look:
    """One look at the sources, for a process that does not stay."""

    def __init__(self, make: MakeSource = make_source) -> None:
        """Look when first asked what is found."""
        self._make = make
        self._told: dict[str, FoundVm] = {}
        self._seen: dict[Finder, Sequence[FoundVm]] = {}
        #: Source -> why it could not be looked at.
        self.problems: dict[Finder, str] = {}

    def tell(self, vm: FoundVm) -> None:
        """Count a VM as found that somebody else knows of."""
        self._told[vm.name] = vm

    def found(self, finders: Sequence[Finder]) -> Found:
        """Return what is found by some sources, looking at each once."""
        for finder in finders:
            if finder not in self._seen:
                self._seen[finder] = self._scan(finder)
        return merged([tuple(self._told.values()), *(self._seen[each] for each in finders)])

    def _scan(self, finder: Finder) -> Sequence[FoundVm]:
        source = self._make(finder)
        try:
            return source.scan()
        except SourceError as error:
            self.problems[finder] = str(error)
            return ()
        finally:
            source.close()


class Search:
    """The sources that a controller follows; safe to use from several threads."""

    def __init__(self, make: MakeSource = make_source) -> None:
        """Follow nothing yet; `make` gives the source of a name."""
        self._make = make
        self._lock = threading.Lock()
        self._followers: dict[Finder, _Follower] = {}
        self._told: dict[str, FoundVm] = {}

    def follow(self, finders: Sequence[Finder], changed: Callable[[], None]) -> None:
        """Follow these sources and no others; `changed` is called when one finds something else."""
        with self._lock:
            ended = [self._followers.pop(each) for each in {*self._followers}.difference(finders)]
            for finder in finders:
                if finder not in self._followers:
                    self._followers[finder] = _Follower(self._make(finder), changed)
        for follower in ended:
            follower.end()

    def look(self) -> None:
        """Have all sources scanned again soon."""
        with self._lock:
            for follower in self._followers.values():
                follower.look()

    def tell(self, vm: FoundVm) -> None:
        """Count a VM as found that somebody else knows of, as long as it has an interface."""
        with self._lock:
            self._told[vm.name] = vm

    def forget(self, interfaces: Sequence[str]) -> None:
        """Forget VMs that were told of and had these interfaces, which are gone."""
        with self._lock:
            for vm in list(self._told.values()):
                if any(each.name in interfaces for each in vm.interfaces):
                    del self._told[vm.name]

    def found(self, finders: Sequence[Finder]) -> Found:
        """Return what some sources found last."""
        with self._lock:
            seen = [self._followers[each].seen for each in finders if each in self._followers]
            return merged([tuple(self._told.values()), *seen])

    @property
    def problems(self) -> Mapping[Finder, str]:
        """Which sources cannot be looked at now, and why."""
        with self._lock:
            problems = {finder: each.problem for finder, each in self._followers.items()}
        return {finder: problem for finder, problem in problems.items() if problem is not None}

    def close(self) -> None:
        """Follow nothing any more."""
        self.follow((), lambda: None)


class _Follower:
    """Scans one source again and again, in a thread."""

    def __init__(self, source: Source, changed: Callable[[], None]) -> None:
        self.seen: Sequence[FoundVm] = ()
        self.problem: str | None = None
        self._source = source
        self._changed = changed
        self._asked = threading.Event()
        self._ended = threading.Event()
        name = f"find-{source.finder}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def look(self) -> None:
        self._asked.set()

    def end(self) -> None:
        self._ended.set()
        self._asked.set()
        self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        self._source.watch(self.look)
        while not self._ended.is_set():
            self._asked.clear()
            self._scan()
            self._ended.wait(LEAST_SECONDS)
            self._asked.wait(MOST_SECONDS if self.problem is None else RETRY_SECONDS)
        self._source.close()

    def _scan(self) -> None:
        before = self.seen, self.problem
        try:
            self.seen, self.problem = tuple(self._source.scan()), None
        except SourceError as error:
            self.problem = str(error)  # what it found before still counts
        except Exception as error:
            _logger.exception("a source of VMs goes on after an internal error")
            self.problem = f"{self._source.finder}: {type(error).__name__}: {error}"
        if (self.seen, self.problem) != before:
            self._changed()
