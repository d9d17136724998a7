# SPDX-License-Identifier: Apache-2.0
"""Whether this process may do its work here: its capabilities, and a bpffs for the pins."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from pathlib import Path
from typing import Final

from vgw.errors import VgwError

#: Bits of linux/capability.h; ids of maps and programs are opened under CAP_SYS_ADMIN only.
NEEDED_CAPABILITIES: Final = {
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

DEFAULT_BPFFS: Final = Path("/sys/fs/bpf")


def missing_capabilities() -> list[str]:
    """Return the names of capabilities that this process lacks."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    return [name for name, bit in NEEDED_CAPABILITIES.items() if not effective >> bit & 1]


def require_capabilities() -> None:
    """Raise VgwError unless this process may load and attach programs."""
    missing = missing_capabilities()
    if missing:
        raise VgwError(
            f"no permission to load BPF programs: run vgw as root ({missing[0]} is missing)"
        )


def allow_many_files() -> None:
    """Let this process have as many files open as it may ask for: a change opens those of all VMs.

    The usual limit of 1,024 is there for programs that wait by select(), which vgw must not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def require_bpffs(directory: Path) -> None:
    """Raise VgwError unless `directory` is in a bpffs, whether it exists already or not."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if filesystem_type(existing) != "bpf":
        # Elsewhere a mount hides what a directory holds, so it must be one of vgw's own.
        command = (
            f"mount -t bpf bpf {DEFAULT_BPFFS}"
            if directory.is_relative_to(DEFAULT_BPFFS)
            else f"mkdir -p {directory} && mount -t bpf bpf {directory}"
        )
        raise VgwError(f"{directory} is not in a bpffs: run `{command}`")


def require_own(*directories: Path) -> None:
    """Raise VgwError if another user may change what is in a directory that is there.

    Who can put pins there could have this process adopt them.
    """
    for directory in directories:
        try:
            facts = directory.stat()
        except FileNotFoundError:
            continue
        if facts.st_uid not in {0, os.geteuid()} or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise VgwError(
                f"{directory} is open to other users: if what is pinned there is yours, run "
                f"`chown {os.geteuid()} {directory}` and `chmod 700 {directory}`"
            )


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that a path is on, as /proc/self/mountinfo calls it."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return "unknown"
