# SPDX-License-Identifier: Apache-2.0
"""One scenario killed at its steps, and what about it is not as it has to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.crash.killing import Step, run_change
from tests.crash.scenarios import Scenario
from tests.crash.world import Left, World


@dataclass
class Result:
    """What came of a scenario: how many steps it has, at how many it was killed, what was wrong."""

    name: str
    steps: list[Step] = field(default_factory=list)
    killed: int = 0
    probes: int = 0
    problems: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.name}: {len(self.steps)} steps, killed at {self.killed}, "
        return f"{text}{self.probes} packets, {len(self.problems)} problems"


#: What picks those steps of a change at which something is done to it.
Choice = Callable[[Sequence[Step]], Sequence[Step]]


def every(number: int, first: int = 0) -> Choice:
    """Pick every so manieth step."""
    return lambda found: found[first::number]


def kill_at_steps(world: World, scenario: Scenario, choice: Choice) -> Result:
    """Kill the change of a scenario at some of its steps, each time from where it starts."""
    result = Result(scenario.name)
    whole = unharmed(world, scenario, result)
    before = world.prober.probes
    for step in choice(result.steps):
        if scenario.bare:
            world.clear()
        problems = list(asserted(_killed(world, scenario, step, whole)))
        result.killed += 1
        result.problems += [f"killed before {step}: {problem}" for problem in problems]
    world.clear()
    result.probes = world.prober.probes - before
    return result


def asserted(problems: Iterator[str]) -> Iterator[str]:
    """Yield problems, and what an assertion says on the way as the last of them."""
    try:
        yield from problems
    except AssertionError as error:
        yield str(error)


def unharmed(world: World, scenario: Scenario, result: Result) -> Left:
    """Make the change once, count its steps and return what there is after it."""
    world.clear()
    for _ in range(2):  # the first time there may be something to compile
        if scenario.bare:
            world.clear()
        scenario.before(world)
        ended = run_change(world.paths, lambda: scenario.change(world))
    if ended.error is not None:
        result.problems.append(f"unharmed it fails: {ended.error}")
    result.steps = ended.steps
    return world.left()


def _killed(world: World, scenario: Scenario, step: Step, whole: Left) -> Iterator[str]:
    scenario.before(world)
    world.prober.seen()
    before = world.prober.seen()
    ended = run_change(world.paths, lambda: scenario.change(world), at=step)
    if not ended.killed:
        yield f"it did not come to that: {ended.error}"
    after = world.prober.seen()
    world.host().status()
    try:
        scenario.change(world)
    except Exception as error:
        yield f"the next run fails: {type(error).__name__}: {error}"
    end = world.prober.seen()
    if not scenario.allows([*before, *after, *end]):
        yield f"packets were judged by something else: {shown(before, after, end)}"
    if scenario.order[-1] not in world.prober.now():
        yield "the next run does not put the new policy in force"
    left = world.left()
    for field_name, wanted, found in zip(Left._fields, whole, left, strict=True):
        if wanted != found:
            yield f"{field_name} of the next run: {found} instead of {wanted}"


def shown(*parts: Sequence[object]) -> str:
    return " | ".join(
        ", ".join(f"{'>' if s.to_vm else '<'}{s.kind}{'+' if s.passed else '-'}" for s in part)  # type: ignore[attr-defined]
        for part in parts
    )
