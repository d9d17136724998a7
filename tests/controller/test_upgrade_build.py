# SPDX-License-Identifier: Apache-2.0
"""Programs of another build of the same ABI are replaced under traffic, and nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.controller import observe, other_build
from tests.controller.killed import killed_after
from tests.controller.observe import program_ids, received, row, send_to_vm, traces
from tests.controller.policies import document, from_vm, to_vm
from vgw import libbpf
from vgw.controller.conntrack import list_flows
from vgw.controller.reconcile import Host
from vgw.errors import KernelError

pytestmark = pytest.mark.bpf
Tap = Callable[[str], int]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of another build."""
    return other_build.build(tmp_path_factory.mktemp("sources") / "bpf")


def later_segments(vm: int) -> bool:
    """Tell whether segments of the open connection pass in both directions."""
    segment = to_vm(sport=40001, flags="A")
    send_to_vm("tap0", segment)
    os.write(vm, from_vm(sport=80, dport=40001, flags="A"))
    return received(vm, segment)


def open_connection(vm: int) -> None:
    observe.open_connection(vm)
    while received(vm, b""):
        pass


def use_other(monkeypatch: pytest.MonkeyPatch, host: Host, other: Path) -> Host:
    other_build.use(monkeypatch, other)
    return Host(host.paths)


def test_catalogue_M36_upgrade_and_downgrade_keep_flows_and_counters(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, other: Path
) -> None:
    vm = tap("tap0")
    text = document("[{name: http, action: accept, services: [tcp/80]}]")
    host.attach(text, "web01")
    open_connection(vm)
    before, flows = row(host), list_flows(host, "web01")["flows"]

    with monkeypatch.context() as patched:
        upgraded = use_other(patched, host, other)
        assert f"are of another build ({before['build']}" in row(upgraded)["pending"]
        result = upgraded.upgrade()
        assert not result.failures
        (done,) = result.done
        assert (done.vm, done.interface, done.before) == ("web01", "tap0", before["build"])
        after = row(upgraded)
        assert after["build"] == done.after != before["build"]
        assert after["attached"]
        assert after["pending"] is None
        assert set(program_ids(upgraded)).isdisjoint(
            before[path]["prog_id"] for path in ("from_vm", "to_vm")
        )
        assert [flow["packets"] for flow in list_flows(upgraded, "web01")["flows"]] == [
            flow["packets"] for flow in flows
        ]
        assert later_segments(vm)
        assert not upgraded.attach(text, "web01").changed, "the policy is the same"
        assert not upgraded.upgrade().done, "again there is nothing to do"

    assert host.attach(text, "web01").changed is False
    assert row(host)["build"] == before["build"], "attach goes back to the build it belongs to"
    assert later_segments(vm)
    host.detach("web01")
    assert traces(host.paths) == []


def test_the_new_program_is_the_one_that_judges(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The control: a build that drops everything is noticed by the same packets."""
    vm = tap("tap0")
    host.attach(document(), "web01")
    open_connection(vm)
    deaf = use_other(monkeypatch, host, other_build.build(tmp_path / "bpf", *other_build.DEAF))

    assert len(deaf.upgrade().done) == 1

    assert not later_segments(vm)


@pytest.mark.parametrize("hook", ["xdp", "tc"])
@pytest.mark.parametrize("link", [True, False], ids=["link", "netlink"])
def test_upgrade_at_each_hook(  # noqa: PLR0917
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, other: Path, hook: str, link: bool
) -> None:
    tap("tap0")
    old = Host(host.paths, prefer_link=link)
    text = document(vms={"web01": f"{{interfaces: [{{name: tap0, hook: {hook}}}]}}"})
    old.attach(text, "web01")
    before = row(old)

    use_other(monkeypatch, host, other).upgrade()

    after = row(old)
    assert after["attached"]
    for path in ("from_vm", "to_vm"):
        assert after[path]["prog_id"] != before[path]["prog_id"]
        assert {**after[path], "prog_id": 0} == {**before[path], "prog_id": 0}
    old.detach("web01")
    assert traces(host.paths) == []


def test_a_build_that_is_refused_leaves_the_old_programs(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, other: Path
) -> None:
    vm = tap("tap0")
    host.attach(document(), "web01")
    open_connection(vm)
    before = row(host)
    broken = use_other(monkeypatch, host, other)
    updates: list[int] = []

    def second_fails(fd: int, program: int) -> None:
        updates.append(fd)
        if len(updates) == 2:
            raise KernelError("cannot replace the program of a link: No space left on device", 28)
        update(fd, program)

    update = libbpf.link_update
    monkeypatch.setattr(libbpf, "link_update", second_fails)

    result = broken.attach(document(), "web01")

    assert len(updates) == 3, "the first one was put back"
    (note,) = result.pending
    assert note.startswith("tap0 goes on with the programs of another build: cannot replace")
    assert row(host) == before
    assert later_segments(vm)
    assert not list(host.paths.endpoint_dir("web01", "tap0").glob("%%*"))


def test_a_large_policy_keeps_its_stages(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, other: Path
) -> None:
    vm = tap("tap0")
    host.attach(document(many_rules(2000)), "web01")
    upgraded = use_other(monkeypatch, host, other)

    assert len(upgraded.upgrade().done) == 1

    last = to_vm(sport=40001, dport=11999)
    send_to_vm("tap0", last)
    assert received(vm, last)
    denied = to_vm(sport=40001, dport=9999)
    send_to_vm("tap0", denied)
    assert not received(vm, denied)


def many_rules(count: int) -> str:
    """Return rules that need the programs' stages."""
    rules = (
        f"{{name: r{n}, action: accept, from: [192.0.2.0/{24 + n % 9}], "
        f"services: [tcp/{10000 + n}]}}"
        for n in range(count)
    )
    return f"[{', '.join(rules)}]"


def test_catalogue_M3_an_upgrade_killed_at_any_step_converges(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, other: Path
) -> None:
    vm = tap("tap0")
    host.attach(document(), "web01")
    open_connection(vm)
    builds: Sequence[Host] = (Host(host.paths), host)
    steps = finished = 0
    with monkeypatch.context() as patched:
        upgraded = use_other(patched, host, other)
        upgraded.artefact(("tc_from_vm", "tc_to_vm"))
        while not finished:
            finished = killed_after(steps, upgraded.upgrade)
            assert later_segments(vm), f"killed after {steps} steps"
            upgraded.upgrade()
            status = row(upgraded)
            assert status["attached"], f"killed after {steps} steps: {status['reason']}"
            assert not list(host.paths.endpoint_dir("web01", "tap0").glob("%%*"))
            patched.undo()
            assert len(builds[steps % 2].upgrade().done) == 1
            assert later_segments(vm)
            other_build.use(patched, other)
            steps += 1
    print(f"killed after each of {steps} steps")
    assert steps > 10
    host.detach("web01")
    assert traces(host.paths) == []
