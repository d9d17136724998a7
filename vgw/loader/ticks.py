# SPDX-License-Identifier: Apache-2.0
"""How long a tick of this kernel is: a constant for the compiler, see bpf/clock.h."""

from __future__ import annotations

import time
from typing import Final

#: CLOCK_MONOTONIC_COARSE of linux/time.h, which Python's time module does not name. It moves on
#: with each tick, and its resolution is that of the ticks.
_CLOCK: Final = 6
_SECOND_NS: Final = 1_000_000_000


def tick_options() -> tuple[str, ...]:
    """Return the compiler's options that bpf/clock.h wants."""
    return (f"-DTICK_NS={round(time.clock_getres(_CLOCK) * _SECOND_NS)}ULL",)
