# SPDX-License-Identifier: Apache-2.0
"""Apply, modes, flows and the lock: what changes for VMs that are attached."""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.controller.conftest import run
from tests.controller.observe import received, row, send_to_vm, traces
from tests.controller.policies import document, from_vm, interface, to_vm
from vgw import libbpf
from vgw.abi import Mode, Reason, Verdict
from vgw.abi import Path as PacketPath
from vgw.controller import reconcile, replacement
from vgw.controller.event_names import EventNames
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import PartlyAppliedError, VgwError
from vgw.loader.sources import PROGRAMS
from vgw.maps import EndpointMaps
from vgw.policy import compile as compiler
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
HTTPS = "[{name: https, action: accept, services: [tcp/443]}]"
SSH = "[{name: ssh, action: accept, services: [tcp/22]}]"
Tap = Callable[[str], int]
Veth = Callable[[str], str]


# --- apply ----------------------------------------------------------------------------------


def test_apply_changes_what_differs_and_leaves_the_rest(host: Host, tap: Tap) -> None:
    for name in ("tap0", "tap1"):
        tap(name)
    vms = {"web01": interface("tap0"), "db01": "{interfaces: [{name: tap1}]}"}
    host.attach_many(document(HTTP, vms=vms))
    only_web = """  - name: more
    tier: vm
    applies_to: {vms: [web01]}
    ingress: [{name: ssh, action: accept, services: [tcp/22]}]"""

    result = host.apply(document(HTTP, vms=vms, extra=only_web))

    assert {each.vm: (each.changed, each.generation) for each in result.vms} == {
        "web01": (True, 2),
        "db01": (False, 1),
    }
    assert not any(each.changed for each in host.apply(document(HTTP, vms=vms, extra=only_web)).vms)


def test_more_vms_than_the_usual_limit_of_files_are_changed_at_once(host: Host, veth: Veth) -> None:
    """Each endpoint is some 15 files, and a login shell or a service may have 1,024."""
    count = 12
    names = [veth(f"tap{number}") for number in range(count)]
    vms = {f"vm-{name}": f"{{interfaces: [{{name: {name}}}]}}" for name in names}
    host.attach_many(document(vms=vms))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 100  # noqa: PTH208 (a number of files)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        changed = host.apply(document("[{name: ssh, action: accept}]", vms=vms))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [each.changed for each in changed.vms] == [True] * count


