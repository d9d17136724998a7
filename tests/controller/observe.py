# SPDX-License-Identifier: Apache-2.0
"""What tests of the controller look at: packets that get through, status, and traces left."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from tests.controller.policies import from_vm, to_vm
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host


def send_to_vm(name: str, frame: bytes) -> None:
    """Send a frame out of an interface, towards its VM."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        with contextlib.suppress(OSError):  # ENOBUFS: a program dropped it
            sock.send(frame)


def received(tap_fd: int, frame: bytes) -> bool:
    """Tell whether the VM's side of a TAP got a frame; the kernel delivers before send returns."""
    while True:
        try:
            if os.read(tap_fd, 65536) == frame:
                return True
        except BlockingIOError:
            return False


def passes(vm: int, frame: bytes, name: str = "tap0") -> bool:
    """Tell whether a frame toward a VM gets to it."""
    send_to_vm(name, frame)
    return received(vm, frame)


def lets_in(vm: int, port: int, name: str = "tap0") -> bool:
    """Tell whether a new connection to a port of a VM gets in."""
    sport = 20000 + int.from_bytes(os.urandom(2), "big") // 2
    return passes(vm, to_vm(dport=port, sport=sport), name)


def open_connection(vm: int, name: str = "tap0", port: int = 40001) -> None:
    """Have a TCP connection to a VM's port 80 come about."""
    send_to_vm(name, to_vm(sport=port))
    os.write(vm, from_vm(sport=80, dport=port, flags="SA"))
    send_to_vm(name, to_vm(sport=port, flags="A"))


def row(host: Host, vm: str = "web01", number: int = 0) -> dict[str, Any]:
    """Return the status of an interface of a VM."""
    found: dict[str, Any] = host.status(vm)["vms"][0]["interfaces"][number]
    return found


def program_ids(host: Host, vm: str = "web01") -> list[int]:
    status = row(host, vm)
    return [status[path]["prog_id"] for path in ("from_vm", "to_vm")]


def traces(paths: Paths) -> list[str]:
    """Return what vgw has left: pins and remembered state."""
    pinned = [str(entry) for entry in paths.bpffs.parent.rglob("*") if entry.suffix != ".debug"]
    state = [str(entry) for entry in paths.state_dir.rglob("*") if entry.is_file()]
    return sorted(pinned + state)
