# SPDX-License-Identifier: Apache-2.0
"""A version with another ABI takes over running endpoints, and gives them back, under traffic."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from scripts.lab.wire import arp_request
from tests.controller import other_abi
from tests.controller.conftest import run
from tests.controller.killed import killed_at
from tests.controller.observe import open_connection, received, row, send_to_vm, traces
from tests.controller.other_abi import ABI, OtherVersion
from tests.controller.policies import (
    PEER_ADDRESS,
    PEER_MAC,
    VM_ADDRESS,
    VM_MAC,
    document,
    from_vm,
    interface,
    to_vm,
)
from tests.lab.swap_traffic import Ends, Traffic
from vgw import abi, libbpf
from vgw.controller import endpoint as endpoints
from vgw.controller import upgrade_tables
from vgw.controller.conntrack import list_flows
from vgw.controller.elsewhere import endpoints_elsewhere
from vgw.controller.layouts import layout_file
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import PartlyAppliedError, VgwError
from vgw.maps import EndpointMaps
from vgw.policy.model import PolicyDocument

pytestmark = pytest.mark.bpf
Tap = Callable[[str], int]
RULES = """[{name: http, action: accept, services: [tcp/80]},
  {name: dns, action: accept, services: [udp/5000]}]"""
EGRESS = "    egress: [{name: no-discard, action: drop, services: [udp/9]}]"
#: Frames by kind and path. Of "reply" and "tcp" only the connection says that they may pass.
FRAMES: Mapping[abi.Path, Mapping[str, list[bytes]]] = {
    abi.Path.TO_VM: {
        "tcp": [to_vm(sport=40001, flags="A", length=8)],
        "reply": [to_vm(proto="udp", sport=53, dport=5353, length=8)],
        "rule": [to_vm(proto="udp", sport=7000, dport=5000, length=8)],
        "denied": [
            to_vm(proto="udp", sport=54, dport=5353, length=8),
            to_vm(sport=40002, flags="A", length=8),
        ],
    },
    abi.Path.FROM_VM: {
        "tcp": [from_vm(sport=80, dport=40001, flags="A", length=8)],
        "query": [from_vm(proto="udp", sport=5353, dport=53, length=8)],
        "denied": [from_vm(proto="udp", sport=5353, dport=9, length=8)],
    },
}


def policy(more: str = "") -> PolicyDocument:
    # On a busy machine compiling may take longer than the usual timeout.
    times = "timeouts: {udp_single: 10m, udp_replied: 10m}"
    vm = interface("tap0", more, vm=f"conntrack: {{grace: 0s, {times}}},")
    return document(RULES, vms={"web01": vm}, extra=EGRESS)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other version."""
    return other_abi.copy(tmp_path_factory.mktemp("other") / "vgw")


@pytest.fixture
def other(copy: Path, paths: Paths) -> Iterator[OtherVersion]:
    """A process of it on the same host."""
    with OtherVersion(copy, paths) as process:
        yield process


@pytest.fixture
def vm(tap: Tap) -> int:
    """The VM's side of tap0, on which the host says nothing by itself."""
    fd = tap("tap0")
    run("ip", "link", "set", "tap0", "addrgenmode", "none")
    run("ip", "addr", "flush", "dev", "tap0")
    return fd


def open_connections(vm: int) -> None:
    open_connection(vm)
    os.write(vm, from_vm(proto="udp", sport=5353, dport=53))
    while received(vm, b""):
        pass


def judged_rightly(vm: int) -> bool:
    """Tell whether what the connection lets pass does, and nothing else."""
    frames = FRAMES[abi.Path.TO_VM]
    for kind, some in frames.items():
        for frame in some:
            send_to_vm("tap0", frame)
            if received(vm, frame) != (kind != "denied"):
                return False
    return True


def flows(host: Host) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (flow["proto"], flow["remote_port"]): flow for flow in list_flows(host, "web01")["flows"]
    }


def rule_hits(host: Host) -> dict[str, int]:
    return {rule["rule"]: rule["packets"] for rule in host.rules("web01")["rules"]}


