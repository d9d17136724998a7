# SPDX-License-Identifier: Apache-2.0
"""From a VM's packets to the log: each connection begins and ends there, whatever ends it."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.observe import send_to_vm
from tests.controller.policies import document, from_vm, interface, to_vm
from tests.patience import PATIENCE
from vgw import abi, libbpf
from vgw.controller.event_names import EventNames
from vgw.controller.event_reader import EventLosses, EventReader
from vgw.controller.events import LogWriter, read_log
from vgw.controller.last_flows import LastFlows
from vgw.controller.paths import Paths
from vgw.controller.readings import read_meters
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
#: What stays in the queue and in the CPUs' buffers until other flows push it on.
KEPT = (abi.EXPIRY_MARGIN + libbpf.possible_cpus()) * abi.QUEUE_BATCH
SHORT = "conntrack: {timeouts: {udp_single: 1s}},"


def logged(log: str = "{flows: true}", vm: str = "", **rest: str) -> PolicyDocument:
    return document(vms={"web01": interface("tap0", vm=f"{vm} log: {log},")}, **rest)


class Logging:
    """The log of a host whose events and last flows are logged, as the controller has it."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.log = LogWriter(paths.log_file)
        self.losses = EventLosses(lambda: read_meters(self.host))
        self.host = Host(paths, last_flows=LastFlows(paths, self.log, self.losses))
        self.reader = EventReader(paths.events, EventNames(paths), self.log, self.losses)
        self.reader.start()
        self.running = True

    def attach(self, policy: PolicyDocument) -> None:
        self.host.attach(policy, "web01")
        self.reader.catch_up()

    def flows(self) -> list[dict[str, Any]]:
        """End the reader, and return the records of flows."""
        self.close()
        return [
            record for record in read_log(self.paths.log_file) if record["event"][:5] == "flow_"
        ]

    def close(self) -> None:
        if self.running:
            self.running = False
            self.reader.stop()
            self.log.close()


@pytest.fixture
def logging(paths: Paths) -> Iterator[Logging]:
    made = Logging(paths)
    yield made
    made.close()


def talk(vm: int, first_port: int, count: int) -> None:
    for port in range(first_port, first_port + count):
        os.write(vm, from_vm(proto="udp", sport=port, dport=53))


def ended(records: list[dict[str, Any]]) -> Counter[str]:
    return Counter(record["ended"] for record in records if record["event"] == "flow_end")


