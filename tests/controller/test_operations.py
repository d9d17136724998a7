# SPDX-License-Identifier: Apache-2.0
"""What the controller does when things fail: what it keeps, says once, and tries again."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vgw.controller.alarms import Alarms
from vgw.controller.changes import Changes
from vgw.controller.events import LogWriter, read_log
from vgw.controller.metrics import ApplyTimes
from vgw.controller.operations import Operations
from vgw.controller.parameters import Parameters
from vgw.controller.paths import Paths
from vgw.controller.reconcile import ApplyResult, AttachResult, Host, Upgrades
from vgw.controller.renames import Renamed
from vgw.controller.upgrade import Upgraded
from vgw.controller.verbs import Verbs
from vgw.errors import PartlyAppliedError, PolicyError, VgwError
from vgw.policy.model import PolicyDocument

#: The loopback interface stands for one that exists; nothing is attached to it here.
PRESENT = "lo"


def policy(*vms: str) -> str:
    """Return a policy that names VMs; the first has the interface that exists."""
    named = "".join(
        f"  {vm}: {{interfaces: [{{name: {f'tap{n}' if n else PRESENT}}}]}}\n"
        for n, vm in enumerate(vms)
    )
    return f"schema: vgw/v1\nvms:\n{named}"


class FakeHost(Host):
    """Attaches nothing, fails where a test wants it to, and remembers what it was asked."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.asked: list[list[str]] = []
        self.failures: dict[str, str] = {}
        self.sweep_error: VgwError | None = None
        self.gone: list[tuple[str, str]] = []
        self.expired = 0
        self.expiry_error: VgwError | None = None
        self.protected: dict[str, int] = {}
        self.ordered: dict[str, str] = {}
        self.renamed: list[Renamed] = []
        self.upgrades = Upgrades()

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ordered_interfaces(self) -> dict[str, str]:
        return self.ordered

    def attached(self) -> list[str]:
        return sorted(self.protected)

    def attach_many(
        self,
        document: PolicyDocument,  # noqa: ARG002
        vms: Sequence[str] | None = None,
        *,
        force: bool = False,  # noqa: ARG002
    ) -> ApplyResult:
        return self._change(vms or ())

    def apply(
        self,
        document: PolicyDocument,  # noqa: ARG002
        vms: Sequence[str] | None = None,
        *,
        dry_run: bool = False,  # noqa: ARG002
    ) -> ApplyResult:
        return self._change(self.attached() if vms is None else vms)

    def status(self, vm: str | None = None) -> dict[str, Any]:
        return {"vms": [{"vm": name} for name in self.protected if vm in (None, name)]}

    def follow_renames(self) -> list[Renamed]:
        renamed, self.renamed = self.renamed, []
        return renamed

    def detach(self, vm: str) -> None:
        del self.protected[vm]

    def expire(self, vm: str | None = None) -> int:  # noqa: ARG002
        self.expired += 1
        if self.expiry_error is not None:
            raise self.expiry_error
        return 0

    def sweep(
        self, tell: Callable[[str, str], object] = lambda _vm, _interface: None
    ) -> list[tuple[str, str]]:
        gone, self.gone = self.gone, []
        for each in gone:
            tell(*each)
        if self.sweep_error is not None:
            raise self.sweep_error
        return gone

    def upgrade(self) -> Upgrades:
        return self.upgrades

    def _change(self, vms: Sequence[str]) -> ApplyResult:
        self.asked.append(list(vms))
        failed = {vm: self.failures[vm] for vm in vms if vm in self.failures}
        results = []
        for vm in vms:
            if vm not in failed:
                changed = vm not in self.protected
                self.protected.setdefault(vm, 1)
                results.append(AttachResult(vm, [PRESENT], 1, changed, False, 0.002))
        if len(failed) == 1 and not results:
            raise VgwError(next(iter(failed.values())))
        if failed:
            raise PartlyAppliedError(failed, [asdict(each) for each in results])
        return ApplyResult(results)


