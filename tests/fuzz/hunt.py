# SPDX-License-Identifier: Apache-2.0
"""Looks for disagreements: one trial after the other, until the budget is used up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tests.engines import play
from tests.fuzz.compare import LONGEST_PLAY, Disagreement, Rig
from tests.fuzz.rows import case_of, row_of, said_text
from tests.fuzz.sequences import Sequences
from tests.fuzz.shrink import shrink
from tests.program_engine import ProgramEngine
from vgw import loader
from vgw.policy.model import Hook

#: Trials between two looks at the programs' counters.
AUDIT_EVERY = 2000


@dataclass(frozen=True, slots=True)
class Finding:
    """A disagreement made small, as plain values.

    `name` is the trial's, `kind` tells it from others, `said` is by engine of the last packet,
    `counters` what slower runs say that read the verdict from the counters, by hook.
    """

    name: str
    kind: str
    row: str
    said: dict[str, str]
    counters: dict[str, str]
    steps_before: int
    steps: int


class Catch(NamedTuple):
    """A disagreement as it was met, and made small."""

    met: Disagreement
    small: Disagreement


class Hunt:
    """The trials of some numbers on one rig."""

    def __init__(self, rig: Rig, sequences: Sequences, numbers: Iterable[int]) -> None:
        self._rig, self._sequences = rig, sequences
        self._numbers = iter(numbers)
        self._kinds: set[str] = set()

    def next(self, is_over: Callable[[], bool]) -> Catch | None:
        """Return the next disagreement of a new kind; None when it is over.

        One that does not come again is written down in the rig's counts, unless it took so long
        that the programs' clock went on. Raises AuditError.
        """
        for number in self._numbers:
            if is_over():
                break
            trial = self._sequences.trial(number)
            start = time.monotonic()
            found = self._rig.compare(trial)
            took = time.monotonic() - start
            if found is not None and not self._rig.is_stable(found.trial):
                if took < LONGEST_PLAY:
                    self._rig.counts.unstable.append(trial.name)
            elif found is not None and found.kind not in self._kinds:
                self._kinds.add(found.kind)
                return Catch(found, shrink(found, self._rig.check))
            if self._rig.counts.trials % AUDIT_EVERY == 0:
                self._rig.audit()
        self._rig.audit()
        return None


def describe(catch: Catch, artefact: loader.Artefact, hooks: Iterable[Hook]) -> Finding:
    """Return a disagreement as plain values."""
    found = catch.small
    said = {name: said_text(each) for name, each in found.last.items()}
    return Finding(
        name=found.trial.name,
        kind=found.kind,
        row=row_of(found),
        said=said,
        counters={str(hook): _by_counters(found, artefact, hook) for hook in hooks},
        steps_before=len(catch.met.trial.steps),
        steps=len(found.trial.steps),
    )


def _by_counters(found: Disagreement, artefact: loader.Artefact, hook: Hook) -> str:
    """Return what a ProgramEngine says of the row."""
    case = case_of(found)
    facts, policy = case.fixture.facts, case.fixture.policy
    engine = ProgramEngine(artefact, hook, facts, policy, case.conntrack_max)
    try:
        differences = play(engine, case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()
    if not differences:
        return "as the row says"
    return said_text(differences[-1].outcome)
