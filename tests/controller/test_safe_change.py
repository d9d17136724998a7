# SPDX-License-Identifier: Apache-2.0
"""Policies that are applied, remembered and gone back to, on real endpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.observe import lets_in, received, row, send_to_vm
from tests.controller.policies import interface, to_vm
from vgw.controller import admission
from vgw.controller.actor import Actor
from vgw.controller.batch import ApplyResult
from vgw.controller.history import Entry
from vgw.controller.paths import Paths
from vgw.controller.policy_keeper import ApplyOrder, PolicyKeeper
from vgw.controller.reconcile import Host
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy import compile as compiler
from vgw.policy.parse import parse_sources

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
WHO = Actor(0, "root", "cli", "here", 7, "vgw")


def text(port: int, vms: str | None = None, *, head: str = "", rest: str = "") -> str:
    """Return a policy that lets a TCP port in, by default to web01 on tap0."""
    named = f"  web01: {interface('tap0')}" if vms is None else vms
    return f"""schema: vgw/v1
{head}
vms:
{named or "  {}"}
policies:
  - name: base
    tier: vm
    applies_to: {{all: true}}
    ingress: [{{name: in, action: accept, services: [tcp/{port}]}}]
{rest}
"""


class Bench:
    """A keeper on a real host, with VM web01 on tap0."""

    def __init__(self, host: Host, paths: Paths, vm: int) -> None:
        self.host = host
        self.paths = paths
        self.vm = vm
        self.records: list[dict[str, Any]] = []
        self.keeper = PolicyKeeper(host, self.records.append)

    def attach(self, policy: str, vm: str = "web01") -> None:
        sources = [("policy.yaml", policy)]
        document = parse_sources(sources)
        self.keeper.record_attach(
            sources,
            document,
            WHO,
            [vm],
            lambda: ApplyResult([self.host.attach(document, vm)]),
        )

    def apply(self, policy: str, **order: Any) -> ApplyResult:
        sources = [("policy.yaml", policy)]
        return self.keeper.apply(sources, parse_sources(sources), WHO, ApplyOrder(**order))

    def entries(self) -> list[Entry]:
        return self.keeper.history.entries()

    def lets_in(self, port: int) -> bool:
        """Tell whether a new connection to a port of web01 gets in."""
        return lets_in(self.vm, port)


@pytest.fixture
def bench(host: Host, paths: Paths, tap: Tap) -> Bench:
    return Bench(host, paths, tap("tap0"))


def test_each_policy_is_remembered_with_what_became_of_it(bench: Bench) -> None:
    bench.attach(text(80))
    bench.apply(text(443))
    bench.apply(text(443))
    bench.paths.policy.write_text(text(22))
    bench.keeper.rollback(None, WHO)

    first, second, third = bench.entries()
    assert [each.event for each in (first, second, third)] == ["attach", "apply", "rollback"]
    assert [each.number for each in (first, second, third)] == [1, 2, 3], "nothing new, no entry"
    assert second.who == WHO
    assert second.outcome is not None
    assert (second.outcome.changed, second.outcome.vms) == (1, ("web01",))
    assert (third.back, third.digest) == (1, first.digest)
    assert third.is_held
    assert bench.lets_in(80)
    assert not bench.lets_in(443)
    assert bench.records[-1]["event"] == "rolled_back"


def test_rollback_to_a_number_and_to_what_is_not_there(bench: Bench) -> None:
    for port in (80, 443, 22):
        bench.attach(text(port))
        bench.apply(text(port))
    bench.keeper.rollback(2, WHO)
    assert bench.lets_in(443)
    bench.keeper.rollback(3, WHO)
    assert bench.lets_in(22)

    with pytest.raises(VgwError, match="policy 99 is not kept"):
        bench.keeper.rollback(99, WHO)
    for file in bench.paths.state_dir.glob("history/texts/*.json"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(VgwError, match="texts of policy 1 are lost or damaged"):
        bench.keeper.rollback(1, WHO)
    assert bench.lets_in(22)
    assert len(bench.entries()) == 5


def too_many_rules(vm: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a policy of more rules for one VM than fit."""
    monkeypatch.setattr(compiler, "MAX_RULES", 100)
    many = ", ".join(f"{{name: r{n}, action: accept, services: [tcp/{n}]}}" for n in range(1, 102))
    return f"""  - name: more
    tier: vm
    applies_to: {{vms: [{vm}]}}
    ingress: [{many}]"""


def test_a_policy_that_changes_nothing_anywhere_is_not_remembered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.attach(text(80))

    with pytest.raises(VgwError, match="the limit is 100"):
        bench.apply(text(443, rest=too_many_rules("web01", monkeypatch)))

    assert [each.event for each in bench.entries()] == ["attach"]
    assert bench.lets_in(80)
    bench.apply(text(443))
    assert [each.number for each in bench.entries()] == [1, 2]


