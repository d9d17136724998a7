# SPDX-License-Identifier: Apache-2.0
"""The ways a frame of a VM comes into the kernel give it the same verdict.

A VM picks its way by what it sends: small frames of a TAP run through native XDP, those with a
GSO header or written by a thread that may sleep through generic XDP on a finished skb. Rows of the
verdict tables are sent for real on each of them; the verdict is read from the counters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import pytest

from scripts.lab import wire
from tests.cases import TABLES
from tests.cases.fixtures import OPEN
from tests.cases.table import Case, Send
from tests.frames import IPV4, IPV6, TCP, VM4
from tests.lab.devices import Devices, Fate, Guarded, document
from tests.lab.taps import GSO_TCPV4, GSO_TCPV6, IFF_VNET_HDR, NEEDS_CSUM, VnetHeader
from vgw.abi import Path, Reason, Verdict
from vgw.policy.model import Hook

pytestmark = pytest.mark.lab

SHORTEST, LONGEST = 14, 1514
#: Of the rows with the same fate as many, spread over them; together at least FEWEST.
ROWS_OF_A_FATE, FEWEST = 15, 200
#: Frames that the kernel itself drops before tc sees them: those cut inside a tag.
MOST_UNSEEN = 4
#: A frame that is judged on every way, to tell that one before it never was.
MARK = (wire.arp_request("52:54:00:00:00:11", VM4, "10.20.0.1"), Reason.ARP)

Sender = Callable[[bytes], None]


@functools.cache
def rows() -> tuple[tuple[str, bytes, Fate], ...]:
    """Return name, frame and fate of the rows that are one frame of the VM."""
    found: dict[bytes, tuple[str, Fate]] = {}
    for case in chain(*TABLES.values()):
        step = _only_frame(case)
        if step is not None:
            fate = step.expected.verdict, step.expected.reason
            found.setdefault(step.frame, (case.name, fate))
    by_fate: dict[Fate, list[tuple[str, bytes, Fate]]] = {}
    for frame, (name, fate) in found.items():
        by_fate.setdefault(fate, []).append((name, frame, fate))
    spread = (each[:: -(-len(each) // ROWS_OF_A_FATE)] for each in by_fate.values())
    return tuple(chain.from_iterable(spread))


def _only_frame(case: Case) -> Send | None:
    if case.fixture is not OPEN or len(case.steps) != 1:
        return None
    step = case.steps[0]
    if not isinstance(step, Send) or step.path is not Path.FROM_VM:
        return None
    beside = not step.for_test_run or step.gso
    return None if beside or not SHORTEST <= len(step.frame) <= LONGEST else step


@dataclass(frozen=True)
class Way:
    """A device and hook, and how a frame gets there."""

    name: str
    hook: Hook
    make: Callable[[Devices], Sender]


def _gso_header(frame: bytes) -> VnetHeader:
    """Return the header of a super-packet, as far as one can be claimed of a frame."""
    is_six = frame[12:14] == IPV6.to_bytes(2, "big")
    start = 54 if is_six else 34
    kind = GSO_TCPV6 if is_six else GSO_TCPV4
    return VnetHeader(NEEDS_CSUM, kind, start + 20, 1, start, 16)


def _super_packets(devices: Devices) -> Sender:
    queue = devices.queue("tap0", IFF_VNET_HDR)

    def send(frame: bytes) -> None:
        queue.send(frame, _gso_header(frame))

    return send


WAYS = (
    Way("TAP, native XDP", Hook.XDP, lambda devices: devices.queue("tap0").send),
    Way("TAP, generic XDP", Hook.XDP, lambda devices: devices.queue("tap0", blocking=True).send),
    Way("TAP, tc", Hook.TC, lambda devices: devices.queue("tap0").send),
    Way("veth, tc", Hook.TC, lambda devices: devices.veth("tap0").send),
    Way("veth, native XDP", Hook.XDP, lambda devices: devices.veth("tap0").send),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_catalogue_K1_every_way_in_gives_the_verdict_of_the_table(
    devices: Devices, way: Way
) -> None:
    send = way.make(devices)
    guarded = devices.protect(document(), hook=way.hook)
    wrong, unseen = [], []

    for name, frame, expected in rows():
        guarded.forget()
        got = _fate(guarded, send, frame, expected)
        if got is None:
            unseen.append(name)
        elif got != expected:
            wrong.append(f"{name}: {got[0].name} {got[1].name} {frame.hex()}")

    assert not wrong, "\n".join(wrong)
    assert len(unseen) <= (MOST_UNSEEN if way.hook is Hook.TC else 0), unseen
    assert len(rows()) >= FEWEST


def _fate(guarded: Guarded, send: Sender, frame: bytes, expected: Fate) -> Fate | None:
    """Return what a frame got; None when it was gone before it was judged."""
    mark, reason = MARK
    if expected[1] is reason:
        return guarded.reason(partial(send, frame))

    def both() -> None:
        send(frame)
        send(mark)

    seen = guarded.judged(both, until=reason)
    return next((key[1:] for key in seen if key[2] is not reason), None)


def test_catalogue_K1_super_packets_get_the_verdict_of_the_table(devices: Devices) -> None:
    """The same rows claimed to be super-packets, as far as the kernel takes them as such."""
    send = _super_packets(devices)
    guarded = devices.protect(document(), hook=Hook.XDP)
    taken, wrong = 0, []

    for name, frame, expected in rows():
        if not _is_tcp(frame):
            continue
        guarded.forget()
        got = guarded.reason_or_refusal(partial(send, frame))
        taken += got is not None
        if got not in (None, expected):
            wrong.append(f"{name}: {got} {frame.hex()}")

    assert not wrong, "\n".join(wrong)
    assert taken >= 20


def _is_tcp(frame: bytes) -> bool:
    kinds = {IPV4: 23, IPV6: 20}
    place = kinds.get(int.from_bytes(frame[12:14], "big"))
    return place is not None and frame[place : place + 1] == bytes([TCP])


def test_a_missing_guard_is_noticed(devices: Devices) -> None:
    """The control: without the guard of addresses its rows get another verdict for real."""
    guards = ", guards: {address: false}"
    send = devices.queue("tap0").send
    guarded = devices.protect(document(more=guards))
    spoofed = [row for row in rows() if row[2][1] is Reason.SPOOF_ADDRESS]

    accepted = 0
    for _, frame, _ in spoofed:
        guarded.forget()
        accepted += guarded.reason(partial(send, frame))[0] is Verdict.ACCEPT

    assert accepted >= len(spoofed) // 2 > 0
