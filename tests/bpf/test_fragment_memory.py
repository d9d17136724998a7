# SPDX-License-Identifier: Apache-2.0
"""What is remembered of first fragments: it has a fixed size, and losing it loses no connection."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from tests.cases.fixtures import TYPICAL
from tests.datagrams import piece
from tests.engines import Outcome
from tests.frames import IN, OUT, UDP, udp
from tests.program_engine import ProgramEngine
from vgw import abi, libbpf, loader
from vgw.abi import Path, Reason, Verdict
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

FLOOD = 20_000
FIRST = 24
DATAGRAM = OUT.wrap4(udp(payload=bytes(40)), UDP)
ANSWER = IN.wrap4(udp(53, 40000), UDP)
DEFAULT = Outcome(Verdict.ACCEPT, Reason.DEFAULT, None)
ESTABLISHED = Outcome(Verdict.ACCEPT, Reason.CT_ESTABLISHED, None)
FRAGMENT = Outcome(Verdict.DROP, Reason.FRAGMENT, None)


@pytest.fixture(params=(Hook.XDP, Hook.TC), ids=str)
def engine(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[ProgramEngine]:
    made = ProgramEngine(artefact, request.param, TYPICAL.facts, TYPICAL.policy)
    yield made
    made.close()


def remembered(engine: ProgramEngine) -> list[bytes]:
    sizes = ctypes.sizeof(abi.FragmentKey), ctypes.sizeof(abi.Fragment)
    return [key for key, _ in libbpf.map_entries(engine.fd("fragments"), *sizes)]


def test_catalogue_D11_a_flood_of_first_fragments_takes_no_more_room(
    engine: ProgramEngine,
) -> None:
    """Its sender may push out what is remembered of its own datagrams; flows are not touched."""
    assert engine.judge(Path.FROM_VM, piece(DATAGRAM, 0, FIRST)) == DEFAULT
    program = engine.program(Path.FROM_VM)
    before = engine.maps.stats()
    for identification in range(FLOOD):
        libbpf.prog_test_run(program, piece(DATAGRAM, 0, FIRST, identification=identification))
    counted = engine.maps.stats()[Path.FROM_VM, Verdict.ACCEPT, Reason.CT_ESTABLISHED].packets
    assert (Path.FROM_VM, Verdict.ACCEPT, Reason.CT_ESTABLISHED) not in before
    assert counted == FLOOD
    assert 0 < len(remembered(engine)) <= abi.FRAGMENTS
    assert len(list(engine.maps.flows())) == 1


def test_catalogue_D10_another_vm_with_the_same_addresses_does_not_notice(
    artefact: loader.Artefact, engine: ProgramEngine
) -> None:
    other = ProgramEngine(artefact, Hook.XDP, TYPICAL.facts, TYPICAL.policy)
    try:
        assert other.judge(Path.FROM_VM, piece(DATAGRAM, 0, FIRST)) == DEFAULT
        program = engine.program(Path.FROM_VM)
        for identification in range(2 * abi.FRAGMENTS):
            libbpf.prog_test_run(program, piece(DATAGRAM, 0, FIRST, identification=identification))
        assert len(remembered(other)) == 1
        assert other.judge(Path.FROM_VM, piece(DATAGRAM, FIRST)) == ESTABLISHED
    finally:
        other.close()


def test_catalogue_D14_a_datagram_that_was_forgotten_is_sent_again(engine: ProgramEngine) -> None:
    assert engine.judge(Path.FROM_VM, piece(DATAGRAM, 0, FIRST)) == DEFAULT
    (key,) = remembered(engine)
    libbpf.map_delete(engine.fd("fragments"), key)
    assert engine.judge(Path.FROM_VM, piece(DATAGRAM, FIRST)) == FRAGMENT
    assert engine.judge(Path.TO_VM, ANSWER) == ESTABLISHED
    first = piece(DATAGRAM, 0, FIRST, identification=78)
    assert engine.judge(Path.FROM_VM, first) == ESTABLISHED
    last = piece(DATAGRAM, FIRST, identification=78)
    assert engine.judge(Path.FROM_VM, last) == ESTABLISHED
