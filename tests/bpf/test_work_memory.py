# SPDX-License-Identifier: Apache-2.0
"""What an earlier packet left in the work memory means nothing to the next one.

Programs clear only the part of it that every packet has; the rest is to be read only where a
packet of that kind was parsed. Here each packet finds the memory full of rubbish.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from typing import Unpack

import pytest

from tests.bpf.event_tap import EventTap
from tests.cases import TABLES
from tests.cases.fixtures import OPEN
from tests.cases.table import Case, Fixture, Send
from tests.engine_pool import Engines
from tests.engines import Beside, Outcome, report
from tests.program_engine import ProgramEngine, why_not_run
from vgw import libbpf, loader
from vgw.abi import Path
from vgw.policy.model import Hook, Logging

pytestmark = pytest.mark.bpf

HOOKS = (Hook.XDP, Hook.TC)
LOG = Logging(per_second=1_000_000)
#: Frames are cut here: within and behind the link header, IP headers and upper headers.
CUTS = (14, 18, 30, 34, 40, 54, 60, 62, 74)


class LitteredEngine(ProgramEngine):
    """A ProgramEngine whose programs find rubbish in the work memory, each time other rubbish."""

    _random = random.Random(20261127)

    def judge(self, path: Path, frame: bytes, **beside: Unpack[Beside]) -> Outcome:
        size = self._artefact.maps["scratch"].value_size
        rubbish = self._random.choice(
            (b"\xff" * size, b"\x01" * size, self._random.randbytes(size), bytes(size))
        )
        self._put("scratch", rubbish * libbpf.possible_cpus())
        return super().judge(path, frame, **beside)


class LitteredEngines(Engines):
    """LitteredEngines for the verdict tables."""

    def make(self, fixture: Fixture, conntrack_max: int) -> ProgramEngine:
        return LitteredEngine(
            self._artefact, self._hook, fixture.facts, fixture.policy, conntrack_max
        )


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_rubbish_changes_no_verdict(artefact: loader.Artefact, hook: Hook) -> None:
    with closing(LitteredEngines(artefact, hook)) as engines:
        played = engines.play(chain(*TABLES.values()))
    assert not played.differences, report(played.differences)


def _frames(hook: Hook) -> Iterator[bytes]:
    """Frames of the VM of all kinds, and all of them cut short."""
    for case in chain(*TABLES.values()):
        step = case.steps[0]
        if not isinstance(step, Send) or step.path is not Path.FROM_VM or not _is_plain(case):
            continue
        if why_not_run(hook, step) is None:
            yield step.frame
        for size in CUTS:
            cut = Send(step.path, step.frame[:size], step.expected)
            if size < len(step.frame) and why_not_run(hook, cut) is None:
                yield cut.frame


def _is_plain(case: Case) -> bool:
    return case.fixture is OPEN and len(case.steps) == 1


def _events(engine: ProgramEngine, frames: list[bytes]) -> Iterator[bytes | None]:
    """Yield the record of each frame without its time, None for one without a record."""
    with closing(engine), EventTap(engine) as tap:
        for frame in frames:
            engine.reset()
            engine.judge(Path.FROM_VM, frame)
            events = tap.packets()
            assert len(events) <= 1
            for event in events:
                event.time_ns = 0
            yield bytes(events[0]) if events else None


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_a_record_says_nothing_of_an_earlier_packet(artefact: loader.Artefact, hook: Hook) -> None:
    frames = list(_frames(hook))
    arguments = artefact, hook, OPEN.facts, OPEN.policy
    clean = _events(ProgramEngine(*arguments, log=LOG), frames)
    littered = _events(LitteredEngine(*arguments, log=LOG), frames)
    records = list(zip(frames, clean, littered, strict=True))
    assert sum(record is not None for _, record, _ in records) > 100
    differ = [
        f"{frame.hex()}: {(one or b'').hex()}, with rubbish {(other or b'').hex()}"
        for frame, one, other in records
        if one != other
    ]
    assert not differ, "\n".join(differ[:10])
