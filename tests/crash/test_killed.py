# SPDX-License-Identifier: Apache-2.0
"""Killed at a step of a change: one policy or the other judges, and the next run converges.

Here at a fixed choice of the steps; `python -m tests.crash` kills at every one of them.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.crash.killing import Step, run_change
from tests.crash.probe import A, B
from tests.crash.run import Choice, every, kill_at_steps
from tests.crash.scenarios import SCENARIOS, Scenario, under_a
from tests.crash.world import World
from vgw.controller import links
from vgw.controller import links_replace as replacing
from vgw.controller.images import pinned_images
from vgw.maps import EndpointMaps

pytestmark = pytest.mark.bpf

#: Scenario -> of how many steps one is chosen.
SPREAD: Final = {
    "attach": 12,
    "attach-xdp": 17,
    "attach-clsact": 17,
    "repair": 11,
    "repair-changed": 11,
    "repair-clsact": 13,
    "apply": 3,
    "apply-clsact": 11,
    "apply-wide": 23,
    "apply-config": 3,
    "apply-group": 9,
    "apply-staged": 5,
    "hook-move": 5,
    "hook-move-wide": 13,
    "mode": 3,
    "flush": 3,
    "sweep": 5,
    "detach": 6,
    "detach-clsact": 7,
}

Staged = tuple[World, Scenario]


def test_every_scenario_is_killed() -> None:
    assert set(SPREAD) == set(SCENARIOS)


@pytest.mark.parametrize("staged", SPREAD, indirect=True)
def test_catalogue_M4_killed_at_a_step_one_policy_judges_and_the_next_run_converges(
    staged: Staged,
) -> None:
    world, scenario = staged
    result = kill_at_steps(world, scenario, every(SPREAD[scenario.name], len(scenario.name) % 3))
    print(result)  # with -s: how many steps there are
    assert result.problems == []
    assert result.killed >= 2
    assert result.probes > 1000


def of_pins(found: Sequence[Step]) -> Sequence[Step]:
    """Pick steps from the first link on that a new endpoint takes over, and all of links."""
    first = next(n for n, step in enumerate(found) if step.what.startswith("link "))
    there = [step for step in found[first:] if "state/" not in step.target]
    return [step for n, step in enumerate(there) if step.what.startswith("link ") or n % 4 == 3]


def test_killed_between_the_pins_that_take_the_place_of_others(a_world: World) -> None:
    result = kill_at_steps(a_world, SCENARIOS["repair-changed"], of_pins)
    assert result.problems == []
    assert result.killed > 5


def test_killed_while_a_map_of_stages_is_moved(a_world: World) -> None:
    """An endpoint without it drops what a large policy decides."""

    result = kill_at_steps(a_world, SCENARIOS["hook-move-wide"], at("rename", "_vm", "_stages"))
    assert result.problems == []
    assert result.killed == 3


def test_catalogue_M5_killed_between_making_an_image_and_its_switch(a_world: World) -> None:
    """The old policy stays in force, and what was made for the new one goes."""
    scenario = SCENARIOS["apply"]
    under_a(a_world)
    ended = run_change(a_world.paths, partial(scenario.change, a_world))
    first = next(step for step in ended.steps if step.target == "policies_inner")
    last = next(step for step in ended.steps if step.target == "active")
    between = ended.steps[ended.steps.index(first) + 1 : ended.steps.index(last) + 1]
    assert len(between) > 8
    for step in between[::3]:
        under_a(a_world)
        assert run_change(a_world.paths, partial(scenario.change, a_world), step).killed
        assert a_world.prober.now() == {A}
        under_a(a_world)
        assert len(pinned_images(a_world.paths)) == 2
        a_world.left()  # which asserts that no other map lives


# --- M30: for want of memory ----------------------------------------------------------------


_taken: list[bytearray] = []


def no_more_memory() -> int:
    """Let this process get no more memory, and use what it has mapped: smaller and smaller blocks.

    Only what it needs for small objects is left, and that not for long.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
    size = 1 << 20
    while size >= 1 << 10:
        try:
            _taken.append(bytearray(size))
        except MemoryError:
            size //= 2
    return 0


@pytest.mark.parametrize("name", ["apply", "repair-changed"])
def test_catalogue_M30_memory_runs_out_in_the_middle_of_a_change(a_world: World, name: str) -> None:
    scenario = SCENARIOS[name]
    scenario.before(a_world)
    found = run_change(a_world.paths, partial(scenario.change, a_world)).steps
    a_world.clear()
    failed = 0
    for step in found[2 :: len(found) // 10]:
        if scenario.bare:
            a_world.clear()
        scenario.before(a_world)
        a_world.prober.seen()
        ended = run_change(a_world.paths, partial(scenario.change, a_world), step, no_more_memory)
        assert ended.error is None or not ended.error.startswith("escaped"), (step, ended.error)
        failed += ended.error is not None
        scenario.change(a_world)
        assert scenario.allows(a_world.prober.seen()), step
        assert a_world.prober.now() == {B}
        a_world.left()
    assert failed > 1


# --- negative controls: what is done in the wrong order is noticed --------------------------------


def detached_first(patch: pytest.MonkeyPatch) -> None:
    """Take the old program off before the new one is attached."""

    def take_off(*arguments: Any) -> None:
        _, ifindex, path, _, directory = arguments
        links.detach(ifindex, path, links.link_pin(directory, path))

    patch.setattr(replacing, "take_over", take_off)


def never_settled(patch: pytest.MonkeyPatch) -> None:
    """Leave what a killed process left."""
    for module in ("change", "reconcile", "renames", "replacement", "upgrade"):
        patch.setattr(f"vgw.controller.{module}.settle", lambda _: None)


def switched_too_early(patch: pytest.MonkeyPatch) -> None:
    """Put the spare slot in force before it is written."""
    stage = EndpointMaps.stage

    def hasty(self: EndpointMaps, *arguments: Any) -> int:
        active = self.active_slot()
        self.switch(1 - active)
        vars(self)["active_slot"] = lambda: active
        return stage(self, *arguments)

    patch.setattr(EndpointMaps, "stage", hasty)


def at(what: str, *targets: str) -> Choice:
    """Pick the steps that do this to what ends in one of these."""
    return lambda found: [
        step for step in found if step.what == what and step.target.endswith(targets or "")
    ]


@pytest.mark.parametrize(
    ("name", "choice", "broken", "noticed"),
    [
        ("repair-changed", at("link create"), detached_first, "judged by something else"),
        ("repair-changed", at("link update"), never_settled, "the next run fails"),
        ("apply", at("map update", "configs"), switched_too_early, "judged by something else"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_done_in_the_wrong_order_is_noticed(
    a_world: World,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    choice: Choice,
    broken: Callable[[pytest.MonkeyPatch], None],
    noticed: str,
) -> None:
    broken(monkeypatch)
    result = kill_at_steps(a_world, SCENARIOS[name], lambda found: choice(found)[-1:])
    assert any(noticed in problem for problem in result.problems), result.problems
