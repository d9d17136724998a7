# SPDX-License-Identifier: Apache-2.0
"""Fragments on real devices, toward a real stack that puts them together (D7, D10, D11, E16).

Whatever the firewall lets through of a hostile train of fragments, the VM's stack must not make a
datagram of it that the policy denies, nor one that its sender did not send as it stands.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from scripts.lab import wire
from tests.frames import ICMP, IPV4, IPV6, TCP, UDP, ethernet, udp
from tests.lab.devices import Devices, Guarded, Space, Wire, document
from tests.lab.taps import Queue
from tests.lab.topology import eventually
from vgw import libbpf
from vgw.abi import Reason, Verdict
from vgw.policy.frame import internet_checksum, seal

pytestmark = pytest.mark.lab

FAMILIES = pytest.mark.parametrize("family", [4, 6])
ALLOWED, DENIED = 8080, 9999
VM_MAC, PEER_MAC = "52:54:00:00:00:11", "52:54:00:00:00:02"
VM_ADDRESS = {4: "10.20.0.11", 6: "2001:db8:20::11"}
PEER_ADDRESS = {4: "10.20.0.2", 6: "2001:db8:20::2"}
STRANGER = {4: "10.20.0.3", 6: "2001:db8:20::3"}
FRAGMENT_HEADER = 44
ACCEPTED = (Verdict.ACCEPT, Reason.RULE)
ESTABLISHED = (Verdict.ACCEPT, Reason.CT_ESTABLISHED)
REFUSED = (Verdict.DROP, Reason.FRAGMENT)
ONLY_ALLOWED = f"[{{name: in, action: accept, services: [udp/{ALLOWED}]}}]"
DENY = "{ingress: drop, egress: drop}"
#: Entries of the table that remembers first fragments, whatever comes.
REMEMBERED = 512

ORIGINAL = bytes(range(65, 65 + 24)) + bytes(range(97, 97 + 24)) + bytes(24)


@dataclass(frozen=True)
class Piece:
    """Bytes of a datagram and where they belong."""

    offset: int
    data: bytes
    more: bool = True
    protocol: int = UDP


def fragment(
    family: int,
    identifier: int,
    piece: Piece,
    *,
    source: str | None = None,
    to_vm: bool = True,
) -> bytes:
    """Return the frame of one fragment between the peer and the VM."""
    ends = [source or PEER_ADDRESS[family], VM_ADDRESS[family]]
    macs = [wire.mac_bytes(PEER_MAC), wire.mac_bytes(VM_MAC)]
    if not to_vm:
        ends.reverse()
        macs.reverse()
    addresses = b"".join(ipaddress.ip_address(end).packed for end in ends)
    if family == 4:
        place = piece.offset // 8 | (0x2000 if piece.more else 0)
        fields = (0x45, 0, 20 + len(piece.data), identifier, place, 64, piece.protocol, 0)
        head = struct.pack("!BBHHHBBH", *fields) + addresses
        head = head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:]
    else:
        header = struct.pack("!BBHI", piece.protocol, 0, piece.offset | piece.more, identifier)
        head = struct.pack("!IHBB", 6 << 28, 8 + len(piece.data), FRAGMENT_HEADER, 64)
        head += addresses + header
    ethertype = IPV4 if family == 4 else IPV6
    return ethernet(head + piece.data, ethertype, source=macs[0], destination=macs[1])


def datagram(family: int, port: int, payload: bytes = ORIGINAL) -> bytes:
    """Return a UDP datagram for the VM with its checksum."""
    source, destination = (
        ipaddress.ip_address(table[family]) for table in (PEER_ADDRESS, VM_ADDRESS)
    )
    return seal(udp(40000, port, payload), UDP, source, destination)


def trains(family: int) -> dict[str, list[Piece]]:
    """Return hostile sequences of fragments.

    What the denied port would get has a right checksum: with `evil` before the rest of `good`, and
    with the header of `turned` before all that `good` carries.
    """
    good, turned = datagram(family, ALLOWED), datagram(family, DENIED)
    evil = datagram(family, DENIED, b"X" * 24 + ORIGINAL[24:])
    first, rest = Piece(0, good[:32]), Piece(32, good[32:], more=False)
    return {
        "another first, to the denied port": [first, Piece(0, evil[:32]), rest],
        "another first before": [Piece(0, evil[:32]), first, rest],
        "the rest before another first": [rest, Piece(0, evil[:32])],
        "ports replaced by a short one": [first, Piece(0, turned[:8]), rest],
        "total overlap of the header": [first, Piece(0, evil[:48]), Piece(48, good[48:], False)],
        "head overlap": [first, Piece(8, evil[8:32]), rest],
        "overlap by one unit": [first, Piece(24, evil[24:], False)],
        "inside of the first": [first, Piece(16, evil[16:24]), rest],
        "checksum and length replaced": [first, Piece(8, bytes(24)), rest],
        "tail overlap": [first, Piece(32, good[32:64]), Piece(56, evil[56:], False)],
        "the rest replaced": [first, Piece(32, b"X" * 24), rest],
        "the end moved": [first, Piece(32, good[32:72]), Piece(48, evil[48:56], False)],
        "later first, then overlapped": [rest, first, Piece(24, evil[24:40])],
        "same id, other protocol": [first, Piece(32, good[32:], False, protocol=TCP)],
        "same id, other protocol first": [Piece(0, good[:32], protocol=ICMP), rest],
        "all to the denied port": [Piece(0, evil[:32]), Piece(32, evil[32:], False)],
        "only later ones": [rest, rest],
    }


@contextmanager
def vm_sockets(vm: Space) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Open what listens in the VM at the allowed and at the denied port."""
    with ExitStack() as stack:
        pair = [stack.enter_context(wire.receiver(vm, port)) for port in (ALLOWED, DENIED)]
        yield pair[0], pair[1]


