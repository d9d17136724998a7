# SPDX-License-Identifier: Apache-2.0
"""Dead flows of a VM that opens no others are freed from user space; live ones never are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

import pytest

from tests.controller.observe import row
from tests.controller.policies import document, from_vm
from vgw import abi, libbpf
from vgw.controller.conntrack import list_flows
from vgw.controller.reconcile import Host
from vgw.loader import Artefact

pytestmark = pytest.mark.bpf

FLOWS = 400
#: What stays in the queue and in the CPUs' buffers until other flows push it on.
KEPT = (abi.EXPIRY_MARGIN + libbpf.possible_cpus()) * abi.QUEUE_BATCH
Tap = Callable[[str], int]


def open_flows(vm: int, first_port: int, count: int) -> None:
    for port in range(first_port, first_port + count):
        os.write(vm, from_vm(proto="udp", sport=port, dport=53))


def entries(host: Host) -> int:
    found: int = row(host)["conntrack"]["entries"]
    return found


def test_live_flows_stay(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(), "web01")
    open_flows(vm, 2000, FLOWS)
    assert entries(host) == FLOWS

    assert host.expire() == 0

    assert entries(host) == FLOWS
    assert len(list_flows(host, "web01")["flows"]) == FLOWS


def test_flush_frees_what_it_ends(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(), "web01")
    open_flows(vm, 2000, FLOWS)

    assert host.flush("web01") == FLOWS

    assert entries(host) <= KEPT
    open_flows(vm, 2000, FLOWS)
    assert len(list_flows(host, "web01")["flows"]) == FLOWS


def test_dead_flows_go_and_live_ones_stay(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(), "web01")
    open_flows(vm, 2000, FLOWS)
    host.flush("web01")
    open_flows(vm, 9000, 50)

    host.expire("web01")

    assert 50 <= entries(host) <= 50 + KEPT
    assert len(list_flows(host, "web01")["flows"]) == 50


def test_an_idle_table_needs_no_program(host: Host, tap: Tap) -> None:
    """With nothing to do nothing is compiled or loaded, however many VMs there are."""
    vm = tap("tap0")
    host.attach(document(), "web01")
    open_flows(vm, 2000, 5)
    unused = Host(host.paths)

    def compile_nothing(programs: Collection[str]) -> Artefact:
        raise AssertionError(f"asked for {programs}")

    unused.artefact = compile_nothing  # type: ignore[method-assign]
    assert unused.expire() == 0