class Both:
    """Traffic in both directions, and what it found at the end."""

    def __init__(self, stack: ExitStack, vm: int) -> None:
        ways: dict[abi.Path, tuple[bytes, Ends]] = {
            abi.Path.TO_VM: (arp_request(PEER_MAC, PEER_ADDRESS, VM_ADDRESS), ("tap0", vm)),
            abi.Path.FROM_VM: (arp_request(VM_MAC, VM_ADDRESS, PEER_ADDRESS), (vm, "tap0")),
        }
        self._running = [
            stack.enter_context(Traffic(FRAMES[path], mark, ends, path))
            for path, (mark, ends) in ways.items()
        ]

    def losses(self) -> tuple[int, dict[str, int], int]:
        """Return how many packets were sent, lost by kind, and passed though denied."""
        tallies = [each.stop() for each in self._running]
        # The frames are IPv4; IPv6 toward the VM is the host's own group membership.
        strange = [frame for tally in tallies for frame in tally.strange]
        assert not [frame for frame in strange if frame[24:28] == "0800"]
        lost = {
            kind: count - tally.arrived.get(kind, 0)
            for tally in tallies
            for kind, count in tally.sent.items()
            if kind != "denied" and count != tally.arrived.get(kind, 0)
        }
        sent = sum(sum(tally.sent.values()) for tally in tallies)
        return sent, lost, sum(tally.arrived.get("denied", 0) for tally in tallies)


def test_catalogue_M3_to_another_abi_and_back_under_traffic(
    host: Host, vm: int, other: OtherVersion
) -> None:
    host.attach(policy(), "web01")
    open_connections(vm)
    before, drops, hits = flows(host), row(host)["drops"], rule_hits(host)
    other("status")
    with ExitStack() as stack:
        traffic = Both(stack, vm)
        for _ in range(2):
            upgrades = other("upgrade")
            assert not upgrades["failures"]
            (done,) = upgrades["done"]
            assert (done["abi"], done["vm"]) == (abi.ABI_VERSION, "web01")
            (theirs,) = other("status")["vms"][0]["interfaces"]
            assert theirs["attached"]
            assert "of another version" in row(host)["reason"]
            back = host.upgrade()
            assert not back.failures
            assert back.done[0].abi == ABI
        sent, lost, passed = traffic.losses()
    print(f"{sent} packets while four versions took over")
    assert sent > 100
    assert (lost, passed) == ({}, 0)
    after = flows(host)
    assert after.keys() >= before.keys()
    for key, flow in before.items():
        assert after[key]["age"] >= flow["age"]
        assert after[key]["state"] in {flow["state"], "udp_replied"}
        assert after[key]["packets"]["ingress"] >= flow["packets"]["ingress"]
    assert row(host)["drops"] > drops, "counters go on"
    assert rule_hits(host)["http"] >= hits["http"] > 0
    assert not endpoints_elsewhere(host.paths)
    assert not host.attach(policy(), "web01").changed
    host.detach("web01")
    assert traces(host.paths) == []


