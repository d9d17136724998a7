# SPDX-License-Identifier: Apache-2.0
"""Frames that a rejecting endpoint must not answer, by name."""

from __future__ import annotations

from collections.abc import Iterator

from tests.frames import (
    GATEWAY_MAC,
    ICMP,
    ICMPV6,
    IN,
    OUT,
    PEER4,
    PEER6,
    TCP,
    UDP,
    VM4,
    VM6,
    VM_MAC,
    Wire,
    echo,
    ethernet,
    fragment6,
    icmp,
    icmp_error,
    ipv4,
    ipv6,
    tcp,
    udp,
)
from vgw.abi import Path
from vgw.policy.packet_fields import ETHERTYPE_IPV4, ETHERTYPE_IPV6


def never_either(wire: Wire) -> Iterator[tuple[str, bytes]]:
    """Yield what is not answered on either path."""
    quoted = ipv4(udp(), UDP, PEER4, VM4)
    yield "TCP RST", wire.wrap4(tcp(flags="R"), TCP)
    yield "TCP RST with ACK", wire.wrap6(tcp(flags="RA"), TCP)
    yield "ICMP error", wire.wrap4(icmp_error(3, quoted, 3), ICMP)
    yield "ICMPv6 error", wire.wrap6(icmp_error(1, ipv6(udp(), UDP, PEER6, VM6), 4), ICMPV6)
    yield "echo reply", wire.wrap4(echo(0), ICMP)
    yield "ICMPv6 echo reply", wire.wrap6(echo(129), ICMPV6)
    yield "ICMP timestamp", wire.wrap4(icmp(13, payload=bytes(12)), ICMP)
    yield "node information", wire.wrap6(icmp(139, payload=bytes(8)), ICMPV6)
    yield "ICMPv6 in IPv4", wire.wrap4(echo(128), ICMPV6)
    yield "ICMP in IPv6", wire.wrap6(echo(8), ICMP)
    yield "fragment", wire.wrap4(udp(payload=bytes(24), length=100), UDP, fragment=0x2000)
    yield "later fragment", wire.wrap4(bytes(24), UDP, fragment=3)
    yield "atomic fragment", wire.wrap6(udp(), UDP, headers=fragment6(UDP), first=44)
    yield "unreadable", wire.wrap4(b"", TCP)


def out_frame(destination: str, mac: bytes, source: str | None = None) -> bytes:
    """Return a UDP frame that the VM sends."""
    if ":" in destination:
        packet = ipv6(udp(), UDP, source or VM6, destination)
        return ethernet(packet, ETHERTYPE_IPV6, source=VM_MAC, destination=mac)
    packet = ipv4(udp(), UDP, source or VM4, destination)
    return ethernet(packet, ETHERTYPE_IPV4, source=VM_MAC, destination=mac)


def in_frame(source: str, *, mac: bytes = GATEWAY_MAC, destination: str | None = None) -> bytes:
    """Return a UDP frame toward the VM."""
    if ":" in source:
        packet = ipv6(udp(), UDP, source, destination or VM6)
        return ethernet(packet, ETHERTYPE_IPV6, source=mac, destination=VM_MAC)
    packet = ipv4(udp(), UDP, source, destination or VM4)
    return ethernet(packet, ETHERTYPE_IPV4, source=mac, destination=VM_MAC)


BROADCAST_MAC = b"\xff" * 6
GROUP_MAC = bytes.fromhex("01005e010203")
#: Name -> packet that opens a flow, and one of this flow that is not answered.
NEVER_OF_FLOW = {
    "TCP RST": (
        (Path.FROM_VM, OUT.wrap4(tcp(flags="S"), TCP)),
        (Path.TO_VM, IN.wrap4(tcp(443, 40000, flags="R", seq=1001), TCP)),
    ),
    "TCP RST with ACK": (
        (Path.TO_VM, IN.wrap6(tcp(flags="S"), TCP)),
        (Path.FROM_VM, OUT.wrap6(tcp(443, 40000, flags="RA", ack=1001), TCP)),
    ),
    "echo reply": (
        (Path.FROM_VM, OUT.wrap4(echo(8), ICMP)),
        (Path.TO_VM, IN.wrap4(echo(0), ICMP)),
    ),
    "ICMP error": (
        (Path.FROM_VM, OUT.wrap4(udp(), UDP)),
        (Path.TO_VM, IN.wrap4(icmp_error(3, ipv4(udp(), UDP), 3), ICMP)),
    ),
    "ICMPv6 error": (
        (Path.TO_VM, IN.wrap6(udp(), UDP)),
        (Path.FROM_VM, OUT.wrap6(icmp_error(1, ipv6(udp(), UDP, PEER6, VM6), 4), ICMPV6)),
    ),
}

#: Name -> path and frame that is not answered.
NEVER = {
    **{
        f"{name}, {wire.path.name.lower()}": (wire.path, frame)
        for wire in (OUT, IN)
        for name, frame in never_either(wire)
    },
    "to a group": (Path.FROM_VM, out_frame("239.1.2.3", GROUP_MAC)),
    "to a group by a unicast MAC": (Path.FROM_VM, out_frame("239.1.2.3", GATEWAY_MAC)),
    "to a group, IPv6": (Path.FROM_VM, out_frame("ff05::2", bytes.fromhex("333300000002"))),
    "to a group by a unicast MAC, IPv6": (Path.FROM_VM, out_frame("ff05::2", GATEWAY_MAC)),
    "broadcast": (Path.FROM_VM, out_frame("255.255.255.255", BROADCAST_MAC)),
    "directed broadcast": (Path.FROM_VM, out_frame("10.20.0.255", BROADCAST_MAC)),
    "reserved": (Path.FROM_VM, out_frame("240.0.0.1", GATEWAY_MAC)),
    "to nobody": (Path.FROM_VM, out_frame("0.0.0.0", GATEWAY_MAC)),  # noqa: S104
    "to nobody, IPv6": (Path.FROM_VM, out_frame("::", GATEWAY_MAC)),
    "to loopback": (Path.FROM_VM, out_frame("127.0.0.1", GATEWAY_MAC)),
    "to loopback, IPv6": (Path.FROM_VM, out_frame("::1", GATEWAY_MAC)),
    "to itself": (Path.FROM_VM, out_frame(VM4, GATEWAY_MAC)),
    "from nobody": (Path.TO_VM, in_frame("0.0.0.0")),  # noqa: S104
    "from nobody, IPv6": (Path.TO_VM, in_frame("::")),
    "from loopback": (Path.TO_VM, in_frame("127.0.0.1")),
    "from loopback, IPv6": (Path.TO_VM, in_frame("::1")),
    "from a group": (Path.TO_VM, in_frame("224.0.0.1")),
    "from a group, IPv6": (Path.TO_VM, in_frame("ff02::1")),
    "from broadcast": (Path.TO_VM, in_frame("255.255.255.255")),
    "from a group MAC": (Path.TO_VM, in_frame(PEER4, mac=GROUP_MAC)),
    "from itself": (Path.TO_VM, in_frame(VM4)),
    "from itself, IPv6": (Path.TO_VM, in_frame(VM6)),
}