class Bench:
    """Operations on a fake host, and what they wrote."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.host = FakeHost(paths)
        self.log = LogWriter(paths.log_file)
        self.alarms = Alarms(self.log)
        self.changes = Changes(self.host, self.log, ApplyTimes(), self.alarms)
        self.operations = Operations(self.changes)

    def reload(self, text: str) -> None:
        self.paths.policy.write_text(text)
        self.operations.reload()

    def ask(self, verb: str, **parameters: object) -> Any:
        return Verbs(self.changes).by_name()[verb](Parameters(parameters))

    def records(self) -> list[dict[str, Any]]:
        self.log.flush()
        dull = ("ts", "duration_ms")
        return [
            {key: value for key, value in found.items() if key not in dull}
            for found in read_log(self.paths.log_file)
        ]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    paths = Paths.from_environment(
        {},
        policy=tmp_path / "policy.yaml",
        log_file=tmp_path / "events.jsonl",
        state_dir=tmp_path / "state",
    )
    bench = Bench(paths)
    yield bench
    bench.log.close()


def attached(vm: str) -> dict[str, Any]:
    return {"event": "attach", "vm": vm, "interface": PRESENT, "generation": 1}


def test_only_vms_whose_interface_exists_are_attached(bench: Bench) -> None:
    bench.reload(policy("web01", "db01"))

    assert bench.host.asked == [["web01"]]
    assert bench.records() == [attached("web01")]


def test_upgrades_are_logged_and_what_is_not_upgraded_is_said(bench: Bench) -> None:
    done = Upgraded("web01", PRESENT, "old", "new")
    bench.host.upgrades = Upgrades([done], {"db01": "it goes on as it was"})
    bench.reload(policy())

    upgrade, error = bench.records()[:2]
    assert upgrade == {
        "event": "upgrade",
        "vm": "web01",
        "interface": PRESENT,
        "before": "old",
        "after": "new",
    }
    assert error == {"event": "error", "vm": "db01", "message": "it goes on as it was"}


def test_failure_is_said_once_and_tried_again_until_it_works(bench: Bench) -> None:
    bench.host.failures = {"web01": "no memory"}
    bench.reload(policy("web01"))
    bench.operations.idle()
    assert bench.records() == [{"event": "error", "vm": "web01", "message": "no memory"}]

    bench.host.failures = {"web01": "other reason"}
    bench.operations.idle()
    bench.host.failures = {}
    bench.operations.idle()
    bench.operations.idle()

    assert bench.host.asked == [["web01"]] * 4
    assert bench.records()[1:] == [
        {"event": "error", "vm": "web01", "message": "other reason"},
        attached("web01"),
    ]


def test_one_vm_that_fails_keeps_no_other_from_being_logged(bench: Bench) -> None:
    bench.host.protected = {"old": 1}
    bench.host.failures = {"old": "no memory"}
    bench.reload(policy("web01"))

    assert bench.host.asked == [["old", "web01"]]
    assert bench.records() == [
        attached("web01"),
        {"event": "error", "vm": "old", "message": "no memory"},
    ]


def test_bad_policy_keeps_the_good_one(bench: Bench) -> None:
    bench.reload(policy("web01"))
    bench.reload("schema: vgw/v9\n")
    bench.operations.links_changed({PRESENT: 77}, ())

    assert bench.host.asked == [["web01"], ["web01"]]
    assert [found["event"] for found in bench.records()] == ["attach", "error", "alarm"]


def test_interface_that_is_protected_already_costs_nothing(bench: Bench) -> None:
    bench.reload(policy("web01"))
    index = socket.if_nametoindex(PRESENT)

    bench.operations.links_changed({PRESENT: index, "eth7": 7}, ())
    assert len(bench.host.asked) == 1
    bench.operations.links_changed({PRESENT: index}, [PRESENT])
    assert len(bench.host.asked) == 2


def test_endpoints_of_gone_interfaces_are_forgotten_if_need_be_later(bench: Bench) -> None:
    bench.host.sweep_error = VgwError("process 7 is changing vgw's endpoints")
    bench.operations.links_changed({}, ["tap0"])
    bench.operations.idle()
    bench.host.gone = [("web01", "tap0")]
    bench.host.sweep_error = None
    bench.operations.idle()
    bench.operations.idle()

    assert bench.records() == [
        {"event": "error", "message": "process 7 is changing vgw's endpoints"},
        {"event": "detach", "vm": "web01", "interface": "tap0"},
    ]


def test_those_that_were_forgotten_before_it_failed_are_in_the_log(bench: Bench) -> None:
    bench.host.gone = [("web01", "tap0")]
    bench.host.sweep_error = VgwError("failed for 1 VM(s): web02: no")
    bench.operations.links_changed({}, ["tap0", "tap1"])

    assert bench.records() == [
        {"event": "detach", "vm": "web01", "interface": "tap0"},
        {"event": "error", "message": "failed for 1 VM(s): web02: no"},
    ]


def test_partly_applied_policy_is_the_current_one(bench: Bench) -> None:
    bench.host.protected = {"old": 1, "web01": 1}
    bench.host.failures = {"old": "does not fit"}

    with pytest.raises(PartlyAppliedError):
        bench.ask("apply", sources=[["p.yaml", policy("web01")]])
    bench.operations.links_changed({PRESENT: 77}, ())

    assert bench.host.asked == [["old", "web01"], ["web01"]]
    assert bench.records() == [{"event": "error", "vm": "old", "message": "does not fit"}]


def test_what_a_verb_did_before_it_failed_is_logged(bench: Bench) -> None:
    bench.host.failures = {"db01": "does not fit"}

    with pytest.raises(PartlyAppliedError) as caught:
        bench.ask("attach", vms=["db01", "web01"])

    assert [each["vm"] for each in caught.value.done] == ["web01"]
    assert bench.records() == [
        attached("web01"),
        {"event": "error", "vm": "db01", "message": "does not fit"},
    ]


def test_ordered_interface_that_comes_back_is_protected_with_or_without_a_policy(
    bench: Bench,
) -> None:
    bench.host.ordered = {PRESENT: "guest"}
    bench.operations.links_changed({PRESENT: 77}, ())
    assert bench.host.asked == [["guest"]]

    bench.operations.links_changed({PRESENT: 78}, ())
    assert len(bench.host.asked) == 1  # no policy is no reason to change what is in force
    bench.reload("schema: vgw/v1\n")
    bench.operations.links_changed({PRESENT: 79}, ())
    assert bench.host.asked == [["guest"]] * 3
    bench.reload(policy("web01"))
    assert bench.host.asked[-1] == ["guest", "web01"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_policy_that_was_not_applied_is_not_the_current_one(bench: Bench, dry_run: bool) -> None:
    bench.host.protected = {"old": 1}
    if dry_run:
        bench.host.protected = {"old": 1, "web01": 1}
        bench.host.failures = {"old": "does not fit"}
        with pytest.raises(PartlyAppliedError):
            bench.ask("apply", sources=[["p.yaml", policy("web01")]], dry_run=True)
    else:
        with pytest.raises(PolicyError):
            bench.ask("apply", sources=[["p.yaml", "schema: vgw/v9"]])
    before = list(bench.host.asked)
    bench.operations.links_changed({PRESENT: 77}, ())

    assert bench.host.asked == before
    assert bench.records() == []


def test_nothing_is_changed_any_more_when_the_end_is_near(bench: Bench) -> None:
    bench.changes.finish()
    with pytest.raises(VgwError, match="stopping"):
        bench.ask("attach", vm="web01")


@pytest.mark.parametrize(
    ("verb", "parameters", "message"),
    [
        ("attach", {}, "has no vm"),
        ("attach", {"vm": 7}, "vm in the request is not a text"),
        ("attach", {"vm": "a", "hook": "nfqueue"}, "'nfqueue' in the request is none of auto, xdp"),
        ("attach", {"vm": "a", "interfaces": "tap0"}, "interfaces in the request is not a list"),
        ("attach", {"vm": "a", "force": "yes"}, "force in the request is neither true nor false"),
        ("attach", {"vms": ["a", 1]}, "vms in the request is not a list of texts"),
        ("attach", {"vm": "a", "sources": [["p"]]}, r"sources .* not a list of \[name, text\]"),
        ("apply", {}, "has no sources"),
        ("apply", {"sources": "schema: vgw/v1"}, r"sources .* not a list of \[name, text\]"),
        ("detach", {}, "has no vm"),
        ("rules", {}, "has no vm"),
        ("conntrack", {}, "has no vm"),
        ("flush", {}, "has no vm"),
        ("mode", {"vm": "a"}, "has no mode"),
        ("mode", {"vm": "a", "mode": "off"}, "'off' in the request is none of enforce"),
        ("status", {"vm": []}, "vm in the request is not a text"),
    ],
)
def test_parameters_are_checked(
    bench: Bench, verb: str, parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(VgwError, match=message):
        bench.ask(verb, **parameters)
    assert bench.host.asked == []


def test_idle_frees_dead_flows_and_a_failure_of_that_stops_nothing(bench: Bench) -> None:
    bench.reload(policy("web01"))
    bench.host.expiry_error = VgwError("no memory")
    bench.host.failures = {"web01": "busy"}
    bench.reload(policy("web01"))
    bench.host.failures = {}

    bench.operations.idle()

    assert bench.host.expired == 1
    assert bench.host.asked[-1] == ["web01"]


def test_status_has_the_alarms_until_the_vm_is_detached(bench: Bench) -> None:
    bench.reload(policy("web01"))
    bench.alarms.set("renamed", "why", vm="web01", interface=PRESENT)
    bench.alarms.set("slow", "why")

    def shown(**parameters: object) -> list[tuple[str, str | None]]:
        answer = bench.ask("status", **parameters)
        return [(alarm["alarm"], alarm["vm"]) for alarm in answer["alarms"]]

    assert shown() == [("renamed", "web01"), ("slow", None)]
    assert shown(vm="web01") == [("renamed", "web01")]
    bench.ask("detach", vm="web01")
    assert shown() == [("slow", None)]
