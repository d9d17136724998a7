# SPDX-License-Identifier: Apache-2.0
"""Packet stories of TCP: handshakes, closing, resets, timeouts and reuse of ports."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import OPEN, SERVER, TYPICAL
from tests.cases.table import (
    DEFAULT,
    DENIED,
    ESTABLISHED,
    NO_STATE,
    Case,
    Send,
    Wait,
    by_rule,
    dropped,
    into,
    out,
)
from tests.frames import IN, OUT, TCP, VM6, tcp
from vgw.abi import Reason


def sent(flags: str, seq: int = 1000, ack: int | None = None, payload: bytes = b"") -> bytes:
    """A segment from the VM's client to the server outside."""
    return OUT.wrap4(tcp(40000, 443, flags, seq=seq, ack=ack, payload=payload), TCP)


def got(flags: str, seq: int = 5000, ack: int | None = 1001, payload: bytes = b"") -> bytes:
    """A segment of the server's."""
    return IN.wrap4(tcp(443, 40000, flags, seq=seq, ack=ack, payload=payload), TCP)


SYN, SYN_ACK = out(sent("S"), DEFAULT), into(got("SA"), ESTABLISHED)
ACK = out(sent("A", 1001, 5001), ESTABLISHED)
HANDSHAKE: tuple[Send, ...] = (SYN, SYN_ACK, ACK)
DATA_IN, DATA_OUT = into(got("A", 5001), ESTABLISHED), out(sent("A", 1001, 5001), ESTABLISHED)
FIN_OUT, FIN_IN = out(sent("FA", 1001, 5001), ESTABLISHED), into(got("FA", 5001, 1002), ESTABLISHED)
LATE_IN = into(got("A", 5001), NO_STATE)


def _opening() -> Iterator[Case]:
    yield Case("G2 handshake and data", TYPICAL, (*HANDSHAKE, DATA_IN, DATA_OUT))
    server = (
        into(IN.wrap4(tcp(), TCP), by_rule("site")),
        out(OUT.wrap4(tcp(443, 40000, "SA"), TCP), ESTABLISHED),
        into(IN.wrap4(tcp(flags="A"), TCP), ESTABLISHED),
    )
    yield Case("G2 handshake of a client outside", SERVER, server)
    yield Case(
        "G2 handshake over IPv6",
        TYPICAL,
        (
            out(OUT.wrap6(tcp(), TCP), DEFAULT),
            into(IN.wrap6(tcp(443, 40000, "SA"), TCP, local=VM6), ESTABLISHED),
            out(OUT.wrap6(tcp(flags="A"), TCP), ESTABLISHED),
        ),
    )
    for flags in ("A", "FA", "R", "RA", "SA", "PA"):
        yield Case(
            f"G3 {flags} without a flow",
            OPEN,
            (out(sent(flags), NO_STATE), into(got(flags), NO_STATE)),
        )
    yield Case("G4 SYN-ACK first", TYPICAL, (into(got("SA"), NO_STATE), SYN, SYN_ACK))
    yield Case(
        "G3 a dropped ACK opens nothing", OPEN, (out(sent("A"), NO_STATE), out(sent("A"), NO_STATE))
    )
    yield Case("G22 SYN twice", TYPICAL, (SYN, out(sent("S"), ESTABLISHED), SYN_ACK, ACK))
    yield Case(
        "G1 invalid flags in an open flow",
        TYPICAL,
        (*HANDSHAKE, out(sent("SF"), dropped(Reason.TCP_FLAGS)), DATA_IN),
    )
    yield Case(
        "G10 simultaneous open",
        TYPICAL,
        (SYN, into(got("S", ack=0), ESTABLISHED), out(sent("SA"), ESTABLISHED), SYN_ACK, ACK),
    )
    yield Case(
        "G11 split handshake keeps the opener",
        TYPICAL,
        (
            SYN,
            into(got("A", 5000, 1001), ESTABLISHED),
            into(got("S", 5000, 0), ESTABLISHED),
            out(sent("SA", 1000, 5001), ESTABLISHED),
            into(got("A", 5001, 1001), ESTABLISHED),
            DATA_OUT,
        ),
    )
    yield Case(
        "G19 opened from both sides is one flow",
        SERVER,
        (
            out(OUT.wrap4(tcp(443, 40000), TCP), DEFAULT),
            into(IN.wrap4(tcp(40000, 443), TCP), ESTABLISHED),
        ),
    )


