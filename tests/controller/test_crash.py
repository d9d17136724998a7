# SPDX-License-Identifier: Apache-2.0
"""A process that is killed at any step of a change: packets stay judged by one policy or the other,
and the next process brings the host to what it should be.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.controller.observe import received, row, send_to_vm, traces
from tests.controller.policies import document, to_vm
from vgw import libbpf
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.loader import clone
from vgw.loader.sources import PROGRAMS
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
HTTPS = "[{name: https, action: accept, services: [tcp/443]}]"

#: Everything by which a change touches the kernel or the disk.
_STEPS: Final = (
    *((libbpf, name) for name in ("map_update", "map_delete", "map_create", "pin")),
    *((libbpf, name) for name in ("link_create", "link_update", "link_detach")),
    *((clone, name) for name in ("map_create", "prog_load")),
    *((pathlib.Path, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir")),
)


def killed_after(steps: int, change: Callable[[], object]) -> bool:
    """Make a change in a process that dies after so many steps; return whether it finished."""
    child = os.fork()
    if child == 0:
        left = steps

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return function(*arguments, **options)

            return counted

        for owner, name in _STEPS:
            setattr(owner, name, counting(getattr(owner, name)))
        try:
            change()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


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


@pytest.mark.parametrize("kind", ["tap", "veth"])
def test_killed_in_an_attach(
    host: Host, paths: Paths, request: pytest.FixtureRequest, kind: str
) -> None:
    request.getfixturevalue(kind)("tap0")
    host.artefact(PROGRAMS)
    steps = 0
    finished = False
    while not finished:
        finished = killed_after(steps, lambda: Host(paths).attach(document(HTTP), "web01"))
        host.status()
        host.attach(document(HTTP), "web01")
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


def test_killed_in_a_detach(host: Host, paths: Paths, tap: Callable[[str], int]) -> None:
    tap("tap0")
    steps = 0
    finished = False
    while not finished:
        host.attach(document(HTTP), "web01")
        finished = killed_after(steps, lambda: Host(paths).detach("web01"))
        host.status()
        host.detach_all()
        assert traces(paths) == [], f"after {steps} steps"
        steps += 3
