# SPDX-License-Identifier: Apache-2.0
"""The clock of the packet programs: times in maps are of it, in nanoseconds."""

from __future__ import annotations

import time
from typing import Final

SECOND_NS: Final = 1_000_000_000
#: CLOCK_MONOTONIC_COARSE of linux/time.h; Python's time module does not name it.
_CLOCK: Final = 6


def coarse_now_ns() -> int:
    """Return what bpf_ktime_get_coarse_ns() returns to a program now."""
    return time.clock_gettime_ns(_CLOCK)