def _timeouts() -> Iterator[Case]:
    yield Case("G16 SYN lives 30 s", TYPICAL, (SYN, Wait(28), SYN_ACK))
    yield Case("G16 SYN dies after 30 s", TYPICAL, (SYN, Wait(32), into(got("SA"), NO_STATE)))
    yield Case(
        "G16 half open is refreshed by SYN-ACK",
        TYPICAL,
        (SYN, Wait(25), SYN_ACK, Wait(25), ACK, Wait(7000), DATA_IN),
    )
    yield Case(
        "G16 half open dies 30 s after SYN-ACK",
        TYPICAL,
        (SYN, SYN_ACK, Wait(32), out(sent("A", 1001, 5001), NO_STATE)),
    )
    yield Case(
        "G16 open lives two hours", TYPICAL, (*HANDSHAKE, Wait(7198), DATA_IN, Wait(7198), DATA_OUT)
    )
    yield Case("G16 open dies after two hours", TYPICAL, (*HANDSHAKE, Wait(7202), LATE_IN))
    yield Case(
        "G16 only the opener's ACK after an answer establishes",
        TYPICAL,
        (SYN, out(sent("A"), ESTABLISHED), Wait(32), LATE_IN),
    )
    yield Case(
        "G16 the answerer's ACK does not establish",
        TYPICAL,
        (SYN, SYN_ACK, into(got("A", 5001), ESTABLISHED), Wait(32), LATE_IN),
    )
    yield Case(
        "G23 dead flow, SYN opens again", TYPICAL, (*HANDSHAKE, Wait(7202), LATE_IN, SYN, SYN_ACK)
    )
    yield Case(
        "G23 dead flow is not opened from the other side",
        TYPICAL,
        (*HANDSHAKE, Wait(7202), into(got("S", ack=0), DENIED)),
    )


def _closing() -> Iterator[Case]:
    closed = (*HANDSHAKE, FIN_OUT, FIN_IN)
    last = out(sent("A", 1002, 5002), ESTABLISHED)
    yield Case("G13 closing, FINs repeated", TYPICAL, (*closed, last, FIN_IN, last, FIN_OUT))
    yield Case("G13 closed lives 30 s", TYPICAL, (*closed, last, Wait(28), FIN_IN))
    yield Case("G13 closed dies after 30 s", TYPICAL, (*closed, last, Wait(32), LATE_IN))
    half = (*HANDSHAKE, FIN_OUT)
    yield Case(
        "G12 half closed stays open", TYPICAL, (*half, Wait(3600), DATA_IN, Wait(3600), DATA_IN)
    )
    yield Case(
        "G12 the same FIN twice is half closed", TYPICAL, (*half, FIN_OUT, Wait(3600), DATA_IN)
    )
    yield Case(
        "G9 port reuse after closing", TYPICAL, (*closed, SYN, SYN_ACK, ACK, Wait(3600), DATA_IN)
    )
    yield Case(
        "G9 reuse from the other side is judged anew",
        TYPICAL,
        (*closed, into(got("S", ack=0), DENIED), into(got("A"), ESTABLISHED)),
    )
    yield Case(
        "G9 reuse from the other side, accepted",
        OPEN,
        (
            *closed,
            into(got("S", ack=0), DEFAULT),
            out(sent("SA"), ESTABLISHED),
            into(got("A"), ESTABLISHED),
            Wait(3600),
            DATA_OUT,
        ),
    )
    yield Case("G9 SYN-ACK is no reuse", TYPICAL, (*closed, into(got("SA"), ESTABLISHED)))
    yield Case(
        "G8 SYN inside an open flow",
        TYPICAL,
        (
            *HANDSHAKE,
            out(sent("S", 9), ESTABLISHED),
            into(got("A", 5001), ESTABLISHED),
            Wait(3600),
            DATA_IN,
        ),
    )
    yield Case(
        "G8 SYN inside an open flow does not refresh it",
        TYPICAL,
        (*HANDSHAKE, Wait(7000), into(got("S", 9, 0), ESTABLISHED), Wait(300), LATE_IN),
    )


