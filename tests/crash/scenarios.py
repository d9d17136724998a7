# SPDX-License-Identifier: Apache-2.0
"""The changes that are killed at each step: from where they start, and what packets may meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.controller.killed import killed_at
from tests.controller.policies import document, interface
from tests.crash.probe import CLOSED, OPEN, A, B, Seen, explained, of_path, policy
from tests.crash.world import TAP, VM, World, run
from vgw import abi
from vgw.maps import EndpointMaps
from vgw.policy.model import Hook

MANY: Final = 2100  # rules with which programs need their stages


@dataclass(frozen=True)
class Scenario:
    """One kind of change.

    `before` brings a host to where it starts, a bare one unless `bare` is False; `change` is made,
    and made again after a kill. `order` is by what packets may be judged one after another, from
    before the change to after it. `both_ways`: the paths change at the same packet, by one store.
    `removes`: when it fails, what it has removed stays so, and the next try removes the rest.
    `is_left_over`: it starts with what a killed process left, and clears that even if it fails.
    """

    name: str
    before: Callable[[World], object]
    change: Callable[[World], object]
    order: tuple[str, ...]
    both_ways: bool = True
    prefer_link: bool = True
    bare: bool = True
    removes: bool = False
    is_left_over: bool = False

    def allows(self, seen: Sequence[Seen], *, undone: bool = False) -> bool:
        """Tell whether probes show what is allowed while the change is made, killed and made.

        `undone`: it was made, undone and made again.
        """
        order = (*self.order, *reversed(self.order), *self.order) if undone else self.order
        if self.both_ways:
            return explained(seen, *order)
        return all(explained(of_path(seen, inbound=way), *order) for way in (True, False))


def attach(world: World, name: str, hook: Hook | None = None, more: int = 0) -> object:
    return world.host().attach(policy(name, more=more), VM, hook=hook)


def apply(world: World, name: str, **options: Any) -> object:
    """Bring an endpoint, or a bare host, to a policy."""
    if not world.host().attached():
        return world.host().attach(policy(name, **options), VM)
    return world.host().apply(policy(name, **options))


def damaged(world: World) -> None:
    """Leave an endpoint that filters by policy a, of which a map is missing."""
    attach(world, A)
    (world.paths.endpoint_dir(VM, TAP) / "stats").unlink()


def killed_before_switch(world: World) -> None:
    """Leave an endpoint under policy a, beside which policy b is staged."""
    under_a(world)
    killed_at(EndpointMaps, "switch", lambda: apply(world, B))


def gone(world: World) -> None:
    """Leave a second VM whose interface is gone."""
    run("ip", "tuntap", "add", "tap1", "mode", "tap")
    second = {"web01": interface("tap0"), "web02": "{interfaces: [{name: tap1}]}"}
    world.host().attach_many(dataclasses.replace(policy(A), vms=document(vms=second).vms))
    run("ip", "link", "del", "tap1")


def nothing(_: World) -> None:
    """Start on a bare host."""


def under_a(world: World, hook: Hook | None = None) -> None:
    """Start under policy a, with nothing remembered of a policy before."""
    for config in ("reject_per_second: 9", ""):
        world.host().attach(policy(A, config=config), VM, hook=hook)


def _all() -> Iterator[Scenario]:
    unlinked = {"prefer_link": False}
    fresh = {"both_ways": False}
    # Linux stops the queues of an interface for a moment when it gets or loses a clsact qdisc.
    gap = (OPEN, CLOSED, OPEN)
    # A link that is not pinned yet goes with the process that made it.
    made = (OPEN, B, OPEN, B)
    yield Scenario("attach", nothing, lambda w: attach(w, B), made, **fresh)
    yield Scenario("attach-xdp", nothing, lambda w: attach(w, B, Hook.XDP), made, **fresh)
    yield Scenario("attach-clsact", nothing, lambda w: attach(w, B), (*gap, B), **fresh, **unlinked)
    yield Scenario("repair", damaged, lambda w: attach(w, A), (A,))
    yield Scenario("repair-changed", damaged, lambda w: attach(w, B), (A, B), **fresh)
    yield Scenario("repair-clsact", damaged, lambda w: attach(w, B), (A, B), **fresh, **unlinked)
    yield Scenario("apply", under_a, lambda w: apply(w, B), (A, B), bare=False)
    yield Scenario("apply-clsact", under_a, lambda w: apply(w, B), (A, B), bare=False, **unlinked)
    yield Scenario("apply-wide", under_a, lambda w: apply(w, B, more=MANY), (A, B))
    yield Scenario(
        "apply-config",
        under_a,
        lambda w: apply(w, A, config="reject_per_second: 7"),
        (A,),
        bare=False,
    )
    yield Scenario(
        "apply-group",
        grouped,
        lambda w: apply(w, B, by_group=True),
        (A, B),
        bare=False,
    )
    yield Scenario(
        "apply-staged",
        killed_before_switch,
        lambda w: apply(w, A),
        (A,),
        bare=False,
        is_left_over=True,
    )
    yield Scenario(
        "hook-move",
        lambda w: under_a(w, Hook.XDP),
        lambda w: attach(w, B, Hook.TC),
        (A, B),
        bare=False,
    )
    yield Scenario(
        "hook-move-wide",
        lambda w: attach(w, A, Hook.TC, MANY),
        lambda w: attach(w, A, Hook.XDP, MANY),
        (A,),
        bare=False,
    )
    yield Scenario(
        "mode",
        enforced,
        lambda w: w.host().set_mode(VM, abi.Mode.QUARANTINE),
        (A, CLOSED),
        bare=False,
    )
    yield Scenario("flush", under_a, lambda w: w.host().flush(VM), (A,), bare=False)
    yield Scenario("sweep", gone, lambda w: w.host().sweep(), (A,), bare=False, removes=True)
    yield Scenario(
        "detach", under_a, lambda w: w.host().detach_all(), (A, OPEN), removes=True, **fresh
    )
    yield Scenario(
        "detach-clsact",
        under_a,
        lambda w: w.host().detach_all(),
        (A, *gap),
        removes=True,
        **fresh,
        **unlinked,
    )


def grouped(world: World) -> None:
    """Start under policy a by groups, with nothing remembered of a policy before."""
    for config in ("reject_per_second: 9", ""):
        apply(world, A, by_group=True, config=config)


def enforced(world: World) -> None:
    """Start under policy a, with no other mode ordered."""
    under_a(world)
    world.host().set_mode(VM, abi.Mode.ENFORCE)


SCENARIOS: Final = {scenario.name: scenario for scenario in _all()}
