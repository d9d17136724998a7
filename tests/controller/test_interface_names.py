# SPDX-License-Identifier: Apache-2.0
"""Interfaces that change their name or their network namespace, and names that are unusual."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.killed import killed_after
from tests.controller.observe import program_ids, received, row, send_to_vm, traces
from tests.controller.policies import document, from_vm, interface, to_vm
from vgw import libbpf
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.controller.renames import Renamed
from vgw.errors import VgwError

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
SSH = "[{name: ssh, action: accept, services: [tcp/22]}]"
PLAIN = "{{interfaces: [{{name: {}}}]}}"
Tap = Callable[[str], int]
Veth = Callable[[str], str]


def rename(old: str, new: str) -> None:
    run("ip", "link", "set", old, "down")
    run("ip", "link", "set", old, "name", new)
    run("ip", "link", "set", new, "up")


def names(host: Host, vm: str = "web01") -> list[tuple[str, bool]]:
    return [(there["name"], there["attached"]) for there in host.status(vm)["vms"][0]["interfaces"]]


@pytest.fixture(params=["link", "netlink"])
def any_host(paths: Paths, request: pytest.FixtureRequest) -> Host:
    """A host on a kernel with links, and on one without."""
    return Host(paths, prefer_link=request.param == "link")


def test_catalogue_M16_a_renamed_interface_keeps_its_policy_and_takes_the_next(
    any_host: Host, paths: Paths, tap: Tap
) -> None:
    vm = tap("tap0")
    any_host.attach(document(HTTP), "web01")
    before = program_ids(any_host)
    send_to_vm("tap0", to_vm())
    rename("tap0", "tap7")

    there = row(any_host)
    assert (there["name"], there["attached"]) == ("tap0", True)
    assert there["reason"] == "interface tap0 is called tap7 now; correct its name in the policy"
    assert any_host.sweep() == []
    there = row(any_host)
    assert (there["name"], there["attached"]) == ("tap7", True)
    assert there["reason"] == "the policy calls it tap0; correct its name there"
    assert there["conntrack"]["entries"] == 1

    result = any_host.apply(document(SSH))
    assert [(each.vm, each.interfaces) for each in result.vms] == [("web01", ["tap7"])]
    assert result.waiting == {}
    assert not any_host.apply(document(SSH)).vms[0].changed
    assert program_ids(any_host) == before
    for port, passes in ((80, False), (22, True)):
        frame = to_vm(dport=port, sport=40001)
        send_to_vm("tap7", frame)
        assert received(vm, frame) == passes
    any_host.detach("web01")
    assert traces(paths) == []
    send_to_vm("tap7", to_vm())
    assert received(vm, to_vm()), "the programs are off it"


def test_catalogue_M16_the_policy_may_be_corrected_or_the_name_changed_back(
    any_host: Host, tap: Tap
) -> None:
    tap("tap0")
    any_host.attach(document(HTTP), "web01")
    before = program_ids(any_host)

    rename("tap0", "tap7")
    assert not any_host.apply(document(HTTP, vms={"web01": interface("tap7")})).vms[0].changed
    any_host.apply(document(SSH, vms={"web01": interface("tap7")}))
    assert row(any_host)["reason"] is None
    rename("tap7", "tap8")
    assert any_host.follow_renames() == [Renamed("web01", "tap7", "tap8")]
    rename("tap8", "tap7")
    assert any_host.follow_renames() == [Renamed("web01", "tap8", "tap7")]
    assert any_host.follow_renames() == []

    assert row(any_host)["reason"] is None
    assert program_ids(any_host) == before


def test_catalogue_M16_both_are_protected_when_another_interface_gets_the_old_name(
    any_host: Host, veth: Veth
) -> None:
    veth("tap0")
    any_host.attach(document(HTTP), "web01")
    rename("tap0", "tap7")
    rename("tap0-p", "tap7-p")
    veth("tap0")

    any_host.apply(document(HTTP))
    assert names(any_host) == [("tap0", True), ("tap7", True)]
    run("ip", "link", "del", "tap7")
    assert any_host.sweep() == [("web01", "tap7")]
    assert names(any_host) == [("tap0", True)]


def test_catalogue_M16_interfaces_that_exchange_their_names_keep_their_programs(
    any_host: Host, veth: Veth
) -> None:
    for name in ("tap0", "tap1"):
        veth(name)
    both = document(HTTP, vms={"web01": interface("tap0"), "db01": PLAIN.format("tap1")})
    any_host.attach_many(both)
    before = program_ids(any_host, "web01"), program_ids(any_host, "db01")
    rename("tap0", "tmp")
    rename("tap1", "tap0")
    rename("tmp", "tap1")

    assert any_host.follow_renames() == [
        Renamed("db01", "tap1", "tap0"),
        Renamed("web01", "tap0", "tap1"),
    ]
    assert (program_ids(any_host, "web01"), program_ids(any_host, "db01")) == before
    with pytest.raises(VgwError, match="tap0 of VM web01 is protected as VM db01's"):
        any_host.apply(both, ["web01"])
    any_host.apply(document(SSH, vms={"web01": interface("tap1"), "db01": PLAIN.format("tap0")}))
    assert (program_ids(any_host, "web01"), program_ids(any_host, "db01")) == before


def test_catalogue_M16_an_interface_that_was_ordered_is_found_again(
    any_host: Host, veth: Veth
) -> None:
    veth("tap0")
    empty = document(HTTP, vms={})
    any_host.attach(empty, "guest", interfaces=["tap0"])
    rename("tap0", "tap7")
    any_host.apply(empty)
    assert names(any_host, "guest") == [("tap7", True)]
    assert any_host.apply(empty).vms[0].interfaces == ["tap7"]


def test_a_rename_that_is_killed_anywhere_is_completed_by_the_next(
    host: Host, paths: Paths, veth: Veth
) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    before = program_ids(host)
    called, steps = ["tap7", "tap0"], 0
    rename("tap0", "tap7")
    while not killed_after(steps, Host(paths).follow_renames):
        steps += 1
        assert not host.apply(document(HTTP)).vms[0].changed
        assert names(host) == [(called[0], True)]
        assert program_ids(host) == before
        called.reverse()
        rename(called[1], called[0])
    assert steps > 3


@pytest.mark.parametrize("name", ["fifteen-bytes-x", "schlüssel0", "東京", "ta'p;$0"])
def test_catalogue_M16_unusual_names(host: Host, paths: Paths, tap: Tap, name: str) -> None:
    vm = tap("tap0")
    rename("tap0", name)
    host.attach(document(HTTP, vms={}), "guest", interfaces=[name])
    assert names(host, "guest") == [(name, True)]
    for port, passes in ((80, True), (22, False)):
        send_to_vm(name, to_vm(dport=port))
        assert received(vm, to_vm(dport=port)) == passes
    host.detach("guest")
    assert traces(paths) == []


def test_catalogue_M16_a_name_that_is_no_text_is_not_taken(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")
    rename("tap0", os.fsdecode(b"tap\xff"))

    assert host.follow_renames() == []
    assert row(host)["attached"]
    assert row(host)["drops"] == 0
    os.write(vm, from_vm(src="10.20.0.99"))
    assert row(host)["drops"] == 1
    host.detach("web01")
    ifindex = socket.if_nametoindex(os.fsdecode(b"tap\xff"))
    assert not libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_EGRESS)


def test_catalogue_M16_an_alternative_name_is_no_new_interface(host: Host, veth: Veth) -> None:
    veth("tap0")
    run("ip", "link", "property", "add", "dev", "tap0", "altname", "web01-public-interface")
    host.attach(document(HTTP), "web01")
    assert host.follow_renames() == []
    run("ip", "link", "property", "add", "dev", "tap0", "altname", "another")
    assert host.follow_renames() == []
    assert names(host) == [("tap0", True)]


def test_catalogue_M17_moved_to_another_namespace_and_back(
    host: Host, veth: Veth, elsewhere: str
) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    before = program_ids(host)
    send_to_vm("tap0", to_vm())
    run("ip", "link", "set", "tap0", "netns", elsewhere)

    there = row(host)
    assert not there["attached"]
    assert "was moved to another network namespace" in there["reason"]
    assert host.sweep() == []
    with pytest.raises(VgwError, match="tap0 of VM web01 was moved to another network namespace"):
        host.apply(document(SSH))
    bring_back(elsewhere)

    host.apply(document(SSH))
    assert names(host) == [("tap0", True)]
    assert program_ids(host) == before


def bring_back(elsewhere: str) -> None:
    """Move tap0 from a namespace to that of the test's thread."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        command = f"nsenter -t {elsewhere} -n ip link set tap0 netns /proc/self/fd/{home}"
        subprocess.run(command.split(), check=True, pass_fds=[home])
    finally:
        os.close(home)


