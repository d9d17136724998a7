# SPDX-License-Identifier: Apache-2.0
"""Limits of new flows in the program: room that expires, rates, counts that come back to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.cases.fixtures import ALL_ACCEPTED, GUARDED
from tests.frames import ICMP, IN, OUT, TCP, UDP, echo, tcp, udp
from tests.program_engine import ProgramEngine
from vgw import loader
from vgw.abi import Mode, Path, Reason
from vgw.controller.clock import SECOND_NS, coarse_now_ns
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import Hook, Tracking

pytestmark = pytest.mark.bpf

LIMIT = 200
MakeEngine = Callable[[Tracking], ProgramEngine]


@pytest.fixture
def make_engine(artefact: loader.Artefact) -> Iterator[MakeEngine]:
    made: list[ProgramEngine] = []

    def make(tracking: Tracking) -> ProgramEngine:
        facts = endpoint_facts(replace(GUARDED, tracking=tracking), Mode.ENFORCE)
        made.append(ProgramEngine(artefact, Hook.TC, facts, ALL_ACCEPTED, 2048))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def open_from_vm(engine: ProgramEngine, port: int) -> Reason:
    return engine.judge(Path.FROM_VM, OUT.wrap4(tcp(port), TCP)).reason


def open_from_outside(engine: ProgramEngine, port: int) -> Reason:
    return engine.judge(Path.TO_VM, IN.wrap4(tcp(port), TCP)).reason


def complete(engine: ProgramEngine, port: int) -> None:
    answer = tcp(443, port, "SA", seq=5000, ack=1001)
    engine.judge(Path.TO_VM, IN.wrap4(answer, TCP))
    engine.judge(Path.FROM_VM, OUT.wrap4(tcp(port, 443, "A", seq=1001, ack=5001), TCP))


def answer_to(engine: ProgramEngine, port: int) -> Reason:
    answer = tcp(443, port, "SA", seq=5000, ack=1001)
    return engine.judge(Path.TO_VM, IN.wrap4(answer, TCP)).reason


def test_the_oldest_half_open_flows_make_room(make_engine: MakeEngine) -> None:
    engine = make_engine(Tracking(half_open_max=LIMIT))
    assert {open_from_vm(engine, port) for port in range(1, 5 * LIMIT)} == {Reason.DEFAULT}
    assert engine.maps.meta().half_open[Path.FROM_VM] <= LIMIT
    assert engine.maps.meta().entries <= LIMIT
    assert answer_to(engine, 1) is Reason.NO_STATE
    recent = range(5 * LIMIT - 10, 5 * LIMIT)
    assert {answer_to(engine, port) for port in recent} == {Reason.CT_ESTABLISHED}


def test_only_half_open_flows_of_the_same_side_make_room(make_engine: MakeEngine) -> None:
    engine = make_engine(Tracking(half_open_max=LIMIT))
    for port in range(1, 51):
        open_from_vm(engine, port)
        complete(engine, port)
    others = range(60001, 60051)
    assert {open_from_outside(engine, port) for port in others} == {Reason.DEFAULT}
    for port in range(1001, 1001 + 4 * LIMIT):
        open_from_vm(engine, port)
    data = [OUT.wrap4(tcp(port, 443, "A", seq=1001, ack=5001), TCP) for port in range(1, 51)]
    assert {engine.judge(Path.FROM_VM, frame).reason for frame in data} == {Reason.CT_ESTABLISHED}
    answers = [OUT.wrap4(tcp(443, port, "SA", seq=5000, ack=1001), TCP) for port in others]
    assert {engine.judge(Path.FROM_VM, each).reason for each in answers} == {Reason.CT_ESTABLISHED}


def test_without_an_old_one_there_is_no_room(make_engine: MakeEngine) -> None:
    """What expiry holds back are the newest flows, so nothing is there to give way."""
    engine = make_engine(Tracking(half_open_max=20))
    reasons = [open_from_vm(engine, port) for port in range(1, 22)]
    assert reasons == [Reason.DEFAULT] * 20 + [Reason.CT_HALF_OPEN]


def test_established_flows_leave_the_count(make_engine: MakeEngine) -> None:
    engine = make_engine(Tracking(half_open_max=LIMIT))
    for port in range(1, 21):
        open_from_vm(engine, port)
        complete(engine, port)
    assert list(engine.maps.meta().half_open) == [0, 0]
    open_from_outside(engine, 1)
    assert list(engine.maps.meta().half_open) == [1, 0]


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (OUT.wrap4(udp(1, 53), UDP), IN.wrap4(udp(53, 1), UDP)),
        (OUT.wrap4(echo(8), ICMP), IN.wrap4(echo(0), ICMP)),
    ],
)
def test_an_answer_ends_being_half_open_once(
    make_engine: MakeEngine, ask: bytes, answer: bytes
) -> None:
    engine = make_engine(Tracking())
    engine.judge(Path.FROM_VM, ask)
    engine.judge(Path.FROM_VM, ask)
    assert list(engine.maps.meta().half_open) == [0, 1]
    engine.judge(Path.TO_VM, answer)
    engine.judge(Path.TO_VM, answer)
    assert list(engine.maps.meta().half_open) == [0, 0]


def test_expiry_and_reuse_take_flows_out_of_the_count(make_engine: MakeEngine) -> None:
    engine = make_engine(Tracking())
    for port in range(1, 301):
        open_from_vm(engine, port)
    engine.advance(31)
    assert open_from_vm(engine, 1) is Reason.DEFAULT  # takes the place of its dead predecessor
    assert engine.maps.meta().half_open[Path.FROM_VM] <= 300
    with engine.reaper() as reap:
        while reap():
            pass
    meta = engine.maps.meta()
    assert meta.half_open[Path.FROM_VM] == meta.entries
    assert meta.entries < 300


def test_new_flows_in_a_second(make_engine: MakeEngine) -> None:
    engine = make_engine(Tracking(new_per_second=5))
    for attempt in range(5):
        reasons, seconds = [], set()
        for port in range(1, 9):
            reasons.append(open_from_vm(engine, 100 * attempt + port))
            seconds.add(engine.maps.meta().window[Path.FROM_VM])
        if len(seconds) == 1 and attempt:  # all within one second, and all of that second
            break
        second = engine.maps.meta().window[Path.FROM_VM]
        while coarse_now_ns() // SECOND_NS == second:
            pass
    assert reasons == [Reason.DEFAULT] * 5 + [Reason.CT_RATE] * 3
    assert open_from_outside(engine, 1) is Reason.DEFAULT, "each side has its own rate"


def test_no_limit_of_rate_by_default(make_engine: MakeEngine) -> None:
    engine = make_engine(Tracking())
    assert {open_from_vm(engine, port) for port in range(1, 501)} == {Reason.DEFAULT}
    assert engine.maps.meta().created[Path.FROM_VM] == 500
