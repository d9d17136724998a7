# SPDX-License-Identifier: Apache-2.0
"""What becomes of an endpoint that looks wrong: looked at closely, put right, and an alarm raised.

The programs of others are never removed. An alarm about something that was put right stands for
ALARM_SECONDS, so that a person gets to see that somebody does such things.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import Final

from vgw import abi
from vgw.controller import links, pinned
from vgw.controller.alarms import Alarms
from vgw.controller.endpoint import BrokenEndpointError, open_endpoint
from vgw.controller.events import LogWriter, control_record
from vgw.controller.foreign import programs_beside
from vgw.controller.reconcile import Host
from vgw.controller.restore import Suspect, alive, is_filed
from vgw.errors import KernelError, VgwError

#: How long an alarm about something that was put right stands.
ALARM_SECONDS: Final = 600.0

DETACHED: Final = "detached"
FOREIGN: Final = "foreign"
MOVED: Final = "moved"

_FIND_OUT: Final = "find out which tool does that"
_Key = tuple[str, str]


class Outcome(enum.Enum):
    """What became of an endpoint that was inspected."""

    RIGHT = enum.auto()
    WRONG = enum.auto()
    """It is not whole, and cannot be made so now."""
    MAKE_ANEW = enum.auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """What a look at an endpoint found: each a text of what is wrong, or None.

    `gone`: there is no such endpoint any more.
    """

    detached: str | None = None
    foreign: str | None = None
    moved: str | None = None
    gone: bool = False


class Inspector:
    """Looks at endpoints; to be used by one thread at a time, while nothing else changes them."""

    def __init__(self, host: Host, alarms: Alarms, log: LogWriter) -> None:
        """Have nothing to say yet."""
        self._host = host
        self._alarms = alarms
        self._log = log
        #: Endpoint that was put right -> when its alarm ends, by the monotonic clock.
        self._until: dict[_Key, float] = {}
        #: Endpoints that were wrong when they were last looked at.
        self._wrong: set[_Key] = set()

    def inspect(self, suspect: Suspect) -> Outcome:
        """Look at an endpoint and put it right if it is not."""
        finding = self._look(suspect)
        if finding.detached is None:
            self._wrong.discard((suspect.vm, suspect.interface))
            if (suspect.vm, suspect.interface) not in self._until:
                self._say(suspect, DETACHED, None)
            return Outcome.RIGHT
        key = suspect.vm, suspect.interface
        if key not in self._wrong:
            self._say(suspect, DETACHED, f"not protected: {finding.detached}; {_FIND_OUT}")
        self._wrong.add(key)
        try:
            restored = self._host.restore(suspect)
        except VgwError as error:
            self._say(suspect, DETACHED, f"not protected: {finding.detached}: {error}")
            return Outcome.WRONG
        if restored is None:
            return Outcome.MAKE_ANEW
        if restored.done:
            self._put_right(suspect, ", ".join(restored.done))
        else:  # another process was at work on it
            self._wrong.discard(key)
            self._say(suspect, DETACHED, None)
        return Outcome.RIGHT

    def made_anew(self, suspect: Suspect) -> bool:
        """Look again after an attempt to make an endpoint anew; return whether it is right now."""
        finding = self._look(suspect)
        if finding.detached is None:
            self._put_right(suspect, "everything, made anew")
            return True
        self._say(suspect, DETACHED, f"not protected: {finding.detached}")
        return False

    def end_alarms(self) -> None:
        """Take back the alarms about what was put right long ago."""
        now = time.monotonic()
        for key in [key for key, until in self._until.items() if until <= now]:
            del self._until[key]
            self._alarms.clear(DETACHED, vm=key[0], interface=key[1])

    def _put_right(self, suspect: Suspect, what: str) -> None:
        key = suspect.vm, suspect.interface
        self._wrong.discard(key)
        self._until[key] = time.monotonic() + ALARM_SECONDS
        self._say(suspect, DETACHED, f"somebody took away and vgw put back: {what}; {_FIND_OUT}")
        self._log.add(
            control_record("restored", vm=suspect.vm, interface=suspect.interface, what=what)
        )

    def _look(self, suspect: Suspect) -> Finding:
        finding = _finding(self._host, suspect)
        if finding.gone:
            self._until.pop((suspect.vm, suspect.interface), None)
        self._say(suspect, FOREIGN, finding.foreign)
        self._say(suspect, MOVED, finding.moved)
        return finding

    def _say(self, suspect: Suspect, alarm: str, text: str | None) -> None:
        if text is None:
            self._alarms.clear(alarm, vm=suspect.vm, interface=suspect.interface)
        else:
            self._alarms.set(alarm, text, vm=suspect.vm, interface=suspect.interface)


def _finding(host: Host, suspect: Suspect) -> Finding:
    directory = host.paths.endpoint_dir(suspect.vm, suspect.interface)
    if not directory.exists():
        if alive(suspect.links) and not is_filed(host.paths, suspect.links):
            return Finding(detached="its pins were removed")
        return Finding(gone=True)
    ifindex = pinned.present_ifindex(suspect.interface)
    if ifindex is None:
        return Finding(moved=_moved(host, suspect))
    try:
        with open_endpoint(suspect.vm, suspect.interface, directory) as endpoint:
            there = {path: endpoint.attachment(ifindex, path) for path in abi.Path}
    except BrokenEndpointError as error:
        return Finding(detached=str(error))
    missing = [path.name.lower() for path, attachment in there.items() if attachment is None]
    unpinned = [
        path.name.lower()
        for path, attachment in there.items()
        if attachment is not None and path in suspect.links and not attachment.link
    ]
    detached = None
    if missing:
        detached = f"the program {' and '.join(missing)} is not on the interface"
    elif unpinned:
        detached = f"the pin of the link {' and '.join(unpinned)} was removed"
    own = {attachment.prog_id for attachment in there.values() if attachment is not None}
    own |= {each.shield for each in there.values() if each is not None and each.shield is not None}
    return Finding(detached, _foreign(ifindex, own))


def _moved(host: Host, suspect: Suspect) -> str | None:
    paths = host.paths
    if pinned.is_gone(paths, suspect.vm, suspect.interface):
        return None
    if pinned.located(paths, suspect.vm, suspect.interface) is not None:
        return None  # renamed, which is followed
    return (
        "it was moved to another network namespace, where its programs still run; move it back, "
        f"or detach {suspect.vm}"
    )


def _foreign(ifindex: int, own: set[int]) -> str | None:
    """Return what others run on an interface, None when they run nothing."""
    try:
        rows = programs_beside(ifindex, own)
    except KernelError:
        return None  # the interface went at this moment
    if not rows:
        return None
    shown = ", ".join(f"{row['path']} {row['kind']} {row['id']}" for row in rows)
    name = links.interface_name(ifindex)
    return (
        f"of somebody else on the interface: {shown}; it may pass packets by vgw, "
        f"`vgw status` and `tc filter show dev {name} ingress` say what it is"
    )
