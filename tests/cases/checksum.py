# SPDX-License-Identifier: Apache-2.0
"""Verdict table of checksum requests (K5): which bytes a sender may leave for others to fill in.

A test run cannot be given a request; tests/lab/test_checksum_requests.py plays this table on a TAP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from tests.cases.fixtures import OPEN
from tests.cases.table import DEFAULT, Case, Expected, Rows, accepted, dropped
from tests.frames import (
    ARP,
    BROADCAST4,
    BROADCAST_MAC,
    GATEWAY4,
    ICMP,
    ICMPV6,
    IGMP_ROUTER_ALERT,
    IGMP_ROUTERS4,
    PEER4,
    SCTP,
    STRANGER4,
    TCP,
    UDP,
    UNSPECIFIED4,
    VM4,
    VM6,
    Wire,
    arp,
    bootp,
    echo,
    fragment6,
    icmp_error,
    igmp,
    igmp_frame,
    ipv4,
    ipv6,
    link_layer,
    mld,
    mld_frame,
    sctp,
    solicitation,
    tcp,
    udp,
)
from vgw.abi import Path, Reason

ROWS = Rows(OPEN)
REFUSED = dropped(Reason.CHECKSUM_REQUEST)
#: Where the upper header begins in a frame without tag, extension headers and options.
UPPER4, UPPER6 = 34, 54
GRE, ESP, IPV6_ICMP_OVER_IPV4 = 47, 50, ICMPV6
#: A payload with room for a whole packet in a tunnel.
INNER = bytes(60)

Place = tuple[int, int]


class Kind(NamedTuple):
    """A packet, where its upper header begins, what it gets without and with a fair request."""

    name: str
    make: Callable[[Wire], bytes]
    upper: int
    expected: Expected
    fair: tuple[Place, ...]
    unfair: tuple[Place, ...]


def _fields(upper: int, *offsets: int) -> tuple[Place, ...]:
    return tuple((upper, offset) for offset in offsets)


def _lies(upper: int) -> tuple[Place, ...]:
    """Return requests to write over what is in front of any upper header, or begin in it."""
    addresses = ((14, 12), (14, 16), (14, 18)) if upper == UPPER4 else ((14, 8), (14, 24), (14, 38))
    return ((0, 0), (0, 6), (0, 12), (14, 0), (14, 2), (14, 6), *addresses, (upper - 2, 0))


def _tcp(upper: int) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    wrong = (0, 2, 4, 8, 12, 13, 14, 15, 17, 18, 20, 30)
    return (
        ((upper, 16), (upper + 20, 0), (upper + 28, 6), (upper + 40, 16)),
        (
            *_lies(upper),
            *_fields(upper, *wrong),
            (upper - 20, 36),
            (upper + 2, 14),
            (upper + 19, 1),
        ),
    )


def _udp(upper: int) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    return (
        ((upper, 6), (upper + 8, 0), (upper + 16, 6), (upper + 30, 16)),
        (*_lies(upper), *_fields(upper, 0, 1, 2, 4, 5, 7, 8, 16), (upper - 20, 26), (upper + 7, 0)),
    )


def _exact(upper: int, field: int = 2) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Return what a packet may ask for whose payload is judged as well."""
    others = tuple(offset for offset in (0, 1, 2, 4, 6, 16) if offset != field)
    return (
        ((upper, field),),
        (*_lies(upper), *_fields(upper, *others), (upper + 2, 0), (upper + 8, 0)),
    )


