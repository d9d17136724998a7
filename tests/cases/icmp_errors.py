# SPDX-License-Identifier: Apache-2.0
"""Packet stories of ICMP errors that are guesses or harm: numbers, groups, MTUs, redirects."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import OPEN, TYPICAL, UNGUARDED_OPEN
from tests.cases.table import (
    DEFAULT,
    ESTABLISHED,
    RELATED,
    UNRELATED,
    Case,
    Rows,
    dropped,
    into,
    out,
)
from tests.cases.tcp_stories import HANDSHAKE, SYN, got, sent
from tests.frames import (
    BROADCAST4,
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
    Wire,
    icmp,
    icmp_error,
    ipv4,
    ipv6,
    tcp,
    udp,
)
from vgw.abi import Reason

ROWS, UNGUARDED = Rows(OPEN), Rows(UNGUARDED_OPEN)
BAD_MTU, REDIRECT = dropped(Reason.BAD_MTU), dropped(Reason.REDIRECT)
FAR = 2**31
FRAGMENTATION_NEEDED, TOO_BIG = 4, 2
ROUTER = "198.51.100.254"


def _about(frame: bytes, wire: Wire = IN) -> bytes:
    """Return an error about an IPv4 frame, from a router on its way."""
    return wire.wrap4(icmp_error(3, frame[14:42], 1), ICMP, remote=ROUTER)


def _numbers() -> Iterator[Case]:
    """The VM's data 1001 to 1100 is on its way, or all of it is acknowledged."""
    data = out(sent("A", 1001, 5001, bytes(100)), ESTABLISHED)
    acked = into(got("A", 5001, 1101), ESTABLISHED)
    for name, number, expected in (
        ("its first byte", 1001, RELATED),
        ("its last byte", 1100, RELATED),
        ("what comes next", 1101, RELATED),
        ("what was not sent", 1102, UNRELATED),
        ("a guess", 4_000_000, UNRELATED),
        ("the other half of the numbers", 1001 + FAR, UNRELATED),
        ("long ago", (1001 - 10_000_000) % 2**32, UNRELATED),
    ):
        error = _about(sent("A", number, 5001))
        yield Case(f"H7 error quotes {name}", TYPICAL, (*HANDSHAKE, data, into(error, expected)))
    yield Case(
        "H7 error that comes after the acknowledgement",
        TYPICAL,
        (*HANDSHAKE, data, acked, into(_about(sent("A", 1001, 5001)), RELATED)),
    )
    yield Case(
        "H7 error about a SYN, and a guess about it",
        TYPICAL,
        (
            SYN,
            into(_about(sent("S", 1_000_000)), UNRELATED),
            into(_about(sent("S")), RELATED),
        ),
    )
    answer, guess = got("A", 5001)[14:], got("A", 9_000_000)[14:]
    yield Case(
        "H7 the VM's error about what it got, and one about what it did not get",
        TYPICAL,
        (
            *HANDSHAKE,
            into(got("A", 5001, payload=bytes(100)), ESTABLISHED),
            out(OUT.wrap4(icmp_error(3, guess, 3), ICMP), UNRELATED),
            out(OUT.wrap4(icmp_error(3, answer, 3), ICMP), RELATED),
        ),
    )


def _groups() -> Iterator[Case]:
    for group in ("239.1.2.3", BROADCAST4, "ff02::fb", "ff0e::1"):
        version4 = "." in group
        wrap = OUT.wrap4 if version4 else OUT.wrap6
        question = wrap(udp(), UDP, remote=group)
        error = (
            IN.wrap4(icmp_error(3, question[14:], 3), ICMP)
            if version4
            else IN.wrap6(icmp_error(1, question[14:], 4), ICMPV6)
        )
        yield Case(
            f"H8 error about a packet to {group}",
            TYPICAL,
            (out(question, DEFAULT), into(error, UNRELATED)),
        )


def _mtus() -> Iterator[Case]:
    asked, asked6 = OUT.wrap4(udp(), UDP), OUT.wrap6(udp(), UDP)
    for mtu in (0, 1, 67, 68, 576, 1500, 65535):
        expected = BAD_MTU if 0 < mtu < 68 else RELATED
        quote = icmp_error(3, asked[14:], FRAGMENTATION_NEEDED, mtu)
        yield Case(
            f"H10 fragmentation needed, MTU {mtu}",
            TYPICAL,
            (out(asked, DEFAULT), into(IN.wrap4(quote, ICMP), expected)),
        )
    for mtu in (0, 1, 67, 1279, 1280, 1500, 2**31, 2**32 - 1):
        expected = BAD_MTU if mtu < 1280 else RELATED
        quote = icmp_error(TOO_BIG, asked6[14:], 0, mtu)
        yield Case(
            f"H10 packet too big, MTU {mtu}",
            TYPICAL,
            (out(asked6, DEFAULT), into(IN.wrap6(quote, ICMPV6), expected)),
        )
    other = icmp_error(3, asked[14:], 3, 20)
    yield Case(
        "H10 port unreachable has no MTU",
        TYPICAL,
        (out(asked, DEFAULT), into(IN.wrap4(other, ICMP), RELATED)),
    )
    quote4, quote6 = ipv4(tcp(), TCP, PEER4, VM4), ipv6(tcp(), TCP, PEER6, VM6)
    for rows, guards in ((ROWS, "on"), (UNGUARDED, "off")):
        frame = OUT.wrap4(icmp_error(3, quote4, FRAGMENTATION_NEEDED, 67), ICMP)
        yield rows.out(f"H10 fragmentation needed from the VM, guards {guards}", frame, BAD_MTU)
        frame = OUT.wrap6(icmp_error(TOO_BIG, quote6, 0, 1279), ICMPV6)
        yield rows.out(f"H10 packet too big from the VM, guards {guards}", frame, BAD_MTU)


def _redirects() -> Iterator[Case]:
    """Not even about an open flow, and not from the router."""
    asked, asked6 = OUT.wrap4(udp(), UDP), OUT.wrap6(udp(), UDP)
    for code in range(4):
        message = icmp(5, code, 0x0A140063, asked[14:42])
        yield Case(
            f"H11 redirect code {code} about an open flow",
            TYPICAL,
            (out(asked, DEFAULT), into(IN.wrap4(message, ICMP, remote="10.20.0.1"), REDIRECT)),
        )
    message = icmp(137, 0, 0, bytes(32) + asked6[14:])
    frame = IN.wrap6(message, ICMPV6, remote="fe80::1", hop_limit=255)
    yield Case(
        "H11 redirect6 about an open flow", TYPICAL, (out(asked6, DEFAULT), into(frame, REDIRECT))
    )
    for name, quoted in (("nothing", b""), ("an echo", bytes(28))):
        frame = IN.wrap4(icmp(5, 1, 0, quoted), ICMP)
        yield ROWS.into(f"H11 redirect about {name}", frame, REDIRECT)


CASES: tuple[Case, ...] = (*_numbers(), *_groups(), *_mtus(), *_redirects())