def test_catalogue_M7_one_bad_policy_of_a_hundred_holds_no_other_back(
    bench: Bench, veth: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        veth(f"v{number}")
    names = [f"v{number}{end}" for number in range(50) for end in ("", "-p")]
    vms = "\n".join(f"  vm-{name}: {{interfaces: [{{name: {name}}}]}}" for name in names)
    bench.host.attach_many(parse_sources([("policy.yaml", text(80, vms))]))

    with pytest.raises(PartlyAppliedError) as caught:
        bench.apply(text(443, vms, rest=too_many_rules("vm-v7", monkeypatch)))

    assert set(caught.value.failures) == {"vm-v7"}
    assert len([each for each in caught.value.done if each["changed"]]) == 99
    generations = {vm["vm"]: vm["generation"] for vm in bench.host.status()["vms"]}
    assert generations.pop("vm-v7") == 1
    assert set(generations.values()) == {2}
    (entry,) = bench.entries()
    assert entry.outcome is not None
    assert (entry.outcome.changed, entry.outcome.failed) == (99, 1)


def test_catalogue_M11_a_vm_that_vanishes_from_the_policy_keeps_its_own(
    bench: Bench, tap: Tap
) -> None:
    tap("tap1")
    both = f"  web01: {interface('tap0')}\n  db01: {{interfaces: [{{name: tap1}}]}}"
    bench.attach(text(80, both))
    bench.attach(text(80, both), "db01")

    result = bench.apply(text(443, "  db01: {interfaces: [{name: tap1}]}"))

    outcome = {each.vm: (each.changed, each.kept) for each in result.vms}
    assert outcome == {"web01": (False, True), "db01": (True, False)}
    assert bench.lets_in(80)
    assert not bench.lets_in(443)
    kept = bench.entries()[-1].outcome
    assert kept is not None
    assert kept.kept == ("web01",)
    assert bench.host.ordered_interfaces() == {"tap0": "web01"}, "its interface is remembered"


def test_catalogue_M11_what_is_kept_is_repaired_and_comes_back(bench: Bench, tap: Tap) -> None:
    bench.attach(text(80))
    bench.apply(text(443, ""))
    bench.apply(text(22, ""))
    pins = bench.paths.endpoint_dir("web01", "tap0")
    (pins / "prog_to_vm").unlink()
    assert not row(bench.host)["attached"]
    bench.apply(text(23, ""))
    assert row(bench.host)["attached"]
    assert bench.lets_in(80)

    run("ip", "link", "delete", "tap0")
    bench.host.sweep()
    assert bench.host.attached() == []
    bench.vm = tap("tap0")
    bench.host.attach_many(parse_sources([("p", text(24, ""))]), ["web01"])
    assert bench.lets_in(80)
    assert not bench.lets_in(24)


def test_catalogue_M11_one_that_no_policy_had_gets_the_defaults(bench: Bench) -> None:
    document = parse_sources([("p", text(80, ""))])
    bench.host.attach(document, "guest", interfaces=["tap0"])
    (result,) = bench.apply(text(443, "")).vms
    assert (result.kept, result.named) == (False, False)
    frame = to_vm(dport=443)
    send_to_vm("tap0", frame)
    assert received(bench.vm, frame), "the policy for all VMs is its own, too"


def test_catalogue_M11_detach_ends_it(bench: Bench) -> None:
    bench.attach(text(80))
    bench.apply(text(443, ""))
    bench.host.detach("web01")
    assert not bench.paths.manifest("web01").exists()
    assert bench.apply(text(22, "")).vms == []


def test_catalogue_M10_an_older_revision_needs_force_or_rollback(bench: Bench) -> None:
    bench.attach(text(80, head="revision: 7"))
    for head, said in (("revision: 6", "is revision 6 and 7"), ("", "has no `revision` and")):
        with pytest.raises(VgwError, match=said):
            bench.apply(text(443, head=head))
    assert bench.lets_in(80)
    bench.apply(text(443, head="revision: 7"))
    bench.apply(text(22, head="revision: 8"))
    bench.keeper.rollback(1, WHO)
    assert bench.lets_in(80)
    bench.apply(text(443, head="revision: 3"), force=True)
    assert bench.lets_in(443)
    assert bench.entries()[-1].revision == 3


@pytest.mark.parametrize(
    ("head", "is_taken"),
    [
        ("host: here", True),
        ("host: HERE.example.org", True),
        ("host: [other, here]", True),
        ("host: other", False),
        ("host: here.example.com", False),
        ("host: example", False),
    ],
)
def test_catalogue_N15_a_policy_for_another_host_is_refused(
    head: str, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission.socket, "gethostname", lambda: "here.example.org")  # type: ignore[attr-defined]
    document = parse_sources([("p", text(80, head=head))])
    if is_taken:
        admission.require_admission(document, None)
    else:
        with pytest.raises(admission.NotAdmittedError, match="is for host"):
            admission.require_admission(document, None)


def test_catalogue_N15_refused_means_that_nothing_is_changed(bench: Bench) -> None:
    bench.attach(text(80))
    with pytest.raises(VgwError, match="for host elsewhere"):
        bench.apply(text(443, head="host: elsewhere"))
    with pytest.raises(VgwError, match="for host elsewhere"):
        bench.keeper.admit(parse_sources([("p", text(443, head="host: elsewhere"))]))
    assert bench.lets_in(80)
    assert len(bench.entries()) == 1
    bench.apply(text(443, head="host: elsewhere"), force=True)
    assert bench.lets_in(443)


def test_what_cannot_be_remembered_is_not_applied(bench: Bench, tmp_path: Path) -> None:
    bench.attach(text(80))
    texts = tmp_path / "state" / "history" / "texts"
    for file in texts.iterdir():
        file.unlink()
    texts.rmdir()
    texts.write_text("")
    with pytest.raises(VgwError, match="cannot write"):
        bench.apply(text(443))
    assert bench.lets_in(80)
