# SPDX-License-Identifier: Apache-2.0
"""Once `attach` has returned, not one packet of a denied VM gets through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from scripts.lab import wire
from scripts.lab.wire import Tap
from tests.lab.topology import Lab, policy
from vgw.policy.frame import build_frame

pytestmark = pytest.mark.lab

PACE = 0.0002  # seconds between frames, so that the capture can keep up
MORE = 500  # frames sent after `attach` returned


class Flood:
    """UDP packets from one card to another, each numbered, one after the other."""

    def __init__(self, sender: Tap, receiver: Tap) -> None:
        self._sender, self._receiver = sender, receiver
        self._stop = threading.Event()
        self._enough = threading.Condition()
        self.sent = 0

    def frame(self, number: int) -> bytes:
        """Return the frame of that number; its ports tell it from all others."""
        near, far = self._sender.node, self._receiver.node
        ports = {"sport": 1024 + number % 30000, "dport": 1024 + number // 30000}
        return build_frame(
            {"src": near.ipv4, "dst": far.ipv4, "proto": "udp", **ports},
            source_mac=wire.mac_bytes(near.mac),
            destination_mac=wire.mac_bytes(far.mac),
        )

    def send(self) -> None:
        """Send until told to stop."""
        while not self._stop.wait(PACE):
            self._sender.send(self.frame(self.sent))
            with self._enough:
                self.sent += 1
                self._enough.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until that many frames were sent."""
        with self._enough:
            assert self._enough.wait_for(lambda: self.sent >= count, timeout=wire.PATIENCE)

    def stop(self) -> None:
        """End sending."""
        self._stop.set()


@contextmanager
def flood(sender: Tap, receiver: Tap) -> Iterator[tuple[Flood, list[int]]]:
    """Send for the length of the block; afterwards the list holds the numbers that arrived."""
    flooding = Flood(sender, receiver)
    mark = wire.mark_of(sender.node)
    arrived: list[int] = []
    with ThreadPoolExecutor() as pool:
        capture = pool.submit(receiver.until, lambda frame: frame == mark, timeout=60)
        sending = pool.submit(flooding.send)
        try:
            yield flooding, arrived
        finally:
            flooding.stop()
            sending.result()
            sender.send(mark)
            numbers = {flooding.frame(n): n for n in range(flooding.sent)}
            arrived += [numbers[frame] for frame in capture.result() if frame in numbers]


@pytest.mark.parametrize("vm", ["web01", "db01"])
@pytest.mark.parametrize("inbound", [True, False])
def test_nothing_passes_once_attach_returned(lab: Lab, vm: str, inbound: bool) -> None:
    lab.write_policy(policy())
    names = ("client", vm) if inbound else (vm, "client")
    with (
        Tap(lab.nodes[names[0]]) as sender,
        Tap(lab.nodes[names[1]]) as receiver,
        flood(sender, receiver) as (flooding, arrived),
    ):
        flooding.wait_for(MORE)
        before = flooding.sent
        lab.attach(vm)
        # The frame after this number may have been on its way while attach returned.
        after = flooding.sent + 1
        flooding.wait_for(after + MORE)
    assert set(arrived) >= set(range(before)), "without vgw frames were lost: nothing is shown"
    assert [number for number in arrived if number >= after] == []
