# SPDX-License-Identifier: Apache-2.0
"""Program engines that many rows share: loading programs takes longer than playing a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tests.cases.table import Case, Fixture
from tests.engines import CannotRunError, Difference, changes_endpoint, play
from tests.program_engine import ProgramEngine
from tests.shielded_engine import ShieldedEngine
from vgw import loader
from vgw.policy.model import Hook


class Played(NamedTuple):
    """What came of playing rows; `not_run` names those that a test run cannot be given."""

    differences: list[Difference]
    not_run: list[str]


class Engines:
    """Program engines of one hook, one for each fixture and table size."""

    def __init__(self, artefact: loader.Artefact, hook: Hook, *, shielded: bool = False) -> None:
        """Have none yet; with `shielded` a shield meets packets in front of tc."""
        self._artefact, self._hook, self._shielded = artefact, hook, shielded
        self._engines: dict[tuple[str, int], ProgramEngine] = {}

    def of(self, fixture: Fixture, conntrack_max: int = 1024) -> ProgramEngine:
        key = fixture.name, conntrack_max
        if key not in self._engines:
            self._engines[key] = self.make(fixture, conntrack_max)
        return self._engines[key]

    def make(self, fixture: Fixture, conntrack_max: int) -> ProgramEngine:
        """Load programs, which the caller closes or keeps in `of`."""
        arguments = fixture.facts, fixture.policy, conntrack_max
        if self._shielded:
            return ShieldedEngine(self._artefact, *arguments)
        return ProgramEngine(self._artefact, self._hook, *arguments)

    def drop(self, fixture: Fixture, conntrack_max: int) -> None:
        """Close an engine that a case left under another policy."""
        self._engines.pop((fixture.name, conntrack_max)).close()

    def play(self, cases: Iterable[Case], *, until_different: bool = False) -> Played:
        """Play rows, with `until_different` only up to the first that does not get its verdict."""
        played = Played([], [])
        for case in cases:
            try:
                played.differences.extend(play(self.of(case.fixture, case.conntrack_max), case))
            except CannotRunError:
                played.not_run.append(case.name)
            if changes_endpoint(case):
                self.drop(case.fixture, case.conntrack_max)
            if until_different and played.differences:
                break
        return played

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