def test_more_vms_than_files_may_be_open_for_are_changed_in_parts(
    host: Host, veth: Veth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vgw.controller.fitness.allow_many_files", lambda: None)
    count = 20
    names = [veth(f"tap{number}") for number in range(count)]
    vms = {f"vm-{name}": f"{{interfaces: [{{name: {name}}}]}}" for name in names}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 300  # noqa: PTH208 (a number of files)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        made = host.attach_many(document(vms=vms))
        changed = host.apply(document("[{name: ssh, action: accept}]", vms=vms))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [each.changed for each in (*made.vms, *changed.vms)] == [True] * (2 * count)


def test_a_dry_run_tells_and_does_nothing(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")

    result = host.apply(document(HTTPS), dry_run=True)

    assert [(each.vm, each.changed, each.generation) for each in result.vms] == [("web01", True, 2)]
    assert host.status()["vms"][0]["generation"] == 1
    assert not host.attach(document(HTTP), "web01").changed


def test_what_fails_for_one_vm_does_not_keep_the_others_back(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "MAX_RULES", 100)
    for name in ("tap0", "tap1"):
        tap(name)
    vms = {"web01": interface("tap0"), "db01": "{interfaces: [{name: tap1}]}"}
    host.attach_many(document(HTTP, vms=vms))
    many = ", ".join(f"{{name: r{n}, action: accept, services: [tcp/{n}]}}" for n in range(1, 102))
    too_many = f"""  - name: more
    tier: vm
    applies_to: {{vms: [db01]}}
    ingress: [{many}]"""

    with pytest.raises(PartlyAppliedError) as caught:
        host.apply(document(HTTPS, vms=vms, extra=too_many))

    assert set(caught.value.failures) == {"db01"}
    (done,) = caught.value.done
    assert (done["vm"], done["generation"], done["changed"]) == ("web01", 2, True)
    generations = {vm["vm"]: vm["generation"] for vm in host.status()["vms"]}
    assert generations == {"web01": 2, "db01": 1}
    assert row(host, "db01")["attached"]


def test_the_number_of_an_undone_change_is_not_used_again(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flows may carry it: one that the undone policy accepted must be judged by the next."""
    for name in ("tap0", "tap1"):
        tap(name)
    vms = {"web01": "{interfaces: [{name: tap0}, {name: tap1}]}"}
    host.attach(document(HTTP, vms=vms), "web01")
    real, calls = EndpointMaps.switch, []

    def switch(maps: EndpointMaps, slot: int) -> None:
        calls.append(slot)
        if len(calls) == 2:
            raise VgwError("refused")
        real(maps, slot)

    monkeypatch.setattr(EndpointMaps, "switch", switch)
    with pytest.raises(VgwError, match="keeps what it had"):
        host.apply(document(HTTPS, vms=vms))
    monkeypatch.undo()
    assert host.status("web01")["vms"][0]["generation"] == 1

    (done,) = host.apply(document(SSH, vms=vms)).vms
    assert done.generation == 3


def test_apply_follows_interfaces_that_the_policy_adds_and_removes(host: Host, tap: Tap) -> None:
    for name in ("tap0", "tap1"):
        tap(name)
    host.attach(document(vms={"web01": "{interfaces: [{name: tap0}]}"}), "web01")

    host.apply(document(vms={"web01": "{interfaces: [{name: tap0}, {name: tap1}]}"}))
    both = [each["name"] for each in host.status()["vms"][0]["interfaces"] if each["attached"]]
    result = host.apply(document(vms={"web01": "{interfaces: [{name: tap1}, {name: tap2}]}"}))

    assert both == ["tap0", "tap1"]
    assert [each["name"] for each in host.status()["vms"][0]["interfaces"]] == ["tap1"]
    assert libbpf.xdp_program(socket.if_nametoindex("tap0")) is None
    assert result.waiting == {"web01": ["tap2"]}


def test_a_vm_that_lost_its_last_interface_says_so(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(), "web01")

    (result,) = host.apply(document(vms={"web01": interface("tap9")})).vms

    assert (result.interfaces, result.changed) == ([], True)
    assert host.attached() == []


def test_a_vm_that_the_policy_no_longer_names_stays_protected(host: Host, tap: Tap) -> None:
    tap("tap0")
    extra = """  - name: web
    tier: vm
    applies_to: {vms: [web01]}
    ingress: [{name: ssh, action: accept, services: [tcp/22]}]"""
    host.attach(document(HTTP, extra=extra), "web01")
    assert row(host)["rules"]["ingress"] == 2

    (result,) = host.apply(document(HTTP, vms={})).vms

    assert (result.kept, result.changed) == (True, False)
    there = row(host)
    assert there["attached"]
    assert there["rules"]["ingress"] == 2
    assert there["guards_off"] == {}  # who it is has not changed


def test_apply_to_a_vm_that_is_not_attached(host: Host) -> None:
    with pytest.raises(VgwError, match="VM web01 is not attached"):
        host.apply(document(), ["web01"])


def test_counters_of_rules_go_on_over_changes(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")
    send_to_vm("tap0", to_vm())

    many = ", ".join(f"{{name: r{n}, action: drop, services: [udp/{n}]}}" for n in range(1, 100))
    host.apply(document(f"[{{name: http, action: accept, services: [tcp/80]}}, {many}]"))
    send_to_vm("tap0", to_vm(sport=41000))

    rules = {rule["rule"]: rule for rule in host.rules("web01")["rules"]}
    assert len(rules) == 100
    assert rules["http"]["packets"] == 2
    assert rules["http"]["bytes"] == 2 * len(to_vm())
    assert rules["http"]["last_hit"] is not None
    assert rules["r1"]["packets"] == 0
    assert rules["r1"]["last_hit"] is None
    assert received(vm, to_vm(sport=41000))


def test_events_have_names_for_the_policy_before(host: Host, paths: Paths, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    manifest = load_manifest(paths.manifest("web01"))
    assert manifest is not None
    identity = manifest.endpoints["tap0"].endpoint

    host.apply(document(HTTPS))

    names = EventNames(paths)
    to_vm_rule = functools.partial(names.rule, identity, path=PacketPath.TO_VM, rule=0)
    assert names.endpoint(identity) == ("web01", "tap0")
    assert to_vm_rule(generation=1) == ("base", "vm", "http")
    assert to_vm_rule(generation=2) == ("base", "vm", "https")
    assert to_vm_rule(generation=3) is None
    assert to_vm_rule(generation=2, rule=1) is None
    assert to_vm_rule(generation=2, path=PacketPath.FROM_VM) is None
    host.apply(document("[{name: ssh, action: accept, services: [tcp/22]}]"))
    assert to_vm_rule(generation=3) == ("base", "vm", "ssh")
    assert to_vm_rule(generation=2) == ("base", "vm", "https")
    assert to_vm_rule(generation=1) is None


def test_detach_all(host: Host, paths: Paths, tap: Tap) -> None:
    for name in ("tap0", "tap1"):
        tap(name)
    vms = {"web01": interface("tap0"), "db01": "{interfaces: [{name: tap1}]}"}
    host.attach_many(document(HTTP, vms=vms))

    assert host.detach_all() == ["db01", "web01"]
    assert traces(paths) == []


def test_attach_many_protects_what_is_there_and_names_what_is_not(host: Host, tap: Tap) -> None:
    tap("tap0")
    vms = {
        "web01": "{interfaces: [{name: tap0}, {name: tap9}]}",
        "db01": "{interfaces: [{name: tap8}]}",
    }

    with pytest.raises(PartlyAppliedError, match="tap8 of VM db01 does not exist"):
        host.attach_many(document(HTTP, vms=vms))

    assert host.attached() == ["web01"]
    assert host.attach_many(document(HTTP, vms=vms), ["web01"]).waiting == {"web01": ["tap9"]}


# --- modes and flows ------------------------------------------------------------------------


def test_a_mode_that_is_ordered_holds_until_it_is_ordered_back(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")

    assert host.set_mode("web01", Mode.QUARANTINE)
    assert not host.set_mode("web01", Mode.QUARANTINE)
    send_to_vm("tap0", to_vm())
    assert not received(vm, to_vm())
    host.apply(document(HTTPS))
    status = host.status()["vms"][0]
    assert (status["mode"], status["mode_policy"]) == ("quarantine", "enforce")
    host.set_mode("web01", Mode.MONITOR)
    send_to_vm("tap0", to_vm(dport=81))
    assert received(vm, to_vm(dport=81))
    host.set_mode("web01", Mode.ENFORCE)

    assert host.status()["vms"][0]["mode"] == "enforce"
    manifest = load_manifest(host.paths.manifest("web01"))
    assert manifest is not None
    assert manifest.mode_override is None


def test_a_quarantine_outlives_the_interface(host: Host, veth: Veth) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    host.set_mode("web01", Mode.QUARANTINE)
    run("ip", "link", "del", "tap0")
    assert host.sweep() == [("web01", "tap0")]
    assert host.attached() == []

    veth("tap0")
    host.attach(document(HTTP), "web01")

    assert host.status()["vms"][0]["mode"] == "quarantine"
    host.detach("web01")
    host.attach(document(HTTP), "web01")
    assert host.status()["vms"][0]["mode"] == "enforce"


@pytest.fixture
def two_gone(host: Host, veth: Veth) -> Host:
    """Leave endpoints of two VMs whose interfaces are gone."""
    vms = {"db01": "{interfaces: [{name: tap1}]}", "web01": interface("tap0")}
    for name in ("tap0", "tap1"):
        veth(name)
    host.attach_many(document(HTTP, vms=vms))
    for name in ("tap0", "tap1"):
        run("ip", "link", "del", name)
    return host


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), VgwError("no"), MemoryError()])
def test_a_sweep_is_told_of_where_the_tidying_fails(
    two_gone: Host, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    told: list[tuple[str, str]] = []
    with monkeypatch.context() as patched:
        patched.setattr(reconcile, "remove_unused_images", fail)
        two_gone.sweep(lambda *each: told.append(each))

    assert told == [("db01", "tap1"), ("web01", "tap0")]
    assert two_gone.sweep() == []
    assert traces(two_gone.paths) == []


def test_a_vm_that_cannot_be_forgotten_keeps_no_other_one(
    two_gone: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path, _: object) -> None:
        if directory.parent.name == "db01":
            raise OSError(5, "Input/output error")
        replacement.destroy(directory, None)

    told: list[tuple[str, str]] = []
    with monkeypatch.context() as patched:
        patched.setattr(reconcile, "destroy", fail)
        with pytest.raises(PartlyAppliedError, match=r"db01: .*Input/output error"):
            two_gone.sweep(lambda *each: told.append(each))

    assert told == [("web01", "tap0")]
    assert two_gone.sweep() == [("db01", "tap1")]


def test_a_vm_that_is_detached_is_so_where_the_tidying_fails(
    host: Host, veth: Veth, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    veth("tap0")
    for detach in (lambda: host.detach("web01"), host.detach_all):
        host.attach(document(HTTP), "web01")
        with monkeypatch.context() as patched:
            patched.setattr(reconcile, "remove_unused_images", fail)
            detach()
        assert host.attached() == []


def test_an_ordered_interface_is_protected_again_until_detach(host: Host, veth: Veth) -> None:
    unnamed = document(HTTP, vms={"web01": interface("tap1")})
    for name in ("tap0", "tap1", "tap2"):
        veth(name)
    host.attach(unnamed, "guest", interfaces=["tap0"], hook=Hook.XDP)
    host.attach(unnamed, "web01", interfaces=["tap2"])
    for name in ("tap0", "tap2"):
        run("ip", "link", "del", name)
    assert host.sweep() == [("guest", "tap0"), ("web01", "tap2")]
    assert host.attached() == ["web01"]
    assert host.ordered_interfaces() == {"tap0": "guest", "tap2": "web01"}
    assert host.attach(unnamed, "web01").interfaces == ["tap1"]

    for name in ("tap0", "tap2"):
        veth(name)
    result = host.attach_many(unnamed, ["guest", "web01"])

    assert [each.interfaces for each in result.vms] == [["tap0"], ["tap1", "tap2"]]
    assert row(host, "guest")["from_vm"]["hook"] == "xdp"
    run("ip", "link", "del", "tap0")
    host.sweep()
    host.detach("guest")
    assert host.ordered_interfaces() == {"tap2": "web01"}


def test_an_ordered_interface_that_became_another_vms_is_let_go(host: Host, veth: Veth) -> None:
    for name in ("tap0", "tap1"):
        veth(name)
    host.attach(None, "guest", interfaces=["tap0", "tap1"])
    run("ip", "link", "del", "tap0")
    host.sweep()
    veth("tap0")
    host.attach(document(), "web01")

    assert host.attach(None, "guest").interfaces == ["tap1"]
    assert host.ordered_interfaces() == {"tap1": "guest"}


def test_flush_forgets_connections(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")
    send_to_vm("tap0", to_vm())
    os.write(vm, from_vm(dport=40000, sport=80, flags="SA"))

    assert host.flush("web01") == 1
    os.write(vm, from_vm(dport=40000, sport=80, flags="A"))

    (endpoint,) = host.endpoints()
    with endpoint:
        counted = endpoint.maps.stats()
    assert counted[PacketPath.FROM_VM, Verdict.ACCEPT, Reason.CT_ESTABLISHED].packets == 1
    assert counted[PacketPath.FROM_VM, Verdict.DROP, Reason.NO_STATE].packets == 1
    assert host.status()["vms"][0]["generation"] == 1


# --- fitness and what it takes ----------------------------------------------------------------


def test_without_a_bpffs_nothing_is_done(paths: Paths, tmp_path: Path, tap: Tap) -> None:
    tap("tap0")
    host = Host(dataclasses.replace(paths, bpffs=tmp_path / "plain" / "vgw"))

    with pytest.raises(VgwError, match=f"mount -t bpf bpf {tmp_path}/plain"):
        host.attach(document(), "web01")

    assert libbpf.xdp_program(socket.if_nametoindex("tap0")) is None


def test_no_descriptors_are_left_open(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.artefact(PROGRAMS)
    before = len(list(Path("/proc/self/fd").iterdir()))

    host.attach(document(HTTP), "web01")
    host.apply(document(HTTPS))
    host.status()
    host.rules("web01")
    host.set_mode("web01", Mode.MONITOR)
    for endpoint in host.endpoints():
        endpoint.close()
    host.detach("web01")

    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_idle_endpoint_takes_little_memory(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")

    (endpoint,) = host.endpoints()
    with endpoint:
        assert endpoint.maps.memory() < 3_000_000
