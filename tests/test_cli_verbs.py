# SPDX-License-Identifier: Apache-2.0
"""The verbs, one by one, on a pretended host: what they ask for and what they print."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.cli_fakes import FLOWS, POLICY, RULES, STATUS, TEN_MISTAKES, VMS, FakeTarget, result
from vgw import abi, cli_options
from vgw.cli import cli
from vgw.cli_target import AttachOrder
from vgw.controller import interfaces, inventory
from vgw.errors import PartlyAppliedError
from vgw.policy.compile import PolicyImage
from vgw.policy.model import EffectivePolicy, PolicyDocument
from vgw.policy.quotas import PolicyTooLargeError


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> FakeTarget:
    fake = FakeTarget()
    monkeypatch.setattr(cli_options, "connect", lambda *_: fake)
    return fake


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A policy that is the one of the host; nothing of vgw may lie beside it afterwards."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    monkeypatch.setenv("VGW_POLICY", str(path))
    for variable in ("VGW_RUN_DIR", "VGW_STATE_DIR", "VGW_BPFFS", "VGW_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    yield path
    assert not list(tmp_path.glob("vgw_*"))


def vgw(arguments: str, *more: str) -> Result:
    """Run a command line, which is to succeed unless the caller looks at its exit code."""
    return CliRunner().invoke(cli, [*arguments.split(), *more])


def document(outcome: Result) -> dict[str, Any]:
    """Return the one JSON document that a verb printed."""
    assert outcome.exit_code == 0, outcome.stderr
    parsed = json.loads(outcome.stdout)
    assert parsed["schema"] == "vgw/v1"
    assert next(iter(parsed)) == "schema"
    return dict(parsed)


def rows(outcome: Result) -> list[dict[str, Any]]:
    """Return the JSON lines that a verb printed."""
    assert outcome.exit_code == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def order_of(target: FakeTarget) -> AttachOrder:
    [(verb, order)] = target.asked
    assert verb == "attach"
    assert isinstance(order, AttachOrder)
    return order


def test_attach_sends_the_texts_of_the_policy(target: FakeTarget, policy: Path) -> None:
    outcome = vgw("attach --vm web01 --hook tc --force")
    assert outcome.stdout.split("\n")[1].split() == ["web01", "protected", "tap-web01", "2"]
    expected = AttachOrder(["web01"], [(str(policy), POLICY)], (), "tc", force=True, own=True)
    assert order_of(target) == expected


def test_attach_all_is_every_vm_of_the_policy(target: FakeTarget, policy: Path) -> None:
    assert [row["vm"] for row in document(vgw("attach --all -o json"))["vms"]] == ["web01", "db01"]
    assert order_of(target).vms == ["web01", "db01"]
    assert order_of(target).sources == [(str(policy), POLICY)]


def test_attach_parses_the_policy_once_however_much_it_asks_of_it(
    target: FakeTarget, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work gets what was parsed."""
    parsed: list[PolicyDocument] = []
    waited: list[Sequence[str]] = []
    real = inventory.read_document

    def read_document(*arguments: Any) -> PolicyDocument:
        parsed.append(real(*arguments))
        return parsed[-1]

    monkeypatch.setattr(inventory, "read_document", read_document)

    def wait_for(names: Sequence[str], _: float) -> list[str]:
        waited.append(names)
        return []

    monkeypatch.setattr(interfaces, "wait_for", wait_for)
    assert vgw("attach --all --wait 5").exit_code == 0
    assert waited == [["tap-web01", "tap-db01"]]
    assert order_of(target).sources == [(str(policy), POLICY)]
    assert [order_of(target).document] == parsed


def test_attach_takes_a_vm_once(target: FakeTarget, policy: Path) -> None:
    other = policy.with_name("other.yaml")
    other.write_text(POLICY + "defaults: {ingress: accept}\n")
    vgw(f"attach --vm b --vm a --vm b --policy {other}")
    assert order_of(target).vms == ["b", "a"]
    assert order_of(target).sources == [(str(other), other.read_text())]


