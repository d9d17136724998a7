# SPDX-License-Identifier: Apache-2.0
"""Gives a trial to the evaluator and to the programs of each hook, and compares what they say."""

from __future__ import annotations

import os
import time
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from tests.cases.table import Apply, Wait
from tests.engines import CannotRunError, Engine, EvaluatorEngine, Outcome
from tests.fuzz.quick_engine import QuickEngine
from tests.fuzz.trial import SCENES, Scene, Shot, Step, Trial
from tests.fuzz.work_memory import WorkMemory
from vgw import loader
from vgw.abi import Path, Reason, Verdict
from vgw.policy.guards import EndpointFacts
from vgw.policy.model import EffectivePolicy, Hook

#: Makes the engine that the programs are held against.
Model = Callable[[EndpointFacts, EffectivePolicy | None, int], Engine]
#: What an engine says of a packet: an outcome, the text of what went wrong, or None where it
#: cannot be given the packet, and of a step that is no packet.
Said = Outcome | str | None
MODEL: Final = "evaluator"
#: A trial that takes longer than this of real time may cross a timeout that it comes near to.
LONGEST_PLAY: Final = 0.5


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A trial after whose last step engines do not agree; `said` is by engine, of each step."""

    trial: Trial
    said: dict[str, tuple[Said, ...]]

    @property
    def last(self) -> dict[str, Said]:
        """What the engines said of the last step."""
        return {name: each[-1] for name, each in self.said.items()}

    @property
    def kind(self) -> str:
        """What makes it another one than others: the answers, whichever hook gives them."""
        answers = {_kind(said) for name, said in self.last.items() if name != MODEL and said}
        programs = " and ".join(sorted(answers))
        return f"{_kind(self.last[MODEL])} by the evaluator, {programs} by programs"


def _no_seconds() -> dict[str, float]:
    return defaultdict(float)


@dataclass(slots=True)
class Counts:
    """What was compared. `seconds` is per engine, of trials without changes of policy."""

    trials: int = 0
    packets: int = 0
    outcomes: Tally[tuple[Path, Verdict, Reason]] = field(default_factory=Tally)
    skipped: Tally[str] = field(default_factory=Tally)
    seconds: dict[str, float] = field(default_factory=_no_seconds)
    timed: int = 0
    unstable: list[str] = field(default_factory=list)

    def add(self, others: Counts) -> None:
        """Add what others counted."""
        self.trials += others.trials
        self.packets += others.packets
        self.outcomes += others.outcomes
        self.skipped += others.skipped
        self.timed += others.timed
        self.unstable += others.unstable
        for name, seconds in others.seconds.items():
            self.seconds[name] += seconds


class Rig:
    """The engines of every scene; belongs to one CPU, see `pinned`."""

    def __init__(
        self,
        artefact: loader.Artefact,
        memory: WorkMemory,
        hooks: Sequence[Hook],
        model: Model = EvaluatorEngine,
    ) -> None:
        """Make nothing yet: engines are made for the scenes that come, or by `prepare`."""
        self._artefact, self._memory = artefact, memory
        self._hooks, self._model = tuple(hooks), model
        self._engines: dict[int, dict[str, Engine]] = {}
        self.counts = Counts()

    def prepare(self) -> None:
        """Make the engines of all scenes, which takes a while."""
        for scene in SCENES:
            self._of(scene)

    def close(self) -> None:
        """Close the engines."""
        for engines in self._engines.values():
            for engine in engines.values():
                engine.close()

    def compare(self, trial: Trial) -> Disagreement | None:
        """Play a trial on all engines, count it and return it up to where they disagree."""
        said = self.play(trial, self.counts.seconds)
        counts = self.counts
        counts.trials += 1
        for step, outcome in zip(trial.steps, said[MODEL], strict=True):
            if isinstance(step, Shot):
                counts.packets += 1
                if isinstance(outcome, Outcome):
                    counts.outcomes[step.path, outcome.verdict, outcome.reason] += 1
        for name, outcomes in said.items():
            counts.skipped[name] += outcomes.count(None) - said[MODEL].count(None)
        return find_disagreement(trial, said)

    def check(self, trial: Trial) -> Disagreement | None:
        """Play a trial again and return it up to where engines disagree; counts nothing."""
        return find_disagreement(trial, self.play(trial))

    def is_stable(self, trial: Trial) -> bool:
        """Tell whether engines disagree about a trial again, in a replay without delay."""
        for _ in range(5):
            start = time.monotonic()
            found = self.check(trial) is not None
            if found or time.monotonic() - start < LONGEST_PLAY:
                return found
        return False

    def audit(self) -> None:
        """Hold the programs' counters against the decisions that were read; raises AuditError."""
        for engines in self._engines.values():
            for engine in engines.values():
                if isinstance(engine, QuickEngine):
                    engine.audit()

    def play(
        self, trial: Trial, seconds: dict[str, float] | None = None
    ) -> dict[str, tuple[Said, ...]]:
        """Return what each engine says of each step."""
        engines = self._of(trial.scene)
        applies = any(isinstance(step, Apply) for step in trial.steps)
        if seconds is not None and not applies:
            self.counts.timed += sum(isinstance(step, Shot) for step in trial.steps)
        # What XDP cannot be given leaves it with another state than the rest.
        without = Hook.XDP if any(_is_super(step) for step in trial.steps) else None
        said: dict[str, tuple[Said, ...]] = {}
        for name, engine in engines.items():
            if name == without:
                said[name] = (None,) * len(trial.steps)
                continue
            start = time.perf_counter()
            engine.reset()
            said[name] = tuple([_take(engine, step) for step in trial.steps])
            if applies:
                engine.set_policy(trial.scene.fixture.policy)
            elif seconds is not None:
                seconds[name] += time.perf_counter() - start
        return said

    def _of(self, scene: Scene) -> dict[str, Engine]:
        engines = self._engines.get(id(scene))
        if engines is None:
            facts, policy = scene.fixture.facts, scene.fixture.policy
            engines = {MODEL: self._model(facts, policy, scene.conntrack_max)}
            for hook in self._hooks:
                engines[str(hook)] = QuickEngine(
                    self._artefact,
                    hook,
                    facts,
                    policy,
                    conntrack_max=scene.conntrack_max,
                    memory=self._memory,
                )
            self._engines[id(scene)] = engines
        return engines