def test_catalogue_M17_an_interface_that_ends_elsewhere_is_forgotten(
    host: Host, veth: Veth, elsewhere: str
) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    run("ip", "link", "set", "tap0", "netns", elsewhere)
    run("ip", "link", "del", "tap0-p")
    assert host.sweep() == [("web01", "tap0")]


def test_catalogue_M17_without_links_it_comes_back_to_new_programs(
    paths: Paths, veth: Veth, elsewhere: str
) -> None:
    host = Host(paths, prefer_link=False)
    veth("tap0")
    host.attach(document(HTTP), "web01")
    run("ip", "link", "set", "tap0", "netns", elsewhere)
    assert not row(host)["attached"]
    bring_back(elsewhere)
    assert not row(host)["attached"], "the kernel takes filters off what moves"

    host.apply(document(HTTP))
    assert names(host) == [("tap0", True)]


def test_catalogue_M14_a_late_sweep_leaves_the_pins_of_the_new_interface(
    any_host: Host, veth: Veth
) -> None:
    veth("tap0")
    any_host.attach(document(HTTP), "web01")
    old = program_ids(any_host)
    run("ip", "link", "del", "tap0")
    veth("tap0")
    any_host.attach(document(HTTP), "web01")

    assert any_host.sweep() == []
    assert names(any_host) == [("tap0", True)]
    assert set(program_ids(any_host)).isdisjoint(old)


