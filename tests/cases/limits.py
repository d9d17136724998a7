# SPDX-License-Identifier: Apache-2.0
"""Packet stories of limits of new flows, and of connections that were open before an attach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.cases.fixtures import GUARDED, OPEN, SERVER, TYPICAL
from tests.cases.table import (
    DEFAULT,
    DENIED,
    ESTABLISHED,
    NO_STATE,
    Case,
    Fixture,
    Send,
    Wait,
    by_rule,
    dropped,
    into,
    out,
)
from tests.frames import ICMP, IN, OUT, TCP, UDP, echo, tcp, udp
from vgw.abi import Reason
from vgw.policy.model import Tracking

FEW = Fixture("few half open", replace(GUARDED, tracking=Tracking(half_open_max=2)), OPEN.policy)
HALF_OPEN = dropped(Reason.CT_HALF_OPEN)


def syn(port: int, *, expected: bool = True) -> Send:
    return out(OUT.wrap4(tcp(port), TCP), DEFAULT if expected else HALF_OPEN)


def syn_in(port: int, *, expected: bool = True) -> Send:
    return into(IN.wrap4(tcp(port), TCP), DEFAULT if expected else HALF_OPEN)


def handshake(port: int) -> tuple[Send, ...]:
    answer = IN.wrap4(tcp(443, port, "SA", seq=5000, ack=1001), TCP)
    confirm = OUT.wrap4(tcp(port, 443, "A", seq=1001, ack=5001), TCP)
    return syn(port), into(answer, ESTABLISHED), out(confirm, ESTABLISHED)


def _half_open() -> Iterator[Case]:
    full = syn(1), syn(2), syn(3, expected=False)
    yield Case("L2 half-open flows of the VM are limited", FEW, full)
    yield Case(
        "L1 half-open flows from outside are limited apart", FEW, (*full, syn_in(1), syn_in(2))
    )
    yield Case(
        "L1 third from outside", FEW, (syn_in(1), syn_in(2), syn_in(3, expected=False), syn(1))
    )
    yield Case(
        "L1 a retransmitted SYN is no new flow",
        FEW,
        (*full, out(OUT.wrap4(tcp(1), TCP), ESTABLISHED)),
    )
    many = tuple(step for port in range(1, 6) for step in handshake(port))
    yield Case("L1 established ones do not count", FEW, (*many, syn(11), syn(12)))
    established = (*handshake(9), *full)
    data = out(OUT.wrap4(tcp(9, 443, "A", seq=1001, ack=5001), TCP), ESTABLISHED)
    yield Case("L1 established ones go on", FEW, (*established, data))
    refused = into(IN.wrap4(tcp(443, 1, "RA", seq=0, ack=1001), TCP), ESTABLISHED)
    yield Case("L16 an exact reset makes no room", FEW, (*full, refused, syn(3, expected=False)))
    forged = into(IN.wrap4(tcp(443, 1, "R", seq=77, ack=0), TCP), ESTABLISHED)
    fin = into(IN.wrap4(tcp(443, 1, "FA", seq=5001, ack=9), TCP), ESTABLISHED)
    yield Case("L16 forged ends make no room", FEW, (*full, forged, fin, syn(3, expected=False)))
    again = out(OUT.wrap4(tcp(1), TCP), DEFAULT)
    yield Case(
        "L16 a reused place counts once",
        FEW,
        (syn(1), refused, again, syn(2), syn(3, expected=False)),
    )
    asks = [out(OUT.wrap4(udp(port, 53), UDP), DEFAULT) for port in (1, 2, 3)]
    late = out(OUT.wrap4(udp(3, 53), UDP), HALF_OPEN)
    answer = into(IN.wrap4(udp(53, 1), UDP), ESTABLISHED)
    yield Case("L3 UDP without an answer is half open", FEW, (*asks[:2], late, answer, asks[2]))
    pings = [out(OUT.wrap4(echo(8, number), ICMP), DEFAULT) for number in (1, 2)]
    third = OUT.wrap4(echo(8, 3), ICMP)
    pong = into(IN.wrap4(echo(0, 1), ICMP), ESTABLISHED)
    yield Case("L3 so is a ping", FEW, (*pings, out(third, HALF_OPEN), pong, out(third, DEFAULT)))


def _taken_over() -> Iterator[Case]:
    """The VM is a client at 40000 of a server outside, or the server of a client there."""
    sent = OUT.wrap4(tcp(40000, 443, "A", seq=1001, ack=5001), TCP)
    got = IN.wrap4(tcp(443, 40000, "A", seq=5001, ack=1001), TCP)
    served = OUT.wrap4(tcp(443, 40000, "PA", seq=7000, ack=9000, payload=b"data"), TCP)
    asked = IN.wrap4(tcp(40000, 443, "A", seq=9000, ack=7000), TCP)
    both = out(sent, ESTABLISHED), into(got, ESTABLISHED)
    yield Case(
        "G15 open before the attach, the VM speaks", TYPICAL, (out(sent, DEFAULT), *both), grace=60
    )
    yield Case(
        "G15 open before the attach, the peer speaks",
        TYPICAL,
        (into(got, DEFAULT), *both),
        grace=60,
    )
    site = by_rule("site")
    yield Case(
        "G15 open before the attach, the VM serves",
        SERVER,
        (out(served, site), into(asked, ESTABLISHED)),
        grace=60,
    )
    yield Case(
        "G15 open before the attach, a client outside speaks",
        SERVER,
        (into(asked, site), out(served, ESTABLISHED)),
        grace=60,
    )
    closed = IN.wrap4(tcp(40000, 25, "A", seq=9000, ack=7000), TCP)
    yield Case("G15 no rule lets it in", SERVER, (into(closed, DENIED),), grace=60)
    yield Case("G15 the time is over", TYPICAL, (Wait(61), out(sent, NO_STATE)), grace=60)
    yield Case("G15 the time is not over", TYPICAL, (Wait(58), out(sent, DEFAULT)), grace=60)
    for flags in ("SA", "R", "RA"):
        frame = OUT.wrap4(tcp(40000, 443, flags, seq=1001, ack=5001), TCP)
        yield Case(f"G15 {flags} takes nothing over", TYPICAL, (out(frame, NO_STATE),), grace=60)
    reset = out(OUT.wrap4(tcp(40000, 443, "RA", seq=1001, ack=5001), TCP), ESTABLISHED)
    yield Case(
        "G15 the VM resets what it took over", TYPICAL, (out(sent, DEFAULT), reset), grace=60
    )
    forged = into(IN.wrap4(tcp(443, 40000, "R", seq=5002, ack=0), TCP), ESTABLISHED)
    exact = into(IN.wrap4(tcp(443, 40000, "R", seq=5001, ack=0), TCP), ESTABLISHED)
    taken = (out(sent, DEFAULT), forged, Wait(3600), both[1])
    yield Case("G15 a reset is checked after a takeover", TYPICAL, taken, grace=60)
    yield Case(
        "G15 an exact reset ends what was taken over",
        TYPICAL,
        (out(sent, DEFAULT), exact, Wait(12), into(got, NO_STATE)),
        grace=10,
    )
    fins = (
        out(OUT.wrap4(tcp(40000, 443, "FA", seq=1001, ack=5001), TCP), ESTABLISHED),
        into(IN.wrap4(tcp(443, 40000, "FA", seq=5001, ack=1002), TCP), ESTABLISHED),
    )
    yield Case(
        "G15 what was taken over is closed as usual",
        TYPICAL,
        (out(sent, DEFAULT), *fins, Wait(32), into(got, NO_STATE)),
        grace=20,
    )
    first_fin = out(OUT.wrap4(tcp(40000, 443, "FA", seq=1001, ack=5001), TCP), DEFAULT)
    yield Case(
        "G15 a connection is taken over while it closes",
        TYPICAL,
        (first_fin, fins[1], Wait(32), into(got, NO_STATE)),
        grace=20,
    )
    yield Case(
        "L1 what is taken over is not half open",
        FEW,
        (
            *(out(OUT.wrap4(tcp(port, 443, "A"), TCP), DEFAULT) for port in range(1001, 1006)),
            syn(1),
            syn(2),
            syn(3, expected=False),
        ),
        grace=60,
    )


CASES: tuple[Case, ...] = (*_half_open(), *_taken_over())
