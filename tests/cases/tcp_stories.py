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
from vgw.policy.flows import ESTABLISHED_SECONDS

#: Idle times of an open connection at which it is just alive, and just not.
ALIVE, GONE = ESTABLISHED_SECONDS - 2, ESTABLISHED_SECONDS + 2
#: When Linux sends the first keepalive: two hours, and what its timers are late by.
KEEPALIVE = 7200.01


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
        (SYN, Wait(25), SYN_ACK, Wait(25), ACK, Wait(ALIVE), DATA_IN),
    )
    yield Case(
        "G16 half open dies 30 s after SYN-ACK",
        TYPICAL,
        (SYN, SYN_ACK, Wait(32), out(sent("A", 1001, 5001), NO_STATE)),
    )
    yield Case(
        "G16 open lives its whole timeout",
        TYPICAL,
        (*HANDSHAKE, Wait(ALIVE), DATA_IN, Wait(ALIVE), DATA_OUT),
    )
    yield Case("G16 open dies after its timeout", TYPICAL, (*HANDSHAKE, Wait(GONE), LATE_IN))
    probe_out, probe_in = out(sent("A", 1000, 5001), ESTABLISHED), into(got("A", 5000), ESTABLISHED)
    for name, probe, answer in (
        ("the VM", probe_out, DATA_IN),
        ("the peer", probe_in, DATA_OUT),
    ):
        yield Case(
            f"G16 keepalives of {name} keep a flow",
            TYPICAL,
            (*HANDSHAKE, *(Wait(KEEPALIVE), probe, answer) * 2, Wait(KEEPALIVE), DATA_IN, DATA_OUT),
        )
    yield Case(
        "G16 an unanswered keepalive keeps a flow",
        TYPICAL,
        (*HANDSHAKE, Wait(KEEPALIVE), probe_out, Wait(KEEPALIVE), probe_out, Wait(GONE), LATE_IN),
    )
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
        "G23 dead flow, SYN opens again", TYPICAL, (*HANDSHAKE, Wait(GONE), LATE_IN, SYN, SYN_ACK)
    )
    yield Case(
        "G23 dead flow is not opened from the other side",
        TYPICAL,
        (*HANDSHAKE, Wait(GONE), into(got("S", ack=0), DENIED)),
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
            out(sent("SA", 1000, 5001), ESTABLISHED),
            into(got("A", 5001, 1001), ESTABLISHED),
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
        (*HANDSHAKE, Wait(ALIVE), into(got("S", 9, 0), ESTABLISHED), Wait(GONE - ALIVE), LATE_IN),
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
        (*HANDSHAKE, Wait(ALIVE), into(got("R", 0, 0), ESTABLISHED), Wait(GONE - ALIVE), LATE_IN),
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
            into(got("A", 5001, payload=bytes(1000)), ESTABLISHED),
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
    late = (Wait(12), LATE_IN)
    for isn in (0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF):
        first = (isn + 1) % 2**32
        begun = SYN, into(got("SA", isn), ESTABLISHED), out(sent("A", 1001, first), ESTABLISHED)
        data = into(got("A", first, payload=bytes(2)), ESTABLISHED)
        end = (first + 2) % 2**32
        acked = out(sent("A", 1001, end), ESTABLISHED)
        reset = into(got("R", end, 0), ESTABLISHED)
        yield Case(f"G21 data behind {isn:x}, reset", TYPICAL, (*begun, data, acked, reset, *late))
        fins = into(got("FA", end), ESTABLISHED), out(sent("FA", 1001, end + 1), ESTABLISHED)
        yield Case(
            f"G21 data behind {isn:x}, closed",
            TYPICAL,
            (*begun, data, acked, *fins, Wait(32), LATE_IN),
        )


def _resets_of_openings() -> Iterator[Case]:
    """The SYN has sequence 1000, so resets must acknowledge 1001 or, the opener's, carry it."""
    unanswered = into(got("SA"), NO_STATE)
    forged_in = {
        "without ACK": got("R", 0, 0),
        "without ACK at the acknowledged sequence": got("R", 5001, 0),
        "without ACK at the SYN's sequence": got("R", 1001, 0),
        "without ACK but with the number": got("R", 0, 1001),
        "that acknowledges one less": got("RA", 0, 1000),
        "that acknowledges one more": got("RA", 0, 1002),
        "that acknowledges nothing": got("RA", 1001, 0),
        "that acknowledges something far off": got("RA", 0, 2**31),
    }
    for name, frame in forged_in.items():
        forged = into(frame, ESTABLISHED)
        data = (Wait(60), DATA_IN, DATA_OUT, Wait(ALIVE), DATA_IN)
        yield Case(f"G17 reset {name} against a SYN", TYPICAL, (SYN, forged, SYN_ACK, ACK, *data))
        yield Case(
            f"G17 reset {name} against a half-open flow",
            TYPICAL,
            (SYN, SYN_ACK, forged, Wait(12), ACK, *data),
        )
        yield Case(
            f"G17 reset {name} does not refresh a SYN",
            TYPICAL,
            (SYN, Wait(20), forged, Wait(12), unanswered),
        )
    forged_out = {
        "at the SYN's sequence": sent("R", 1000, 0),
        "one too far": sent("R", 1002, 0),
        "at 0": sent("R", 0, 0),
        "at the peer's sequence": sent("R", 5001, 0),
        "that acknowledges the number it should be at": sent("RA", 1000, 1001),
    }
    for name, frame in forged_out.items():
        forged = out(frame, ESTABLISHED)
        yield Case(
            f"G17 the opener's reset {name}",
            TYPICAL,
            (SYN, forged, Wait(12), SYN_ACK, forged, Wait(12), ACK, Wait(ALIVE), DATA_IN),
        )
    refused = into(got("RA", 0, 1001), ESTABLISHED)
    chosen = into(got("A", 9, 77), ESTABLISHED), into(got("RA", 0, 77), ESTABLISHED)
    yield Case(
        "G17 a forged ACK does not choose the reset's number",
        TYPICAL,
        (SYN, *chosen, Wait(12), SYN_ACK),
    )
    yield Case("G17 refused flow lives 10 s", TYPICAL, (SYN, refused, Wait(8), refused))
    yield Case(
        "G17 refused after all",
        TYPICAL,
        (SYN, SYN_ACK, refused, Wait(12), into(got("A"), NO_STATE)),
    )
    yield Case(
        "G17 refused at the second SYN",
        TYPICAL,
        (SYN, Wait(20), out(sent("S"), ESTABLISHED), Wait(20), refused, Wait(12), unanswered),
    )
    yield Case(
        "G17 refused at any sequence",
        TYPICAL,
        (SYN, into(got("RA", 77, 1001), ESTABLISHED), Wait(12), unanswered),
    )
    yield Case(
        "G17 a forged reset does not move what the true one must acknowledge",
        TYPICAL,
        (
            SYN,
            into(got("RA", 0, 77), ESTABLISHED),
            into(got("RA", 0, 77), ESTABLISHED),
            out(sent("R", 77, 0), ESTABLISHED),
            Wait(12),
            refused,
            Wait(12),
            unanswered,
        ),
    )
    for flags in ("R", "RA"):
        aborted = out(sent(flags, 1001), ESTABLISHED)
        yield Case(
            f"G17 the opener gives up with {flags}", TYPICAL, (SYN, aborted, Wait(12), unanswered)
        )
        yield Case(
            f"G17 the opener refuses the answer with {flags}",
            TYPICAL,
            (SYN, SYN_ACK, aborted, Wait(12), unanswered),
        )
    yield Case("G17 aborted flow lives 10 s", TYPICAL, (SYN, aborted, Wait(8), SYN_ACK))
    again = (SYN, refused, out(sent("S", 9000), DEFAULT))
    yield Case(
        "G17 refused, tried again: the old answer does not close",
        TYPICAL,
        (*again, refused, Wait(12), into(got("SA", ack=9001), ESTABLISHED)),
    )
    yield Case(
        "G17 refused, tried again, refused again",
        TYPICAL,
        (*again, into(got("RA", 0, 9001), ESTABLISHED), Wait(12), unanswered),
    )
    last = out(sent("S", 0xFFFFFFFF), DEFAULT)
    for name, step in (
        ("refused", into(got("RA", 0, 0), ESTABLISHED)),
        ("aborted", out(sent("R", 0, 0), ESTABLISHED)),
    ):
        yield Case(f"G21 SYN at the wrap, {name}", TYPICAL, (last, step, Wait(12), unanswered))
    yield Case(
        "G21 SYN at the wrap, reset without ACK",
        TYPICAL,
        (last, into(got("R", 0, 0), ESTABLISHED), Wait(12), into(got("SA", ack=0), ESTABLISHED)),
    )
    yield from _resets_of_clients_outside()


def _resets_of_clients_outside() -> Iterator[Case]:
    syn = into(IN.wrap4(tcp(), TCP), by_rule("site"))
    answer = out(OUT.wrap4(tcp(443, 40000, "SA", seq=5000, ack=1001), TCP), ESTABLISHED)
    late = out(OUT.wrap4(tcp(443, 40000, "SA", seq=5000, ack=1001), TCP), NO_STATE)
    confirm = into(IN.wrap4(tcp(flags="A", seq=1001, ack=5001), TCP), ESTABLISHED)
    for name, flags, acknowledged in (("without ACK", "R", 0), ("off by one", "RA", 1000)):
        forged = out(OUT.wrap4(tcp(443, 40000, flags, seq=0, ack=acknowledged), TCP), ESTABLISHED)
        yield Case(
            f"G17 client outside, reset {name}",
            SERVER,
            (syn, forged, Wait(12), answer, confirm, Wait(ALIVE), confirm),
        )
    refused = out(OUT.wrap4(tcp(443, 40000, "RA", seq=0, ack=1001), TCP), ESTABLISHED)
    yield Case("G17 client outside, refused", SERVER, (syn, refused, Wait(12), late))
    for name, seq, step in (("off by one", 1000, answer), ("exact", 1001, late)):
        aborted = into(IN.wrap4(tcp(flags="R", seq=seq, ack=0), TCP), ESTABLISHED)
        yield Case(f"G17 client outside, its reset {name}", SERVER, (syn, aborted, Wait(12), step))


CASES: tuple[Case, ...] = (
    *_opening(),
    *_timeouts(),
    *_closing(),
    *_resets(),
    *_resets_of_openings(),
)