def _veth_at(name: str, ifindex: int) -> None:
    run(*f"ip link add {name} index {ifindex} type veth peer name {name}-p".split())
    run("ip", "link", "set", name, "up")
    run("ip", "link", "set", f"{name}-p", "up")


@pytest.mark.parametrize("successor", ["tap0", "tap9"])
def test_catalogue_M15_an_index_that_another_interface_gets_inherits_nothing(
    any_host: Host, successor: str
) -> None:
    _veth_at("tap0", 777)
    any_host.attach(document(HTTP), "web01")
    send_to_vm("tap0", to_vm())
    old = _maps(any_host, "web01")
    run("ip", "link", "del", "tap0")
    _veth_at(successor, 777)
    assert socket.if_nametoindex(successor) == 777

    assert not row(any_host)["attached"]
    vm = "web01" if successor == "tap0" else "db01"
    any_host.attach_many(document(HTTP, vms={vm: interface(successor)}))
    assert names(any_host, vm) == [(successor, True)]
    assert row(any_host, vm)["conntrack"]["entries"] == 0
    assert _maps(any_host, vm).isdisjoint(old)
    any_host.sweep()
    assert any_host.attached() == [vm]


def _maps(host: Host, vm: str) -> set[Any]:
    """Return what is an endpoint's own: ids of its maps and its identity."""
    found: set[Any] = set()
    for endpoint in host.open_endpoints(vm):
        with endpoint:
            found |= {libbpf.map_info(fd).id for fd in endpoint.fds.values()}
            found.add(("identity", endpoint.maps.config().endpoint))
    return found


def test_catalogue_M18_an_interface_that_goes_up_and_down_keeps_its_programs(
    any_host: Host, tap: Tap, tmp_path: Path
) -> None:
    vm = tap("tap0")
    any_host.attach(document(HTTP), "web01")
    before = program_ids(any_host)
    batch = tmp_path / "flaps"
    batch.write_text("link set tap0 down\nlink set tap0 up\n" * 300)
    run("ip", "-batch", str(batch))
    run("ip", "link", "set", "tap0", "address", "52:54:00:aa:bb:cc")
    run("ip", "link", "set", "tap0", "mtu", "1400")

    assert not any_host.apply(document(HTTP)).vms[0].changed
    assert program_ids(any_host) == before
    for port, passes in ((80, True), (22, False)):
        send_to_vm("tap0", to_vm(dport=port))
        assert received(vm, to_vm(dport=port)) == passes
