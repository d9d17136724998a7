# SPDX-License-Identifier: Apache-2.0
"""What the tests of answers to rejected packets share: policies, and how a sender is told."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from typing import Any

import pytest

from scripts.lab import wire
from scripts.lab.wire import PATIENCE, Node
from tests.lab.topology import Lab

PORT = 4100
REJECT_ALL = {
    "ingress": ["{name: nothing-in, action: reject, services: [any]}"],
    "egress": ["{name: nothing-out, action: reject, services: [any]}"],
}
DROP_ALL = {way: [text.replace("reject", "drop") for text in REJECT_ALL[way]] for way in REJECT_ALL}
ACCEPT_ALL = {
    way: [text.replace("reject", "accept") for text in REJECT_ALL[way]] for way in REJECT_ALL
}
#: What one VM may send and the other rejects.
REJECT_INGRESS = {"ingress": REJECT_ALL["ingress"], "egress": ACCEPT_ALL["egress"]}
#: What a connected UDP socket says of "administratively prohibited".
UDP_ERRORS = {4: errno.EHOSTUNREACH, 6: errno.EACCES}
PING_TEXTS = {4: "Packet filtered", 6: "Administratively prohibited"}
FAMILIES = pytest.mark.parametrize("family", [4, 6])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp", "ping"])


def assert_refused(near: Node, far: Node, protocol: str, family: int) -> None:
    """Assert that `near` is told that it may not talk to `far`."""
    address = far.address(family)
    if protocol == "tcp":
        with pytest.raises(ConnectionRefusedError):
            wire.connect(near, address, PORT).close()
    elif protocol == "udp":
        with wire.client(near, socket.SOCK_DGRAM, address) as sock:
            sock.connect((address, PORT))
            sock.send(b"question")
            with pytest.raises(OSError, match=os.strerror(UDP_ERRORS[family])):
                sock.recv(64)
    else:
        command = near.command("ping", "-n", "-c1", f"-W{PATIENCE}", address)
        environment = os.environ | {"LC_ALL": "C"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert PING_TEXTS[family] in run.stdout


def answers(lab: Lab, vm: str) -> dict[str, int]:
    """Return what status says of the answers of a VM."""
    found: dict[str, int] = _interface(lab, vm)["reject_answers"]
    return found


def drops(lab: Lab, vm: str) -> int:
    """Return how many packets a VM's endpoint has dropped."""
    count: int = _interface(lab, vm)["drops"]
    return count


def _interface(lab: Lab, vm: str) -> dict[str, Any]:
    found: dict[str, Any] = lab.json("status", "--vm", vm)["vms"][0]["interfaces"][0]
    return found
