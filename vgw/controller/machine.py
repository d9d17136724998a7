# SPDX-License-Identifier: Apache-2.0
"""What tells this machine, and this run of it, from others."""

from __future__ import annotations

import functools
import socket
import time
from pathlib import Path

from vgw.errors import VgwError


@functools.cache
def machine_id() -> str:
    """Return what is this installation's own: /etc/machine-id, without one the host's name."""
    try:
        found = Path("/etc/machine-id").read_text().strip()
    except OSError:
        found = ""
    return found or socket.gethostname()


def boot_id() -> str:
    """Return what is different after every boot of the kernel. Raises VgwError."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        raise VgwError(f"cannot tell this boot from others: {error}; is /proc mounted?") from error


def boottime_ns() -> int:
    """Return nanoseconds since the boot, time in suspend included; no clock setting changes it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
