# SPDX-License-Identifier: Apache-2.0
"""Attach: what holds once it returned, what it refuses, and that a failure leaves nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.observe import program_ids, received, row, send_to_vm, traces
from tests.controller.policies import document, interface, to_vm
from vgw import abi, libbpf
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import ForeignProgramError, VgwError
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
HTTPS = "[{name: https, action: accept, services: [tcp/443]}]"
Tap = Callable[[str], int]
Veth = Callable[[str], str]


def test_attach_enforces_before_it_returns_and_detach_leaves_nothing(
    host: Host, paths: Paths, tap: Tap
) -> None:
    vm = tap("tap0")
    denied = to_vm(dport=81)
    send_to_vm("tap0", denied)
    assert received(vm, denied)

    result = host.attach(document(HTTP), "web01")
    for frame in (denied, to_vm(dport=80)):
        send_to_vm("tap0", frame)
    assert not received(vm, denied)
    send_to_vm("tap0", to_vm(dport=80, sport=2))
    assert received(vm, to_vm(dport=80, sport=2))

    assert (result.vm, result.interfaces, result.generation) == ("web01", ["tap0"], 1)
    assert result.changed
    assert host.attached() == ["web01"]
    host.detach("web01")
    assert host.attached() == []
    assert host.status()["vms"] == []
    assert traces(paths) == []
    assert "prog" not in run("ip", "-d", "link", "show", "tap0")
    send_to_vm("tap0", denied)
    assert received(vm, denied)


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.AUTO], ids=str)
def test_status_is_what_the_kernel_says(host: Host, tap: Tap, hook: Hook) -> None:
    tap("tap0")
    rules = "[{name: a, action: accept}, {name: b, action: drop}]"
    host.attach(document(rules), "web01", hook=hook)

    status = host.status()

    assert status["schema"] == "vgw/v1"
    (vm,) = status["vms"]
    assert (vm["vm"], vm["mode"], vm["generation"]) == ("web01", "enforce", 1)
    (there,) = vm["interfaces"]
    assert (there["name"], there["attached"], there["reason"]) == ("tap0", True, None)
    assert there["ifindex"] == socket.if_nametoindex("tap0")
    xdp = libbpf.xdp_program(there["ifindex"])
    if hook is Hook.XDP:
        assert xdp is not None
        expected = {"hook": "xdp", "mode": xdp[1], "link": True, "prog_id": xdp[0]}
    else:
        assert xdp is None
        (tcx_id,) = libbpf.tcx_programs(there["ifindex"], libbpf.AttachType.TCX_INGRESS)
        expected = {"hook": "tc", "mode": "tcx", "link": True, "prog_id": tcx_id}
    assert there["from_vm"] == expected
    tcx = libbpf.tcx_programs(there["ifindex"], libbpf.AttachType.TCX_EGRESS)
    assert [there["to_vm"]["prog_id"]] == tcx
    assert (there["to_vm"]["hook"], there["to_vm"]["mode"]) == ("tc", "tcx")
    assert there["rules"] == {"ingress": 2, "egress": 0}
    assert there["conntrack"] == {"entries": 0, "max": 65536}
    assert list(there["guards_off"]) == (["checksum"] if hook is Hook.XDP else [])


def test_a_second_attach_changes_nothing(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    before = program_ids(host)

    again = host.attach(document(HTTP), "web01")

    assert not again.changed
    assert again.generation == 1
    assert program_ids(host) == before


def test_attach_with_another_policy_is_an_apply(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    before = program_ids(host)

    again = host.attach(document(HTTPS), "web01")

    assert again.changed
    assert again.generation == 2
    assert program_ids(host) == before


def test_a_veth_gets_tc_and_a_hook_that_is_ordered_stays(host: Host, veth: Veth) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    assert row(host)["from_vm"]["hook"] == "tc"
    assert row(host)["guards_off"] == {}
    to_vm_program = program_ids(host)[1]

    host.attach(document(HTTP), "web01", hook=Hook.XDP)
    assert row(host)["from_vm"]["hook"] == "xdp"
    assert "XDP does not see tags" in row(host)["guards_off"]["vlan"]
    assert not libbpf.tcx_programs(row(host)["ifindex"], libbpf.AttachType.TCX_INGRESS)
    host.apply(document(HTTPS))
    assert row(host)["from_vm"]["hook"] == "xdp"
    host.attach(document(HTTPS), "web01", hook=Hook.AUTO)

    assert row(host)["from_vm"]["hook"] == "tc"
    assert libbpf.xdp_program(row(host)["ifindex"]) is None
    assert program_ids(host)[1] == to_vm_program


def test_a_vm_without_a_policy_gets_the_defaults_on_the_interface_named(
    host: Host, tap: Tap
) -> None:
    tap("tap0")

    host.attach(document(HTTP, vms={}), "guest", interfaces=["tap0"])

    there = row(host, "guest")
    assert there["attached"]
    assert set(there["guards_off"]) == {"mac", "address", "arp", "nd"}
    assert there["rules"] == {"ingress": 1, "egress": 0}  # the policy that applies to all
    assert host.status()["vms"][0]["named"] is False


def test_an_unknown_vm_without_interfaces_says_what_to_do(host: Host, paths: Paths) -> None:
    with pytest.raises(VgwError, match=r"does not name VM nobody; .*--interface"):
        host.attach(document(), "nobody")
    assert traces(paths) == []


def test_a_missing_interface_changes_nothing(host: Host, paths: Paths, tap: Tap) -> None:
    tap("tap0")
    two = "{interfaces: [{name: tap0}, {name: tap1}]}"

    with pytest.raises(VgwError, match="interface tap1 of VM web01 does not exist"):
        host.attach(document(vms={"web01": two}), "web01")

    assert traces(paths) == []
    assert libbpf.xdp_program(socket.if_nametoindex("tap0")) is None


def test_an_interface_of_another_vm_is_refused(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(), "web01")

    with pytest.raises(VgwError, match="tap0 of VM other is protected as VM web01's"):
        host.attach(None, "other", interfaces=["tap0"])

    assert host.attached() == ["web01"]


@pytest.mark.parametrize("prefer_link", [True, False])
def test_catalogue_K10_a_foreign_xdp_program_stops_an_attach_unless_forced(
    paths: Paths, tap: Tap, prefer_link: bool
) -> None:
    tap("tap0")
    host = Host(paths, prefer_link=prefer_link)
    ifindex = socket.if_nametoindex("tap0")
    code = bytes.fromhex("b700000002000000") + bytes.fromhex("9500000000000000")
    program = libbpf.prog_load(libbpf.ProgType.XDP, "foreign", code)
    link = libbpf.link_create(program, ifindex, libbpf.AttachType.XDP, libbpf.XDP_NATIVE)
    before = libbpf.xdp_program(ifindex)

    with pytest.raises(ForeignProgramError, match="tap0 already has an XDP program"):
        host.attach(document(), "web01", hook=Hook.XDP)
    assert traces(paths) == []
    assert libbpf.xdp_program(ifindex) == before
    assert not libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_EGRESS)
    host.attach(document(), "web01", hook=Hook.XDP, force=True)

    assert row(host)["attached"]
    os.close(link)
    os.close(program)
    assert row(host)["attached"]


def test_force_holds_for_a_move_to_another_hook_too(host: Host, veth: Veth) -> None:
    veth("tap0")
    host.attach(document(), "web01")
    ifindex = socket.if_nametoindex("tap0")
    code = bytes.fromhex("b700000002000000") + bytes.fromhex("9500000000000000")
    program = libbpf.prog_load(libbpf.ProgType.XDP, "foreign", code)
    link = libbpf.link_create(program, ifindex, libbpf.AttachType.XDP, libbpf.XDP_NATIVE)
    assert "programs of others run before" in row(host)["reason"]

    with pytest.raises(ForeignProgramError, match=r"keeps what it had.* --force"):
        host.attach(document(), "web01", hook=Hook.XDP)
    assert row(host)["from_vm"]["hook"] == "tc"
    host.attach(document(), "web01", hook=Hook.XDP, force=True)

    assert row(host)["from_vm"]["hook"] == "xdp"
    assert row(host)["reason"] is None
    os.close(link)
    os.close(program)


def test_without_links_the_same_holds(paths: Paths, veth: Veth) -> None:
    name = veth("tap0")
    host = Host(paths, prefer_link=False)

    host.attach(document(HTTP), "web01")
    there = row(host)
    assert there["attached"]
    assert (there["from_vm"]["mode"], there["from_vm"]["link"]) == ("clsact", False)
    assert (there["to_vm"]["mode"], there["to_vm"]["link"]) == ("clsact", False)
    assert not host.attach(document(HTTP), "web01").changed
    assert host.attach(document(HTTPS), "web01").generation == 2
    host.detach("web01")

    assert traces(paths) == []
    assert "clsact" not in run("tc", "qdisc", "show", "dev", name)


class _InjectedError(VgwError):
    """A failure that a test asked for."""


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        ("vgw.loader.clone", "prog_load", 2),
        ("vgw.loader.clone", "map_create", 16),
        ("vgw.libbpf", "map_update", 3),
        ("vgw.libbpf", "map_update_many", 1),
        ("vgw.libbpf", "pin", 18),
        ("vgw.libbpf", "link_create", 2),
        ("vgw.controller.change", "save_manifest", 1),
    ],
)
def test_an_attach_that_fails_anywhere_leaves_nothing(  # noqa: PLR0917
    host: Host,
    paths: Paths,
    tap: Tap,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    calls: int,
) -> None:
    tap("tap0")
    ifindex = socket.if_nametoindex("tap0")
    target = __import__(module, fromlist=[name])
    original = getattr(target, name)
    for failing in range(1, calls + 1):
        count = 0

        def fail(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == failing:  # noqa: B023 - called within this round
                raise _InjectedError("injected")
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(VgwError, match="injected"):
                host.attach(document(), "web01")
        assert traces(paths) == [], f"{name} call {failing}"
        assert libbpf.xdp_program(ifindex) is None
        assert not libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_EGRESS)
    host.attach(document(), "web01")
    assert row(host)["attached"]


def test_the_error_of_a_failed_attach_names_the_step(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap("tap0")

    def fail(*_: Any, **__: Any) -> int:
        raise _InjectedError("injected")

    monkeypatch.setattr(libbpf, "link_create", fail)
    with pytest.raises(VgwError, match="web01 tap0 failed while attaching to_vm and was undone"):
        host.attach(document(), "web01")


def test_answers_get_their_budget_and_a_mark_where_programs_meet_them(
    host: Host, veth: Veth
) -> None:
    """The program on XDP does not meet answers of the other one: nobody would take a mark away."""
    veth("tap0")
    limited = {"web01": interface("tap0", vm="reject_per_second: 7,")}
    host.attach(document(HTTP), "web01")
    on_tc = _config(host)
    host.attach(document(HTTP, vms=limited), "web01", hook=Hook.XDP)
    on_xdp = _config(host)
    host.attach(document(HTTP, vms=limited), "web01", hook=Hook.AUTO)
    again = _config(host)

    assert on_tc.reject_per_second == 100
    assert on_tc.reply_mark == on_tc.endpoint & 0xFFFFFFFF
    assert (on_xdp.reject_per_second, on_xdp.reply_mark) == (7, 0)
    assert (again.reject_per_second, again.reply_mark) == (7, on_tc.reply_mark)


def _config(host: Host) -> abi.EndpointConfig:
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        return endpoint.maps.config()
