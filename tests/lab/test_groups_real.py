# SPDX-License-Identifier: Apache-2.0
"""Multicast and broadcast between real sockets, and answers to real datagrams (I3, J1, J2)."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest

from scripts.lab import wire
from tests.frames import VM4, VM6
from tests.lab.devices import Devices, Guarded, Key, Space, document, run
from tests.lab.topology import eventually
from vgw.abi import Path, Reason, Verdict

pytestmark = pytest.mark.lab

FAMILIES = pytest.mark.parametrize("family", [4, 6])
GROUP = {4: "239.1.2.3", 6: "ff05::1:3"}
PORT = 5000
DENY = "{ingress: drop, egress: drop}"
RULES = f"[{{name: group, action: accept, services: [udp/{PORT}]}}]"
REPORT: Key = (Path.FROM_VM, Verdict.ACCEPT, Reason.MEMBERSHIP)
REFUSED_QUERY: Key = (Path.FROM_VM, Verdict.DROP, Reason.MEMBERSHIP_QUERY)


@pytest.fixture
def pair(devices: Devices) -> tuple[Devices, Space, Space]:
    """The VM and a machine beside it."""
    vm = devices.stack("tap0", "52:54:00:00:00:11", VM4, VM6)
    peer = devices.stack("net0", "52:54:00:00:00:02", "10.20.0.2", "2001:db8:20::2")
    devices.bridge("tap0", "net0")
    for space in (vm, peer):
        with wire.inside(space.namespace):
            run("ip route add default dev eth0")  # so that all of 255.255.255.255 has a way
            run("ip -6 route add multicast ff05::/16 dev eth0 table local")
    return devices, vm, peer


def listener(space: Space, family: int, group: bool = True) -> socket.socket:
    """Open a receiver at PORT that is a member of the group."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    sock = wire.receiver(space, PORT, kind)
    with wire.inside(space.namespace):
        index = socket.if_nametoindex("eth0")
    address = ipaddress.ip_address(GROUP[family]).packed
    if not group:
        return sock
    if family == 4:
        request = address + bytes(4) + struct.pack("=i", index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    else:
        request = address + struct.pack("=i", index)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    return sock


def send(space: Space, address: str, port: int = PORT, text: bytes = b"hello") -> None:
    """Send a datagram, to whoever it is for."""
    with space.open(wire.family_of(address), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(text, (address, port))


def counted(guarded: Guarded, key: Key) -> None:
    seen: set[Key] = set()

    def there() -> bool:
        seen.update(guarded.counts())
        return key in seen

    eventually(f"{key} is counted", there)


@FAMILIES
def test_catalogue_J2_a_member_reports_itself_and_hears_its_group(
    pair: tuple[Devices, Space, Space], family: int
) -> None:
    devices, vm, peer = pair
    guarded = devices.protect(document(ingress=RULES, defaults=DENY))
    with listener(vm, family) as sock:
        counted(guarded, REPORT)
        send(peer, GROUP[family])
        assert sock.recv(64) == b"hello"
        # The control: to a port that no rule names nothing comes.
        send(peer, GROUP[family], PORT + 1)
        counted(guarded, (Path.TO_VM, Verdict.DROP, Reason.DEFAULT))


def test_catalogue_J2_the_vm_is_no_querier(pair: tuple[Devices, Space, Space]) -> None:
    devices, vm, _ = pair
    guarded = devices.protect(document())
    with vm.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes.fromhex("94040000"))
        sock.sendto(bytes.fromhex("1164ee9b00000000"), ("224.0.0.1", 0))
    counted(guarded, REFUSED_QUERY)


def test_catalogue_J1_broadcasts_of_the_vm_are_judged(pair: tuple[Devices, Space, Space]) -> None:
    devices, vm, peer = pair
    guarded = devices.protect(document(egress=RULES, defaults=DENY))
    with listener(peer, 4, group=False) as sock:
        send(vm, "255.255.255.255")
        assert sock.recv(64) == b"hello"
        # To its network's own broadcast address, and to a port that no rule names.
        send(vm, "10.20.0.255", text=b"directed")
        counted(guarded, (Path.FROM_VM, Verdict.DROP, Reason["GROUP_MISMATCH"]))
        send(vm, "255.255.255.255", PORT + 1)
        counted(guarded, (Path.FROM_VM, Verdict.DROP, Reason.DEFAULT))
        send(vm, "255.255.255.255", text=b"last")
        assert sock.recv(64) == b"last"


@FAMILIES
def test_catalogue_I3_only_who_was_asked_may_answer(
    pair: tuple[Devices, Space, Space], family: int
) -> None:
    devices, vm, peer = pair
    guarded = devices.protect(document(egress=RULES, defaults=DENY))
    with (
        wire.receiver(peer, PORT) as asked,
        wire.receiver(peer, PORT + 1) as other,
        wire.client(vm, socket.SOCK_DGRAM, peer.address(family)) as sock,
    ):
        sock.sendto(b"question", (peer.address(family), PORT))
        _, origin = asked.recvfrom(64)
        other.sendto(b"from another port", origin)
        counted(guarded, (Path.TO_VM, Verdict.DROP, Reason.DEFAULT))
        asked.sendto(b"answer", origin)
        assert sock.recv(64) == b"answer"
