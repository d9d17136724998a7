# SPDX-License-Identifier: Apache-2.0
"""A process that is killed at any step of a change: packets stay judged by one policy or the other,
and the next process brings the host to what it should be.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.controller.killed import killed_after
from tests.controller.observe import received, row, send_to_vm, traces
from tests.controller.policies import document, to_vm
from vgw import libbpf
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.loader.sources import PROGRAMS
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
HTTPS = "[{name: https, action: accept, services: [tcp/443]}]"


def judged_by(vm: int, port: int) -> bool:
    """Tell whether the policy in force is the one that lets a port in."""
    frame = to_vm(dport=port)
    send_to_vm("tap0", frame)
    return received(vm, frame)


def test_killed_in_an_apply(host: Host, paths: Paths, tap: Callable[[str], int]) -> None:
    vm = tap("tap0")
    steps = 0
    finished = False
    while not finished:
        host.attach(document(HTTP), "web01")
        finished = killed_after(steps, lambda: Host(paths).apply(document(HTTPS)))
        old, new = judged_by(vm, 80), judged_by(vm, 443)
        assert old != new, f"after {steps} steps"
        assert row(host)["attached"]
        host.apply(document(HTTPS))
        assert judged_by(vm, 443), f"after {steps} steps"
        host.apply(document(HTTP))
        assert judged_by(vm, 80), f"after {steps} steps"
        host.flush("web01")
        steps += 1
    assert steps > 5


@pytest.mark.parametrize(("kind", "hook"), [("tap", Hook.XDP), ("tap", Hook.TC), ("veth", Hook.TC)])
def test_killed_in_an_attach(
    host: Host, paths: Paths, request: pytest.FixtureRequest, kind: str, hook: Hook
) -> None:
    request.getfixturevalue(kind)("tap0")
    host.artefact(PROGRAMS)
    steps = 0
    finished = False

    def attach() -> None:
        Host(paths).attach(document(HTTP), "web01", hook=hook)

    while not finished:
        finished = killed_after(steps, attach)
        host.status()
        host.attach(document(HTTP), "web01", hook=hook)
        assert row(host)["attached"], f"after {steps} steps"
        host.detach("web01")
        assert traces(paths) == [], f"after {steps} steps"
        steps += 5
    assert steps > 25


def test_killed_in_a_move_to_another_hook(
    host: Host, paths: Paths, tap: Callable[[str], int]
) -> None:
    vm = tap("tap0")
    steps = 0
    finished = False

    def move() -> None:
        Host(paths).attach(document(HTTP), "web01", hook=Hook.TC)

    while not finished:
        host.attach(document(HTTP), "web01", hook=Hook.XDP)
        finished = killed_after(steps, move)
        assert judged_by(vm, 80)
        host.attach(document(HTTP), "web01", hook=Hook.TC)
        there = row(host)
        assert there["attached"], f"after {steps} steps"
        assert there["from_vm"]["hook"] == "tc"
        assert libbpf.xdp_program(there["ifindex"]) is None
        host.detach("web01")
        assert traces(paths) == [], f"after {steps} steps"
        steps += 1


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
def test_killed_in_a_detach(
    host: Host, paths: Paths, tap: Callable[[str], int], hook: Hook
) -> None:
    tap("tap0")
    steps = 0
    finished = False
    while not finished:
        host.attach(document(HTTP), "web01", hook=hook)
        finished = killed_after(steps, lambda: Host(paths).detach("web01"))
        host.status()
        host.detach_all()
        assert traces(paths) == [], f"after {steps} steps"
        steps += 3
