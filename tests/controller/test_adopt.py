# SPDX-License-Identifier: Apache-2.0
"""Endpoints that were damaged, lost or left behind: adopted, shown as broken, repaired, removed."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.killed import killed_at
from tests.controller.observe import program_ids, received, row, send_to_vm, traces
from tests.controller.policies import document, interface, to_vm
from vgw import libbpf
from vgw.abi import Mode, Reason
from vgw.abi import Path as PacketPath
from vgw.controller import links, links_netlink
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.maps import EndpointMaps
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
Tap = Callable[[str], int]
Veth = Callable[[str], str]


class _InjectedError(VgwError):
    """A failure that a test asked for."""


def test_another_process_adopts_what_is_pinned(paths: Paths, tap: Tap) -> None:
    tap("tap0")
    Host(paths).attach(document(HTTP), "web01")
    before = program_ids(Host(paths))

    assert not Host(paths).attach(document(HTTP), "web01").changed
    assert program_ids(Host(paths)) == before


def break_map(directory: Path) -> str:
    (directory / "stats").unlink()
    return "stats"


def replace_map(directory: Path) -> str:
    fd = libbpf.map_create(libbpf.MapType.ARRAY, "active", 4, 8, 1)
    (directory / "active").unlink()
    libbpf.pin(fd, directory / "active")
    os.close(fd)
    return "do not use the map pinned as active"


def resize_map(directory: Path) -> str:
    fd = libbpf.map_create(libbpf.MapType.HASH, "conntrack", 4, 8, 1)
    (directory / "conntrack").unlink()
    libbpf.pin(fd, directory / "conntrack")
    os.close(fd)
    return "conntrack has keys of 4"


def break_program(directory: Path) -> str:
    (directory / "prog_to_vm").unlink()
    return "prog_to_vm"


@pytest.mark.parametrize("damage", [break_map, replace_map, resize_map, break_program])
@pytest.mark.parametrize("place", [("tap", Hook.XDP), ("tap", Hook.TC), ("veth", Hook.TC)])
def test_a_broken_endpoint_is_shown_and_repaired_without_a_gap(
    host: Host,
    paths: Paths,
    request: pytest.FixtureRequest,
    damage: Callable[[Path], str],
    place: tuple[str, Hook],
) -> None:
    kind, hook = place
    request.getfixturevalue(kind)("tap0")
    host.attach(document(HTTP), "web01", hook=hook)
    ifindex = socket.if_nametoindex("tap0")
    said = damage(paths.endpoint_dir("web01", "tap0"))

    there = row(host)
    assert not there["attached"]
    assert said in there["reason"]
    result = host.attach(document(HTTP), "web01")

    assert result.changed
    assert row(host)["attached"]
    assert row(host)["from_vm"]["hook"] == hook
    assert len(libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_EGRESS)) == 1
    is_tc = hook is Hook.TC
    assert len(libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_INGRESS)) == is_tc
    host.detach("web01")
    assert traces(paths) == []


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
def test_repairing_keeps_a_program_on_the_interface_all_the_time(
    host: Host, paths: Paths, tap: Tap, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01", hook=hook)
    break_map(paths.endpoint_dir("web01", "tap0"))
    ifindex = socket.if_nametoindex("tap0")
    seen: list[bool] = []

    def watching(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            finally:
                egress = libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_EGRESS)
                ingress = libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_INGRESS)
                xdp = libbpf.xdp_program(ifindex)
                seen.append(bool(egress) and bool(xdp if hook is Hook.XDP else ingress))

        return watched

    for name in ("link_create", "link_update", "link_detach", "pin"):
        monkeypatch.setattr(libbpf, name, watching(getattr(libbpf, name)))
    host.attach(document(HTTP), "web01")

    assert len(seen) > 12
    assert all(seen)


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
def test_a_failed_repair_leaves_the_old_programs_running(
    host: Host, paths: Paths, tap: Tap, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01", hook=hook)
    break_map(paths.endpoint_dir("web01", "tap0"))
    ifindex = socket.if_nametoindex("tap0")

    def running() -> tuple[object, ...]:
        return libbpf.xdp_program(ifindex), *(libbpf.tcx_programs(ifindex, at) for at in (46, 47))

    before = running()

    def fail(*_: Any, **__: Any) -> None:
        raise _InjectedError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(libbpf, "link_update", fail)
        with pytest.raises(VgwError, match="injected"):
            host.attach(document(HTTP), "web01")

    assert running() == before
    host.attach(document(HTTP), "web01")
    assert row(host)["attached"]


def take_off(host: Host, path: PacketPath) -> None:
    """Take the program of one path off tap0, as somebody may while no controller runs."""
    pin = links.link_pin(host.paths.endpoint_dir("web01", "tap0"), path)
    if pin.exists():
        with links.opened(pin) as fd:
            libbpf.link_detach(fd)
    elif row(host)[path.name.lower()]["hook"] == "xdp":
        run("ip", "link", "set", "tap0", "xdp", "off")
    else:
        links_netlink.remove_filter(socket.if_nametoindex("tap0"), path)


def counted(host: Host) -> tuple[int, int, int]:
    """Return how many packets a rule has judged, by two counters, and how many flows are known."""
    (endpoint,) = host.endpoints()
    with endpoint:
        stats = endpoint.maps.stats().items()
    judged = sum(counter.packets for (_, _, reason), counter in stats if reason is Reason.RULE)
    return judged, host.rules("web01")["rules"][0]["packets"], row(host)["conntrack"]["entries"]


@pytest.mark.parametrize("path", PacketPath)
@pytest.mark.parametrize("hook", [Hook.TC, Hook.XDP])
@pytest.mark.parametrize("prefer_link", [True, False])
def test_what_is_attached_half_is_shown_and_goes_on_with_what_it_counted(
    paths: Paths, tap: Tap, path: PacketPath, hook: Hook, prefer_link: bool
) -> None:
    tap("tap0")
    host = Host(paths, prefer_link=prefer_link)
    host.attach(document(HTTP), "web01", hook=hook)
    send_to_vm("tap0", to_vm())
    before = counted(host), program_ids(host), host.manifest("web01").generation
    assert before[0] == (1, 1, 1)
    take_off(host, path)

    there = row(host)
    assert not there["attached"]
    assert there[path.name.lower()] is None
    assert f"{path.name.lower()} program is not on the interface" in there["reason"]
    (result,) = Host(paths, prefer_link=prefer_link).attach_many(document(HTTP)).vms

    assert result.changed
    assert row(host)["attached"]
    assert (counted(host), program_ids(host), host.manifest("web01").generation) == before
    send_to_vm("tap0", to_vm(sport=40001))
    assert counted(host) == (2, 2, 2)
    assert not host.apply(document(HTTP)).vms[0].changed


@pytest.mark.parametrize("path", PacketPath)
def test_what_is_attached_half_may_get_another_policy_and_hook(
    host: Host, tap: Tap, path: PacketPath
) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01", hook=Hook.XDP)
    send_to_vm("tap0", to_vm())
    take_off(host, path)

    host.attach(
        document(f"[{{name: ssh, action: accept, services: [tcp/22]}}, {HTTP[1:]}"),
        "web01",
        hook=Hook.TC,
    )

    there = row(host)
    assert (there["attached"], there["from_vm"]["hook"]) == (True, "tc")
    assert [rule["packets"] for rule in host.rules("web01")["rules"]] == [0, 1]
    send_to_vm("tap0", to_vm(dport=22))
    assert received(vm, to_vm(dport=22))
    assert [rule["packets"] for rule in host.rules("web01")["rules"]] == [1, 1]


def test_what_is_attached_half_stays_so_when_the_change_fails(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise _InjectedError("injected")

    tap("tap0")
    host.attach(document(HTTP), "web01")
    take_off(host, PacketPath.TO_VM)
    with monkeypatch.context() as patched:
        patched.setattr(EndpointMaps, "switch", fail)
        with pytest.raises(VgwError, match=r"web01 keeps what it had.*injected"):
            host.apply(document(HTTP.replace("80", "443")))
    assert row(host)["to_vm"] is None

    killed_at(links, "attach", lambda: host.apply(document(HTTP)))
    host.apply(document(HTTP))
    assert row(host)["attached"]


def test_an_interface_made_anew_gets_programs_and_no_old_flows(host: Host, veth: Veth) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    send_to_vm("tap0", to_vm())
    assert row(host)["conntrack"]["entries"] == 1
    run("ip", "link", "del", "tap0")
    assert row(host)["reason"] == "interface tap0 does not exist"
    veth("tap0")
    assert not row(host)["attached"]

    host.attach(document(HTTP), "web01")

    assert row(host)["attached"]
    assert row(host)["conntrack"]["entries"] == 0


def test_a_conntrack_limit_takes_effect_with_the_next_endpoint(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    smaller = document(HTTP, vms={"web01": interface("tap0", ", conntrack_max: 4096")})

    (result,) = host.apply(smaller).vms
    assert result.pending == [f"tap0: {row(host)['pending']}"]
    there = row(host)
    assert there["conntrack"]["max"] == 65536
    assert there["pending"].startswith("conntrack_max 4096 takes effect when")
    host.detach("web01")
    host.attach(smaller, "web01")

    there = row(host)
    assert (there["conntrack"]["max"], there["pending"]) == (4096, None)


def test_detach_when_the_interface_is_gone(host: Host, paths: Paths, veth: Veth) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    run("ip", "link", "del", "tap0")

    host.detach("web01")

    assert traces(paths) == []
    with pytest.raises(VgwError, match="VM web01 is not attached"):
        host.detach("web01")


def test_a_lost_manifest_does_not_open_anything(host: Host, paths: Paths, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")
    file = paths.manifest("web01")
    file.write_text(file.read_text().replace('"generation":1', '"generation":9'))

    there = row(host)
    assert there["attached"]
    assert "lost or damaged" in there["reason"]
    assert (there["rules"], there["guards_off"]) == (None, None)
    with pytest.raises(VgwError, match="lost or damaged; web01 stays protected"):
        host.rules("web01")
    result = host.apply(document(HTTP))

    assert result.vms[0].generation == 2
    send_to_vm("tap0", to_vm())
    assert received(vm, to_vm())
    assert host.rules("web01")["rules"][0]["packets"] == 1


def test_lost_rules_are_written_anew(host: Host, paths: Paths, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    shutil.rmtree(paths.policies)

    with pytest.raises(VgwError, match=r"names of web01's rules are lost .* apply its policy"):
        host.rules("web01")
    (result,) = host.apply(document(HTTP)).vms

    assert (result.changed, result.generation) == (False, 1)
    assert [rule["rule"] for rule in host.rules("web01")["rules"]] == ["http"]


@pytest.mark.parametrize("ordered", [Mode.QUARANTINE, Mode.MONITOR])
def test_a_mode_outlives_the_state_directory(
    host: Host, paths: Paths, tap: Tap, ordered: Mode
) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    host.set_mode("web01", ordered)
    shutil.rmtree(paths.state_dir)
    assert modes(host) == (ordered.name.lower(), None)

    host.apply(document(HTTP))

    assert modes(host) == (ordered.name.lower(), "enforce")
    assert host.set_mode("web01", Mode.ENFORCE)
    shutil.rmtree(paths.state_dir)
    host.attach(document(HTTP), "web01")
    host.apply(document(HTTP, vms={"web01": interface("tap0", vm="mode: monitor,")}))
    assert modes(host) == ("monitor", "monitor")  # what the policy said was no order


def test_mode_and_flush_need_no_manifest(host: Host, paths: Paths, veth: Veth) -> None:
    veth("tap0")
    host.attach(document(HTTP), "web01")
    send_to_vm("tap0", to_vm())
    shutil.rmtree(paths.state_dir)

    assert host.flush("web01") == 1
    assert host.set_mode("web01", Mode.QUARANTINE)
    assert not host.set_mode("web01", Mode.QUARANTINE)

    assert modes(host) == ("quarantine", None)
    assert "lost or damaged" in row(host)["reason"]
    run("ip", "link", "del", "tap0")
    host.sweep()
    veth("tap0")
    host.attach(document(HTTP), "web01")
    assert modes(host) == ("quarantine", "enforce")


def modes(host: Host) -> tuple[str, str | None]:
    """Return the mode that web01 runs and that of its policy."""
    status = host.status("web01")["vms"][0]
    return status["mode"], status["mode_policy"]
