# SPDX-License-Identifier: Apache-2.0
"""A change of policy and the connections that are open at that moment."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from scripts.lab import wire
from scripts.lab.wire import Tap
from tests.lab.topology import Lab, connection, exchange, packet_filter, policy

pytestmark = pytest.mark.lab

PORT = 8080
OPEN = policy({"ingress": [f"{{name: web, action: accept, services: [tcp/{PORT}]}}"]})
OTHER_RULE_ADDED = policy(
    {
        "ingress": [
            "{name: ssh, action: accept, services: [tcp/22]}",
            f"{{name: web, action: accept, services: [tcp/{PORT}]}}",
        ]
    }
)
CLOSED = policy()


def sent_is_stopped(lab: Lab, vm: str, here: socket.socket) -> bool:
    """Send a word on an open connection to a VM and tell whether it was stopped on the way."""
    near, far = lab.nodes["client"], lab.nodes[vm]
    wanted = packet_filter("tcp", far.ipv4, PORT)
    with Tap(near) as sender, Tap(far) as receiver:
        here.sendall(b"one more")
        sender.until(wanted, outgoing=True)
        return wire.arrivals(sender, receiver, wanted) == []


@pytest.mark.parametrize("vm", ["web01", "db01"])
def test_removing_the_rule_stops_the_open_connection(lab: Lab, vm: str) -> None:
    lab.write_policy(OPEN)
    lab.attach(vm)
    with connection(lab.nodes["client"], lab.nodes[vm], PORT) as (here, there):
        exchange(here, there)
        lab.apply(CLOSED)
        assert sent_is_stopped(lab, vm, here)
    lab.assert_blocked("tcp", "client", vm, PORT)

    lab.apply(OPEN)
    lab.assert_reaches("tcp", "client", vm, PORT)


@pytest.mark.parametrize("vm", ["web01", "db01"])
def test_a_change_elsewhere_leaves_the_connection_alone(lab: Lab, vm: str) -> None:
    lab.write_policy(OPEN)
    lab.attach(vm)
    with connection(lab.nodes["client"], lab.nodes[vm], PORT) as (here, there):
        exchange(here, there)
        lab.apply(OTHER_RULE_ADDED)
        assert not sent_is_stopped(lab, vm, here)
        assert there.recv(64) == b"one more"
        exchange(here, there)


def test_what_the_vm_says_is_stopped_too(lab: Lab) -> None:
    lab.write_policy(OPEN)
    lab.attach("web01")
    web01, client = lab.nodes["web01"], lab.nodes["client"]
    with connection(client, web01, PORT) as (here, there), Tap(web01) as out, Tap(client) as far:
        exchange(here, there)
        port = here.getsockname()[1]
        wanted = packet_filter("tcp", client.ipv4, port)
        lab.apply(CLOSED)
        there.sendall(b"one more")
        out.until(wanted, outgoing=True)
        late = [frame for frame in wire.arrivals(out, far, wanted) if b"one more" in frame]
    assert late == []


@pytest.mark.parametrize("vm", ["web01", "db01"])
def test_detaching_leaves_no_trace(lab: Lab, vm: str) -> None:
    pins, state = (Path(lab.environment[name]) for name in ("VGW_BPFFS", "VGW_STATE_DIR"))
    lab.write_policy(CLOSED)
    lab.attach(vm)
    lab.assert_blocked("tcp", "client", vm, PORT)
    assert len(lab.kernel_programs()) == 2
    assert list(pins.rglob(vm))

    lab.vgw("detach", "--vm", vm)
    lab.assert_reaches("tcp", "client", vm, PORT)
    assert lab.kernel_programs() == []
    assert [*pins.rglob(f"{vm}*"), *state.rglob(f"{vm}*")] == []
