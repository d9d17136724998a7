# SPDX-License-Identifier: Apache-2.0
"""Verdict table of single TCP segments: flags, data offset, ports, what needs a flow."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import OPEN
from tests.cases.table import DEFAULT, NO_STATE, Case, Rows, dropped
from tests.frames import OUT, TCP, tcp
from vgw.abi import Reason

ROWS = Rows(OPEN)
OPENING = {"S"}
NEEDS_FLOW = {"SA", "R", "RA", "A", "FA"}
STATE_FLAGS = "FSRA"
#: ECE and CWR, and the accurate-ECN bit's byte is not the flags' one.
ECN = 0xC0


def _flags() -> Iterator[Case]:
    for bits in range(16):
        letters = "".join(STATE_FLAGS[i] for i in range(4) if bits >> i & 1)
        expected = dropped(Reason.TCP_FLAGS)
        if letters in OPENING:
            expected = DEFAULT
        elif set(letters) in [set(flags) for flags in NEEDS_FLOW]:
            expected = NO_STATE
        for extra, more in (("", 0), ("P", 0), ("U", 0), ("PU", 0), ("", ECN), ("PU", ECN)):
            label = f"{letters or 'none'}{extra and '+' + extra}{' with ECN' if more else ''}"
            yield from ROWS.both(
                f"G1 flags {label}",
                lambda wire, f=letters + extra, m=more: wire.wrap4(tcp(flags=f, extra_flags=m), 6),  # type: ignore[misc]
                expected,
            )
        yield from ROWS.both(
            f"G1 flags {letters or 'none'} over IPv6",
            lambda wire, f=letters: wire.wrap6(tcp(flags=f), TCP),  # type: ignore[misc]
            expected,
        )


def _headers() -> Iterator[Case]:
    bad = dropped(Reason.BAD_HEADER)
    for words in range(5):
        frame = OUT.wrap4(tcp(words=words, payload=bytes(40)), TCP)
        yield ROWS.out(f"A13 data offset {words}", frame, bad)
    for words in range(6, 16):
        room = (words - 5) * 4
        fits = OUT.wrap4(tcp(words=words, payload=bytes(room)), TCP)
        yield ROWS.out(f"A13 data offset {words} fits", fits, DEFAULT)
        short = OUT.wrap4(tcp(words=words, payload=bytes(room - 1)), TCP)
        yield ROWS.out(f"A13 data offset {words} beyond the segment", short, bad)
        yield ROWS.out(f"A13 data offset {words} in padding", short + bytes(8), bad)
    over_ipv6 = OUT.wrap6(tcp(words=6), TCP)
    yield ROWS.out("A13 data offset beyond, IPv6", over_ipv6, bad)
    both_wrong = OUT.wrap4(tcp(0, 0, "SF", words=4), TCP)
    yield ROWS.out("A13 before flags and ports", both_wrong, bad)
    flags_and_port = OUT.wrap4(tcp(0, 80, "SF"), TCP)
    yield ROWS.out("G1 before ports", flags_and_port, dropped(Reason.TCP_FLAGS))


def _ports() -> Iterator[Case]:
    zero = dropped(Reason.PORT_ZERO)
    for sport, dport in ((0, 80), (40000, 0), (0, 0)):
        for flags in ("S", "A"):
            yield from ROWS.both(
                f"I15 TCP {sport} to {dport}, {flags}",
                lambda wire, s=sport, d=dport, f=flags: wire.wrap4(tcp(s, d, f), TCP),  # type: ignore[misc]
                zero,
            )
    yield ROWS.out("I15 TCP from port 0, IPv6", OUT.wrap6(tcp(0, 80), TCP), zero)
    for sport, dport in ((1, 1), (65535, 65535), (1, 65535)):
        yield ROWS.out(f"I15 TCP {sport} to {dport}", OUT.wrap4(tcp(sport, dport), TCP), DEFAULT)


def _odd_openings() -> Iterator[Case]:
    yield ROWS.out("G2 SYN with data", OUT.wrap4(tcp(payload=b"GET /"), TCP), DEFAULT)
    fast_open = tcp(words=8, payload=bytes.fromhex("220a0102030405060708") + bytes(2) + b"data")
    yield ROWS.out("G2 fast open", OUT.wrap4(fast_open, TCP), DEFAULT)
    accurate = bytearray(tcp(extra_flags=ECN))
    accurate[12] |= 1
    yield ROWS.out("G2 accurate ECN", OUT.wrap4(bytes(accurate), TCP), DEFAULT)
    for flags, name in (("S", "without URG"), ("SU", "with URG")):
        for pointer in (0, 1, 4, 0x7FFF, 0xFFFF):
            urgent = bytearray(tcp(flags=flags, payload=b"data"))
            urgent[18:20] = pointer.to_bytes(2, "big")
            frame = OUT.wrap4(bytes(urgent), TCP)
            yield ROWS.out(f"G18 urgent pointer {pointer} {name}", frame, DEFAULT)
    for sequence in (0, 0xFFFFFFFF):
        frame = OUT.wrap4(tcp(seq=sequence), TCP)
        yield ROWS.out(f"G21 SYN with sequence {sequence}", frame, DEFAULT)
    acked = OUT.wrap4(tcp(ack=77), TCP)
    yield ROWS.out("G2 SYN with an acknowledgement number but no ACK", acked, DEFAULT)


CASES: tuple[Case, ...] = (*_flags(), *_headers(), *_ports(), *_odd_openings())
