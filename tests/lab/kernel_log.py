# SPDX-License-Identifier: Apache-2.0
"""The kernel's log since a mark, and what in it says that the kernel itself went wrong."""

from __future__ import annotations

import os
import re
from typing import Final

_ALARM: Final = re.compile(
    r"WARNING: |BUG: |kernel BUG at|Oops|general protection|Call Trace|refcount_t: |"
    r"KASAN|UBSAN|soft lockup|hung_task|blocked for more than|list_add corruption|"
    r"list_del corruption|skb_warn_bad_offload|skb_under_panic|skb_over_panic|"
    r"suspicious RCU usage|rcu_preempt detected|Kernel panic|hw csum failure"
)
_RECORD_SIZE: Final = 8192


class KernelLog:
    """Reads /dev/kmsg from where it stood when this was made."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        """Stop reading."""
        os.close(self._fd)

    def records(self) -> list[str]:
        """Return the lines since the last look: `priority,...;text`."""
        lines: list[str] = []
        while True:
            try:
                record = os.read(self._fd, _RECORD_SIZE)
            except BlockingIOError:
                return lines
            except BrokenPipeError:
                # Some were overwritten before they were read.
                lines.append("0,;BUG: the kernel logged more than it keeps")
                continue
            lines.append(record.decode(errors="replace").split("\n", 1)[0])

    def alarms(self) -> list[str]:
        """Return the lines since the last look in which the kernel warns of itself."""
        return [line for line in self.records() if is_alarm(line)]


def is_alarm(record: str) -> bool:
    """Tell whether a record is a warning of the kernel; what processes write there is none."""
    prefix, _, text = record.partition(";")
    priority = int(prefix.split(",", 1)[0])
    from_kernel = priority >> 3 == 0
    return from_kernel and _ALARM.search(text) is not None