def test_without_the_flows_packets_are_lost(
    host: Host, vm: int, other: OtherVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the traffic notices when nothing is carried over."""
    host.attach(policy(), "web01")
    open_connections(vm)
    other("upgrade")
    monkeypatch.setattr(upgrade_tables, "copy_flows", lambda *_: 0)
    with ExitStack() as stack:
        traffic = Both(stack, vm)
        host.upgrade()
        _, lost, passed = traffic.losses()
    assert lost["tcp"]
    assert passed == 0


@pytest.mark.parametrize(
    ("owner", "name", "finished"),
    [
        (endpoints, "create", False),
        (libbpf, "link_create", False),
        (upgrade_tables, "copy_flows", False),
        (upgrade_tables, "_set_mode", False),
        (EndpointMaps, "release", False),
        (upgrade_tables, "mark_build", False),
        (upgrade_tables._TakeOver, "finish", True),
        (upgrade_tables, "destroy", True),
    ],
)
def test_catalogue_M3_killed_on_the_way_it_converges(  # noqa: PLR0917
    host: Host, vm: int, other: OtherVersion, owner: object, name: str, finished: bool
) -> None:
    host.attach(policy(), "web01")
    open_connections(vm)
    other("upgrade")

    killed_at(owner, name, host.upgrade)

    assert judged_rightly(vm)
    if finished:  # both have all there is: whoever comes next goes on alone
        assert not other("upgrade")["failures"]
        assert not endpoints_elsewhere(host.paths) or not row(host)["attached"]
    assert not host.upgrade().failures
    assert row(host)["attached"]
    assert not endpoints_elsewhere(host.paths)
    assert judged_rightly(vm)
    assert len(flows(host)) >= 3


class Gate:
    """Lets a function be called once; the second time goes through `second`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._passed = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._passed:
            self.second()
        self._passed = True
        return self._function(*arguments, **options)

    def second(self) -> None:
        """Be replaced by what kills."""


def test_catalogue_M3_killed_between_two_interfaces_of_a_vm(
    host: Host, vm: int, tap: Tap, other: OtherVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap("tap1")
    text = (
        "{conntrack: {grace: 0s, timeouts: {udp_single: 10m, udp_replied: 10m}}, interfaces: ["
        f"{{name: tap0, mac: '{VM_MAC}', addresses: [{VM_ADDRESS}]}}, {{name: tap1}}]}}"
    )
    both = document(RULES, vms={"web01": text}, extra=EGRESS)
    host.attach(both, "web01")
    open_connections(vm)
    assert len(other("upgrade")["done"]) == 2
    gate = Gate(endpoints.create)
    monkeypatch.setattr(endpoints, "create", gate)

    killed_at(gate, "second", host.upgrade)

    monkeypatch.undo()
    assert judged_rightly(vm)
    assert not host.upgrade().failures
    assert [row(host, number=number)["attached"] for number in (0, 1)] == [True, True]
    assert not endpoints_elsewhere(host.paths)
    assert judged_rightly(vm)


def test_catalogue_M36_tables_without_a_layout_stay_in_force(
    host: Host, vm: int, other: OtherVersion
) -> None:
    host.attach(policy(), "web01")
    open_connections(vm)
    other("upgrade")
    file = layout_file(host.paths.state_dir, ABI)
    text = file.read_text()
    for damage in ("", text.replace("offset", "offzet"), text[:-40]):
        file.write_text(damage)
        (failure,) = host.upgrade().failures.values()
        assert failure.startswith(f"tap0 goes on filtering with the tables of ABI {ABI}")
        assert "`vgw detach --vm web01` of the version that attached it" in failure
        with pytest.raises(VgwError, match="goes on filtering"):
            host.attach(policy(), "web01")
        with pytest.raises(VgwError, match="goes on filtering"):
            host.detach("web01")
        with pytest.raises(PartlyAppliedError, match="failed for 1 VM"):
            host.detach_all()
        assert judged_rightly(vm)
    assert len(endpoints_elsewhere(host.paths)) == 1

    assert host.attach(policy(), "web01", force=True).changed, "on demand, without its flows"

    assert not endpoints_elsewhere(host.paths)
    assert row(host)["attached"]
    assert flows(host) == {}
    host.detach("web01")
    assert traces(host.paths) == []


@pytest.mark.parametrize("link", [True, False], ids=["xdp", "netlink"])
def test_where_two_cannot_run_beside_each_other(
    host: Host, vm: int, other: OtherVersion, link: bool
) -> None:
    more = ", hook: xdp" if link else ""
    ours = Host(host.paths, prefer_link=link)
    ours.attach(policy(more), "web01")
    open_connections(vm)

    assert not other("upgrade")["failures"]
    assert judged_rightly(vm)
    assert not ours.upgrade().failures

    assert judged_rightly(vm)
    assert {("tcp", 40001), ("udp", 53)} <= flows(ours).keys()
    assert row(ours)["attached"]
    assert row(ours)["from_vm"]["hook"] == ("xdp" if link else "tc")
    host.detach("web01")
    assert traces(host.paths) == []


def test_an_order_of_mode_and_a_lost_policy(host: Host, vm: int, other: OtherVersion) -> None:
    host.attach(policy(), "web01")
    host.set_mode("web01", abi.Mode.QUARANTINE)
    assert not other("upgrade")["failures"]
    assert other("status")["vms"][0]["mode"] == "quarantine"
    host.paths.manifest("web01").unlink()
    (failure,) = host.upgrade().failures.values()
    assert "is not remembered; attach the VM by its policy" in failure

    assert host.attach(policy(), "web01").generation == 3

    assert not endpoints_elsewhere(host.paths)
    assert row(host)["attached"]
    assert host.status("web01")["vms"][0]["mode"] == "quarantine", (
        "an order is not lifted by a loss"
    )
    assert not judged_rightly(vm)
