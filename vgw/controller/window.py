# SPDX-License-Identifier: Apache-2.0
"""The window in which an applied policy waits to be confirmed: its record in the state directory.

The record has the deadline. That a policy waits at all says its entry of the history: with the
record lost or damaged it counts as overdue. Deadlines are of CLOCK_BOOTTIME, so neither a change of
the wall clock nor a suspend moves them, and after another boot each has passed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vgw.controller.machine import boot_id, boottime_ns, machine_id
from vgw.controller.paths import Paths
from vgw.controller.state_file import read_state, remove_state, write_state

_SCHEMA: Final = "vgw/confirm-window/v1"
#: How often going back is tried where it fails for some VMs.
ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class Window:
    """A policy that waits to be confirmed.

    `id` is that in the history entry `number`, `back` is the entry to go back to. `deadline_ns` is
    in nanoseconds of CLOCK_BOOTTIME of the boot `boot`. `others` are the policies, by digest, of
    VMs that had another one than the host's. `attempts`: how often going back failed for some VM.
    """

    id: str
    number: int
    back: int
    seconds: float
    deadline_ns: int = 0
    boot: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    attempts: int = 0

    def remaining_seconds(self) -> float:
        """Return how long it is open, 0 when it is overdue."""
        if self.boot != boot_id():
            return 0.0
        return max(0.0, (self.deadline_ns - boottime_ns()) / 1e9)

    def beginning_now(self) -> Window:
        """Return the window with its whole length ahead."""
        deadline = boottime_ns() + round(self.seconds * 1e9)
        return dataclasses.replace(self, deadline_ns=deadline, boot=boot_id())


def has_record(paths: Paths) -> bool:
    """Tell whether there is a record, damaged or not."""
    return _file(paths).exists()


def load_window(paths: Paths) -> Window | None:
    """Return the record; None when there is none, or it is damaged or of another host."""
    body = read_state(_file(paths), _SCHEMA)
    if body is None or body.get("machine") != machine_id():
        return None
    try:
        return Window(**body["window"])
    except (KeyError, TypeError):
        return None


def save_window(paths: Paths, window: Window) -> None:
    """Write the record. Raises VgwError."""
    body = {"machine": machine_id(), "window": dataclasses.asdict(window)}
    write_state(_file(paths), _SCHEMA, body)


def remove_window(paths: Paths) -> None:
    """Remove the record, if there is one."""
    remove_state(_file(paths))


def _file(paths: Paths) -> Path:
    return paths.state_dir / "confirm.json"
