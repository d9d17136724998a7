# SPDX-License-Identifier: Apache-2.0
"""Packet stories of TCP's numbers: what is forged passes, and opens, closes or blinds nothing."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import TYPICAL
from tests.cases.table import ESTABLISHED, NO_STATE, Case, Send, Wait, into, out
from tests.cases.tcp_stories import (
    ACK,
    ALIVE,
    DATA_IN,
    FIN_IN,
    FIN_OUT,
    HANDSHAKE,
    LATE_IN,
    SYN,
    SYN_ACK,
    got,
    sent,
)

FAR = 2**31
#: Acknowledgements of a SYN with sequence 1000 that are no such thing.
WRONG = {"of nothing": 0, "one less": 1000, "one more": 1002, "far off": 1001 + FAR}


def _answers() -> Iterator[Case]:
    for name, number in WRONG.items():
        wrong = into(got("SA", ack=number), ESTABLISHED)
        yield Case(
            f"G5 SYN-ACK that acknowledges {name} does not establish",
            TYPICAL,
            (SYN, wrong, out(sent("A", 1001, 5001), ESTABLISHED), Wait(32), LATE_IN),
        )
        yield Case(
            f"G5 SYN-ACK that acknowledges {name}, then the right one",
            TYPICAL,
            (SYN, wrong, SYN_ACK, ACK, Wait(ALIVE), DATA_IN),
        )
        yield Case(
            f"G5 SYN-ACK that acknowledges {name} does not refresh",
            TYPICAL,
            (SYN, Wait(20), wrong, Wait(12), into(got("SA"), NO_STATE)),
        )
        yield Case(
            f"G5 the host's reset of a SYN-ACK that acknowledges {name} closes nothing",
            TYPICAL,
            (
                SYN,
                wrong,
                out(sent("R", number, 0), ESTABLISHED),
                Wait(12),
                SYN_ACK,
                ACK,
                Wait(ALIVE),
                DATA_IN,
            ),
        )
    yield Case(
        "G5 SYN-ACK with a number of its own after the right one changes nothing",
        TYPICAL,
        (*HANDSHAKE, into(got("SA", 9, 77), ESTABLISHED), Wait(ALIVE), DATA_IN),
    )


def _ends() -> Iterator[Case]:
    """The VM's own FIN is there, so one that counts would leave the flow 30 seconds."""
    forged = {
        "before what was acknowledged": got("FA", 100, 1001),
        "just before what was acknowledged": got("FA", 5000, 1001),
        "far ahead": got("FA", 5001 + FAR, 1001),
        "far behind": got("FA", (5001 - FAR + 9) % 2**32, 1001),
        "with an acknowledgement of what was never sent": got("FA", 5001, 500_000),
        "with an acknowledgement of the far past": got("FA", 5001, (1001 - FAR + 9) % 2**32),
    }
    for name, frame in forged.items():
        lie = into(frame, ESTABLISHED)
        yield Case(
            f"G14 FIN {name}",
            TYPICAL,
            (*HANDSHAKE, lie, FIN_OUT, Wait(3600), DATA_IN, Wait(3600), DATA_IN),
        )
        yield Case(
            f"G14 FIN {name} after the VM's", TYPICAL, (*HANDSHAKE, FIN_OUT, lie, Wait(32), DATA_IN)
        )
    yield Case(
        "G14 FIN of both sides ends it",
        TYPICAL,
        (*HANDSHAKE, FIN_OUT, FIN_IN, Wait(28), FIN_IN, Wait(32), LATE_IN),
    )
    with_data = into(got("FA", 5001, 1002, bytes(100)), ESTABLISHED)
    yield Case(
        "G14 FIN with data ends it", TYPICAL, (*HANDSHAKE, FIN_OUT, with_data, Wait(32), LATE_IN)
    )
    half = out(sent("FA", 1001, 5000), ESTABLISHED)
    yield Case(
        "G14 FIN that acknowledges a little less ends it",
        TYPICAL,
        (*HANDSHAKE, half, FIN_IN, Wait(32), LATE_IN),
    )


def _windows() -> Iterator[Case]:
    """No window is followed, for its scale may not have been seen; numbers are, for resets."""
    yield Case(
        "G15 an acknowledgement of what was never sent chooses no reset",
        TYPICAL,
        (
            *HANDSHAKE,
            into(got("A", 5001, 500_000), ESTABLISHED),
            out(sent("R", 500_000, 0), ESTABLISHED),
            Wait(60),
            DATA_IN,
            out(sent("R", 1001, 0), ESTABLISHED),
            Wait(12),
            LATE_IN,
        ),
    )
    for size in (70_000, 10_000_000):
        ahead = into(got("A", 5001 + size, payload=bytes(1000)), ESTABLISHED)
        acked = out(sent("A", 1001, 6001 + size), ESTABLISHED)
        late = into(got("A", 6001 + size), NO_STATE)
        opened: tuple[Send, ...] = (*HANDSHAKE, ahead, acked)
        yield Case(
            f"G15 {size} bytes ahead, reset where it was",
            TYPICAL,
            (
                *opened,
                into(got("R", 5001, 0), ESTABLISHED),
                Wait(60),
                into(got("A", 6001 + size), ESTABLISHED),
            ),
        )
        yield Case(
            f"G15 {size} bytes ahead, exact reset",
            TYPICAL,
            (*opened, into(got("R", 6001 + size, 0), ESTABLISHED), Wait(12), late),
        )
    yield Case(
        "G15 an older acknowledgement does not move the reset's number back",
        TYPICAL,
        (
            *HANDSHAKE,
            into(got("A", 5001, payload=bytes(1000)), ESTABLISHED),
            out(sent("A", 1001, 6001), ESTABLISHED),
            out(sent("A", 1001, 5001), ESTABLISHED),
            into(got("R", 5001, 0), ESTABLISHED),
            Wait(60),
            DATA_IN,
            into(got("R", 6001, 0), ESTABLISHED),
            Wait(12),
            LATE_IN,
        ),
    )


CASES: tuple[Case, ...] = (*_answers(), *_ends(), *_windows())