@pytest.mark.usefixtures("policy")
def test_a_vm_without_policy_can_be_attached_by_interface(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGW_POLICY", "/nowhere/policy.d")
    outcome = vgw("attach --vm new --interface tap7 --interface tap8")
    assert outcome.exit_code == 0
    assert outcome.stderr.startswith("warning: there is no policy /nowhere/policy.d")
    assert order_of(target) == AttachOrder(["new"], None, ("tap7", "tap8"), own=True)


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize(
    "arguments",
    [
        "attach --vm new",
        "attach --vm new --interface tap7 --policy /nowhere/policy.d",
        "--policy /nowhere/policy.d attach --vm new --interface tap7",
        "apply",
        "check",
        "compile --vm web01",
    ],
)
def test_a_policy_that_is_missing_is_said(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setenv("VGW_POLICY", "/nowhere/policy.d")
    outcome = vgw(arguments)
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("vgw: policy /nowhere/policy.d cannot be read")
    assert outcome.stderr.count("\n") == 1
    assert target.asked == []


@pytest.mark.parametrize("verb", ["attach --all --policy", "apply --dry-run", "check"])
def test_ten_mistakes_are_ten_lines_and_change_nothing(
    target: FakeTarget, policy: Path, verb: str
) -> None:
    policy.write_text(TEN_MISTAKES)
    outcome = vgw(verb, str(policy))
    assert outcome.exit_code == 3
    assert outcome.stdout == ""
    *problems, last = outcome.stderr.splitlines()
    assert last == "vgw: 10 problems in the policy, nothing was changed"
    lines = [int(problem.removeprefix(f"{policy}:").split(":")[0]) for problem in problems]
    assert lines == [4, 6, 6, 6, 8, 11, 14, 15, 16, 17]
    assert target.asked == []


def test_check_lists_problems_as_json(policy: Path) -> None:
    policy.write_text(TEN_MISTAKES)
    outcome = vgw("check -o json", str(policy))
    assert outcome.exit_code == 3
    found = json.loads(outcome.stdout)
    assert (found["schema"], found["valid"], found["warnings"]) == ("vgw/v1", False, [])
    assert len(found["problems"]) == 10
    first = found["problems"][0]
    assert (first["file"], first["line"], first["column"]) == (str(policy), 4, 11)
    assert first["path"] == "vms.web01.mode"
    lines = vgw("check -o jsonl", str(policy)).stdout.splitlines()
    assert [json.loads(line)["severity"] for line in lines] == ["problem"] * 10


def test_check_of_a_valid_policy_warns(policy: Path) -> None:
    outcome = vgw("check")
    assert outcome.exit_code == 0
    assert outcome.stdout == f"{policy}: valid: 2 VMs, 1 policy, 3 rules\n"
    warnings = outcome.stderr.splitlines()
    assert warnings
    assert all(line.startswith(f"warning: {policy}:6:") for line in warnings)
    found = document(vgw("check -o json"))
    assert (found["valid"], found["problems"]) == (True, [])
    assert len(found["warnings"]) == len(warnings)


def test_check_warns_of_a_rule_that_never_matches(policy: Path) -> None:
    rules = "[{name: a, action: drop}, {name: b, action: accept}]"
    policy.write_text(
        "schema: vgw/v1\npolicies:\n"
        f"  - {{name: p, tier: vm, applies_to: {{all: true}}, ingress: {rules}}}\n"
    )
    outcome = vgw("check")
    assert outcome.exit_code == 0
    assert outcome.stderr == (
        f"warning: {policy}:3:85: policies[0].ingress[1]: rule 'b' of policy 'p' (ingress) never "
        f"matches: 'a' of policy 'p' at {policy}:3 covers it\n"
    )


def test_check_fails_for_vms_whose_rules_do_not_fit(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(effective: EffectivePolicy, **_: object) -> dict[abi.Path, PolicyImage]:
        if effective.vm == "db01":
            raise PolicyTooLargeError("VM db01, ingress: too many rules")
        return {}

    monkeypatch.setattr("vgw.policy.compile.compile_policy", refuse)
    outcome = vgw("check")
    assert outcome.exit_code == 3
    assert outcome.stderr == (
        f"{policy}: vms.db01: VM db01, ingress: too many rules\n"
        "vgw: 1 problem in the policy, nothing was changed\n"
    )


def test_compile_shows_rules_with_their_origin(policy: Path) -> None:
    found = document(vgw("compile --vm web01 -o json"))
    assert (found["vm"], found["defaults"]) == ("web01", {"ingress": "drop", "egress": "accept"})
    assert found["image_bytes"] > 0
    assert [(row["direction"], row["number"], row["rule"]) for row in found["rules"]] == [
        ("ingress", 1, "site"),
        ("ingress", 2, "ops"),
        ("egress", 1, "gre"),
    ]
    assert found["rules"][1] == {
        "number": 2,
        "direction": "ingress",
        "tier": "group",
        "policy": "tier",
        "rule": "ops",
        "action": "reject",
        "peers": ["192.0.2.0/24"],
        "local": ["10.20.0.11/32"],
        "services": ["tcp/22"],
        "source_ports": ["1024-65535"],
        "log": True,
        "comment": "ticket 1",
        "file": str(policy),
        "line": 15,
    }
    assert found["rules"][0]["services"] == ["tcp/80", "tcp/8000-8099", "icmp/8"]


def test_compile_as_a_table_is_short(policy: Path) -> None:
    lines = vgw("compile --vm web01").stdout.splitlines()
    assert "192.0.2.0/24 (local 10.20.0.11)   " in lines[2]
    assert "  tcp/22 from 1024-65535   " in lines[2]
    assert lines[2].endswith(f"{policy}:15")
    assert "10.20.0.2/31, 10.20.0.4, 10.20.0.9" in lines[3]
    assert lines[-1] == "then: ingress drop, egress accept"
    outcome = vgw("compile --vm web02")
    assert outcome.exit_code == 1
    assert outcome.stderr.endswith("does not name VM web02; it names db01, web01\n")


def test_apply_says_what_became_of_each_vm(target: FakeTarget, policy: Path) -> None:
    outcome = vgw("apply")
    assert [line.split()[1] for line in outcome.stdout.splitlines()[1:]] == [
        *("protected", "unchanged")
    ]
    assert outcome.stderr.startswith("warning: web01: tap-new does not exist (yet)")
    assert target.asked == [("apply", [(str(policy), POLICY)])]
    assert document(vgw("apply -o json"))["waiting"] == {"web01": ["tap-new"]}


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("verb", ["attach --all", "apply"])
def test_what_was_done_is_shown_although_some_failed(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise PartlyAppliedError({"db01": "no room"}, [result("web01")])

    monkeypatch.setattr(target, verb.split(maxsplit=1)[0], fail)
    outcome = vgw(verb)
    assert outcome.exit_code == 5
    assert outcome.stdout.splitlines()[1].split() == ["web01", "protected", "tap-web01", "2"]
    assert outcome.stderr == "vgw: failed for 1 VM(s): db01: no room\n"
    outcome = vgw(f"{verb} -o json")
    assert outcome.exit_code == 5
    found = json.loads(outcome.stdout)
    assert (found["vms"], found["failures"]) == ([result("web01")], {"db01": "no room"})


def test_detach_shows_what_was_done_although_some_failed(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[str]:
        raise PartlyAppliedError({"db01": "its tables are unknown"}, [{"vm": "web01"}])

    monkeypatch.setattr(target, "detach_all", fail)
    outcome = vgw("detach --all")
    assert outcome.exit_code == 5
    assert outcome.stdout.splitlines()[1].split() == ["web01", "no", "longer", "protected"]
    assert outcome.stderr == "vgw: failed for 1 VM(s): db01: its tables are unknown\n"
    found = json.loads(vgw("detach --all -o json").stdout)
    assert found["detached"] == [{"vm": "web01"}]
    assert found["failures"] == {"db01": "its tables are unknown"}


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("verb", ["attach --all", "apply"])
def test_what_a_vm_lacks_is_said(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    answer = {
        "vms": [
            result("web01", interfaces=[]),
            result("lost", kept=True),
            result("old", named=False, pending=["conntrack_max 9 takes effect later"]),
        ],
        "waiting": {"web01": ["tap-web01"], "old": ["tap-x"]},
    }
    monkeypatch.setattr(target, verb.split(maxsplit=1)[0], lambda *_: answer)
    outcome = vgw(verb)
    assert outcome.stdout.splitlines()[1].split() == ["web01", "NOT", "protected", "-", "2"]
    absent = "does not exist (yet) and is not protected"
    assert outcome.stderr.splitlines() == [
        "warning: lost: not in this policy any more: it keeps its last one; `vgw detach` ends that",
        "warning: old: not named by this policy: it gets the defaults",
        "warning: old: conntrack_max 9 takes effect later",
        f"warning: web01: tap-web01 {absent}; a running controller protects it when it appears",
        f"warning: old: tap-x {absent}; attach the VM again when it does",
    ]


@pytest.mark.parametrize(
    ("arguments", "asked", "said"),
    [
        ("detach --vm web01", ("detach", "web01"), ["web01"]),
        ("detach --all", ("detach", None), ["db01", "web01"]),
        ("mode --vm web01 monitor", ("mode", ("web01", "monitor")), ["web01"]),
        (
            "quarantine --vm web01 --reason spam",
            ("mode", ("web01", "quarantine", "spam")),
            ["web01"],
        ),
        ("release --vm web01", ("mode", ("web01", None)), ["web01"]),
        ("conntrack flush --vm web01", ("flush", "web01"), ["web01"]),
    ],
)
def test_verbs_that_order_something(
    target: FakeTarget, arguments: str, asked: tuple[str, object], said: Sequence[str]
) -> None:
    outcome = vgw(arguments)
    assert [line.split()[0] for line in outcome.stdout.splitlines()[1:]] == list(said)
    assert target.asked == [asked]
    assert [row["vm"] for row in rows(vgw(f"{arguments} -o jsonl"))] == list(said)


def test_status_passes_on_what_the_host_says(target: FakeTarget) -> None:
    assert document(vgw("status --vm web01 -o json")) == STATUS
    assert rows(vgw("status -o jsonl")) == STATUS["vms"]
    assert target.asked == [("status", "web01"), ("status", None)]


@pytest.mark.usefixtures("target")
def test_status_is_a_line_for_each_interface() -> None:
    outcome = vgw("status")
    header, first, second = outcome.stdout.splitlines()
    assert header.split("  ")[0] == "VM"
    assert first.split() == [
        *("web01", "tap-web01", "xdp/native", "enforce", "3", "3/1", "4/65536", "99", "-")
    ]
    assert "NOT ATTACHED" in second
    assert second.endswith("address,arp")
    assert max(map(len, outcome.stdout.splitlines())) <= 100
    assert outcome.stderr == "warning: web01 tap-web01b: interface tap-web01b does not exist\n"


def test_status_says_what_is_not_as_it_should_be(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = copy.deepcopy(STATUS["vms"][0]) | {"mode": "monitor"}
    del vm["interfaces"][1]
    [interface] = vm["interfaces"]
    interface |= {"pending": "conntrack_max 9 takes effect later", "rules": None}
    interface["to_vm"]["ahead"] = [70, 71]
    interface["beside"] = [
        {"path": "from_vm", "kind": "tcx", "id": 72},
        {"path": "to_vm", "kind": "u32", "id": 10},
    ]
    interface["guards_off"] = None
    monkeypatch.setattr(target, "status", lambda _: {"vms": [vm]})
    outcome = vgw("status")
    _, line = outcome.stdout.splitlines()
    assert "  monitor (policy: enforce)  " in line
    assert line.split()[-4:] == ["-", "4/65536", "99", "unknown"]
    place = "warning: web01 tap-web01:"
    beside = "of somebody else runs beside its"
    assert [text.split("; ")[0] for text in outcome.stderr.splitlines()] == [
        f"{place} program 70 runs ahead of its to_vm program",
        f"{place} program 71 runs ahead of its to_vm program",
        f"{place} program 72 {beside} from_vm program and may redirect packets",
        f"{place} u32 filter of priority 10 {beside} to_vm program and may redirect packets",
        f"{place} conntrack_max 9 takes effect later",
    ]


def test_status_ends_with_the_alarms(target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    alarm = {"alarm": "renamed", "vm": "web01", "interface": "tap0", "text": "why", "seconds": 61.5}
    alone = alarm | {"vm": None, "interface": None}
    monkeypatch.setattr(target, "status", lambda _: STATUS | {"alarms": [alarm, alone]})
    assert vgw("status").stdout.splitlines()[-2:] == [
        "ALARM renamed web01 tap0: why (for 1 min)",
        "ALARM renamed: why (for 1 min)",
    ]
    assert document(vgw("status -o json"))["alarms"] == [alarm, alone]


def test_vms_says_what_protects_them_or_why_not(target: FakeTarget) -> None:
    outcome = vgw("vms")
    header, app, db01, web01 = outcome.stdout.splitlines()
    assert header.split("  ")[0] == "VM"
    assert app.split()[:3] == ["app", "qemu", "yes"]
    assert app.endswith("NO: no file names it")
    assert db01.endswith("NO: no interface of it is known")
    assert "10.20.0.50 (2 h),2001:db8::5 (no end)" in web01
    assert web01.endswith("yes")
    assert outcome.stderr == "warning: libvirt is away\n"
    assert document(vgw("vms -o json"))["vms"] == VMS["vms"] == rows(vgw("vms -o jsonl"))
    assert target.asked == [("vms", None)] * 3


def test_rules_with_their_counters(target: FakeTarget) -> None:
    lines = vgw("rules --vm web01").stdout.splitlines()
    assert lines[1].split("  ")[-3:] == [" 12", "2.0 KiB", "1 min ago"]
    assert lines[2].endswith("never")
    assert document(vgw("rules --vm web01 -o json")) == RULES
    assert target.asked == [("rules", "web01")] * 2


def test_rules_that_were_never_hit(target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    hit, never = RULES["rules"]
    assert (hit["packets"], never["packets"]) == (12, 0)
    assert rows(vgw("rules --vm web01 --never-hit -o jsonl")) == [never]
    assert len(vgw("rules --vm web01 --never-hit").stdout.splitlines()) == 2
    monkeypatch.setattr(target, "rules", lambda _: {**RULES, "rules": [hit]})
    assert "every rule of web01 has decided" in vgw("rules --vm web01 --never-hit").output


@pytest.mark.usefixtures("target")
def test_connections() -> None:
    line = vgw("conntrack list --vm web01").stdout.splitlines()[1]
    assert "10.20.0.11:443  [2001:db8::9]:40000" in line
    assert line.endswith("5/4  12 s      1 h  group/tier/site")
    assert document(vgw("conntrack list --vm web01 -o json")) == FLOWS
    assert rows(vgw("conntrack list --vm web01 -o jsonl")) == FLOWS["flows"]
