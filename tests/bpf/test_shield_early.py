# SPDX-License-Identifier: Apache-2.0
"""A shield that sees packets before tc has judged those in front of them, as where frames wait.

Of the verdict tables, each packet from the VM that must pass is shown to it as it is before the
first of those that the VM sent in a row with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path as File

import pytest

from tests.cases import TABLES
from tests.cases.table import Case, Send
from tests.catalogue.mutant import Mutant
from tests.catalogue.test_mutants import build
from tests.engine_pool import Engines
from tests.engines import changes_endpoint, play
from tests.shielded_engine import ShieldedEngine
from vgw import loader
from vgw.abi import Path, Reason, Verdict
from vgw.loader.artefact import merge
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

_PROTOCOL_AT = {b"\x08\x00": 23, b"\x86\xdd": 20}
_TCP = 6
#: Cases that leave out the answer for which a VM waits before it sends the packet.
_WITHOUT_ANSWER = {"F5 it probes what it is offered, while it is"}


def early(case: Case) -> Iterator[tuple[int, Send]]:
    """Yield packets that must pass, and how many steps are before the row that they are in."""
    begin = 0
    for number, step in enumerate(case.steps):
        if not (isinstance(step, Send) and step.path is Path.FROM_VM and step.for_test_run):
            begin = number + 1
        elif number > begin and step.expected.verdict is Verdict.ACCEPT:
            yield begin, step


def waits_for_an_answer(case: Case, step: Send) -> bool:
    """Tell whether a packet is a segment of a connection: no TCP sends one behind its SYN.

    It does behind another segment of one that was open before the attach.
    """
    frame, kind = step.frame, bytes(step.frame[12:14])
    is_tcp = kind in _PROTOCOL_AT and frame[_PROTOCOL_AT[kind]] == _TCP
    return is_tcp and not case.grace and step.expected.reason is Reason.CT_ESTABLISHED


def met_early(engines: Engines) -> Iterator[tuple[str, bool]]:
    """Yield of each packet that must pass its case, and whether a shield drops it."""
    for case in chain(*TABLES.values()):
        if changes_endpoint(case) or case.name in _WITHOUT_ANSWER:
            continue
        for begin, step in early(case):
            if waits_for_an_answer(case, step):
                continue
            engine = engines.of(case.fixture)
            assert isinstance(engine, ShieldedEngine)
            assert not play(engine, replace(case, steps=case.steps[:begin]))
            yield case.name, engine.is_met(step.frame)


@contextmanager
def shields(artefact: loader.Artefact) -> Iterator[Engines]:
    engines = Engines(artefact, Hook.TC, shielded=True)
    yield engines
    engines.close()


def test_no_packet_that_must_pass_is_dropped_early(artefact: loader.Artefact) -> None:
    with shields(artefact) as engines:
        shown = list(met_early(engines))
    assert [name for name, is_met in shown if is_met] == []
    assert len(shown) > 100


def test_a_shield_that_drops_too_much_is_noticed(artefact: loader.Artefact, tmp_path: File) -> None:
    all_of_it = Mutant(
        "", "", "shield.h", "work->decision.verdict == VGW_VERDICT_DROP", "1", "xdp_shield"
    )
    with shields(merge([artefact, build(all_of_it, tmp_path)])) as engines:
        assert any(is_met for _, is_met in met_early(engines))
