# SPDX-License-Identifier: Apache-2.0
"""Verdict table of IPv6: cut headers, lengths that lie, extension headers, fragments."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import OPEN, OTHER_PROTOCOLS, SERVER, UNGUARDED_OPEN
from tests.cases.ipv4 import BAD_LENGTH, TRUNCATED
from tests.cases.table import DEFAULT, Case, Rows, accepted, by_rule, dropped
from tests.frames import (
    ALL_NODES6,
    ICMP,
    ICMPV6,
    IGMP,
    IN,
    IPV4,
    IPV6,
    MLD_ROUTERS6,
    OUT,
    PEER4,
    PEER6,
    SCTP,
    TCP,
    UDP,
    VM4,
    VM6,
    VM_LINK_LOCAL,
    Wire,
    echo,
    ethernet,
    extension,
    fragment6,
    hop_by_hop,
    icmp,
    icmp_error,
    igmp,
    ipv6,
    mld,
    mld_frame,
    router_solicitation,
    sctp,
    solicitation,
    tcp,
    udp,
)
from vgw.abi import Path, Reason

ROWS = Rows(OPEN)
EXTENSION = dropped(Reason.EXTENSION_HEADER)
PROTOCOL = dropped(Reason.PROTOCOL)
#: Name, protocol, a segment, the length of its header, the hop limit that suits it.
SEGMENTS = (
    ("A5 TCP", TCP, tcp(), 20, 64),
    ("A5 UDP", UDP, udp(), 8, 64),
    ("A5 SCTP", SCTP, sctp(), 12, 64),
    ("A5 ICMPv6", ICMPV6, echo(128), 8, 64),
    ("A5 ICMPv6 redirect", ICMPV6, icmp(137), 8, 255),
)
NEIGHBOUR_MESSAGES = (
    ("A5 NS", solicitation(VM6), 24),
    ("A5 NA", icmp(136, 0, 0, bytes(16)), 24),
    ("A5 RS", router_solicitation(), 8),
    ("A5 RA", icmp(134, 0, 0, bytes(8)), 16),
)


def _packet(wire: Wire, content: bytes, protocol: int, **fields: int) -> bytes:
    ends = (VM6, PEER6) if wire.path is Path.FROM_VM else (PEER6, VM6)
    return wire.frame(ipv6(content, protocol, *ends, **fields), IPV6)  # type: ignore[arg-type]


def _cut() -> Iterator[Case]:
    for wire, row in ((OUT, ROWS.out), (IN, ROWS.into)):
        frame = wire.wrap6(tcp(), TCP)
        for size in range(1, 40):
            yield row(f"A4 IPv6 header cut at {size}", frame[: 14 + size], TRUNCATED)
        for size in range(40, 60):
            yield row(f"A11 packet cut at {size}, length kept", frame[: 14 + size], BAD_LENGTH)
        for name, protocol, segment, header, hop_limit in SEGMENTS:
            for size in range(1, header):
                cut = _packet(wire, segment[:size], protocol, hop_limit=hop_limit)
                yield row(f"{name} over IPv6 cut at {size}", cut, TRUNCATED)
                padded = cut + bytes(24)
                yield row(f"A10 {name[3:]} over IPv6 cut at {size}, padded", padded, BAD_LENGTH)
        for name, message, fixed in NEIGHBOUR_MESSAGES:
            for size in range(1, fixed):
                cut = _packet(wire, message[:size], ICMPV6, hop_limit=255)
                yield row(f"{name} cut at {size}", cut, TRUNCATED)
                yield row(f"A10 {name[3:]} cut at {size}, padded", cut + bytes(30), BAD_LENGTH)


def _lengths() -> Iterator[Case]:
    yield from ROWS.both("A11 length 508", lambda w: _packet(w, tcp(), TCP, length=508), BAD_LENGTH)
    yield from ROWS.both("A11 length 0", lambda w: _packet(w, tcp(), TCP, length=0), BAD_LENGTH)
    yield from ROWS.both("A11 one too long", lambda w: _packet(w, tcp(), 6, length=21), BAD_LENGTH)
    yield from ROWS.both("A11 below TCP", lambda w: _packet(w, tcp(), 6, length=19), BAD_LENGTH)
    yield from ROWS.both("K2 length 0", lambda w: _packet(w, tcp(), TCP, length=0), BAD_LENGTH)
    yield from ROWS.both(
        "K2 length 0 on GSO", lambda w: _packet(w, tcp(), TCP, length=0), DEFAULT, gso=True
    )
    empty = ethernet(ipv6(b"", TCP, length=0), IPV6)
    yield ROWS.out("K2 length 0 on GSO, and nothing there", empty, BAD_LENGTH, gso=True)
    yield from ROWS.both("A9 padding over IPv6", lambda w: w.wrap6(tcp(), 6) + bytes(9), DEFAULT)
    jumbo = hop_by_hop(TCP, bytes.fromhex("c20400000014"))
    for name, length in (("E19 jumbogram", 0), ("E19 jumbogram with a length", None)):
        packet = ipv6(tcp(), TCP, headers=jumbo, first=0, length=length)
        expected = BAD_LENGTH if length == 0 else EXTENSION
        yield ROWS.out(name, ethernet(packet, IPV6), expected)
    big = hop_by_hop(TCP, bytes.fromhex("c2040000001c"))
    for name, headers, expected in (
        ("BIG TCP", big, DEFAULT),
        ("BIG TCP with a wrong length", jumbo, EXTENSION),
        ("BIG TCP with another option", hop_by_hop(TCP, bytes.fromhex("c3040000001c")), EXTENSION),
        (
            "BIG TCP behind two headers",
            hop_by_hop(0, bytes.fromhex("c20400000024")) + big,
            EXTENSION,
        ),
    ):
        yield from ROWS.both(
            f"K2 {name}",
            lambda w, headers=headers: _packet(  # type: ignore[misc]
                w, tcp(), TCP, headers=headers, first=0, length=0
            ),
            expected,
            gso=True,
        )
    for version in (0, 4, 5, 7, 15):
        yield ROWS.out(
            f"A14 IPv6 version {version}",
            _packet(OUT, tcp(), TCP, first_word=version << 28),
            dropped(Reason.BAD_VERSION),
        )
    under_ipv4 = ethernet(OUT.wrap6(tcp(), TCP)[14:], IPV4)
    yield ROWS.out("A14 version 6 under 0800", under_ipv4, dropped(Reason.BAD_VERSION))
    for word in (0x60000001, 0x600FFFFF, 0x6FF00000, 0x6FFFFFFF):
        frame = _packet(OUT, tcp(), TCP, first_word=word)
        yield ROWS.out(f"E23 first word {word:08x}", frame, DEFAULT)


def _extensions() -> Iterator[Case]:
    for number in (0, 43, 59, 60, 135, 139, 140):
        header = extension(TCP)
        identity = "E20" if number >= 135 else "E3"
        yield from ROWS.both(
            f"{identity} extension {number} before TCP",
            lambda wire, n=number, h=header: wire.wrap6(tcp(), TCP, headers=h, first=n),  # type: ignore[misc]
            EXTENSION,
        )
        chain = hop_by_hop(number) + extension(ICMPV6)
        frame = mld_frame(Path.FROM_VM, mld(131), headers=chain)
        yield ROWS.out(f"E2 hop-by-hop, then {number}", frame, EXTENSION)
        atomic = fragment6(number) + extension(TCP)
        frame = OUT.wrap6(tcp(), TCP, headers=atomic, first=44)
        yield ROWS.out(f"E18 atomic fragment, then {number}", frame, EXTENSION)
    for kind in (0, 2, 3, 4, 200):
        identity = "E5" if kind else "E4"
        for left in (0, 1, 2):
            routing = extension(TCP, bytes([kind, left]) + bytes(20), units=2)
            yield from ROWS.both(
                f"{identity} routing header type {kind}, {left} left",
                lambda wire, r=routing: wire.wrap6(tcp(), TCP, headers=r, first=43),  # type: ignore[misc]
                EXTENSION,
            )
    yield from _authenticated()
    for count in (3, 8, 9, 16, 64):
        chain = extension(60) * (count - 1) + extension(TCP)
        frame = OUT.wrap6(tcp(), TCP, headers=chain, first=60)
        yield ROWS.out(f"E6 {count} extension headers", frame, EXTENSION)
    frame = OUT.wrap6(udp(), UDP, headers=hop_by_hop(UDP), first=0)
    yield ROWS.out("E1 hop-by-hop before UDP", frame, EXTENSION)
    frame = OUT.wrap6(b"", 59, headers=b"x" * 8, first=59)
    yield ROWS.out("E11 no next header", frame, EXTENSION)
    long_header = extension(ICMPV6, bytes.fromhex("050200000100"), units=255)
    frame = mld_frame(Path.FROM_VM, mld(131), headers=long_header)
    yield ROWS.out("E7 hop-by-hop of 2048 bytes", frame, EXTENSION)
    for first, name in ((0, "hop-by-hop"), (44, "fragment header")):
        for size in range(1, 8):
            cut = OUT.wrap6(b"", TCP, headers=hop_by_hop()[:size], first=first)
            yield ROWS.out(f"E7 {name} cut at {size}", cut, TRUNCATED)
            padded = cut + bytes(20)
            yield ROWS.out(f"E7 {name} cut at {size}, padded", padded, TRUNCATED)


def _authenticated() -> Iterator[Case]:
    """An authentication header is a protocol by its number; the ports behind it are not read."""
    for words in (0, 1, 4, 255):
        header = bytes([TCP, words]) + bytes(10)
        frame = IN.wrap6(tcp(), TCP, headers=header + bytes(12), first=51)
        yield Rows(SERVER).into(f"E8 AH of {words} words before TCP 443", frame, PROTOCOL)
        frame = OUT.wrap6(tcp(dport=23), TCP, headers=header + bytes(12), first=51)
        yield ROWS.out(f"E8 AH of {words} words before TCP 23", frame, PROTOCOL)
        named = by_rule("esp")
        yield Rows(OTHER_PROTOCOLS).out(f"E8 AH of {words} words that a rule names", frame, named)
    hidden = OUT.wrap6(tcp(), TCP, headers=extension(51) + bytes([TCP, 4]) + bytes(22), first=60)
    yield ROWS.out("E8 AH behind destination options", hidden, EXTENSION)


def _hop_by_hop() -> Iterator[Case]:
    good = {
        "E1 alert, PadN": "050200000100",
        "E1 PadN, alert": "010005020000",
        "E1 alert, Pad1 twice": "050200000000",
        "E1 Pad1 twice, alert": "000005020000",
    }
    bad = {
        "E1 alert for RSVP": "050200010100",
        "E1 no alert": "010400000000",
        "E1 alert for RSVP, Pad1": "050200010000",
        "E1 Pad1, alert for RSVP": "000005020001",
        "E1 wrong padding": "050200000101",
        "E1 wrong padding, alert": "010105020000",
        "E1 Pad1, alert, Pad1": "000502000000",
        "E1 alert, Pad1, half an option": "050200000001",
        "E1 alert of three bytes": "050300000000",
        "E1 Pad1 alone": "000000000000",
        "E1 jumbo": "c20400010000",
    }
    for name, options in {**good, **bad}.items():
        header = hop_by_hop(ICMPV6, bytes.fromhex(options))
        expected = accepted(Reason.MEMBERSHIP) if name in good else EXTENSION
        for kind in (131, 132, 143):
            frame = mld_frame(Path.FROM_VM, mld(kind), headers=header)
            yield ROWS.out(f"{name}, MLD {kind}", frame, expected)
        queried = dropped(Reason.MEMBERSHIP_QUERY) if name in good else EXTENSION
        query = mld(130, "::")
        frame = mld_frame(Path.FROM_VM, query, ALL_NODES6, headers=header)
        yield ROWS.out(f"{name}, MLD 130", frame, queried)
        frame = mld_frame(Path.TO_VM, query, ALL_NODES6, headers=header)
        yield ROWS.into(f"{name}, MLD 130", frame, expected)
        frame = OUT.wrap6(echo(128), ICMPV6, headers=header, first=0)
        yield ROWS.out(f"{name}, no MLD", frame, EXTENSION)
    for kind in (1, 128, 129, 133, 134, 135, 136, 138, 200):
        message = icmp(kind, 0, 0, bytes(56))
        for wire, row in ((OUT, ROWS.out), (IN, ROWS.into)):
            frame = wire.wrap6(message, ICMPV6, headers=hop_by_hop(), first=0, hop_limit=255)
            yield row(f"F14 hop-by-hop, then ICMPv6 {kind}", frame, EXTENSION)
    redirect = OUT.wrap6(icmp(137, 0, 0, bytes(32)), ICMPV6, headers=hop_by_hop(), first=0)
    yield ROWS.out("F16 hop-by-hop, then redirect", redirect, dropped(Reason.REDIRECT))
    for size in range(8):
        cut = mld_frame(Path.FROM_VM, mld(131)[:size])
        yield ROWS.out(f"E7 hop-by-hop, then ICMPv6 cut at {size}", cut, TRUNCATED)


def _fragments() -> Iterator[Case]:
    refused = dropped(Reason.FRAGMENT)
    headers = {
        "E12 first piece of 20 bytes": fragment6(TCP, more=True),
        "E13 later fragment alone": fragment6(TCP, 8),
        "E13 offset 1": fragment6(TCP, 1),
        "E13 last offset": fragment6(TCP, 0x1FFF, more=True),
        "E15 fragment of an extension": fragment6(60, more=True),
    }
    for name, header in headers.items():
        yield from ROWS.both(
            name,
            lambda wire, header=header: wire.wrap6(tcp(), TCP, headers=header, first=44),  # type: ignore[misc]
            refused,
        )
    for name, protocol, segment in (
        ("TCP", TCP, tcp()),
        ("UDP", UDP, udp()),
        ("SCTP", 132, sctp()),
    ):
        yield from ROWS.both(
            f"E14 atomic fragment with {name}",
            lambda wire, p=protocol, s=segment: wire.wrap6(s, p, headers=fragment6(p), first=44),  # type: ignore[misc]
            DEFAULT,
        )
    reserved = bytearray(fragment6(TCP))
    reserved[1], reserved[3] = 0xFF, 0x06
    frame = OUT.wrap6(tcp(), TCP, headers=bytes(reserved), first=44)
    yield ROWS.out("E14 atomic fragment with reserved bits", frame, DEFAULT)
    twice = OUT.wrap6(tcp(), TCP, headers=fragment6(44) + fragment6(TCP), first=44)
    yield ROWS.out("E15 atomic fragment in an atomic fragment", twice, EXTENSION)
    for name, message in (
        ("RS", router_solicitation()),
        ("NS", solicitation(VM6)),
        ("RA", icmp(134, 0, 0, bytes(8))),
    ):
        frame = OUT.wrap6(message, ICMPV6, headers=fragment6(58), first=44, hop_limit=255)
        yield ROWS.out(f"F12 {name} in an atomic fragment", frame, dropped(Reason.ND_INVALID))
    frame = mld_frame(Path.FROM_VM, mld(131), headers=fragment6(58), first=44)
    yield ROWS.out("J3 MLD in an atomic fragment", frame, dropped(Reason.MEMBERSHIP_INVALID))
    frame = OUT.wrap6(echo(128), ICMPV6, headers=fragment6(58), first=44)
    yield ROWS.out("E14 echo in an atomic fragment", frame, DEFAULT)
    short = OUT.wrap6(tcp()[:10], TCP, headers=fragment6(TCP), first=44)
    yield ROWS.out("E14 TCP cut in an atomic fragment", short, TRUNCATED)


def _mapped() -> Iterator[Case]:
    """An IPv4-mapped address in an IPv6 packet must never be taken for the IPv4 address."""
    refused = dropped(Reason.BAD_ADDRESS)
    unguarded = Rows(UNGUARDED_OPEN)
    for local, remote in (
        (f"::ffff:{VM4}", PEER6),
        (VM6, f"::ffff:{PEER4}"),
        (f"::ffff:{VM4}", f"::ffff:{PEER4}"),
        ("::ffff:0.0.0.0", "::ffff:255.255.255.255"),
    ):
        for rows, guards in ((ROWS, "on"), (unguarded, "off")):
            name = f"E21 IPv4-mapped {local} and {remote}, guards {guards}"
            frames = {
                "TCP": (tcp(), TCP, 64),
                "DHCP": (udp(68, 67, bytes(60)), UDP, 64),
                "NS": (solicitation(VM6), ICMPV6, 255),
                "GRE": (bytes(8), 47, 64),
            }
            for kind, (segment, protocol, hop_limit) in frames.items():
                for wire, row in ((OUT, rows.out), (IN, rows.into)):
                    frame = wire.wrap6(
                        segment, protocol, local=local, remote=remote, hop_limit=hop_limit
                    )
                    yield row(f"{name}, {kind}", frame, refused)
    cut = OUT.wrap6(tcp(), TCP, local=f"::ffff:{VM4}")[:-1]
    yield ROWS.out("E21 before lengths", cut, refused)
    target = OUT.wrap6(solicitation(f"::ffff:{VM4}"), ICMPV6, hop_limit=255)
    yield ROWS.out("E21 NS for an IPv4-mapped target", target, dropped(Reason.ND_INVALID))
    for source, destination in ((f"::ffff:{PEER4}", VM6), (PEER6, f"::ffff:{VM4}")):
        quote = icmp_error(1, ipv6(tcp(), TCP, source, destination))
        frame = OUT.wrap6(quote, ICMPV6)
        name = f"E21 error about {source} to {destination}"
        yield ROWS.out(name, frame, dropped(Reason.ICMP_INNER))
    nearly = IN.wrap6(tcp(), TCP, remote="::fffe:192.0.2.10")
    yield ROWS.into("E21 not quite IPv4-mapped", nearly, DEFAULT)


def _upper() -> Iterator[Case]:
    for number in (2, 47, 50, 51, 89, 141, 143, 150, 252, 253, 254, 255):
        for first_byte in (6, 17, 58, 44):
            frame = OUT.wrap6(bytes([first_byte]) + bytes(39), number)
            yield ROWS.out(f"E9 next header {number}, then {first_byte}", frame, PROTOCOL)
    lure = OUT.wrap6(sctp(6 << 8 | 17, 44 << 8 | 58), SCTP)
    yield ROWS.out("E10 SCTP that looks like headers", lure, DEFAULT)
    yield from ROWS.both("H13 ICMP over IPv6", lambda w: w.wrap6(echo(8), ICMP), PROTOCOL)
    yield from ROWS.both("J2 IGMP over IPv6", lambda w: w.wrap6(igmp(0x16), IGMP), PROTOCOL)
    frame = OUT.wrap6(igmp(0x16), IGMP, remote=MLD_ROUTERS6)
    yield ROWS.out("J2 IGMP over IPv6 to a group", frame, PROTOCOL)
    yield from ROWS.both("H13 ICMPv6 over IPv4", lambda w: w.wrap4(echo(128), ICMPV6), PROTOCOL)
    solicited = solicitation(VM6)
    yield from ROWS.both("F12 NS over IPv4", lambda w: w.wrap4(solicited, ICMPV6), PROTOCOL)
    frame = OUT.wrap6(tcp(), TCP, local=VM_LINK_LOCAL, remote="fe80::1")
    yield ROWS.out("A6 TCP between link-local addresses", frame, DEFAULT)


CASES: tuple[Case, ...] = (
    *_cut(),
    *_lengths(),
    *_extensions(),
    *_hop_by_hop(),
    *_fragments(),
    *_mapped(),
    *_upper(),
)