def waiting(sock: socket.socket) -> list[bytes]:
    """Return the datagrams that a socket has."""
    found = []
    sock.setblocking(False)
    while True:
        try:
            found.append(sock.recv(4096))
        except BlockingIOError:
            return found


class Attack:
    """Sends trains of fragments to the VM and says what its sockets got."""

    def __init__(self, sender: Wire, allowed: socket.socket, denied: socket.socket) -> None:
        self._sender, self._allowed, self._denied = sender, allowed, denied
        self._identifier = 100

    def run(self, family: int, pieces: Sequence[Piece]) -> tuple[set[bytes], set[bytes]]:
        """Return what came to the allowed and to the denied port of all pieces."""
        self._identifier += 1
        for piece in pieces:
            self._sender.send(fragment(family, self._identifier, piece))
        mark = b"mark %d" % self._identifier
        whole = datagram(family, ALLOWED, mark)
        packet = fragment(family, 0, Piece(0, whole, more=False))  # IPv4: no fragment at all
        if family == 6:
            packet = ethernet(
                struct.pack("!IHBB", 6 << 28, len(whole), UDP, 64) + packet[22:54] + whole,
                IPV6,
                source=wire.mac_bytes(PEER_MAC),
                destination=wire.mac_bytes(VM_MAC),
            )
        self._sender.send(packet)
        got: list[bytes] = []

        def marked() -> bool:
            got.extend(waiting(self._allowed))
            return mark in got

        eventually("the mark behind the fragments arrives", marked)
        return set(got) - {mark}, set(waiting(self._denied))


@contextmanager
def attack(devices: Devices) -> Iterator[Attack]:
    """Make the VM, on one bridge with the attacker."""
    vm = devices.stack("tap0", VM_MAC, VM_ADDRESS[4], VM_ADDRESS[6])
    peer = devices.stack("net0", PEER_MAC, PEER_ADDRESS[4], PEER_ADDRESS[6])
    devices.bridge("tap0", "net0")
    sender = Wire(peer)
    try:
        with vm_sockets(vm) as (allowed, denied):
            yield Attack(sender, allowed, denied)
    finally:
        sender.close()


def _overlaps_make_nothing(devices: Devices, family: int) -> None:
    with attack(devices) as attacker:
        devices.protect(document(ingress=ONLY_ALLOWED, defaults=DENY))
        for name, pieces in trains(family).items():
            allowed, denied = attacker.run(family, pieces)
            assert denied == set(), name
            assert allowed <= {ORIGINAL}, name


def test_catalogue_D7_overlapping_fragments_make_nothing_denied(devices: Devices) -> None:
    _overlaps_make_nothing(devices, 4)


def test_catalogue_E16_overlapping_fragments_make_nothing_denied(devices: Devices) -> None:
    _overlaps_make_nothing(devices, 6)


