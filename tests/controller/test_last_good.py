# SPDX-License-Identifier: Apache-2.0
"""Which policy the controller goes by when its file is away, wrong, older, or not in force."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller.test_operations import PRESENT, Bench, FakeHost, policy
from tests.patience import PATIENCE
from vgw.controller import host_policy, policy_keeper
from vgw.controller.actor import this_process
from vgw.controller.batch import ApplyResult, AttachResult
from vgw.controller.changes import Changes
from vgw.controller.host_policy import START
from vgw.controller.metrics import ApplyTimes
from vgw.controller.operations import Operations
from vgw.controller.paths import Paths
from vgw.controller.policy_keeper import ApplyOrder, PolicyKeeper
from vgw.controller.policy_source import SourceReader
from vgw.controller.window import load_window, save_window
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

ME = this_process("cli")
WEB, DB = policy("web01"), policy("db01")


class SeeingHost(FakeHost):
    """Remembers by which policy VMs were changed, too."""

    def __init__(self, paths: Paths) -> None:
        super().__init__(paths)
        self.policies: list[list[str]] = []

    def attach_many(self, document: PolicyDocument, *arguments: Any, **options: Any) -> Any:
        self.policies.append(sorted(document.vms))
        return super().attach_many(document, *arguments, **options)

    def apply(self, document: PolicyDocument, *arguments: Any, **options: Any) -> Any:
        self.policies.append(sorted(document.vms))
        return super().apply(document, *arguments, **options)


class Restarting(Bench):
    """A bench whose controller can be started anew, on what the one before left."""

    host: SeeingHost

    def __init__(self, paths: Paths) -> None:
        super().__init__(paths)
        self.host = SeeingHost(paths)
        self.restart()

    def restart(self, *, forget_vms: bool = False) -> None:
        if forget_vms:
            self.host.protected.clear()
        self.changes = Changes(self.host, self.log, ApplyTimes())
        self.operations = Operations(self.changes)
        seconds = 0.3 if self.paths.policy.is_fifo() else PATIENCE
        self.changes.keeper.source = SourceReader(self.paths.policy, seconds=seconds, quiet=0)

    def start(self, text: str | None = None) -> None:
        if text is not None:
            self.paths.policy.write_text(text)
        self.operations.reload(START)

    def standing(self) -> dict[str, str]:
        return {alarm.alarm: alarm.text for alarm in self.changes.alarms.current()}

    def apply(self, text: str, **options: object) -> None:
        self.ask("apply", sources=[["elsewhere.yaml", text]], **options)

    def by(self) -> list[str]:
        """Return the VMs of the policy that a VM which comes now is given."""
        self.operations.links_changed({PRESENT: 1000 + len(self.host.policies)}, ())
        return self.host.policies[-1]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Restarting]:
    paths = Paths.from_environment(
        {},
        policy=tmp_path / "policy.yaml",
        log_file=tmp_path / "events.jsonl",
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
    )
    bench = Restarting(paths)
    yield bench
    if paths.policy.is_fifo():
        paths.policy.write_text("")  # readings that hang end
    bench.log.close()


def spoil(how: str, file: Path) -> None:
    file.unlink()
    if how == "invalid":
        file.write_text("schema: vgw/v1\nvms: 1\n")
    elif how == "empty":
        file.write_text("")
    elif how == "comment":
        file.write_text("# nothing yet\n")
    elif how == "partial":
        file.write_text(WEB[: len(WEB) - 9])
    elif how == "binary":
        file.write_bytes(b"\xff\xfe\x00")
    elif how == "directory":
        file.mkdir()
    elif how == "fifo":
        os.mkfifo(file)
    else:
        assert how == "missing"


@pytest.mark.parametrize(
    "how",
    ["missing", "invalid", "empty", "comment", "partial", "binary", "directory", "fifo"],
)
def test_catalogue_M8_a_start_without_a_usable_file_goes_by_the_last_good_policy(
    bench: Restarting, how: str
) -> None:
    bench.start(WEB)
    spoil(how, bench.paths.policy)
    bench.restart(forget_vms=True)
    asked = len(bench.host.asked)

    bench.start()

    assert bench.host.policies[-1] == ["web01"], "a VM that is there and not protected gets it"
    assert "what is in force stays in force" in bench.standing()["policy_unreadable"]
    assert len(bench.host.asked) == asked + 1
    bench.restart()
    bench.start()
    assert len(bench.host.asked) == asked + 1, "what is in force is left alone"
    assert bench.by() == ["web01"]


def test_catalogue_M8_what_is_wrong_is_said_once_and_over_when_the_file_is_back(
    bench: Restarting,
) -> None:
    bench.start(WEB)
    bench.paths.policy.unlink()
    bench.restart()
    bench.start()
    for _ in range(3):
        bench.operations.look_after_policy()
    events = [found["event"] for found in bench.records()]
    assert (events.count("error"), events.count("alarm")) == (1, 1)

    bench.paths.policy.write_text(policy("web01", "new"))
    bench.operations.look_after_policy()

    assert bench.standing() == {}
    assert bench.records()[-1]["event"] == "alarm_cleared"
    assert bench.by() == ["new", "web01"]


def test_catalogue_M8_a_file_with_a_mistake_is_not_taken_before_a_reload(bench: Restarting) -> None:
    """Whoever corrects it may save it several times."""
    bench.start(WEB)
    bench.paths.policy.write_text("schema: vgw/v9\n")
    bench.operations.reload()
    bench.paths.policy.write_text(DB)
    bench.operations.look_after_policy()
    assert bench.by() == ["web01"]
    bench.operations.reload()
    assert bench.host.policies[-1] == ["db01"]


def test_catalogue_M9_a_file_that_hangs_keeps_nobody_waiting(bench: Restarting) -> None:
    bench.start(WEB)
    spoil("fifo", bench.paths.policy)
    bench.restart()
    bench.operations.reload()
    assert "gave no answer within 0.3 s" in bench.standing()["policy_unreadable"]

    assert bench.by() == ["web01"]
    bench.operations.look_after_policy()
    assert bench.standing(), "it hangs on, and is not asked again"
    regular = bench.paths.policy.with_name("next.yaml")
    regular.write_text(DB)
    with bench.paths.policy.open("w"):  # what the reading waits for
        regular.rename(bench.paths.policy)
    reading = bench.changes.keeper.source._reading
    assert reading is not None
    assert reading.wait(PATIENCE)
    bench.operations.look_after_policy()

    assert bench.standing() == {}
    assert bench.by() == ["db01"]


def test_catalogue_M10_an_older_revision_in_the_file_is_not_taken(bench: Restarting) -> None:
    bench.start(WEB + "revision: 5\n")
    for text in (DB + "revision: 4\n", DB):
        bench.paths.policy.write_text(text)
        bench.operations.reload()
        assert "revision" in bench.standing()["policy_unreadable"]
        bench.restart()
        bench.start()
        assert bench.by() == ["web01"]
    bench.start(DB + "revision: 6\n")
    assert bench.by() == ["db01"]


def test_catalogue_N15_the_file_of_another_host_is_not_taken(bench: Restarting) -> None:
    bench.start(WEB)
    bench.paths.policy.write_text(DB + "host: elsewhere\n")
    bench.operations.reload()
    assert "for host elsewhere" in bench.standing()["policy_unreadable"]
    assert bench.by() == ["web01"]
    with pytest.raises(VgwError, match="for host elsewhere"):
        bench.ask("attach", vms=["db01"], sources=[["p", DB + "host: elsewhere\n"]])


def test_what_was_rolled_back_to_holds_until_the_file_changes(bench: Restarting) -> None:
    bench.start(WEB)
    bench.paths.policy.write_text(DB)
    bench.operations.reload()
    bench.ask("rollback")
    assert bench.by() == ["web01"]

    for _ in range(2):
        bench.operations.reload()
        assert bench.host.policies[-1] == ["web01"]
        bench.restart()
        bench.start()
        assert bench.by() == ["web01"]
    assert bench.ask("status")["host_policy"]["held"] is True
    bench.ask("attach", vms=["web01"], sources=[["p", DB]], own=True)
    assert bench.host.policies[-1] == ["web01"], "an attach by the file's policy is by what is held"
    bench.start(DB + "# changed\n")
    assert bench.by() == ["db01"]
    assert bench.ask("status")["host_policy"]["held"] is False


def test_what_a_vm_was_attached_by_holds_nothing(bench: Restarting) -> None:
    bench.paths.policy.write_text(WEB)
    bench.ask("attach", vms=["web01"], sources=[["p", DB]])
    for vm in ("b", "c"):
        bench.ask("attach", vms=[vm], sources=[["p", policy("b", "c")]])
    first, second = bench.changes.keeper.history.entries()
    assert (first.vms, second.vms) == (None, ("b", "c"))
    bench.start()
    assert bench.by() == ["web01"]


def test_what_was_applied_from_elsewhere_holds_over_a_restart_only(bench: Restarting) -> None:
    bench.start(WEB)
    bench.apply(DB)
    bench.restart()
    bench.start()
    assert bench.by() == ["db01"]
    bench.operations.reload()
    assert bench.by() == ["web01"]


def test_what_another_process_applied_is_taken_over(bench: Restarting) -> None:
    bench.start(WEB)
    sources = [("elsewhere.yaml", DB)]
    other = PolicyKeeper(bench.host, lambda _: None)
    other.apply(sources, parse_sources(sources), ME, ApplyOrder())
    assert bench.by() == ["db01"]
    other.rollback(None, ME)
    assert bench.by() == ["web01"]


def wait_in_vain(bench: Restarting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply a policy that nobody confirms in time, with nobody watching it but the controller."""
    monkeypatch.setattr(policy_keeper, "start_guardian", lambda *_: 0)
    bench.start(WEB)
    bench.apply(DB, confirm_seconds=3600)
    found = load_window(bench.paths)
    assert found is not None
    save_window(bench.paths, dataclasses.replace(found, deadline_ns=1))


