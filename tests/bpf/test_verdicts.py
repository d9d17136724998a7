# SPDX-License-Identifier: Apache-2.0
"""The loaded programs give every packet of the verdict tables what the tables say, on both hooks.

They are held against the reference evaluator as well, also with frames that no table lists: each
accepted one cut at every byte, and many with bytes changed at random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import pytest

from tests.cases import TABLES
from tests.cases.fixtures import OPEN
from tests.cases.table import Case, Send
from tests.catalogue.rows import OTHER_ROWS
from tests.engine_pool import Engines
from tests.engines import (
    CannotRunError,
    Engine,
    EvaluatorEngine,
    play,
    report,
)
from tests.program_engine import ProgramEngine
from vgw import loader
from vgw.abi import Guard, Path, Reason, Verdict
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

HOOKS = (Hook.XDP, Hook.TC)
SHIELDED = "shielded"
CHANGED_FRAMES = 1500


@pytest.fixture(scope="module", params=(*HOOKS, SHIELDED), ids=str)
def engines(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[Engines]:
    shielded = request.param == SHIELDED
    made = Engines(artefact, Hook.TC if shielded else request.param, shielded=shielded)
    yield made
    made.close()


@pytest.mark.parametrize("table", OTHER_ROWS)
def test_programs_agree_with_table(engines: Engines, table: str) -> None:
    """The rows without an id of the catalogue; those with one are tests/catalogue's."""
    played = engines.play(OTHER_ROWS[table])
    assert not played.differences, report(played.differences)
    assert all("unreadable" in name for name in played.not_run), played.not_run


def _asks_for_checksum(case: Case) -> bool:
    return any(isinstance(step, Send) and step.checksum is not None for step in case.steps)


def _sends() -> list[Send]:
    """Return the readable packets of the one-packet cases under the open fixture."""
    cases = (case for case in chain(*TABLES.values()) if case.fixture is OPEN)
    steps = (case.steps[0] for case in cases if len(case.steps) == 1)
    return [step for step in steps if isinstance(step, Send) and _is_plain(step)]


def _is_plain(step: Send) -> bool:
    accepted = step.expected.verdict is Verdict.ACCEPT
    return accepted and step.for_test_run and not step.gso and len(step.frame) < 400


def _compare(engine: Engine, frames: Iterator[tuple[Path, bytes]]) -> tuple[int, list[str]]:
    """Judge frames on fresh state by a program and by the evaluator; returns what differs."""
    model = EvaluatorEngine(OPEN.facts, OPEN.policy)
    differences = []
    count = 0
    for path, frame in frames:
        engine.reset()
        model.reset()
        try:
            got = engine.judge(path, frame)
        except CannotRunError:
            continue
        said = model.judge(path, frame)
        count += 1
        if got != said:
            differences.append(f"{path.name} {frame.hex()}: program {got}, evaluator {said}")
    return count, differences


def _cut_frames() -> Iterator[tuple[Path, bytes]]:
    """The first frame of each kind, cut at every byte."""
    seeds = {(step.path, step.frame[12:14], step.frame[20:24]): step for step in _sends()}
    for step in seeds.values():
        for size in range(14, len(step.frame)):
            yield step.path, step.frame[:size]


def _changed_frames() -> Iterator[tuple[Path, bytes]]:
    generator = random.Random(20260101)
    seeds = _sends()
    for _ in range(CHANGED_FRAMES):
        step = generator.choice(seeds)
        frame = bytearray(step.frame)
        for _ in range(generator.choice((1, 1, 1, 2, 3, 8))):
            place = generator.randrange(12, len(frame))
            frame[place] = generator.choice(
                (0, 1, 0xFF, frame[place] ^ 1 << generator.randrange(8), generator.randrange(256))
            )
        yield step.path, bytes(frame)


def test_catalogue_A15_cut_frames_get_what_the_evaluator_says(engines: Engines) -> None:
    count, differences = _compare(engines.of(OPEN), _cut_frames())
    assert not differences, "\n".join(differences[:20])
    assert count > 500


def test_changed_frames_get_what_the_evaluator_says(engines: Engines) -> None:
    _, differences = _compare(engines.of(OPEN), _changed_frames())
    assert not differences, f"{len(differences)} differ:\n" + "\n".join(differences[:20])


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        (Guard.MAC, Reason.SPOOF_MAC),
        (Guard.MAC, Reason.NOT_FOR_VM),
        (Guard.ADDRESS, Reason.SPOOF_ADDRESS),
        (Guard.ARP, Reason.SPOOF_ARP),
        (Guard.ND, Reason.SPOOF_ND),
        (Guard.DHCP_SERVER, Reason.DHCP_SERVER),
        (Guard.RA, Reason.ROUTER_ADVERTISEMENT),
    ],
    ids=lambda value: value.name,
)
def test_tables_notice_a_missing_guard(
    artefact: loader.Artefact, guard: Guard, reason: Reason
) -> None:
    """The tables would find a program without this guard: its rows fail there."""
    facts = replace(OPEN.facts, guards=OPEN.facts.guards & ~guard)
    engine = ProgramEngine(artefact, Hook.XDP, facts, OPEN.policy)
    try:
        rows = [case for case in chain(*TABLES.values()) if _expects(case, reason)]
        assert rows
        failed = [case for case in rows if play(engine, case)]
    finally:
        engine.close()
    # Some rows break several guards at once, and then the next one still refuses them.
    assert len(failed) >= len(rows) // 2


def _expects(case: Case, reason: Reason) -> bool:
    if case.fixture is not OPEN or len(case.steps) != 1:
        return False
    step = case.steps[0]
    return isinstance(step, Send) and step.for_test_run and step.expected.reason is reason