def _unread(upper: int) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Return what a packet may ask for of which nothing above IP is judged."""
    return (((upper, 0), (upper, 2), (upper + 4, 4), (upper + 20, 16))), _lies(upper)


def _transport() -> Iterator[Kind]:
    segment = tcp(flags="S", payload=INNER)
    optioned = tcp(words=10, payload=bytes.fromhex("01") * 20 + INNER)
    yield Kind("TCP", lambda wire: wire.wrap4(segment, TCP), UPPER4, DEFAULT, *_tcp(UPPER4))
    yield Kind("TCP6", lambda wire: wire.wrap6(segment, TCP), UPPER6, DEFAULT, *_tcp(UPPER6))
    yield Kind(
        "TCP with options",
        lambda wire: wire.wrap4(optioned, TCP),
        UPPER4,
        DEFAULT,
        ((UPPER4, 16), (UPPER4 + 40, 0)),
        ((UPPER4 + 20, 0), (UPPER4 + 39, 0)),
    )
    atomic = fragment6(TCP)
    yield Kind(
        "TCP6 in an atomic fragment",
        lambda wire: wire.wrap6(segment, TCP, headers=atomic, first=44),
        UPPER6 + 8,
        DEFAULT,
        ((UPPER6 + 8, 16), (UPPER6 + 28, 0)),
        ((UPPER6, 16), (UPPER6, 24), (UPPER6 + 8, 2), (UPPER6 + 27, 0)),
    )
    datagram = udp(payload=INNER)
    yield Kind("UDP", lambda wire: wire.wrap4(datagram, UDP), UPPER4, DEFAULT, *_udp(UPPER4))
    yield Kind("UDP6", lambda wire: wire.wrap6(datagram, UDP), UPPER6, DEFAULT, *_udp(UPPER6))
    yield Kind(
        "SCTP",
        lambda wire: wire.wrap4(sctp(payload=INNER), SCTP),
        UPPER4,
        DEFAULT,
        ((UPPER4, 8), (UPPER4 + 12, 0), (UPPER4 + 20, 6)),
        (*_lies(UPPER4), *_fields(UPPER4, 0, 2, 4, 6, 10, 12), (UPPER4 + 11, 1)),
    )


def _prohibited(
    wrap: Callable[[Wire, bytes, int], bytes], kind: tuple[int, int], code: int, wire: Wire
) -> bytes:
    icmp_type, protocol = kind
    quoted = _sent(wire, 4 if protocol == ICMP else 6)
    return wrap(wire, icmp_error(icmp_type, quoted, code=code), protocol)


def _icmp() -> Iterator[Kind]:
    ping4, ping6 = echo(8, payload=INNER), echo(128, payload=INNER)
    yield Kind("ping", lambda wire: wire.wrap4(ping4, ICMP), UPPER4, DEFAULT, *_exact(UPPER4))
    yield Kind("ping6", lambda wire: wire.wrap6(ping6, ICMPV6), UPPER6, DEFAULT, *_exact(UPPER6))
    unrelated = dropped(Reason.ICMP_UNRELATED)
    yield Kind(
        "ICMP error",
        lambda wire: wire.wrap4(icmp_error(3, _sent(wire, 4), code=1), ICMP),
        UPPER4,
        unrelated,
        *_exact(UPPER4),
    )
    yield Kind(
        "ICMPv6 error",
        lambda wire: wire.wrap6(icmp_error(1, _sent(wire, 6), code=3), ICMPV6),
        UPPER6,
        unrelated,
        *_exact(UPPER6),
    )
    # An answer of vgw to a UDP packet has that packet's request.
    for name, code, upper, wrap, kind in (
        ("ICMP", 13, UPPER4, Wire.wrap4, (3, ICMP)),
        ("ICMPv6", 1, UPPER6, Wire.wrap6, (1, ICMPV6)),
    ):
        fair, unfair = _exact(upper)
        yield Kind(
            f"{name} prohibited",
            partial(_prohibited, wrap, kind, code),
            upper,
            unrelated,
            (*fair, (upper, 6)),
            tuple(place for place in unfair if place != (upper, 6)),
        )
    unnamed = dropped(Reason.PROTOCOL)
    yield Kind(
        "timestamp",
        lambda wire: wire.wrap4(bytes([13, 0, 0, 0]) + INNER, ICMP),
        UPPER4,
        unnamed,
        *_exact(UPPER4),
    )
    yield Kind(
        "ICMPv6 over IPv4",
        lambda wire: wire.wrap4(INNER, IPV6_ICMP_OVER_IPV4),
        UPPER4,
        unnamed,
        *_unread(UPPER4),
    )


def _sent(wire: Wire, version: int) -> bytes:
    """Return a packet of whom an error goes to."""
    back = Wire(Path(1 - wire.path))
    frame = (back.wrap4 if version == 4 else back.wrap6)(udp(payload=bytes(8)), UDP)
    return frame[14:]


def _others() -> Iterator[Kind]:
    unnamed = dropped(Reason.PROTOCOL)
    for name, protocol in (("GRE", GRE), ("ESP", ESP)):
        yield Kind(
            name,
            lambda wire, protocol=protocol: wire.wrap4(INNER, protocol),  # type: ignore[misc]
            UPPER4,
            unnamed,
            *_unread(UPPER4),
        )
        yield Kind(
            f"{name}6",
            lambda wire, protocol=protocol: wire.wrap6(INNER, protocol),  # type: ignore[misc]
            UPPER6,
            unnamed,
            *_unread(UPPER6),
        )
    later = dropped(Reason.FRAGMENT)  # it has no first one here
    yield Kind(
        "later fragment",
        lambda wire: wire.wrap4(INNER, TCP, fragment=0x0010),
        UPPER4,
        later,
        *_unread(UPPER4),
    )
    yield Kind(
        "first fragment",
        lambda wire: wire.wrap4(tcp(payload=INNER), TCP, fragment=0x2000),
        UPPER4,
        DEFAULT,
        *_tcp(UPPER4),
    )


def _mirrored() -> Iterator[Case]:
    for kind in (*_transport(), *_icmp(), *_others()):
        for start, offset in kind.fair:
            yield from _both(kind, (start, offset), kind.expected)
        for start, offset in kind.unfair:
            yield from _both(kind, (start, offset), REFUSED)


def _both(kind: Kind, place: Place, expected: Expected) -> Iterator[Case]:
    yield from ROWS.both(f"K5 {kind.name} {place}", kind.make, expected, checksum=place)


def _judged_payloads() -> Iterator[Case]:
    """DHCP, neighbour discovery and groups: what they carry is judged, from the VM above all."""
    request = ipv4(udp(68, 67, bootp()), UDP, UNSPECIFIED4, BROADCAST4)
    dhcp = Wire(Path.FROM_VM, remote_mac=BROADCAST_MAC).frame(request, 0x0800)
    fair, unfair = _exact(UPPER4, 6)
    hardware_address = (UPPER4, 8 + 28), (UPPER4 + 8 + 28, 0), (UPPER4 + 8 + 200, 0)
    yield from _out("DHCP", dhcp, accepted(Reason.DHCP), fair, (*unfair, *hardware_address))

    asking = solicitation("2001:db8:20::1", link_layer(1))
    nd = Wire(Path.FROM_VM).wrap6(asking, ICMPV6, remote="ff02::1:ff00:1", hop_limit=255)
    fair, unfair = _exact(UPPER6)
    target_and_option = (UPPER6, 8), (UPPER6 + 10, 0), (UPPER6 + 24, 0), (UPPER6 + 24, 2)
    yield from _out("ND", nd, accepted(Reason.ND), fair, (*unfair, *target_and_option))

    member = accepted(Reason.MEMBERSHIP)
    plain = igmp_frame(Path.FROM_VM, igmp(0x16), IGMP_ROUTERS4)
    yield from _out("IGMP", plain, member, *_exact(UPPER4))
    alert = igmp_frame(Path.FROM_VM, igmp(0x16), IGMP_ROUTERS4, options=IGMP_ROUTER_ALERT)
    yield from _out(
        "IGMP behind an option", alert, member, ((UPPER4 + 4, 2),), ((UPPER4, 2), (UPPER4, 6))
    )
    report = mld_frame(Path.FROM_VM, mld(131), "ff02::fb")
    yield from _out(
        "MLD", report, member, ((UPPER6 + 8, 2),), ((UPPER6, 2), (UPPER6, 10), (UPPER6 + 32, 0))
    )


def _no_checksum() -> Iterator[Case]:
    """ARP has no checksum, and a frame that cannot be read keeps its reason."""
    asking = Wire(Path.FROM_VM, remote_mac=BROADCAST_MAC).frame(arp(1, VM4, GATEWAY4), ARP)
    places = (0, 0), (14, 0), (14, 14), (14, 26), (34, 2), (40, 0)
    yield from _out("ARP", asking, REFUSED, places, ())
    short = Wire(Path.FROM_VM).frame(ipv4(tcp(), TCP)[:-3], 0x0800)
    yield from _out("unreadable", short, dropped(Reason.BAD_LENGTH), ((34, 2), (34, 16)), ())
    spoofed = Wire(Path.FROM_VM).wrap4(tcp(), TCP, local=STRANGER4)
    yield from _out("spoofed", spoofed, dropped(Reason.SPOOF_ADDRESS), ((34, 16),), ((34, 2),))


def _tunnels() -> Iterator[Case]:
    """What Linux guests ask for of VXLAN, and of IPv4 in IPv6: a checksum of the inner packet."""
    inner = Wire(Path.FROM_VM).wrap4(tcp(), TCP)
    vxlan = Wire(Path.FROM_VM).wrap4(udp(50000, 4789, bytes(8) + inner), UDP)
    start = UPPER4 + 8 + 8 + 34
    yield from _out("VXLAN", vxlan, DEFAULT, ((start, 16),), ((UPPER4, 2), (14, 16)))
    four_in_six = Wire(Path.FROM_VM).frame(ipv6(ipv4(tcp(), TCP, VM4, PEER4), 4, VM6), 0x86DD)
    unnamed = dropped(Reason.PROTOCOL)
    yield from _out("4in6", four_in_six, unnamed, ((UPPER6 + 20, 16),), ((14, 24), (53, 1)))


def _out(
    name: str, frame: bytes, expected: Expected, fair: tuple[Place, ...], unfair: tuple[Place, ...]
) -> Iterator[Case]:
    for place in fair:
        yield ROWS.out(f"K5 {name} {place}", frame, expected, checksum=place)
    for place in unfair:
        yield ROWS.out(f"K5 {name} {place}", frame, REFUSED, checksum=place)


CASES = (*_mirrored(), *_judged_payloads(), *_no_checksum(), *_tunnels())
