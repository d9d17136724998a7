# SPDX-License-Identifier: Apache-2.0
"""A controller that the kernel kills because its control group has no memory left."""

from __future__ import annotations

import contextlib
import signal
from typing import Final

import pytest

from tests.controller import test_process_life as process_life
from tests.controller.memory_limit import memory_group
from tests.controller.observe import program_ids, row
from tests.controller.process import Controller
from tests.controller.test_process_life import (
    POLICY,
    Start,
    Traffic,
    check_nothing_was_lost,
    link_ids,
)
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

pytestmark = [pytest.mark.bpf, pytest.mark.usefixtures("artefact")]

start, traffic = process_life.start, process_life.traffic

_MEBIBYTE: Final = 1 << 20
#: What the controller may still take, so that it is killed at different places of a change.
_LEFT: Final = (1, 4, 8, 12)
_MANY: Final = 4_000


def large_policy() -> str:
    """Return the policy with so many rules more that match nothing sent."""
    rules = ", ".join(
        f"{{name: r{number}, action: accept, from: [10.{number >> 8}.{number & 255}.0/24], "
        "services: [tcp/22]}"
        for number in range(_MANY)
    )
    return POLICY.replace("ingress: [", f"ingress: [{rules}, ")


def test_catalogue_M30_packets_do_not_notice_that_the_kernel_kills_the_controller(
    traffic: tuple[Traffic, Controller], start: Start, paths: Paths
) -> None:
    """In the middle of a change: all of it or nothing is in force, and the next start goes on."""
    flow, controller = traffic
    host = Host(paths)
    before = program_ids(host), link_ids(host)
    killed: list[int] = []
    for left in _LEFT:
        with memory_group() as group:
            group.admit(controller.process.pid)
            group.restrict(group.used() + left * _MEBIBYTE)
            with contextlib.suppress(VgwError):
                controller.client.apply([("policy.yaml", large_policy())])
            flow.goes_on()
            if group.killed():
                killed.append(left)
                assert controller.process.wait() == -signal.SIGKILL
            else:
                controller.end()
        rules = len(host.rules("web01")["rules"])
        assert rules in (2, 2 + _MANY)
        assert row(host)["attached"]
        controller = start()
        flow.goes_on()
        # An apply that was killed is in the history, so it is carried on.
        assert len(host.rules("web01")["rules"]) in (rules, 2 + _MANY)
        controller.client.apply([("policy.yaml", POLICY)])
        assert len(host.rules("web01")["rules"]) == 2
    flow.stop()

    assert len(killed) >= 2, killed
    assert (program_ids(host), link_ids(host)) == before
    check_nothing_was_lost(host, flow)
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        assert not endpoint.maps.spare_is_used(), "nothing is left of what was begun"
    assert len(controller.records("attach")) == 1


def test_with_room_it_is_not_killed(traffic: tuple[Traffic, Controller], paths: Paths) -> None:
    """The control: the same change in such a group, without a limit that it meets."""
    flow, controller = traffic
    with memory_group() as group:
        group.admit(controller.process.pid)
        group.restrict(group.used() + 1024 * _MEBIBYTE)
        (result,) = controller.client.apply([("policy.yaml", large_policy())])["vms"]
        assert result["changed"]
        assert group.killed() == 0
        controller.end()
    flow.stop()
    assert len(Host(paths).rules("web01")["rules"]) == 2 + _MANY