def _resets() -> Iterator[Case]:
    """The VM acknowledged 5001 and the server 1001, so these are what resets must carry."""
    exact_in, exact_out = into(got("R", 5001, 0), ESTABLISHED), out(sent("R", 1001, 0), ESTABLISHED)
    for name, sequence in (("0", 0), ("one less", 5000), ("one more", 5002), ("far off", 2**31)):
        forged = into(got("R", sequence, 0), ESTABLISHED)
        yield Case(
            f"G6 reset with sequence {name}", TYPICAL, (*HANDSHAKE, forged, Wait(3600), DATA_IN)
        )
    yield Case(
        "G7 forged resets do not refresh",
        TYPICAL,
        (*HANDSHAKE, Wait(7000), into(got("R", 0, 0), ESTABLISHED), Wait(300), LATE_IN),
    )
    yield Case("G6 exact reset from outside", TYPICAL, (*HANDSHAKE, exact_in, Wait(12), LATE_IN))
    yield Case("G6 exact reset from the VM", TYPICAL, (*HANDSHAKE, exact_out, Wait(12), LATE_IN))
    yield Case(
        "G6 exact reset with ACK",
        TYPICAL,
        (*HANDSHAKE, into(got("RA", 5001), ESTABLISHED), Wait(12), LATE_IN),
    )
    yield Case("G6 reset flow lives 10 s", TYPICAL, (*HANDSHAKE, exact_in, Wait(8), DATA_IN))
    yield Case(
        "G6 nothing refreshes a reset flow",
        TYPICAL,
        (*HANDSHAKE, exact_in, Wait(6), DATA_IN, exact_in, FIN_OUT, FIN_IN, Wait(6), LATE_IN),
    )
    yield Case(
        "G6 the ten seconds start at the reset",
        TYPICAL,
        (*HANDSHAKE, Wait(600), exact_in, Wait(8), DATA_IN, Wait(4), LATE_IN),
    )
    yield Case(
        "G6 the reset must fit the newest acknowledgement",
        TYPICAL,
        (
            *HANDSHAKE,
            out(sent("A", 1001, 6001), ESTABLISHED),
            into(got("R", 5001, 0), ESTABLISHED),
            Wait(60),
            DATA_IN,
            into(got("R", 6001, 0), ESTABLISHED),
            Wait(12),
            LATE_IN,
        ),
    )
    yield Case(
        "G7 a forged reset's acknowledgement counts for nothing",
        TYPICAL,
        (
            *HANDSHAKE,
            into(got("RA", 77, 4242), ESTABLISHED),
            out(sent("R", 4242, 0), ESTABLISHED),
            Wait(60),
            DATA_IN,
            exact_out,
            Wait(12),
            LATE_IN,
        ),
    )
    refused = into(got("RA", 0), ESTABLISHED)
    yield Case(
        "G17 connection refused", TYPICAL, (SYN, refused, Wait(12), into(got("SA"), NO_STATE))
    )
    yield Case("G17 refused, tried again", TYPICAL, (SYN, refused, SYN, SYN_ACK, ACK))
    yield Case(
        "G9 port reuse after a reset",
        TYPICAL,
        (*HANDSHAKE, exact_in, SYN, SYN_ACK, ACK, Wait(60), DATA_IN),
    )
    yield Case(
        "G17 reset with data",
        TYPICAL,
        (*HANDSHAKE, into(got("R", 5001, 0, b"bye"), ESTABLISHED), Wait(12), LATE_IN),
    )
    yield Case(
        "G17 reset after closing",
        TYPICAL,
        (*HANDSHAKE, FIN_OUT, FIN_IN, into(got("R", 5001, 0), ESTABLISHED), Wait(12), LATE_IN),
    )
    wrapped = out(sent("A", 1001, 0xFFFFFFFF), ESTABLISHED)
    yield Case(
        "G21 acknowledgement at the wrap",
        TYPICAL,
        (*HANDSHAKE, wrapped, into(got("R", 0xFFFFFFFF, 0), ESTABLISHED), Wait(12), LATE_IN),
    )


CASES: tuple[Case, ...] = (*_opening(), *_timeouts(), *_closing(), *_resets())
