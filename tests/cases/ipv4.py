# SPDX-License-Identifier: Apache-2.0
"""Verdict table of IPv4: cut headers, lengths that lie, versions, options, fragments."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import OPEN
from tests.cases.table import DEFAULT, Case, Rows, accepted, dropped
from tests.frames import (
    ICMP,
    IGMP,
    IGMP_ROUTER_ALERT,
    IGMP_ROUTERS4,
    IN,
    IPV4,
    IPV6,
    OUT,
    PEER4,
    SCTP,
    TCP,
    UDP,
    VM4,
    Wire,
    echo,
    ethernet,
    icmp,
    igmp,
    igmp_frame,
    ipv4,
    sctp,
    tcp,
    udp,
)
from vgw.abi import Path, Reason

ROWS = Rows(OPEN)
TRUNCATED, BAD_LENGTH = dropped(Reason.TRUNCATED), dropped(Reason.BAD_LENGTH)
#: Name, protocol, a segment and the length of its header.
SEGMENTS = (
    ("A5 TCP", TCP, tcp(), 20),
    ("A5 UDP", UDP, udp(), 8),
    ("A5 SCTP", SCTP, sctp(), 12),
    ("A5 ICMP", ICMP, echo(8), 8),
    ("A5 ICMP redirect", ICMP, icmp(5), 8),
    ("A5 IGMP", IGMP, igmp(0x16), 8),
)
OPTIONS = {
    "C2 no operation": "01010101",
    "C2 end of list": "00000000",
    "C4 loose source route": "830704c0a8010100",
    "C4 strict source route": "890704c0a8010100",
    "C4 record route": "0707040000000000",
    "C4 timestamp": "4408050000000000",
    "C4 security": "820b0000000000000000000000",
    "C5 length 0": "83000000",
    "C5 length 1": "83010000",
    "C5 past the header": "83280400",
    "C5 end in the middle": "0100830704000000",
    "C6 router alert": "94040000",
    "C2 the longest": "01" * 40,
}


def _packet(wire: Wire, content: bytes, protocol: int, **fields: int) -> bytes:
    """A packet between VM and peer, or to a group, whose fields are what the test wants."""
    ends = (VM4, PEER4) if wire.path is Path.FROM_VM else (PEER4, VM4)
    if protocol == IGMP:
        ends = ends[0], IGMP_ROUTERS4
    packet = ipv4(content, protocol, *ends, **fields)  # type: ignore[arg-type]
    return wire.frame(packet, IPV4, ends[1])


def _cut() -> Iterator[Case]:
    for wire, row in ((OUT, ROWS.out), (IN, ROWS.into)):
        frame = wire.wrap4(tcp(), TCP)
        for size in range(1, 20):
            yield row(f"A3 IPv4 header cut at {size}", frame[: 14 + size], TRUNCATED)
        for size in range(20, 40):
            yield row(f"A7 packet cut at {size}, length kept", frame[: 14 + size], BAD_LENGTH)
        for name, protocol, segment, header in SEGMENTS:
            for size in range(header):
                cut = _packet(wire, segment[:size], protocol)
                yield row(f"{name} cut at {size}", cut, TRUNCATED)
                # Enough zeros behind the packet to make up a header out of padding.
                yield row(f"A10 {name[3:]} cut at {size}, padded", cut + bytes(40), BAD_LENGTH)
                few = cut + bytes(header - size - 1)
                yield row(f"A10 {name[3:]} cut at {size}, one byte short", few, TRUNCATED)


def _lengths() -> Iterator[Case]:
    segment = tcp(payload=b"x" * 20)
    yield from ROWS.both(
        "A7 total length 508", lambda w: _packet(w, segment, 6, total=508), BAD_LENGTH
    )
    yield from ROWS.both("A7 one too long", lambda w: _packet(w, segment, 6, total=61), BAD_LENGTH)
    for total in (1, 10, 19):
        yield ROWS.out(
            f"A8 total length {total}", _packet(OUT, segment, TCP, total=total), BAD_LENGTH
        )
    yield from ROWS.both("A8 total length 0", lambda w: _packet(w, segment, 6, total=0), BAD_LENGTH)
    yield from ROWS.both("K2 total length 0", lambda w: _packet(w, segment, 6, total=0), BAD_LENGTH)
    yield from ROWS.both(
        "K2 total length 0 on GSO", lambda w: _packet(w, segment, 6, total=0), DEFAULT, gso=True
    )
    yield from ROWS.both(
        "A8 total length 0 on GSO", lambda w: _packet(w, segment, 6, total=0), DEFAULT, gso=True
    )
    yield from ROWS.both(
        "A8 total length 19 on GSO",
        lambda w: _packet(w, segment, 6, total=19),
        BAD_LENGTH,
        gso=True,
    )
    yield from ROWS.both("A9 padding", lambda w: w.wrap4(tcp(), TCP) + bytes(6), DEFAULT)
    yield from ROWS.both("A9 hidden bytes", lambda w: w.wrap4(tcp(), 6) + b"x" * 900, DEFAULT)
    yield from ROWS.both("A6 bare TCP", lambda w: w.wrap4(tcp(), TCP), DEFAULT)
    yield from ROWS.both("A6 empty UDP", lambda w: w.wrap4(udp(), UDP), DEFAULT)
    yield ROWS.out("A6 no protocol header at all", OUT.wrap4(b"", 47), dropped(Reason.PROTOCOL))


def _versions() -> Iterator[Case]:
    for version in (0, 1, 5, 6, 15):
        first = version << 4 | 5
        yield from ROWS.both(
            f"A14 version {version}",
            lambda wire, first=first: _packet(wire, tcp(), TCP, first_byte=first),  # type: ignore[misc]
            dropped(Reason.BAD_VERSION),
        )
    under_ipv6 = ethernet(OUT.wrap4(tcp(payload=b"x" * 20), TCP)[14:], IPV6)
    yield ROWS.out("A14 version 4 under 86dd", under_ipv6, dropped(Reason.BAD_VERSION))
    for words in range(5):
        frame = _packet(OUT, tcp(), TCP, first_byte=0x40 | words)
        yield ROWS.out(f"C1 IHL {words}", frame, dropped(Reason.BAD_HEADER))
    for words in range(6, 16):
        frame = ethernet(ipv4(b"", TCP, first_byte=0x40 | words), IPV4)
        yield ROWS.out(f"C3 IHL {words} beyond the frame", frame, TRUNCATED)
        lying = _packet(
            OUT, tcp(payload=b"x" * 60), TCP, first_byte=0x40 | words, total=words * 4 - 1
        )
        yield ROWS.out(f"A8 total length below IHL {words}", lying, BAD_LENGTH)


def _options() -> Iterator[Case]:
    refused = dropped(Reason.IP_OPTIONS)
    for name, text in OPTIONS.items():
        options = bytes.fromhex(text)
        options += bytes(-len(options) % 4)
        for wire, row in ((OUT, ROWS.out), (IN, ROWS.into)):
            yield row(f"{name}, TCP", wire.wrap4(tcp(), TCP, options=options), refused)
        if options != IGMP_ROUTER_ALERT:
            frame = igmp_frame(Path.FROM_VM, igmp(0x16), options=options)
            yield ROWS.out(f"C7 {name[3:]}, IGMP", frame, refused)
    frame = igmp_frame(Path.FROM_VM, igmp(0x16), options=IGMP_ROUTER_ALERT)
    yield ROWS.out("C6 IGMP with router alert", frame, accepted(Reason.MEMBERSHIP))
    frame = igmp_frame(Path.FROM_VM, igmp(0x16), options=bytes.fromhex("94040001"))
    yield ROWS.out("C7 IGMP with router alert 1", frame, refused)
    frame = igmp_frame(Path.FROM_VM, igmp(0x16), options=IGMP_ROUTER_ALERT + bytes(4))
    yield ROWS.out("C7 IGMP with router alert and more", frame, refused)
    fragment = OUT.wrap4(tcp(), TCP, options=bytes(4), fragment=0x2000)
    yield ROWS.out("D13 options and a fragment", fragment, refused)


def _fragments() -> Iterator[Case]:
    fragments = {
        "D9 first piece of 20 bytes": 0x2000,
        "D3 offset 1": 0x0001,
        "D9 later piece of 20 bytes": 0x2010,
        "D5 last piece alone": 0x0010,
        "D8 offset and length beyond 65535": 0x1FFF,
        "D9 MF and DF": 0x6000,
    }
    for name, field in fragments.items():
        yield from ROWS.both(
            name,
            lambda wire, field=field: wire.wrap4(tcp(), TCP, fragment=field),  # type: ignore[misc]
            dropped(Reason.FRAGMENT),
        )
    tiny = OUT.wrap4(tcp()[:8], TCP, fragment=0x2000)
    yield ROWS.out("D2 tiny first fragment", tiny, dropped(Reason.FRAGMENT))
    empty = OUT.wrap4(b"", TCP, fragment=0x2000)
    yield ROWS.out("D9 empty fragment", empty, dropped(Reason.FRAGMENT))
    small = OUT.wrap4(b"abc", ICMP, fragment=0x0100)
    yield ROWS.out("D12 small later ICMP fragment alone", small, dropped(Reason.FRAGMENT))
    yield ROWS.out("C8 reserved flag", OUT.wrap4(tcp(), TCP, fragment=0x8000), DEFAULT)
    yield ROWS.out("C8 DF", OUT.wrap4(tcp(), TCP, fragment=0x4000), DEFAULT)


def _ignored() -> Iterator[Case]:
    for ttl in (0, 1, 255):
        yield ROWS.out(f"C9 TTL {ttl}", OUT.wrap4(tcp(), TCP, ttl=ttl), DEFAULT)
    frame = bytearray(OUT.wrap4(tcp(), TCP))
    frame[24] ^= 0xFF
    yield ROWS.out("C10 wrong header checksum", bytes(frame), DEFAULT)
    frame = bytearray(OUT.wrap4(tcp(), TCP))
    frame[50] ^= 0xFF
    yield ROWS.out("C10 wrong TCP checksum", bytes(frame), DEFAULT)
    for tos in (0x02, 0xB8, 0xFF):
        yield ROWS.out(f"C8 type of service {tos:02x}", _packet(OUT, tcp(), TCP, tos=tos), DEFAULT)


CASES: tuple[Case, ...] = (
    *_cut(),
    *_lengths(),
    *_versions(),
    *_options(),
    *_fragments(),
    *_ignored(),
)
