# SPDX-License-Identifier: Apache-2.0
"""Real stacks on both sides of the firewall: TCP, its odd moments, and what it is told.

Segments that no socket sends are injected between two ends that are really connected.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from scripts.lab import wire
from tests.frames import TCP, VM4, VM6, tcp
from tests.frames import Wire as Conversation
from tests.lab.devices import NO_GRACE, Counts, Devices, Guarded, Space, Wire, document
from tests.lab.topology import eventually, exchange
from vgw.abi import Path, Reason, Verdict
from vgw.policy.model import Hook

pytestmark = pytest.mark.lab

VM_MAC, PEER_MAC = "52:54:00:00:00:11", "52:54:00:00:00:02"
PEER4, PEER6 = "10.20.0.2", "2001:db8:20::2"
PORT, REJECTED, UDP_REJECTED = 443, 3306, 5353
DENY = "{ingress: drop, egress: drop}"
RULES = (
    f"[{{name: D-in, action: accept, services: [tcp/{PORT}]}},"
    f" {{name: D-no, action: reject, services: [tcp/{REJECTED}, udp/{UDP_REJECTED}]}}]"
)
TO_VM = Conversation(Path.TO_VM, remote_mac=wire.mac_bytes(PEER_MAC))
ESTABLISHED = (Verdict.ACCEPT, Reason.CT_ESTABLISHED)


@dataclass(frozen=True)
class Pair:
    """The VM and a machine beside it, the VM under RULES once it is protected."""

    devices: Devices
    vm: Space
    peer: Space
    injector: Wire

    def protect(self, settings: str = NO_GRACE) -> Guarded:
        policy = document(
            ingress=RULES.replace("D-", "i-"),
            egress=RULES.replace("D-", "e-"),
            defaults=DENY,
            settings=settings,
        )
        return self.devices.protect(policy, hook=Hook.TC)

    def inject(self, segment: bytes) -> None:
        """Send a segment to the VM as if the peer had."""
        self.injector.send(TO_VM.wrap4(segment, TCP, remote=PEER4))


@pytest.fixture
def pair(devices: Devices) -> Iterator[Pair]:
    vm = devices.stack("tap0", VM_MAC, VM4, VM6)
    peer = devices.stack("net0", PEER_MAC, PEER4, PEER6)
    devices.bridge("tap0", "net0")
    injector = Wire(peer)
    yield Pair(devices, vm, peer, injector)
    injector.close()


@contextmanager
def connected(
    near: Space, far: Space, port: int = PORT, from_port: int = 0
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect `near` to `far`, from a port of choice; yield both ends."""
    with ExitStack() as stack:
        server = stack.enter_context(wire.listen(far, port))
        here = stack.enter_context(wire.client(near, socket.SOCK_STREAM, far.ipv4))
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        here.bind((near.ipv4, from_port))
        here.connect((far.ipv4, port))
        there = stack.enter_context(server.accept()[0])
        there.settimeout(wire.PATIENCE)
        yield here, there


def dropped(counts: Counts) -> set[Reason]:
    return {reason for _, verdict, reason in counts if verdict is not Verdict.ACCEPT}


@dataclass(frozen=True)
class Numbers:
    """Sequence numbers of the peer's end, overheard on the wire."""

    port: int
    seq: int
    ack: int


def overhear(pair: Pair, here: socket.socket, there: socket.socket) -> Numbers:
    """Return the peer's numbers after one more exchange."""
    pair.injector.received()
    exchange(here, there)
    latest = None

    def seen() -> bool:
        nonlocal latest
        for frame in pair.injector.received():
            packet = wire.network_packet(frame)
            if packet and packet[0] == TCP and packet[1] == PEER4 and len(packet[2]) > 32:
                _, dport, seq, ack = struct.unpack_from("!HHII", packet[2])
                latest = Numbers(dport, ack, seq + len(b"answer"))
        return latest is not None

    # The VM answers last, and what it acknowledges is where the peer stands.
    eventually("the VM's answer is overheard", seen)
    assert latest is not None
    return latest


def test_catalogue_G8_a_syn_inside_a_connection_is_answered_and_harmless(pair: Pair) -> None:
    guarded = pair.protect()
    with connected(pair.peer, pair.vm) as (here, there):
        numbers = overhear(pair, here, there)
        guarded.counts()
        for seq in (numbers.seq + 5, numbers.seq ^ 1 << 31):
            pair.inject(tcp(numbers.port, PORT, "S", seq=seq))

        # The VM's challenge passes, the peer's stack ignores it, and the connection goes on.
        exchange(here, there)
        counts = guarded.counts()
        assert dropped(counts) == set()
        assert counts[Path.TO_VM, *ESTABLISHED].packets >= 2
        # The control: such a SYN to another port is no part of anything.
        pair.inject(tcp(numbers.port, 80, "S", seq=1))
        eventually("it is dropped", lambda: dropped(guarded.counts()) == {Reason.DEFAULT})


@pytest.mark.parametrize("off", [1 << 30, -(1 << 30)])
def test_catalogue_G6_a_forged_reset_does_not_close(pair: Pair, off: int) -> None:
    guarded = pair.protect()
    with connected(pair.peer, pair.vm) as (here, there):
        numbers = overhear(pair, here, there)
        pair.inject(tcp(numbers.port, PORT, "R", seq=(numbers.seq + off) & 0xFFFFFFFF))
        exchange(here, there)
        (flow,) = [flow for _, flow in guarded.endpoint.maps.flows()]
        established = flow.state
        # The control: the one at the right place closes, for the firewall and for the VM.
        pair.inject(tcp(numbers.port, PORT, "R", seq=overhear(pair, here, there).seq))
        with pytest.raises(ConnectionResetError):
            there.recv(1)
        (flow,) = [flow for _, flow in guarded.endpoint.maps.flows()]
        assert flow.state != established


