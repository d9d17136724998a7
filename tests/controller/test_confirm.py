# SPDX-License-Identifier: Apache-2.0
"""Policies that nobody confirms: gone back to the one before, once, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller.killed import killed_after, killed_at
from tests.controller.observe import lets_in
from tests.controller.policies import interface
from tests.controller.process import Controller, environment_of, eventually
from vgw.controller import confirming, guardian, machine, window
from vgw.controller.actor import this_process
from vgw.controller.events import read_log
from vgw.controller.history import Entry, History
from vgw.controller.paths import Paths
from vgw.controller.policy_keeper import ApplyOrder, PolicyKeeper, logging_to
from vgw.controller.reconcile import Host
from vgw.controller.window import load_window, save_window
from vgw.errors import VgwError
from vgw.policy.parse import parse_sources

pytestmark = pytest.mark.bpf

ME = this_process("cli")


def text(port: int, vms: str = "") -> str:
    """Return a policy that lets one TCP port in."""
    return f"""schema: vgw/v1
vms:
  web01: {interface("tap0")}
{vms}
policies:
  - name: base
    tier: vm
    applies_to: {{all: true}}
    ingress: [{{name: in, action: accept, services: [tcp/{port}]}}]
"""


#: What the user is connected by, and what a policy that cuts the user off lets in instead.
SSH, OTHER = text(22), text(443)


#: Python that goes back from a policy whose time is over, and says whether it did.
SETTLE = """
import json, sys
from pathlib import Path
from vgw.controller.actor import this_process
from vgw.controller.paths import Paths
from vgw.controller.policy_keeper import PolicyKeeper, logging_to
from vgw.controller.reconcile import Host
paths = Paths(**{name: Path(text) for name, text in json.loads(sys.argv[1]).items()})
keeper = PolicyKeeper(Host(paths), logging_to(paths.log_file))
print(keeper.settle_overdue(this_process("cli")))
"""


class Bench:
    """A host with VM web01 on tap0, under the policy that lets the user in."""

    def __init__(self, paths: Paths, vm: int) -> None:
        self.paths = paths
        self.vm = vm
        self.history = History(paths)
        self.host = Host(paths)
        self.keeper = PolicyKeeper(self.host, logging_to(paths.log_file))
        self.controllers: list[Controller] = []
        paths.policy.write_text(SSH)

    def vgw(self, arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command, in a process of its own."""
        return subprocess.run(
            [sys.executable, "-c", "from vgw.cli import main; main()", *arguments.split()],
            env={**os.environ, **environment_of(self.paths)},
            capture_output=True,
            text=True,
            check=False,
        )

    def ok(self, arguments: str) -> str:
        done = self.vgw(arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def controller(self) -> Controller:
        self.controllers.append(Controller(self.paths, 0))
        return self.controllers[-1]

    def apply(self, policy: str = OTHER, seconds: float | None = 3600.0, **order: Any) -> None:
        """Apply a policy in this process."""
        sources = [("other.yaml", policy)]
        order_ = ApplyOrder(confirm_seconds=seconds, **order)
        self.keeper.apply(sources, parse_sources(sources), ME, order_)

    def settle(self) -> None:
        self.keeper.settle_overdue(ME)

    def start_with(self, *, controller: bool) -> None:
        if controller:
            self.controller()
        else:
            self.ok("attach --vm web01")
        assert self.lets_in(22)

    def lets_in(self, port: int) -> bool:
        return lets_in(self.vm, port)

    def guardians(self) -> list[int]:
        """Return the processes that watch this host's windows."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes()
                if b"vgw.controller.guardian" in command and str(self.paths.state_dir).encode() in (
                    command
                ):
                    found.append(int(process.name))
        return found

    def kill_guardians(self) -> None:
        for pid in self.guardians():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually("the guardians are gone", lambda: not self.guardians())

    def make_overdue(self) -> None:
        """End the window's time, without waiting for it."""
        found = load_window(self.paths)
        assert found is not None
        save_window(self.paths, dataclasses.replace(found, deadline_ns=1))

    def rollbacks(self) -> list[Entry]:
        return [entry for entry in self.history.entries() if entry.event == "rollback"]

    def await_rollback(self) -> None:
        """Wait until the user is let in again, and check that it was gone back once."""
        eventually("gone back", lambda: load_window(self.paths) is None and self.rollbacks())
        self.assert_rolled_back_once()

    def assert_rolled_back_once(self) -> None:
        assert self.lets_in(22)
        assert not self.lets_in(443)
        (entry,) = self.rollbacks()
        assert entry.outcome is not None
        assert entry.outcome.failed == 0
        states = [each.confirm for each in self.history.entries() if each.confirm is not None]
        assert states == ["rolled_back"]
        # A record is written after what it tells of.
        eventually("recorded", lambda: self.logged("rolled_back"))
        assert self.logged("rolled_back") == 1

    def logged(self, event: str) -> int:
        """Return how many records of a kind there are."""
        return sum(found["event"] == event for found in read_log(self.paths.log_file))


@pytest.fixture
def bench(paths: Paths, tap: Callable[[str], int]) -> Iterator[Bench]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    bench = Bench(paths, tap("tap0"))
    yield bench
    for controller in bench.controllers:
        if controller.process.poll() is None:
            controller.end(signal.SIGKILL)
    bench.kill_guardians()
    with contextlib.suppress(VgwError):
        Host(paths).detach_all()


@pytest.mark.parametrize("with_controller", [False, True])
def test_not_confirmed_it_is_gone_back(bench: Bench, with_controller: bool) -> None:
    bench.start_with(controller=with_controller)
    (bench.paths.policy.parent / "other.yaml").write_text(OTHER)

    done = bench.vgw(f"apply {bench.paths.policy.parent}/other.yaml --confirm-within 1500ms")

    assert done.returncode == 0, done.stderr
    assert "`vgw confirm` within 1.5 s" in done.stderr
    bench.await_rollback()  # which may be over before the command is, on a busy machine
    events = [found["event"] for found in read_log(bench.paths.log_file)]
    assert [each for each in events if each in ("armed", "confirmed")] == ["armed"]
    assert "policy 3: rollback" in bench.ok("status")
    eventually("the guardians have ended", lambda: not bench.guardians())


@pytest.mark.parametrize("with_controller", [False, True])
def test_confirmed_it_stays(bench: Bench, with_controller: bool) -> None:
    bench.start_with(controller=with_controller)
    bench.paths.policy.write_text(OTHER)
    bench.ok("apply --confirm-within 1h")
    assert "waits to be confirmed, 3" in bench.ok("status")
    refused = bench.vgw("apply")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "policy 2 waits to be confirmed" in refused.stderr

    assert bench.ok("confirm") == "policy 2 is confirmed\n"

    assert bench.vgw("confirm").returncode == 1
    eventually("the guardians have ended", lambda: not bench.guardians())
    assert bench.lets_in(443)
    assert [each.confirm for each in bench.history.entries()] == [None, "confirmed"]
    assert bench.rollbacks() == []
    events = [found["event"] for found in read_log(bench.paths.log_file)]
    assert [each for each in events if each in ("armed", "confirmed")] == ["armed", "confirmed"]


@pytest.mark.parametrize("killed", ["cli", "controller", "guardian", "controller and guardian"])
def test_killed_with_a_controller(bench: Bench, killed: str) -> None:
    bench.start_with(controller=True)
    bench.paths.policy.write_text(OTHER)
    bench.ok("apply --confirm-within 1h")
    assert len(bench.guardians()) == 2, "one of the controller, one of the command"
    (controller,) = bench.controllers
    if "guardian" in killed:
        bench.kill_guardians()
    if "controller" in killed:
        controller.end(signal.SIGKILL)
    if killed == "cli":
        controller.process.send_signal(signal.SIGHUP)  # which reads the file, but not now

    bench.make_overdue()

    if killed == "controller and guardian":
        bench.controller()
    bench.await_rollback()
    if killed != "controller":
        status = bench.ok("status -o json")
        assert '"held": true' in status, "the file says what was not confirmed"
        # What the guardian or another did is known to the controller: it does not do it again.
        bench.controllers[-1].client.settle()
        bench.assert_rolled_back_once()


@pytest.mark.parametrize("killed", ["cli", "cli and guardian"])
def test_killed_without_a_controller(bench: Bench, killed: str) -> None:
    bench.start_with(controller=False)
    # The policy is in force everywhere, and the one who applied it dies before it can say so.
    killed_at(confirming.Confirming, "arm", lambda: bench.apply(seconds=3600))
    assert bench.lets_in(443)
    assert len(bench.guardians()) == 1
    if "guardian" in killed:
        bench.kill_guardians()

    bench.make_overdue()

    if "guardian" in killed:
        bench.ok("mode --vm web01 monitor")
        bench.ok("release --vm web01")
    bench.await_rollback()


def test_killed_at_every_step_it_is_gone_back_or_was_never_applied(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever settles it next finds what is to be done; and one that is killed at that, too."""
    monkeypatch.setattr(guardian, "start_guardian", lambda *_: 0)
    monkeypatch.setattr("vgw.controller.policy_keeper.start_guardian", lambda *_: 0)
    bench.start_with(controller=False)
    finished, steps = False, 0
    while not finished:
        finished = killed_after(steps, bench.apply)
        steps += 5
        found = load_window(bench.paths)
        if found is not None:
            bench.make_overdue()
        bench.keeper.settle_overdue(ME)
        assert bench.keeper.waiting() is None
        assert bench.lets_in(22), f"after {steps} steps"
        bench.host.flush("web01")
    assert steps > 10

    finished, steps = False, 0
    while not finished:
        bench.apply()
        found = load_window(bench.paths)
        assert found is not None
        bench.make_overdue()
        finished = killed_after(steps, bench.settle)
        steps += 5
        bench.keeper.settle_overdue(ME)
        assert bench.lets_in(22)
        undoing = [each for each in bench.rollbacks() if each.window == found.id]
        assert len(undoing) == 1, f"after {steps} steps"
        bench.host.flush("web01")
    assert steps > 10


def test_after_a_reboot_it_is_overdue(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.start_with(controller=False)
    bench.apply()
    bench.kill_guardians()
    assert not bench.keeper.settle_overdue(ME)
    monkeypatch.setattr(window, "boot_id", lambda: "another boot")
    assert bench.keeper.settle_overdue(ME)
    bench.assert_rolled_back_once()


def test_catalogue_M33_the_wall_clock_decides_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.start_with(controller=False)
    bench.apply()
    bench.kill_guardians()
    now = time.time()
    for days in (-1, 1):
        monkeypatch.setattr(time, "time", lambda days=days: now + days * 86400)
        monkeypatch.setattr(time, "time_ns", lambda days=days: int((now + days * 86400) * 1e9))
        assert not bench.keeper.settle_overdue(ME)
    boottime = machine.boottime_ns()
    monkeypatch.setattr(window, "boottime_ns", lambda: boottime + int(3599e9))
    assert not bench.keeper.settle_overdue(ME)
    monkeypatch.setattr(window, "boottime_ns", lambda: boottime + int(3601e9))
    assert bench.keeper.settle_overdue(ME)


def test_catalogue_M33_a_host_that_slept_goes_back_from_what_nobody_confirmed(bench: Bench) -> None:
    """A process whose CLOCK_BOOTTIME alone is ahead sees what one does after the host slept."""
    bench.start_with(controller=False)
    bench.apply()
    bench.kill_guardians()
    places = json.dumps({name: str(path) for name, path in dataclasses.asdict(bench.paths).items()})
    for seconds, goes_back in ((3000, False), (3700, True)):
        slept = ["unshare", "--time", "--boottime", str(seconds), "--fork"]
        command = [*slept, sys.executable, "-c", SETTLE, places]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"{goes_back}\n"
    bench.assert_rolled_back_once()


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_catalogue_M32_without_its_record_it_is_gone_back_at_once(bench: Bench, harm: str) -> None:
    bench.start_with(controller=False)
    bench.apply()
    file = bench.paths.state_dir / "confirm.json"
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7])
    bench.kill_guardians()
    assert bench.keeper.settle_overdue(ME)
    bench.assert_rolled_back_once()


def test_catalogue_M32_without_its_entry_it_is_gone_back_when_it_is_due(bench: Bench) -> None:
    bench.start_with(controller=False)
    bench.apply()
    bench.kill_guardians()
    file = bench.paths.state_dir / "history" / "2.json"
    file.write_bytes(file.read_bytes()[:-7])
    assert not bench.keeper.settle_overdue(ME)
    bench.make_overdue()
    assert bench.keeper.settle_overdue(ME)
    assert bench.lets_in(22)
    assert bench.keeper.waiting() is None


def test_what_cannot_be_gone_back_to_stays_and_is_said(bench: Bench) -> None:
    bench.start_with(controller=False)
    bench.apply()
    bench.kill_guardians()
    first = bench.history.get(1)
    (bench.paths.state_dir / "history" / "texts" / f"{first.digest}.json").unlink()
    bench.make_overdue()
    with pytest.raises(VgwError, match="policy 2 was not confirmed and stays in force: the texts"):
        bench.keeper.settle_overdue(ME)
    assert not bench.keeper.settle_overdue(ME), "it can never be done, so it is tried once"
    assert bench.lets_in(443)
    assert bench.history.get(2).confirm == "failed"


def test_each_vm_goes_back_to_what_it_had(bench: Bench, tap: Callable[[str], int]) -> None:
    tap("tap1")
    bench.start_with(controller=False)
    own = bench.paths.policy.parent / "own.yaml"
    own.write_text(text(25, "  db01: {interfaces: [{name: tap1}]}"))
    bench.ok(f"attach --vm db01 --policy {own}")
    digest = bench.host.manifest("db01").policy

    bench.apply(text(443, "  db01: {interfaces: [{name: tap1}]}"))
    assert bench.host.manifest("db01").policy != digest
    bench.keeper.rollback(None, ME)

    assert bench.host.manifest("db01").policy == digest
    bench.assert_rolled_back_once()


def test_a_vm_that_was_attached_meanwhile_stays_protected(
    bench: Bench, tap: Callable[[str], int]
) -> None:
    tap("tap1")
    bench.start_with(controller=False)
    both = text(443, "  db01: {interfaces: [{name: tap1}]}")
    bench.apply(both)
    (bench.paths.policy.parent / "both.yaml").write_text(both)
    bench.ok(f"attach --vm db01 --policy {bench.paths.policy.parent}/both.yaml")

    _, result = bench.keeper.rollback(None, ME)

    assert {each.vm: each.kept for each in result.vms} == {"web01": False, "db01": True}
    bench.assert_rolled_back_once()


def test_another_policy_meanwhile_keeps_what_is_gone_back_to(bench: Bench) -> None:
    bench.start_with(controller=False)
    bench.apply()
    with pytest.raises(VgwError, match="policy 2 waits to be confirmed"):
        bench.apply(text(25))
    bench.apply(text(25), supersede=True)
    bench.keeper.rollback(None, ME)
    assert bench.lets_in(22)
    assert [each.confirm for each in bench.history.entries()] == [
        *(None, "superseded", "rolled_back", None)
    ]
    bench.apply()
    bench.apply(text(25), seconds=None, supersede=True)
    assert bench.keeper.waiting() is None
    assert bench.lets_in(25)


def test_nothing_is_applied_that_nobody_could_undo(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VgwError, match="no policy to go back to yet"):
        bench.apply()
    bench.start_with(controller=False)
    monkeypatch.setattr(guardian.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    with pytest.raises(VgwError, match="did not start"):
        bench.apply()
    assert bench.lets_in(22)
    assert len(bench.history.entries()) == 1
    assert load_window(bench.paths) is None
