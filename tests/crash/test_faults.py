# SPDX-License-Identifier: Apache-2.0
"""Steps that fail: the old policy or an interface as it was found, one line, and a good retry.

Here at a fixed choice of the steps; `python -m tests.crash --fail` has every one of them fail, with
every errno that it may meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import pytest

from tests.crash.faults import ERRNOS, fail_at_steps
from tests.crash.killing import Step
from tests.crash.probe import OPEN, A, B, Seen
from tests.crash.run import every
from tests.crash.scenarios import SCENARIOS, Scenario, attach
from tests.crash.world import TAP, VM, World
from vgw.controller import change
from vgw.controller.replacement import Placing
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

#: Scenario -> of how many steps one is chosen.
SPREAD: Final = {
    "attach": 13,
    "attach-clsact": 23,
    "repair-changed": 17,
    "repair-clsact": 29,
    "apply": 7,
    "apply-wide": 37,
    "apply-staged": 7,
    "hook-move": 11,
    "hook-move-wide": 13,
    "mode": 5,
    "flush": 1,
    "sweep": 11,
    "detach": 13,
    "detach-clsact": 17,
}
Staged = tuple[World, Scenario]


@pytest.mark.parametrize("staged", SPREAD, indirect=True)
def test_catalogue_M6_a_step_that_fails_leaves_the_old_policy(staged: Staged) -> None:
    world, scenario = staged
    result = fail_at_steps(world, scenario, every(SPREAD[scenario.name], len(scenario.name) % 4))
    assert result.problems == []
    assert result.killed >= 2


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
@pytest.mark.parametrize("protected", [False, True], ids=["fresh", "repair"])
def test_catalogue_M19_one_program_is_attached_and_the_other_is_refused(
    a_world: World, hook: Hook, *, protected: bool
) -> None:
    """Whichever of the two it is, the interface is as it was found, and so says status."""
    name = "repair-changed" if protected else "attach"
    what = "link update" if protected else "link create"
    before = SCENARIOS[name].before
    scenario = Scenario(
        name,
        lambda w: (attach(w, A, hook), before(w)) if protected else before(w),
        lambda w: attach(w, B, hook),
        (A, B) if protected else (OPEN, B),
        both_ways=False,
    )

    def attaching(found: Sequence[Step]) -> Sequence[Step]:
        return [step for step in found if step.what == what or "/link_" in step.target]

    result = fail_at_steps(a_world, scenario, attaching)
    assert result.problems == []
    assert result.killed == (2 if protected else 4)
    assert all(f"{VM} {TAP} failed while attaching" in error for error in result.errors)
    assert len(result.errors) == result.killed


def test_every_kind_of_step_can_fail() -> None:
    """Were there a new kind, its errnos would have to be said."""
    assert all(ERRNOS.values())


def test_an_interface_may_stop_each_time_it_gets_or_loses_a_qdisc() -> None:
    """It gets one, loses it when that is undone, and gets it again: three times, and no more."""
    unprotected, stopped = Seen(True, "w", True), Seen(True, "z", False)
    by_b = [Seen(True, "y", True), Seen(True, "x", False)]
    gap = [stopped, unprotected]
    scenario = SCENARIOS["attach-clsact"]
    assert scenario.allows([unprotected, *gap * 3, *by_b], undone=True)
    assert not scenario.allows([unprotected, *gap * 4, *by_b], undone=True)
    assert not scenario.allows([unprotected, *gap * 2, *by_b])


# --- negative controls -------------------------------------------------------------------------


def keep_the_new_manifest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(change, "restore_manifest", lambda *_: None)


def keep_half_an_endpoint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Placing, "undo", lambda _: None)


@pytest.mark.parametrize(
    ("name", "target", "broken", "noticed"),
    [
        ("apply", "active", keep_the_new_manifest, "left after the failure"),
        ("attach", "link_from_vm", keep_half_an_endpoint, "packets are judged by []"),
    ],
    ids=["manifest", "endpoint"],
)
def test_what_is_not_undone_is_noticed(
    a_world: World,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    target: str,
    broken: Callable[[pytest.MonkeyPatch], None],
    noticed: str,
) -> None:
    broken(monkeypatch)

    def there(found: Sequence[Step]) -> Sequence[Step]:
        return [step for step in found if step.target.endswith(target) and step.what != "mkdir"][:1]

    result = fail_at_steps(a_world, SCENARIOS[name], there)
    assert any(noticed in problem for problem in result.problems), result.problems