def test_catalogue_G9_a_port_is_used_again_after_a_close(pair: Pair) -> None:
    """The VM closes first and waits; the peer connects anew from the same port."""
    guarded = pair.protect()
    port = 0
    for _ in range(3):
        with connected(pair.peer, pair.vm, from_port=port) as (here, there):
            exchange(here, there)
            port = here.getsockname()[1]
            there.shutdown(socket.SHUT_WR)
            assert here.recv(1) == b""
            here.close()
            assert there.recv(1) == b""
    assert dropped(guarded.counts()) == set()
    assert guarded.endpoint.maps.meta().entries == 1


def test_catalogue_G13_a_lost_end_is_sent_again(pair: Pair) -> None:
    """A FIN that comes twice, and acknowledgements behind the last one, are no strangers."""
    guarded = pair.protect()
    with connected(pair.peer, pair.vm) as (here, there):
        numbers = overhear(pair, here, there)
        here.shutdown(socket.SHUT_WR)
        assert there.recv(1) == b""
        there.shutdown(socket.SHUT_WR)
        assert here.recv(1) == b""
    guarded.counts()
    again = tcp(numbers.port, PORT, "FA", seq=numbers.seq, ack=numbers.ack)
    got = guarded.judged(partial(pair.inject, again))
    assert dropped(got) == set()
    # The control: the same segment of another port belongs to nothing.
    stray = tcp(numbers.port ^ 1, PORT, "FA", seq=numbers.seq, ack=numbers.ack)
    assert Reason.NO_STATE in dropped(guarded.judged(partial(pair.inject, stray)))


@pytest.mark.parametrize("inbound", [True, False])
def test_catalogue_G15_connections_from_before_go_on(pair: Pair, inbound: bool) -> None:
    """Picked up in their middle, their windows unseen, while the grace after attach lasts."""
    ends = (pair.peer, pair.vm) if inbound else (pair.vm, pair.peer)
    with connected(*ends) as (here, there):
        exchange(here, there)
        guarded = pair.protect(settings="")
        exchange(here, there)
        exchange(there, here)
        block = bytes(1 << 20)
        # More than the buffers of both ends take, so somebody reads while it is written.
        sending = threading.Thread(target=here.sendall, args=(block,))
        sending.start()
        left = len(block)
        while left:
            left -= len(there.recv(left))
        sending.join()
        assert dropped(guarded.counts()) == set()


def test_catalogue_G15_what_policy_denies_does_not_go_on(pair: Pair) -> None:
    """The control: a connection to a port that no rule admits is not picked up."""
    with connected(pair.peer, pair.vm, 8080) as (here, there):
        exchange(here, there)
        guarded = pair.protect(settings="")
        here.sendall(b"question")
        eventually("it is dropped", lambda: bool(dropped(guarded.counts())))
        there.settimeout(0.3)
        with pytest.raises(TimeoutError):
            there.recv(1)


def fill(sock: socket.socket) -> int:
    """Send until nothing more is taken; return how much it was."""
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(65536))
    except BlockingIOError:
        return sent


def test_catalogue_G16_a_reader_that_does_not_read(pair: Pair) -> None:
    """The window closes, is probed and opens again; nothing of it is dropped."""
    guarded = pair.protect()
    with connected(pair.peer, pair.vm) as (here, there):
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        here.setblocking(False)
        sent = fill(here)
        guarded.counts()
        probed = (Path.TO_VM, *ESTABLISHED)
        # The stack asks on its own, from 0.2 s on, whether there is room again.
        eventually("the window is probed", lambda: probed in guarded.counts())
        while sent:
            sent -= len(there.recv(1 << 20))
        here.settimeout(wire.PATIENCE)
        exchange(here, there)
    assert dropped(guarded.counts()) == set()


# --- H12 ------------------------------------------------------------------------------------------


def refusal(ask: Callable[[], object]) -> int:
    """Return the number of the error that asking ends in."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one it is, is the question
        ask()
    return caught.value.errno or 0


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("inbound", [True, False])
def test_catalogue_H12_a_rejected_caller_is_told(pair: Pair, family: int, inbound: bool) -> None:
    pair.protect()
    near, far = (pair.peer, pair.vm) if inbound else (pair.vm, pair.peer)
    address = far.address(family)
    with wire.listen(far, REJECTED), wire.receiver(far, UDP_REJECTED) as datagrams:
        assert refusal(partial(wire.connect, near, address, REJECTED, timeout=1)) == (
            errno.ECONNREFUSED
        )
        with wire.client(near, socket.SOCK_DGRAM, address, timeout=1) as sock:
            sock.connect((address, UDP_REJECTED))
            sock.send(b"question")
            # Administratively prohibited, as each family says it.
            assert refusal(partial(sock.recv, 1)) in {errno.EHOSTUNREACH, errno.EACCES}
        datagrams.setblocking(False)
        assert refusal(partial(datagrams.recv, 1)) == errno.EAGAIN


def test_catalogue_H12_a_dropped_caller_is_not_told(pair: Pair) -> None:
    """The control: what is dropped and not rejected gets no answer, though somebody listens."""
    pair.protect()
    with wire.listen(pair.vm, 8080), pytest.raises(TimeoutError):
        wire.connect(pair.peer, VM4, 8080, timeout=0.3)
