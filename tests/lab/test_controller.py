# SPDX-License-Identifier: Apache-2.0
"""The controller comes and goes, and so do interfaces; packets notice only the latter."""

from __future__ import annotations

import hashlib
import itertools
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.lab import wire
from tests.lab.topology import VMS, Lab, connection, eventually, policy

pytestmark = pytest.mark.lab

PORT = 8080
WEB = policy({"ingress": [f"{{name: web, action: accept, services: [tcp/{PORT}], log: true}}"]})
BLOCK = bytes(range(256)) * 32
BUFFER = 64 << 10  # small, so that bytes under way say little about whether the transfer goes on
PACE = 0.001  # seconds between blocks: captures beside the transfer have to keep up
LATE_VM = """  late:
    interfaces:
      - {name: veth-late, mac: "52:54:00:00:00:13", addresses: [10.20.0.13]}
"""


class Transfer:
    """Bytes that flow through a TCP connection until told to stop, checked at the end."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._received = 0

    def send(self, sock: socket.socket) -> str:
        """Send blocks with changing content; returns the digest of all."""
        digest = hashlib.sha256()
        for number in itertools.count():
            if self._stop.wait(PACE):
                break
            block = number.to_bytes(8, "big") + BLOCK
            sock.sendall(block)
            digest.update(block)
        sock.shutdown(socket.SHUT_WR)
        return digest.hexdigest()

    def receive(self, sock: socket.socket) -> str:
        """Receive to the end; returns the digest of all."""
        digest = hashlib.sha256()
        while data := sock.recv(1 << 16):
            digest.update(data)
            self._received += len(data)
        return digest.hexdigest()

    def proceeds(self) -> None:
        """Wait until more bytes have arrived than can be under way now."""
        start = self._received
        eventually("the transfer goes on", lambda: self._received > start + 16 * BUFFER)

    def stop(self) -> None:
        """End the transfer."""
        self._stop.set()


@contextmanager
def transfer(lab: Lab) -> Iterator[Transfer]:
    """Keep a transfer from the client to web01 going; at the end nothing must be missing."""
    going = Transfer()
    nodes = lab.nodes["client"], lab.nodes["web01"]
    with connection(*nodes, PORT) as (here, there), ThreadPoolExecutor() as pool:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        sent: Future[str] = pool.submit(going.send, here)
        received: Future[str] = pool.submit(going.receive, there)
        try:
            yield going
        finally:
            going.stop()
        assert received.result() == sent.result()


def packets(lab: Lab) -> float:
    """Return what the exporter says of the packets that web01 got."""
    count = lab.metric("vgw_packets_total", vm="web01", direction="ingress", verdict="accept")
    assert count is not None
    return count


def test_stopped_and_killed_a_transfer_goes_on(lab: Lab) -> None:
    lab.write_policy(WEB)
    lab.attach("web01", "db01")
    programs = lab.programs()
    with transfer(lab) as going:
        seen = 0.0
        for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            with lab.controller() as process:
                going.proceeds()
                counted = packets(lab)
                assert counted > seen, "counters started anew"
                seen = counted
                process.send_signal(how)
                process.wait(timeout=wire.PATIENCE)
                going.proceeds()
            assert lab.programs() == programs
            # Without a controller, what is denied stays denied.
            lab.assert_blocked("tcp", "client", "web01", 22)


def test_no_second_program_is_attached(lab: Lab) -> None:
    lab.write_policy(WEB)
    lab.attach("web01", "db01")
    attached = lab.kernel_programs()
    assert len(attached) == 4
    for _ in range(2):
        with lab.controller():
            lab.attach("web01", "db01")
            assert lab.kernel_programs() == attached


def test_events_become_log_records(lab: Lab) -> None:
    lab.write_policy(WEB)
    lab.attach("web01")
    with lab.controller():
        lab.assert_reaches("tcp", "client", "web01", PORT)
        wanted = {"vm": "web01", "interface": "tap-web01", "direction": "ingress",
            "verdict": "accept", "reason": "RULE", "policy": "test", "tier": "vm", "rule": "web",
            "proto": "tcp", "src": "10.20.0.2", "dst": "10.20.0.11", "dport": PORT}  # fmt: skip
        eventually(
            "the accepted connection is in the log",
            lambda: any(wanted.items() <= record.items() for record in lab.records()),
        )


@contextmanager
def late_interface(lab: Lab) -> Iterator[None]:
    """Plug a VM named `late` into the bridge, and pull it out again at the end."""
    host, client = lab.host.namespace, lab.nodes["client"].namespace
    link = ["ip", "-n", host, "link"]
    make = ["add", "veth-late", "type", "veth", "peer", "name", "late", "netns", client]
    subprocess.run([*link, *make], check=True)
    try:
        yield
    finally:
        subprocess.run([*link, "delete", "veth-late"], check=True)


def test_an_interface_that_appears_is_protected_and_one_that_goes_forgotten(lab: Lab) -> None:
    lab.write_policy(policy(vms=VMS + LATE_VM))
    pins = Path(lab.environment["VGW_BPFFS"])
    with lab.controller():
        assert lab.metric("vgw_attached", vm="late") is None
        for _ in range(2):
            with late_interface(lab):
                eventually("late is attached", lambda: lab.metric("vgw_attached", vm="late") == 1)
                assert "veth-late" in lab.programs()
            eventually("late is forgotten", lambda: lab.metric("vgw_attached", vm="late") is None)
            assert "veth-late" not in lab.programs()
            assert not list(pins.glob("v*/late"))
