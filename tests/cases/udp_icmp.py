# SPDX-License-Identifier: Apache-2.0
"""Verdict table of single UDP, SCTP, DHCP, ICMP, IGMP and MLD packets and of other protocols."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from tests.cases.fixtures import CLOSED, OPEN, OTHER_PROTOCOLS, UNGUARDED_OPEN
from tests.cases.table import (
    DEFAULT,
    NO_STATE,
    UNRELATED,
    Case,
    Expected,
    Rows,
    accepted,
    by_rule,
    dropped,
)
from tests.frames import (
    BROADCAST_MAC,
    ICMP,
    ICMPV6,
    IGMP,
    IN,
    OTHER_VM_MAC,
    OUT,
    PEER4,
    PEER6,
    SCTP,
    STRANGER4,
    TCP,
    UDP,
    UNSPECIFIED4,
    VM4,
    VM6,
    VM_LINK_LOCAL,
    Wire,
    bootp,
    echo,
    hop_by_hop,
    icmp,
    icmp_error,
    igmp,
    ipv4,
    ipv6,
    mld,
    sctp,
    tcp,
    udp,
)
from vgw.abi import Path, Reason

ROWS, CLOSED_ROWS, UNGUARDED = Rows(OPEN), Rows(CLOSED), Rows(UNGUARDED_OPEN)
NAMED = Rows(OTHER_PROTOCOLS)
BAD_LENGTH, INNER = dropped(Reason.BAD_LENGTH), dropped(Reason.ICMP_INNER)
PROTOCOL = dropped(Reason.PROTOCOL)
DHCP, DHCP_INVALID = accepted(Reason.DHCP), dropped(Reason.DHCP_INVALID)
MEMBERSHIP = accepted(Reason.MEMBERSHIP)
BROADCAST4 = "255.255.255.255"
DHCPV6_SERVERS = "ff02::1:2"


def _udp() -> Iterator[Case]:
    for length in (1, 7, 13, 100, 65535):
        yield from ROWS.both(
            f"A12 UDP length {length} of 12",
            lambda wire, n=length: wire.wrap4(udp(payload=b"abcd", length=n), UDP),  # type: ignore[misc]
            BAD_LENGTH,
        )
    zero = udp(payload=b"abcd", length=0)
    yield from ROWS.both("A12 UDP length 0", lambda w: w.wrap4(zero, UDP), BAD_LENGTH)
    yield from ROWS.both("A12 UDP length 0, GSO", lambda w: w.wrap4(zero, UDP), DEFAULT, gso=True)
    inside_padding = OUT.wrap4(udp(payload=b"abcd", length=16), UDP) + bytes(20)
    yield ROWS.out("A12 UDP length in padding", inside_padding, BAD_LENGTH)
    shorter = OUT.wrap4(udp(payload=b"abcd", length=10), UDP)
    yield ROWS.out("A12 UDP shorter than its packet", shorter, DEFAULT)
    for name, wrap in (("I1 IPv4", OUT.wrap4), ("I2 IPv6", OUT.wrap6)):
        zeroed = bytearray(wrap(udp(payload=b"x"), UDP))
        zeroed[-3:-1] = b"\0\0"
        yield ROWS.out(f"{name}, UDP checksum 0", bytes(zeroed), DEFAULT)
    for protocol, make in ((UDP, udp), (SCTP, sctp)):
        for sport, dport in ((0, 53), (53, 0), (0, 0)):
            segment = make(sport, dport)
            yield from ROWS.both(
                f"I15 protocol {protocol}, {sport} to {dport}",
                lambda wire, s=segment, p=protocol: wire.wrap4(s, p),  # type: ignore[misc]
                dropped(Reason.PORT_ZERO),
            )
    for dport in (53, 1900, 3544, 3784, 4500, 4789, 5353, 5355, 6081):
        for payload in (b"", b"\xc0\x0c" * 20, bytes(64)):
            frame = OUT.wrap4(udp(40000, dport, payload), UDP)
            yield ROWS.out(f"I12 UDP to {dport}, {len(payload)} bytes", frame, DEFAULT)


def _dhcp(message: bytes, source: str = UNSPECIFIED4, destination: str = BROADCAST4) -> bytes:
    wire = Wire(Path.FROM_VM, remote_mac=BROADCAST_MAC)
    return wire.wrap4(udp(68, 67, message), UDP, local=source, remote=destination)


def _dhcp_rows() -> Iterator[tuple[str, bytes, Expected]]:
    yield "F19 discover", _dhcp(bootp()), DHCP
    yield "F19 renew", _dhcp(bootp(), VM4, "10.20.0.1"), DHCP
    yield "F19 rebind", _dhcp(bootp(), VM4), DHCP
    yield "F19 shortest", _dhcp(bootp()[:44]), DHCP
    for size in (0, 1, 43):
        yield f"F20 message of {size} bytes", _dhcp(bootp()[:size]), DHCP_INVALID
    yield "F18 reply", _dhcp(bootp(2)), DHCP_INVALID
    yield "F18 hardware type", _dhcp(bootp(hardware_type=6)), DHCP_INVALID
    yield "F18 hardware length", _dhcp(bootp(hardware_length=16)), DHCP_INVALID
    yield "F18 relay", _dhcp(bootp(relay=IPv4Address("10.20.0.1"))), DHCP_INVALID
    yield "F18 another client", _dhcp(bootp(client_mac=OTHER_VM_MAC)), DHCP_INVALID
    spoofed = _dhcp(bootp(), "10.20.0.12")
    yield "F18 another source", spoofed, dropped(Reason.SPOOF_ADDRESS)
    unicast = _dhcp(bootp(), UNSPECIFIED4, "10.20.0.1")
    yield "F18 unspecified source to one server", unicast, dropped(Reason.SPOOF_ADDRESS)
    wrong_mac = Wire(Path.FROM_VM, OTHER_VM_MAC)
    frame = wrong_mac.wrap4(udp(68, 67, bootp()), UDP, local=UNSPECIFIED4, remote=BROADCAST4)
    yield "F18 another source MAC", frame, dropped(Reason.SPOOF_MAC)
    frame = OUT.wrap6(udp(546, 547, bytes(4)), UDP, local=VM_LINK_LOCAL, remote=DHCPV6_SERVERS)
    yield "F19 DHCPv6 solicit", frame, DHCP
    frame = OUT.wrap6(udp(546, 547, bytes(4)), UDP, local="fe80::1", remote=DHCPV6_SERVERS)
    yield "F18 DHCPv6 from a foreign source", frame, dropped(Reason.SPOOF_ADDRESS)
    frame = OUT.wrap4(udp(67, 68, bootp(2)), UDP)
    yield "F17 DHCP server", frame, dropped(Reason.DHCP_SERVER)
    frame = OUT.wrap6(udp(547, 546, bytes(4)), UDP)
    yield "F17 DHCPv6 server", frame, dropped(Reason.DHCP_SERVER)
    fragment = OUT.wrap4(udp(68, 67, bootp()), UDP, fragment=0x2000)
    yield "F20 fragment", fragment, dropped(Reason.FRAGMENT)
    options = OUT.wrap4(udp(68, 67, bootp()), UDP, options=bytes(4))
    yield "F20 options", options, dropped(Reason.IP_OPTIONS)
    yield "F20 wrong UDP length", OUT.wrap4(udp(68, 67, bootp(), length=999), UDP), BAD_LENGTH
    lie = OUT.wrap4(udp(68, 67, bootp(), length=8 + 43), UDP)
    yield "F20 UDP length hides the client", lie, DHCP_INVALID


def _dhcp_cases() -> Iterator[Case]:
    for name, frame, expected in _dhcp_rows():
        yield ROWS.out(name, frame, expected)
        yield CLOSED_ROWS.out(f"{name}, no rule accepts", frame, expected)
    server4 = OUT.wrap4(udp(67, 68, bootp(2)), UDP)
    yield UNGUARDED.out("F17 DHCP server, guards off", server4, DEFAULT)
    client = _dhcp(bootp(client_mac=OTHER_VM_MAC))
    yield UNGUARDED.out("F18 another client, guards off", client, DHCP_INVALID)
    unicast = OUT.wrap6(udp(546, 547), UDP)
    yield ROWS.out("F19 DHCPv6 to one server", unicast, DEFAULT)
    yield CLOSED_ROWS.out("F19 DHCPv6 to one server", unicast, dropped(Reason.DEFAULT))
    for name, frame in (
        ("F21 DHCP answer not asked for", IN.wrap4(udp(67, 68, bootp(2)), UDP)),
        ("F21 DHCPv6 answer not asked for", IN.wrap6(udp(547, 546), UDP)),
        ("F21 DHCP request to the VM", IN.wrap4(udp(68, 67, bootp()), UDP)),
    ):
        yield CLOSED_ROWS.into(name, frame, dropped(Reason.DEFAULT))
        yield ROWS.into(f"{name}, a rule accepts", frame, DEFAULT)
    short = IN.wrap4(udp(68, 67, bytes(43)), UDP)
    yield ROWS.into("F20 short request to the VM", short, DHCP_INVALID)


def _membership() -> Iterator[Case]:
    query, invalid = dropped(Reason.MEMBERSHIP_QUERY), dropped(Reason.MEMBERSHIP_INVALID)
    kinds = {0x11: query, 0x12: MEMBERSHIP, 0x16: MEMBERSHIP, 0x17: MEMBERSHIP, 0x22: MEMBERSHIP}
    for kind in (0x11, 0x12, 0x16, 0x17, 0x22, 0x00, 0x13, 0x14, 0x30, 0xFF):
        sent = OUT.wrap4(igmp(kind), IGMP, remote="224.0.0.22", ttl=1)
        yield CLOSED_ROWS.out(f"J2 IGMP {kind:02x}", sent, kinds.get(kind, invalid))
        got = IN.wrap4(igmp(kind), IGMP, ttl=1)
        expected = MEMBERSHIP if kind in kinds else invalid
        yield CLOSED_ROWS.into(f"J2 IGMP {kind:02x}", got, expected)
    for kind in (130, 131, 132, 143):
        for source in (VM_LINK_LOCAL, "::"):
            frame = OUT.wrap6(
                mld(kind),
                ICMPV6,
                local=source,
                remote="ff02::16",
                headers=hop_by_hop(),
                first=0,
                hop_limit=1,
            )
            expected = query if kind == 130 else MEMBERSHIP
            yield CLOSED_ROWS.out(f"J2 MLD {kind} from {source}", frame, expected)
        foreign = OUT.wrap6(
            mld(kind), ICMPV6, local="fe80::1", headers=hop_by_hop(), first=0, hop_limit=1
        )
        yield ROWS.out(f"J2 MLD {kind} spoofed", foreign, dropped(Reason.SPOOF_ADDRESS))
        got = IN.wrap6(mld(kind), ICMPV6, headers=hop_by_hop(), first=0, hop_limit=1)
        yield CLOSED_ROWS.into(f"J2 MLD {kind}", got, MEMBERSHIP)
        bare = OUT.wrap6(mld(kind), ICMPV6, hop_limit=1)
        yield ROWS.out(f"J3 MLD {kind} without router alert", bare, invalid)
        far = OUT.wrap6(mld(kind), ICMPV6, headers=hop_by_hop(), first=0, hop_limit=2)
        yield ROWS.out(f"J3 MLD {kind} with hop limit 2", far, invalid)
        for size in range(8, 8 if kind == 143 else 24):
            cut = OUT.wrap6(mld(kind)[:size], ICMPV6, headers=hop_by_hop(), first=0, hop_limit=1)
            yield ROWS.out(f"A5 MLD {kind} cut at {size}", cut, dropped(Reason.TRUNCATED))
            padded = cut + bytes(24)
            yield ROWS.out(f"A10 MLD {kind} cut at {size}, padded", padded, BAD_LENGTH)
    spoofed = OUT.wrap4(igmp(0x16), IGMP, local=UNSPECIFIED4)
    yield ROWS.out("J2 IGMP from 0.0.0.0", spoofed, dropped(Reason.SPOOF_ADDRESS))


def _icmp() -> Iterator[Case]:
    redirect = dropped(Reason.REDIRECT)
    for rows, name in ((ROWS, "guards on"), (UNGUARDED, "guards off")):
        yield from rows.both(f"F16 redirect, {name}", lambda w: w.wrap4(icmp(5, 1), ICMP), redirect)
        yield from rows.both(f"F16 redirect6, {name}", lambda w: w.wrap6(icmp(137), 58), redirect)
    yield from ROWS.both("H1 echo request", lambda w: w.wrap4(echo(8), ICMP), DEFAULT)
    yield from ROWS.both("H1 echo request6", lambda w: w.wrap6(echo(128), ICMPV6), DEFAULT)
    yield from ROWS.both("H1 reply without request", lambda w: w.wrap4(echo(0), ICMP), NO_STATE)
    yield from ROWS.both("H1 reply6 without request", lambda w: w.wrap6(echo(129), 58), NO_STATE)
    for kind in (1, 2, 4, 6, 9, 10, 13, 14, 15, 17, 30, 40, 128, 133, 255):
        yield from ROWS.both(
            f"H13 ICMP type {kind}",
            lambda wire, k=kind: wire.wrap4(icmp(k), ICMP),  # type: ignore[misc]
            PROTOCOL,
        )
    for kind in (0, 5, 8, 100, 138, 139, 140, 141, 142, 144, 151, 255):
        yield from ROWS.both(
            f"H13 ICMPv6 type {kind}",
            lambda wire, k=kind: wire.wrap6(icmp(k), ICMPV6),  # type: ignore[misc]
            PROTOCOL,
        )
        named = OUT.wrap6(icmp(kind), ICMPV6)
        yield NAMED.out(f"H13 ICMPv6 type {kind}, a rule names it", named, by_rule("all-icmp"))


def _quotes4() -> Iterator[tuple[str, bytes, Expected]]:
    """Yield what an ICMP error may quote: here never a packet of an open flow."""
    whole = ipv4(tcp(), TCP, PEER4, VM4)
    for size in (0, 1, 19, 20, 27):
        yield f"H6 quote of {size} bytes", whole[:size], INNER
    yield "H3 quote of 28 bytes", whole[:28], UNRELATED
    yield "H3 whole quote", whole, UNRELATED
    for first in (0x05, 0x55, 0x65, 0x40, 0x44):
        quote = ipv4(tcp(), TCP, PEER4, VM4, first_byte=first)
        yield f"H6 quote starts with {first:02x}", quote, INNER
    yield "H6 quote with IHL 15", ipv4(tcp(), TCP, PEER4, VM4, first_byte=0x4F), INNER
    optioned = ipv4(tcp(), TCP, PEER4, VM4, options=bytes(8))
    yield "H6 quote with options", optioned, UNRELATED
    yield "H6 quote with options, cut", optioned[:35], INNER
    yield "H6 quote of a later fragment", ipv4(tcp(), TCP, PEER4, VM4, fragment=1), INNER
    yield "H6 quote of a first fragment", ipv4(tcp(), TCP, PEER4, VM4, fragment=0x2000), UNRELATED
    for kind in (3, 5, 11, 12, 13):
        quote = ipv4(icmp(kind), ICMP, PEER4, VM4)
        yield f"H8 error about ICMP {kind}", quote, INNER
    for kind in (0, 8):
        yield f"H3 error about echo {kind}", ipv4(echo(kind), ICMP, PEER4, VM4), UNRELATED
    yield "H6 quote of GRE", ipv4(bytes(8), 47, PEER4, VM4), UNRELATED
    yield "H6 quote of ICMPv6", ipv4(icmp(1), ICMPV6, PEER4, VM4), UNRELATED
    yield "H6 quote of IPv6", ipv6(tcp(), TCP, PEER6, VM6), INNER


def _quotes6() -> Iterator[tuple[str, bytes, Expected]]:
    whole = ipv6(tcp(), TCP, PEER6, VM6)
    for size in (0, 1, 39, 40, 47):
        yield f"H6 quote of {size} bytes", whole[:size], INNER
    yield "H3 quote of 48 bytes", whole[:48], UNRELATED
    for number in (0, 43, 44, 59, 60, 135, 139, 140):
        quote = ipv6(bytes(24), number, PEER6, VM6)
        yield f"H6 quote with extension {number}", quote, INNER
    for kind in (1, 2, 3, 4, 133, 135, 137):
        yield f"H8 error about ICMPv6 {kind}", ipv6(icmp(kind), ICMPV6, PEER6, VM6), INNER
    for kind in (128, 129):
        yield f"H3 error about echo {kind}", ipv6(echo(kind), ICMPV6, PEER6, VM6), UNRELATED
    yield "H6 quote of ESP", ipv6(bytes(8), 50, PEER6, VM6), UNRELATED
    yield "H6 quote of ICMP", ipv6(echo(8), ICMP, PEER6, VM6), UNRELATED
    yield "H6 quote of IPv4", ipv4(tcp(), TCP, PEER4, VM4), INNER
    yield "H6 quote of version 5", b"\x50" + whole[1:], INNER


def _errors() -> Iterator[Case]:
    for name, quote, expected in _quotes4():
        for kind in (3, 11, 12):
            frame = OUT.wrap4(icmp_error(kind, quote), ICMP)
            yield ROWS.out(f"{name}, ICMP {kind}", frame, expected)
        frame = IN.wrap4(icmp_error(3, quote), ICMP)
        yield ROWS.into(f"{name}, ICMP 3", frame, expected)
    for name, quote, expected in _quotes6():
        for kind in (1, 2, 3, 4):
            frame = OUT.wrap6(icmp_error(kind, quote), ICMPV6)
            yield ROWS.out(f"{name}, ICMPv6 {kind}", frame, expected)
        frame = IN.wrap6(icmp_error(1, quote), ICMPV6)
        yield ROWS.into(f"{name}, ICMPv6 1", frame, expected)
    hidden = OUT.wrap4(icmp_error(3, ipv4(tcp(), TCP, PEER4, VM4)[:27]), ICMP) + bytes(40)
    yield ROWS.out("H6 quote that ends in padding", hidden, INNER)


def _other_protocols() -> Iterator[Case]:
    for number in (0, 3, 4, 33, 41, 46, 47, 50, 51, 61, 88, 89, 103, 112, 115, 136, 253, 255):
        yield from ROWS.both(
            f"C11 protocol {number}",
            lambda wire, n=number: wire.wrap4(bytes(40), n),  # type: ignore[misc]
            PROTOCOL,
        )
    rows = {
        "I7 GRE": (OUT.wrap4(bytes.fromhex("3000650000000001"), 47), by_rule("gre")),
        "I7 GRE over IPv6": (OUT.wrap6(bytes(8), 47), by_rule("gre")),
        "I8 ESP": (OUT.wrap4(bytes(16), 50), by_rule("esp")),
        "I8 AH over IPv6": (OUT.wrap6(bytes(16), 51), by_rule("esp")),
        "I9 IPv6 in IPv4": (OUT.wrap4(bytes(40), 41), PROTOCOL),
        "I9 IPv4 in IPv4": (OUT.wrap4(bytes(40), 4), PROTOCOL),
        "C11 proto/0": (OUT.wrap4(bytes(8), 0, remote=STRANGER4), by_rule("zero")),
        "C11 proto/0 is not a wildcard": (OUT.wrap4(tcp(), TCP, remote=STRANGER4), by_rule("rest")),
        "I6 proto/6": (OUT.wrap4(tcp(1, 65535), TCP), by_rule("all-tcp")),
        "I6 any covers UDP": (OUT.wrap4(udp(), UDP), by_rule("rest")),
        "I6 any covers SCTP": (OUT.wrap4(sctp(), SCTP), by_rule("rest")),
        "I6 any does not cover UDP-Lite": (OUT.wrap4(udp(), 136), PROTOCOL),
        "H13 proto/1 over IPv6": (OUT.wrap6(echo(8), ICMP), by_rule("all-icmp")),
        "H13 proto/58 over IPv4": (OUT.wrap4(echo(128), ICMPV6), by_rule("all-icmp")),
        "H13 ICMP timestamp by rule": (OUT.wrap4(icmp(13), ICMP), by_rule("all-icmp")),
    }
    for name, (frame, expected) in rows.items():
        yield NAMED.out(name, frame, expected)


CASES: tuple[Case, ...] = (
    *_udp(),
    *_dhcp_cases(),
    *_membership(),
    *_icmp(),
    *_errors(),
    *_other_protocols(),
)