def expire_all(host: Host) -> None:
    """Have dead flows freed or reported until none is left, for they die as time passes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        host.expire()
        (endpoint,) = host.open_endpoints("web01")
        with endpoint:
            if all(flow.reported for _, flow in endpoint.maps.flows()):
                return
        time.sleep(0.05)


def test_a_connection_begins_and_ends_with_the_rule_that_let_it_in(
    logging: Logging, tap: Tap
) -> None:
    tap("tap0")
    logging.attach(logged())
    send_to_vm("tap0", to_vm(sport=40112))
    logging.host.flush("web01")
    start, end = logging.flows()

    common = {
        "vm": "web01",
        "interface": "tap0",
        "direction": "ingress",
        "verdict": "accept",
        "reason": "RULE",
        "policy": "base",
        "tier": "vm",
        "rule": "http",
        "generation": 1,
        "proto": "tcp",
        "src": "192.0.2.7",
        "dst": "10.20.0.11",
        "sport": 40112,
        "dport": 80,
    }
    assert start.items() >= (common | {"event": "flow_start"}).items()
    assert end.items() >= (common | {"event": "flow_end", "ended": "flushed"}).items()
    assert (end["packets"], end["packets_ingress"], end["packets_egress"]) == (1, 1, 0)
    assert end["bytes"] == end["bytes_ingress"] == len(to_vm(sport=40112))


def test_the_last_flows_of_an_idle_vm_end_in_the_log(logging: Logging, tap: Tap) -> None:
    """Those whose keys stay in the queue: the VM opens no others that would push them on."""
    vm = tap("tap0")
    logging.attach(logged(vm=SHORT))
    talk(vm, 2000, 10)
    expire_all(logging.host)
    logging.host.expire()
    records = logging.flows()

    assert ended(records) == {"timeout": 10}
    assert {record["sport"] for record in records} == set(range(2000, 2010))


def test_what_is_settled_is_not_looked_at_again(
    logging: Logging, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = tap("tap0")
    logging.attach(logged(vm=SHORT))
    talk(vm, 2000, 10)
    expire_all(logging.host)
    looked: list[int] = []

    def look(*_: object) -> Iterator[bytes]:
        looked.append(1)
        return iter(())

    monkeypatch.setattr("vgw.controller.expiry._newest_keys", look)
    logging.host.expire()
    assert not looked
    talk(vm, 3000, 1)
    logging.host.expire()
    assert looked


def test_revoked_flows_end_in_the_log_with_the_rule_that_had_accepted_them(
    logging: Logging, tap: Tap
) -> None:
    tap("tap0")
    logging.attach(logged())
    send_to_vm("tap0", to_vm(sport=40112))
    logging.host.apply(logged(rules="[]"))
    send_to_vm("tap0", to_vm(sport=40112, flags="A"))
    (end,) = [record for record in logging.flows() if record["event"] == "flow_end"]

    assert (end["ended"], end["rule"], end["generation"]) == ("revoked", "http", 1)


def test_the_flows_of_a_vm_that_is_detached_end_in_the_log(logging: Logging, tap: Tap) -> None:
    vm = tap("tap0")
    logging.attach(logged())
    talk(vm, 2000, 100)
    send_to_vm("tap0", to_vm(sport=40112))
    logging.host.detach("web01")
    records = logging.flows()

    assert ended(records) == {"detached": 101}
    (ours,) = [record for record in records if record.get("ended") and record["proto"] == "tcp"]
    assert (ours["vm"], ours["rule"], ours["sport"], ours["direction"]) == (
        "web01",
        "http",
        40112,
        "ingress",
    )


def test_the_flows_of_an_interface_that_goes_end_in_the_log(logging: Logging, tap: Tap) -> None:
    vm = tap("tap0")
    logging.attach(logged())
    talk(vm, 2000, 5)
    run("ip", "link", "del", "tap0")
    assert logging.host.sweep() == [("web01", "tap0")]

    assert ended(logging.flows()) == {"detached": 5}


def test_last_flows_over_the_budget_are_counted(logging: Logging, tap: Tap) -> None:
    vm = tap("tap0")
    logging.attach(logged("{flows: true, per_second: 7}"))
    talk(vm, 2000, 40)
    before = logging.losses.totals()["suppressed"]
    logging.host.detach("web01")

    assert logging.losses.totals()["suppressed"] - before == 33
    assert ended(logging.flows()) == {"detached": 7}


def test_a_removal_that_fails_ends_no_flow(
    logging: Logging, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = tap("tap0")
    logging.attach(logged())
    talk(vm, 2000, 5)

    def fail(*_: object) -> None:
        raise VgwError("no")

    monkeypatch.setattr("vgw.controller.reconcile.destroy", fail)
    with pytest.raises(VgwError, match="no"):
        logging.host.detach("web01")
    assert not ended(logging.flows())


def test_a_removal_that_fails_half_way_ends_the_flows_once(
    logging: Logging, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nobody can read them any more, and the removal that is tried again finds none."""
    vm = tap("tap0")
    logging.attach(logged())
    talk(vm, 2000, 5)

    def fail(directory: Path) -> None:
        (directory / "conntrack").unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr("vgw.controller.replacement.remove_endpoint", fail)
        with pytest.raises(VgwError, match="Input/output error"):
            logging.host.detach("web01")
    logging.host.detach("web01")
    assert ended(logging.flows()) == {"detached": 5}


def test_without_the_switch_nothing_of_flows_is_logged(logging: Logging, tap: Tap) -> None:
    """The control: the same life without `log: {flows: true}`."""
    vm = tap("tap0")
    logging.attach(logged("{flows: false}", vm=SHORT))
    talk(vm, 2000, 2 * KEPT)
    logging.host.flush("web01")
    talk(vm, 2000, 5)
    logging.host.detach("web01")
    assert logging.flows() == []


def test_a_policy_change_switches_records_on_and_off(logging: Logging, tap: Tap) -> None:
    vm = tap("tap0")
    logging.attach(logged("{flows: false}"))
    talk(vm, 2000, 1)
    logging.host.apply(logged("{flows: true}"))
    talk(vm, 3000, 1)
    logging.host.apply(logged("{flows: false}"))
    talk(vm, 4000, 1)

    assert [record["sport"] for record in logging.flows()] == [3000]