def test_while_a_policy_waits_the_file_is_not_read(
    bench: Restarting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_keeper, "start_guardian", lambda *_: 0)
    bench.start(WEB)
    bench.apply(DB, confirm_seconds=3600)
    bench.paths.policy.write_text(policy("new"))
    bench.operations.reload()
    bench.restart()
    bench.start()
    bench.operations.look_after_policy()
    assert bench.by() == ["db01"]

    bench.ask("confirm")
    bench.operations.look_after_policy()
    assert bench.by() == ["new"], "the reload that was put off"


def test_the_controller_goes_back_by_itself(
    bench: Restarting, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_in_vain(bench, monkeypatch)
    bench.operations.look_after_policy()
    assert bench.by() == ["web01"]
    assert [each["event"] for each in bench.records()].count("rolled_back") == 1


def test_a_rollback_that_fails_for_some_vms_ends_the_wait_all_the_same(
    bench: Restarting, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_in_vain(bench, monkeypatch)
    found = load_window(bench.paths)
    assert found is not None
    save_window(bench.paths, found.beginning_now())
    bench.host.protected = {"web01": 1, "db01": 1}
    bench.host.failures = {"db01": "no memory"}
    with pytest.raises(PartlyAppliedError):
        bench.ask("rollback", number=1)
    assert bench.changes.keeper.waiting() is None
    assert load_window(bench.paths) is None
    bench.host.failures = dict.fromkeys(bench.host.protected, "no memory")
    with pytest.raises(PartlyAppliedError):
        bench.apply(policy("new"))
    bench.host.failures = {}
    assert bench.by() == ["web01"], "what no VM has is not this host's"


def test_going_back_that_fails_is_an_alarm_and_tried_again(
    bench: Restarting, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_in_vain(bench, monkeypatch)
    bench.host.failures = {"web01": "no memory"}
    bench.operations.look_after_policy()
    assert "no memory" in bench.standing()["rollback_failed"]
    bench.host.failures = {}
    bench.operations.look_after_policy()
    assert bench.standing() == {}
    entries = bench.changes.keeper.history.entries()
    assert [each.event for each in entries] == ["start", "apply", "rollback"]


def test_catalogue_M11_a_vm_that_is_not_in_the_policy_is_an_alarm(
    bench: Restarting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(is_kept: bool) -> Callable[..., Any]:
        result = AttachResult("web01", [PRESENT], 1, False, False, 0.0, kept=is_kept)
        return lambda *_, **__: ApplyResult([result])

    bench.start(WEB)
    bench.host.protected = {"web01": 1}
    monkeypatch.setattr(bench.host, "attach_many", kept(True))
    bench.start(DB)
    (alarm,) = bench.changes.alarms.current()
    assert (alarm.alarm, alarm.vm) == ("vm_not_in_policy", "web01")
    monkeypatch.setattr(bench.host, "apply", kept(False))
    bench.apply(WEB)
    assert bench.standing() == {}
    monkeypatch.setattr(bench.host, "apply", kept(True))
    bench.apply(DB)
    assert set(bench.standing()) == {"vm_not_in_policy"}


def test_a_history_that_cannot_be_written_keeps_no_vm_from_being_protected(
    bench: Restarting,
) -> None:
    bench.paths.state_dir.write_text("")
    bench.start(WEB)
    assert bench.host.asked == [["web01"]]
    with pytest.raises(VgwError, match="cannot write"):
        bench.apply(DB)


def test_a_problem_is_one_line() -> None:
    with pytest.raises(VgwError) as caught:
        parse_sources([("p", "schema: vgw/v1\nvms: 1\ngroups: 2\n")])
    assert host_policy._on_one_line(caught.value) == (
        "p:2:6: vms: a mapping is expected here, not '1'; and 1 more; see `vgw check`"
    )
