# SPDX-License-Identifier: Apache-2.0
"""Whether this process may do its work here: capabilities, kernel, clock, a bpffs for the pins."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from pathlib import Path
from typing import Final

from vgw import libbpf
from vgw.errors import KernelError, VgwError
from vgw.loader import socket_buffer_options

#: Bits of linux/capability.h: to attach; for pointers in programs and the perf buffer; to load.
NEEDED_CAPABILITIES: Final = {
    "CAP_NET_ADMIN": 12,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

#: `mov r0, 0; exit`
DO_NOTHING: Final = bytes.fromhex("b700000000000000 9500000000000000")

DEFAULT_BPFFS: Final = Path("/sys/fs/bpf")

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


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
            f"no permission to load and attach BPF programs: {', '.join(missing)} is missing; run "
            f"vgw as root, or with {', '.join(NEEDED_CAPABILITIES)}"
        )


def require_programs() -> None:
    """Raise VgwError unless this kernel loads tc programs and describes its socket buffers.

    Both are asked for by every program. What else a kernel may lack has a way around: links and
    tcx (netlink and clsact), native XDP (generic, or tc), the JIT compiler (slower).
    """
    try:
        os.close(libbpf.prog_load(libbpf.ProgType.SCHED_CLS, "vgw_probe", DO_NOTHING))
    except KernelError as error:
        raise VgwError(
            f"this kernel loads no tc programs ({os.strerror(error.errno)}): vgw needs "
            "CONFIG_NET_CLS_ACT and CONFIG_BPF_SYSCALL; `vgw doctor` says more"
        ) from error
    socket_buffer_options()


def require_host_clock() -> None:
    """Raise VgwError where the monotonic clock is not that by which packets are judged."""
    with contextlib.suppress(OSError):  # a kernel without time namespaces has one clock
        for line in Path("/proc/self/timens_offsets").read_text().splitlines():
            name, *offset = line.split()
            if name == "monotonic" and any(int(number) for number in offset):
                raise VgwError(
                    "this process is in a time namespace of its own, whose clock is not that of "
                    "the packet programs; run vgw in the host's"
                )


def allow_many_files() -> None:
    """Let this process have as many files open as it may ask for: a change opens those of all VMs.

    The usual limit of 1,024 is there for programs that wait by select(), which vgw must not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def room_for(files: int) -> int:
    """Return how many times so many files may be open in half of what this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // (2 * files)


def trusted_users(bpffs: Path) -> set[int]:
    """Return the users whose pins this process changes and whose compiled programs it may load.

    It is whom `bpffs`, the directory of the pins, belongs to, if that is root or this process's own
    user. Root also goes on with what a service with a user of its own has made; but then nobody
    else may have been able to make that directory: the one above is root's alone, which gave it to
    that user, or belongs to that user too.
    """
    with contextlib.suppress(OSError):
        owner, above = bpffs.stat().st_uid, bpffs.parent.stat()
        is_given = above.st_uid == owner or (
            above.st_uid == 0 and not above.st_mode & _OTHERS_WRITE
        )
        if owner in {0, os.geteuid()} or (os.geteuid() == 0 and is_given):
            return {owner}
    return set()


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


def require_own(bpffs: Path, *inside: Path) -> None:
    """Raise VgwError if a user who is not trusted may change what is in a directory that is there.

    Who can put pins there could have this process adopt them. `inside` are directories in `bpffs`.
    """
    users = {0, os.geteuid(), *trusted_users(bpffs)}
    for directory in (bpffs, *inside):
        try:
            facts = directory.stat()
        except FileNotFoundError:
            continue
        if facts.st_uid not in users or facts.st_mode & _OTHERS_WRITE:
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
