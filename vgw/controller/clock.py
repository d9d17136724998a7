# SPDX-License-Identifier: Apache-2.0
"""The clock of the packet programs: times in maps are of it, in nanoseconds.

It is that of the kernel's ticks since an arbitrary moment before boot. It stands still while the
host is suspended, and neither the time of day nor a time namespace has to do with it.
"""

from __future__ import annotations

import os
from typing import Final

SECOND_NS: Final = 1_000_000_000
#: Units of times(2) in a second, in which the kernel shows its ticks.
_UNITS: Final = os.sysconf("SC_CLK_TCK")


def coarse_now_ns() -> int:
    """Return what clock_now() of bpf/clock.h returns to a program now, or up to 10 ms less."""
    return round(os.times().elapsed * _UNITS) * (SECOND_NS // _UNITS)
