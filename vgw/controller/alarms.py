# SPDX-License-Identifier: Apache-2.0
"""Alarms: what is wrong now and needs a person, until it is right again.

An alarm has a short name, may concern a VM and one of its interfaces, and stands until it is
cleared. Raising and clearing one each leave a control record and a line in the process's log; the
metrics and `vgw status` show those that stand. They are in memory only: whoever raises one looks
again after a restart.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any

from vgw.controller.clock import SECOND_NS
from vgw.controller.events import LogWriter, control_record

_logger = logging.getLogger(__name__)

#: What tells alarms apart: name, VM and interface; "" where it concerns none.
_Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Alarm:
    """What is wrong, with whom, in words; `since_ns` is of the monotonic clock."""

    alarm: str
    vm: str | None
    interface: str | None
    text: str
    since_ns: int

    def report(self) -> dict[str, Any]:
        """Return what `status` says of it, as JSON; `seconds` is how long it stands."""
        seconds = (time.monotonic_ns() - self.since_ns) / SECOND_NS
        return {
            "alarm": self.alarm,
            "vm": self.vm,
            "interface": self.interface,
            "text": self.text,
            "seconds": round(max(0.0, seconds), 3),
        }


class Alarms:
    """The alarms of a controller; safe to use from several threads."""

    def __init__(self, log: LogWriter) -> None:
        """Have none yet; `log` gets the records."""
        self._log = log
        self._lock = threading.Lock()
        self._standing: dict[_Key, Alarm] = {}

    def set(
        self, alarm: str, text: str, *, vm: str | None = None, interface: str | None = None
    ) -> None:
        """Raise an alarm, a short lower-case name, with a text of one line for people.

        With the same text as it stands nothing happens; with another it goes on with that.
        """
        key = (alarm, vm or "", interface or "")
        with self._lock:
            before = self._standing.get(key)
            if before is not None and before.text == text:
                return
            since = time.monotonic_ns() if before is None else before.since_ns
            self._standing[key] = Alarm(alarm, vm, interface, text, since)
        _logger.error("alarm %s: %s", _shown(key), text)
        self._note("alarm", alarm, vm, interface, text=text)

    def clear(self, alarm: str, *, vm: str | None = None, interface: str | None = None) -> None:
        """Take an alarm back; one that does not stand is no error."""
        self._clear((alarm, vm or "", interface or ""))

    def forget(self, vm: str) -> None:
        """Take all alarms of a VM back: it is detached."""
        with self._lock:
            keys = [key for key in self._standing if key[1] == vm]
        for key in keys:
            self._clear(key)

    def current(self) -> list[Alarm]:
        """Return the alarms that stand, by name, VM and interface."""
        with self._lock:
            return [self._standing[key] for key in sorted(self._standing)]

    def _clear(self, key: _Key) -> None:
        with self._lock:
            gone = self._standing.pop(key, None)
        if gone is not None:
            _logger.info("alarm %s is over", _shown(key))
            self._note("alarm_cleared", gone.alarm, gone.vm, gone.interface)

    def _note(
        self, event: str, alarm: str, vm: str | None, interface: str | None, **more: str
    ) -> None:
        self._log.add(control_record(event, alarm=alarm, vm=vm, interface=interface, **more))
        self._log.flush()


def _shown(key: _Key) -> str:
    return " ".join(part for part in key if part)
