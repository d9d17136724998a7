# SPDX-License-Identifier: Apache-2.0
"""How long a lease still holds, by clocks that survive a jump of the time of day and a reboot.

Within one boot the kernel's CLOCK_BOOTTIME decides, which nobody can set and which goes on while
the host sleeps. After a reboot only the time of day is left: a lease holds then for what is left
by it, and never for longer than it was given, however wrong that clock may be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vgw.controller.machine import boot_id


class Moment(NamedTuple):
    """A moment by both clocks, in seconds, and the boot that the first one counts from."""

    boot_id: str
    boot: float
    wall: float


Clock = Callable[[], Moment]


def now() -> Moment:
    """Return the moment. Raises VgwError."""
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return Moment(boot_id(), boot, time.time())


@dataclass(frozen=True, slots=True)
class Term:
    """A time of some `seconds` since a moment; None: it has no end."""

    since: Moment
    seconds: int | None

    def left(self, moment: Moment) -> float | None:
        """Return the seconds that are left, 0 when it is over, None when it has no end."""
        if self.seconds is None:
            return None
        if moment.boot_id == self.since.boot_id:
            passed = moment.boot - self.since.boot
        else:
            passed = moment.wall - self.since.wall
        return max(0.0, self.seconds - max(0.0, passed))