def _is_super(step: Step) -> bool:
    return isinstance(step, Shot) and step.gso and step.path is Path.FROM_VM


def _take(engine: Engine, step: Step) -> Said:
    """Let an engine take a step; whatever it raises is what it says."""
    try:
        match step:
            case Shot(path, frame, gso):
                return engine.judge(path, frame, gso=gso)
            case Wait(seconds):
                engine.advance(seconds)
            case Apply(policy):
                engine.set_policy(policy)
    except CannotRunError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_disagreement(trial: Trial, said: dict[str, tuple[Said, ...]]) -> Disagreement | None:
    """Return a trial cut behind the first step that engines do not agree on, None if they do."""
    expected = said[MODEL]
    if all(outcomes == expected for outcomes in said.values()) and not any(
        isinstance(each, str) for each in expected
    ):
        return None
    for place, right in enumerate(expected):
        answers = {outcomes[place] for outcomes in said.values()} - {None}
        if len(answers) > 1 or isinstance(right, str):
            steps = trial.steps[: place + 1]
            cut = {name: outcomes[: place + 1] for name, outcomes in said.items()}
            return Disagreement(Trial(trial.name, trial.scene, steps), cut)
    return None


def _kind(said: Said) -> str:
    """Return an answer without the number of a rule and the text of an error."""
    if isinstance(said, Outcome):
        return f"{said.verdict.name} {said.reason.name}"
    return "nothing" if said is None else said.split(":")[0]


@contextmanager
def pinned(cpu: int | None = None) -> Iterator[None]:
    """Keep this process on one CPU for a `with` block, by default one it may use."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before) if cpu is None else cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
