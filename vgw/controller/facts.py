# SPDX-License-Identifier: Apache-2.0
"""The facts about VMs that a controller follows: what its sources find, what servers lease.

Both change by themselves; here is said which VMs a change concerns, and what of it is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Final

from vgw.controller.alarms import Alarms
from vgw.controller.events import LogWriter
from vgw.controller.finding.search import MakeSource, Search, make_source
from vgw.controller.learning.learner import Learner
from vgw.controller.overlay import Overlay, concerned
from vgw.controller.paths import Paths
from vgw.controller.waker import Waker
from vgw.policy.model import PolicyDocument

#: Names of alarms: what is found differs from what is written; a source cannot be looked at.
DIFFERS: Final = "found_differs"
UNREADABLE: Final = "find_{}"
#: Seconds after which leases that could not be kept are tried again.
RETRY_SECONDS: Final = 10.0

#: An alarm's name, VM and interface.
_Alarm = tuple[str, str | None, str | None]


class Facts:
    """What a controller knows of VMs beyond its files; used under the lock of its changes.

    `learner.heard` and `search` may be used by other threads.
    """

    def __init__(
        self,
        paths: Paths,
        log: LogWriter,
        alarms: Alarms,
        make: MakeSource = make_source,
    ) -> None:
        """Follow nothing yet; `make` gives the source of VMs of a name."""
        self.search = Search(make)
        self.overlay = Overlay(paths, self.search.found)
        self.learner = Learner(paths, self.overlay.book, log, alarms, self._wake)
        self._alarms = alarms
        self._changed: Callable[[], None] = _nothing
        self._waker: Waker | None = None
        self._laid = PolicyDocument()
        self._raised: set[_Alarm] = set()

    @contextlib.contextmanager
    def followed(self, changed: Callable[[], None]) -> Iterator[None]:
        """Have `changed` called, by any thread, when `settle` has something to do."""
        with Waker(changed) as waker:
            self._changed, self._waker = changed, waker
            try:
                yield
            finally:
                self.search.close()
                self._changed, self._waker = _nothing, None

    def follow(self, document: PolicyDocument) -> None:
        """Look for VMs where the host's inventory says."""
        self.search.follow(document.inventory.find, self._wake)

    def settle(self, document: PolicyDocument, attached: Collection[str]) -> set[str]:
        """Take in what changed; return the VMs that it concerns, attached or not.

        `document` is what the files say. Raises VgwError when leases cannot be kept.
        """
        self._wake_in(RETRY_SECONDS)  # if this fails
        expired = self.learner.expire()
        self.learner.judge(lambda: self.overlay.laid(document))
        self._wake_in(self.overlay.book.next_end())
        before, self._laid = self._laid, self.overlay.laid(document)
        self._raise_alarms(document)
        return concerned(before, self._laid, attached) | expired

    def _wake_in(self, seconds: float | None) -> None:
        if self._waker is not None:
            self._waker.wake_in(seconds)

    def _wake(self) -> None:
        self._changed()

    def _raise_alarms(self, document: PolicyDocument) -> None:
        wrong: dict[_Alarm, str] = {
            (DIFFERS, each.vm, each.interface): each.text
            for each in self.overlay.differences(document)
        }
        for finder, problem in self.search.problems.items():
            wrong[UNREADABLE.format(finder), None, None] = problem
        for key, text in wrong.items():
            alarm, vm, interface = key
            self._alarms.set(alarm, text, vm=vm, interface=interface)
        for alarm, vm, interface in self._raised.difference(wrong):
            self._alarms.clear(alarm, vm=vm, interface=interface)
        self._raised = set(wrong)


def _nothing() -> None:
    """Do nothing: nobody wants to be called."""
