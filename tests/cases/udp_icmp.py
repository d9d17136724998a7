# SPDX-License-Identifier: Apache-2.0
"""Verdict table of single UDP, SCTP, DHCP, ICMP, IGMP and MLD packets and of other protocols."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from tests.cases.fixtures import CLOSED, OPEN, OTHER_PROTOCOLS, UNGUARDED_OPEN
from tests.cases.table import (
    DEFAULT,
    DENIED,
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
    ALL_HOSTS4,
    ALL_NODES6,
    BROADCAST4,
    BROADCAST_MAC,
    GATEWAY4,
    GATEWAY6,
    GATEWAY_MAC,
    ICMP,
    ICMPV6,
    IGMP_ROUTER_ALERT,
    IGMP_ROUTERS4,
    IN,
    MLD_ROUTERS6,
    OTHER_VM4,
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
    icmp,
    icmp_error,
    igmp,
    igmp_frame,
    ipv4,
    ipv6,
    mld,
    mld_frame,
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
    remote_mac = BROADCAST_MAC if destination == BROADCAST4 else GATEWAY_MAC
    wire = Wire(Path.FROM_VM, remote_mac=remote_mac)
    return wire.wrap4(udp(68, 67, message), UDP, local=source, remote=destination)


def _bad_requests() -> Iterator[tuple[str, bytes]]:
    """Yield BOOTP messages that no client may send, to whomever."""
    for size in (0, 1, 43):
        yield f"F20 message of {size} bytes", bootp()[:size]
    yield "F18 reply", bootp(2)
    yield "F18 hardware type", bootp(hardware_type=6)
    yield "F18 hardware length", bootp(hardware_length=16)
    yield "F18 relay", bootp(relay=IPv4Address(GATEWAY4))
    yield "F18 another client", bootp(client_mac=OTHER_VM_MAC)


def _dhcp_rows() -> Iterator[tuple[str, bytes, Expected]]:
    yield "F19 discover", _dhcp(bootp()), DHCP
    yield "F19 rebind", _dhcp(bootp(), VM4), DHCP
    yield "F19 shortest", _dhcp(bootp()[:44]), DHCP
    for name, message in _bad_requests():
        yield name, _dhcp(message), DHCP_INVALID
        for destination in (GATEWAY4, STRANGER4):
            yield f"{name}, to {destination}", _dhcp(message, VM4, destination), DHCP_INVALID
    spoofed = dropped(Reason.SPOOF_ADDRESS)
    yield "F18 another source", _dhcp(bootp(), OTHER_VM4), spoofed
    yield "F18 another source to one server", _dhcp(bootp(), OTHER_VM4, GATEWAY4), spoofed
    yield "F18 unspecified source to one server", _dhcp(bootp(), UNSPECIFIED4, GATEWAY4), spoofed
    wrong_mac = Wire(Path.FROM_VM, OTHER_VM_MAC)
    frame = wrong_mac.wrap4(udp(68, 67, bootp()), UDP, local=UNSPECIFIED4, remote=BROADCAST4)
    yield "F18 another source MAC", frame, dropped(Reason.SPOOF_MAC)
    frame = OUT.wrap6(udp(546, 547, bytes(4)), UDP, local=VM_LINK_LOCAL, remote=DHCPV6_SERVERS)
    yield "F19 DHCPv6 solicit", frame, DHCP
    frame = OUT.wrap6(udp(546, 547, bytes(4)), UDP, local="fe80::1", remote=DHCPV6_SERVERS)
    yield "F18 DHCPv6 from a foreign source", frame, spoofed
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


def _to_one_server() -> Iterator[tuple[str, bytes]]:
    """Yield well-formed requests to a host: only the policy says whether they may leave."""
    subnet_broadcast = "10.20.0.255"
    for destination in (GATEWAY4, STRANGER4, subnet_broadcast, ALL_HOSTS4):
        yield f"F19 renew at {destination}", _dhcp(bootp(), VM4, destination)
    yield "F19 shortest renew", _dhcp(bootp()[:44], VM4, GATEWAY4)
    yield "F19 DHCPv6 to one server", OUT.wrap6(udp(546, 547), UDP)


def _dhcp_cases() -> Iterator[Case]:
    for name, frame, expected in _dhcp_rows():
        yield ROWS.out(name, frame, expected)
        yield CLOSED_ROWS.out(f"{name}, no rule accepts", frame, expected)
    for name, frame in _to_one_server():
        yield ROWS.out(name, frame, DEFAULT)
        yield CLOSED_ROWS.out(f"{name}, no rule accepts", frame, DENIED)
    for name, message in _bad_requests():
        frame = _dhcp(message, VM4, GATEWAY4)
        yield UNGUARDED.out(f"{name}, to one server, guards off", frame, DHCP_INVALID)
    server4 = OUT.wrap4(udp(67, 68, bootp(2)), UDP)
    yield UNGUARDED.out("F17 DHCP server, guards off", server4, DEFAULT)
    client = _dhcp(bootp(client_mac=OTHER_VM_MAC))
    yield UNGUARDED.out("F18 another client, guards off", client, DHCP_INVALID)
    unspecified = _dhcp(bootp(), UNSPECIFIED4, GATEWAY4)
    yield UNGUARDED.out("F18 unspecified source to one server, guards off", unspecified, DEFAULT)
    for name, frame in (
        ("F21 DHCP answer not asked for", IN.wrap4(udp(67, 68, bootp(2)), UDP)),
        ("F21 DHCPv6 answer not asked for", IN.wrap6(udp(547, 546), UDP)),
        ("F21 DHCP request to the VM", IN.wrap4(udp(68, 67, bootp()), UDP)),
    ):
        yield CLOSED_ROWS.into(name, frame, DENIED)
        yield ROWS.into(f"{name}, a rule accepts", frame, DEFAULT)
    short = IN.wrap4(udp(68, 67, bytes(43)), UDP)
    yield ROWS.into("F20 short request to the VM", short, DHCP_INVALID)


MEMBERSHIP_INVALID = dropped(Reason.MEMBERSHIP_INVALID)
QUERY_REFUSED = dropped(Reason.MEMBERSHIP_QUERY)
BOTH_ROWS = ((Path.FROM_VM, CLOSED_ROWS.out), (Path.TO_VM, CLOSED_ROWS.into))


def _igmp() -> Iterator[Case]:
    reports = {0x12, 0x16, 0x17, 0x22}
    for kind in (0x11, *sorted(reports), 0x00, 0x13, 0x14, 0x30, 0xFF):
        for path, row in BOTH_ROWS:
            expected = MEMBERSHIP if kind in reports else MEMBERSHIP_INVALID
            if kind == 0x11:
                expected = QUERY_REFUSED if path is Path.FROM_VM else MEMBERSHIP
            group = ALL_HOSTS4 if kind == 0x11 else IGMP_ROUTERS4
            yield row(f"J2 IGMP {kind:02x}", igmp_frame(path, igmp(kind), group), expected)
            host = PEER4 if path is Path.FROM_VM else VM4
            frame = igmp_frame(path, igmp(kind), host)
            yield row(f"J3 IGMP {kind:02x} to a host", frame, MEMBERSHIP_INVALID)
    for path, row in BOTH_ROWS:
        for group in ("224.0.0.0", "224.0.0.2", "239.1.2.3", "239.255.255.255"):
            frame = igmp_frame(path, igmp(0x16), group, options=IGMP_ROUTER_ALERT)
            yield row(f"J2 IGMP to {group}", frame, MEMBERSHIP)
        for host in ("223.255.255.255", "240.0.0.0", BROADCAST4, UNSPECIFIED4, GATEWAY4):
            frame = igmp_frame(path, igmp(0x16), host, options=IGMP_ROUTER_ALERT)
            yield row(f"J3 IGMP to {host}", frame, MEMBERSHIP_INVALID)
        host = PEER4 if path is Path.FROM_VM else VM4
        cut = igmp_frame(path, igmp(0x16)[:7], host)
        yield row("A5 IGMP to a host cut at 7", cut, dropped(Reason.TRUNCATED))
        yield row("A10 IGMP to a host cut at 7, padded", cut + bytes(9), BAD_LENGTH)
    for source in (UNSPECIFIED4, OTHER_VM4):
        spoofed = igmp_frame(Path.FROM_VM, igmp(0x16), source=source)
        yield ROWS.out(f"J2 IGMP from {source}", spoofed, dropped(Reason.SPOOF_ADDRESS))
        spoofed = igmp_frame(Path.FROM_VM, igmp(0x16), PEER4, source=source)
        yield ROWS.out(f"J3 IGMP from {source} to a host", spoofed, MEMBERSHIP_INVALID)
    frame = igmp_frame(Path.FROM_VM, igmp(0x16), PEER4)
    yield UNGUARDED.out("J3 IGMP to a host, guards off", frame, MEMBERSHIP_INVALID)


def _mld() -> Iterator[Case]:
    for kind in (130, 131, 132, 143):
        group = ALL_NODES6 if kind == 130 else MLD_ROUTERS6
        message = mld(kind)
        for source in (VM_LINK_LOCAL, VM6, "::"):
            frame = mld_frame(Path.FROM_VM, message, group, source=source)
            expected = QUERY_REFUSED if kind == 130 else MEMBERSHIP
            yield CLOSED_ROWS.out(f"J2 MLD {kind} from {source}", frame, expected)
        foreign = mld_frame(Path.FROM_VM, message, group, source="fe80::1")
        yield ROWS.out(f"J2 MLD {kind} spoofed", foreign, dropped(Reason.SPOOF_ADDRESS))
        got = mld_frame(Path.TO_VM, message, group)
        yield CLOSED_ROWS.into(f"J2 MLD {kind}", got, MEMBERSHIP)
        bare = OUT.wrap6(message, ICMPV6, remote=group, hop_limit=1)
        yield ROWS.out(f"J3 MLD {kind} without router alert", bare, MEMBERSHIP_INVALID)
        far = mld_frame(Path.FROM_VM, message, group, hop_limit=2)
        yield ROWS.out(f"J3 MLD {kind} with hop limit 2", far, MEMBERSHIP_INVALID)
        for size in range(8, 8 if kind == 143 else 24):
            cut = mld_frame(Path.FROM_VM, message[:size], group)
            yield ROWS.out(f"A5 MLD {kind} cut at {size}", cut, dropped(Reason.TRUNCATED))
            padded = cut + bytes(24)
            yield ROWS.out(f"A10 MLD {kind} cut at {size}, padded", padded, BAD_LENGTH)
        for path, row in BOTH_ROWS:
            own = PEER6 if path is Path.FROM_VM else VM6
            for host in (own, GATEWAY6, VM_LINK_LOCAL, "::", "feff::1"):
                frame = mld_frame(path, message, host)
                yield row(f"J3 MLD {kind} to {host}", frame, MEMBERSHIP_INVALID)
            cut = mld_frame(path, message[:8], own)  # all there is to a report of version 2
            yield row(f"J3 MLD {kind} to a host, cut at 8", cut, MEMBERSHIP_INVALID)
        frame = mld_frame(Path.FROM_VM, message, PEER6)
        yield UNGUARDED.out(f"J3 MLD {kind} to a host, guards off", frame, MEMBERSHIP_INVALID)
    for path, row in BOTH_ROWS:
        for group in ("ff00::", "ff05::16", "ff0e::1", "ff3e::8000:1", "ff02::1:ff00:11"):
            yield row(f"J2 MLD to {group}", mld_frame(path, mld(131), group), MEMBERSHIP)
    # As br_ip6_multicast_alloc_query() of Linux builds it, down to the two Pad1.
    header = bytes.fromhex("3a00050200000000")
    general = icmp(130, 0, 1000 << 16, bytes(16))
    bridge = "fe80::fc54:ff:fe00:1"
    query = mld_frame(Path.TO_VM, general, ALL_NODES6, source=bridge, headers=header)
    yield CLOSED_ROWS.into("J2 general query of a Linux bridge", query, MEMBERSHIP)
    yield UNGUARDED.into("J2 general query of a Linux bridge, guards off", query, MEMBERSHIP)
    query = mld_frame(Path.FROM_VM, general, ALL_NODES6, headers=header)
    yield ROWS.out("J2 general query of a bridge in the VM", query, QUERY_REFUSED)


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
    *_igmp(),
    *_mld(),
    *_icmp(),
    *_errors(),
    *_other_protocols(),
)
