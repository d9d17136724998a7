# SPDX-License-Identifier: Apache-2.0
"""Verdict table of fragments of what no host fragments, and of headers around fragment headers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tests.cases.fixtures import OPEN, TYPICAL
from tests.cases.table import DEFAULT, ESTABLISHED, Case, Expected, Rows, dropped, out
from tests.datagrams import piece
from tests.frames import (
    ALL_NODES6,
    BROADCAST4,
    ICMP,
    ICMPV6,
    IGMP,
    IGMP_ROUTERS4,
    IN,
    IPV6,
    MLD_ROUTERS6,
    OUT,
    PEER4,
    PEER6,
    TCP,
    UDP,
    UNSPECIFIED4,
    VM4,
    VM6,
    VM_LINK_LOCAL,
    advertisement,
    bootp,
    ethernet,
    extension,
    fragment6,
    hop_by_hop,
    icmp,
    icmp_error,
    igmp,
    ipv4,
    ipv6,
    link_layer,
    mld,
    router_advertisement,
    solicitation,
    tcp,
    udp,
)
from vgw.abi import Reason

ROWS = Rows(OPEN)
FRAGMENT, EXTENSION = dropped(Reason.FRAGMENT), dropped(Reason.EXTENSION_HEADER)
ND_INVALID = dropped(Reason.ND_INVALID)
MEMBERSHIP_INVALID = dropped(Reason.MEMBERSHIP_INVALID)


class Whole(NamedTuple):
    """A frame that must not come in fragments, where to cut it, what its first fragment gets."""

    name: str
    frame: bytes
    cut: int
    first: Expected


def _wholes() -> Iterator[Whole]:
    options = link_layer(1) * 3
    for name, message in {
        "F12 NS": solicitation(VM6, options),
        "F12 NA": advertisement(VM6, options),
        "F14 RA": router_advertisement(options),
    }.items():
        frame = OUT.wrap6(message, ICMPV6, local=VM6, remote=ALL_NODES6, hop_limit=255)
        yield Whole(name, frame, 32, ND_INVALID)
    frame = OUT.wrap6(mld(131), ICMPV6, local=VM_LINK_LOCAL, remote=MLD_ROUTERS6, hop_limit=1)
    yield Whole("J3 MLD report", frame, 16, MEMBERSHIP_INVALID)
    frame = OUT.wrap4(igmp(0x16) + bytes(16), IGMP, remote=IGMP_ROUTERS4, ttl=1)
    yield Whole("J3 IGMP report", frame, 16, MEMBERSHIP_INVALID)
    discover = OUT.wrap4(udp(68, 67, bootp()), UDP, local=UNSPECIFIED4, remote=BROADCAST4)
    yield Whole("F20 DHCP discover", discover, 64, dropped(Reason.DHCP_INVALID))
    renew = OUT.wrap4(udp(68, 67, bootp()), UDP)
    yield Whole("F20 DHCP renewal", renew, 64, dropped(Reason.DHCP_INVALID))
    quoted = ipv4(tcp(), TCP, PEER4, VM4)
    yield Whole("H6 ICMP error", OUT.wrap4(icmp_error(3, quoted, 1), ICMP), 40, FRAGMENT)
    quoted = ipv6(tcp(), TCP, PEER6, VM6)
    yield Whole("H6 ICMPv6 error", OUT.wrap6(icmp_error(1, quoted), ICMPV6), 56, FRAGMENT)
    redirect = dropped(Reason.REDIRECT)
    yield Whole("F16 redirect", OUT.wrap4(icmp(5, 1, 0, bytes(24)), ICMP), 16, redirect)
    yield Whole("F16 redirect6", OUT.wrap6(icmp(137, 0, 0, bytes(32)), 58), 16, redirect)


def _not_in_pieces() -> Iterator[Case]:
    for name, frame, cut, first in _wholes():
        later = piece(frame, cut)
        # A later piece from no address of its own is a forgery before it is a fragment.
        nowhere = dropped(Reason.SPOOF_ADDRESS) if "discover" in name else FRAGMENT
        steps = (out(later, nowhere), out(piece(frame, 0, cut), first), out(later, nowhere))
        yield Case(f"{name} in two pieces", OPEN, steps)
    hidden = OUT.wrap6(router_advertisement(bytes(16)), ICMPV6, hop_limit=255)
    for count in (1, 2):
        chain = extension(60) * (count - 1) + extension(ICMPV6)
        content = hidden[:14] + hidden[14:54] + chain + hidden[54:]
        head = piece(content, 0, 24, protocol=60)
        yield ROWS.out(f"F14 RA behind {count} destination options in pieces", head, EXTENSION)


def _options() -> Iterator[Case]:
    refused = dropped(Reason.IP_OPTIONS)
    for name, field in {"first": 0x2000, "later": 0x2003, "last": 0x0003}.items():
        frame = OUT.wrap4(udp(payload=bytes(16)), UDP, options=bytes(4), fragment=field)
        yield ROWS.out(f"D13 options in a {name} piece", frame, refused)


def _chains() -> Iterator[Case]:
    segment = tcp(payload=bytes(28))
    for name, headers, first in (
        ("destination options, then a fragment header", extension(44) + fragment6(TCP), 60),
        ("routing header, then a fragment header", extension(44) + fragment6(TCP), 43),
        ("hop-by-hop, then a fragment header", hop_by_hop(44) + fragment6(TCP), 0),
        (
            "hop-by-hop, fragment header, destination options",
            hop_by_hop(44) + fragment6(60, more=True) + extension(TCP),
            0,
        ),
    ):
        for wire, row in ((OUT, ROWS.out), (IN, ROWS.into)):
            frame = wire.wrap6(segment, TCP, headers=headers, first=first)
            yield row(f"E18 {name}, TCP", frame, EXTENSION)
    for number in (0, 43, 60, 135, 139, 140):
        headers = fragment6(number, more=True) + extension(TCP)
        frame = OUT.wrap6(segment[:40], TCP, headers=headers, first=44)
        yield ROWS.out(f"E12 first piece with header {number}, then TCP", frame, EXTENSION)
        frame = OUT.wrap6(segment, TCP, headers=fragment6(number, 3), first=44)
        yield ROWS.out(f"E12 later piece with header {number}", frame, FRAGMENT)
    for name, outer in {"first": fragment6(44, more=True), "atomic": fragment6(44)}.items():
        for inner_name, inner in {
            "first": fragment6(TCP, more=True),
            "later": fragment6(TCP, 3),
            "atomic": fragment6(TCP),
        }.items():
            frame = OUT.wrap6(segment, TCP, headers=outer + inner, first=44)
            yield ROWS.out(f"E15 {inner_name} piece in a {name} one", frame, EXTENSION)
    no_next = ethernet(ipv6(bytes(16), 59, headers=fragment6(59, more=True), first=44), IPV6)
    yield ROWS.out("E11 no next header in a first piece", no_next, EXTENSION)


def _memories() -> Iterator[Case]:
    """What may look like the same datagram and is not."""
    frame = OUT.wrap6(udp(payload=bytes(40)), UDP)
    first, last = out(piece(frame, 0, 24), DEFAULT), out(piece(frame, 24), ESTABLISHED)
    for name, number in {"TCP": TCP, "destination options": 60, "ICMPv6": ICMPV6}.items():
        other = out(piece(frame, 24, protocol=number), FRAGMENT)
        yield Case(
            f"E17 the first piece says UDP, a later one {name}", TYPICAL, (first, other, last)
        )
    hop = OUT.wrap6(frame[78:], UDP, headers=hop_by_hop(44) + fragment6(UDP, 3), first=0)
    yield Case(
        "E17 a later piece with another header in front",
        TYPICAL,
        (first, out(hop, EXTENSION), last),
    )
    atomic = piece(frame, 0)
    yield Case(
        "E14 an atomic fragment is no first piece",
        TYPICAL,
        (out(atomic, DEFAULT), out(piece(frame, 24), FRAGMENT)),
    )
    yield Case(
        "E14 an atomic fragment makes nothing forgotten",
        TYPICAL,
        (first, out(atomic, ESTABLISHED), last),
    )


CASES: tuple[Case, ...] = (*_not_in_pieces(), *_options(), *_chains(), *_memories())