@FAMILIES
def test_catalogue_D7_honest_fragments_arrive(devices: Devices, family: int) -> None:
    """A control: what is refused above is not refused for being in fragments."""
    good = datagram(family, ALLOWED)
    honest = [Piece(0, good[:32]), Piece(32, good[32:56]), Piece(56, good[56:], more=False)]
    with attack(devices) as attacker:
        devices.protect(document(ingress=ONLY_ALLOWED, defaults=DENY))
        assert attacker.run(family, honest) == ({ORIGINAL}, set())


@FAMILIES
def test_catalogue_D7_without_vgw_the_denied_port_gets_them(devices: Devices, family: int) -> None:
    """The other control: the trains do work, and the denied port does listen."""
    with attack(devices) as attacker:
        reached = {
            name for name, pieces in trains(family).items() if attacker.run(family, pieces)[1]
        }
    assert {"all to the denied port", "the rest before another first"} <= reached


# --- D10, D11 -------------------------------------------------------------------------------------


@contextmanager
def two_vms(devices: Devices) -> Iterator[dict[str, tuple[Guarded, Queue, Wire]]]:
    """Protect two VMs with the same addresses; yield counters, card and way in of each."""
    queues = {vm: devices.queue(name) for vm, name in (("web01", "tap0"), ("web02", "tap1"))}
    yield {
        vm: (
            devices.protect(document([(vm, queue.name)], ingress=ONLY_ALLOWED, defaults=DENY), vm),
            queue,
            devices.wire(queue.name),
        )
        for vm, queue in queues.items()
    }


@FAMILIES
def test_catalogue_D10_an_id_belongs_to_one_flow_of_one_vm(devices: Devices, family: int) -> None:
    good = datagram(family, ALLOWED)
    first, later = Piece(0, good[:32]), Piece(32, good[32:], more=False)
    with two_vms(devices) as vms:
        guarded, _, sender = vms["web01"]
        other, _, sender_of_other = vms["web02"]

        def fate(piece: Piece, identifier: int = 7, source: str | None = None) -> object:
            frame = fragment(family, identifier, piece, source=source)
            return guarded.reason(partial(sender.send, frame))

        assert fate(first) == ACCEPTED
        # Of another VM, sender, protocol or id, or of the other direction.
        stray = fragment(family, 7, later)
        assert other.reason(partial(sender_of_other.send, stray)) == REFUSED
        assert fate(later, source=STRANGER[family]) == REFUSED
        assert fate(Piece(32, good[32:], False, protocol=TCP)) == REFUSED
        assert fate(later, identifier=8) == REFUSED
        answer = fragment(family, 7, later, to_vm=False)
        assert guarded.reason(partial(vms["web01"][1].send, answer)) == REFUSED
        # The control: of that flow itself.
        assert fate(later) == ESTABLISHED


@FAMILIES
def test_catalogue_D11_first_fragments_only(devices: Devices, family: int) -> None:
    """Any number of ids of one VM costs a table of fixed size, and another VM nothing."""
    good = datagram(family, ALLOWED)
    first, later = Piece(0, good[:32]), Piece(32, good[32:], more=False)
    ids = 20_000
    with two_vms(devices) as vms:
        guarded, _, sender = vms["web01"]
        other, _, sender_of_other = vms["web02"]
        assert other.reason(partial(sender_of_other.send, fragment(family, 1, first))) == ACCEPTED
        before = guarded.endpoint.maps.memory()

        def flood() -> None:
            for identifier in range(ids):
                sender.send(fragment(family, identifier, first))

        counts = guarded.judged(flood, packets=ids)

        assert {key[1] for key in counts} == {Verdict.ACCEPT}
        # One flow, and nothing that grew with the number of ids.
        assert guarded.endpoint.maps.meta().entries == 1
        assert guarded.endpoint.maps.memory() - before < 64 << 10
        with_table = libbpf.map_info(guarded.endpoint.fds["fragments"])
        assert with_table.max_entries == REMEMBERED
        # The other VM still knows its own; the flooded one knows its latest.
        later_frame = fragment(family, 1, later)
        assert other.reason(partial(sender_of_other.send, later_frame)) == ESTABLISHED
        latest = fragment(family, ids - 1, later)
        assert guarded.reason(partial(sender.send, latest)) == ESTABLISHED
        # The control: what was pushed out of the table is dropped.
        assert guarded.reason(partial(sender.send, later_frame)) == REFUSED
