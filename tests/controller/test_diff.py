# SPDX-License-Identifier: Apache-2.0
"""What a dry run says: pure differences of rules, and those of a real VM with what it has."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
from click.testing import CliRunner

from tests.controller.policies import VM_MAC
from tests.controller.test_safe_change import Bench
from vgw.abi import Action, Mode
from vgw.cli_diff import print_plan
from vgw.controller.diff import plan
from vgw.controller.diff_rules import LISTED, changed_set, compare_rules, modified_row, rule_row
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.policy.model import Direction, EffectiveRule, Service, Tier
from vgw.policy.parse import parse_sources


def rules(*names: str, action: Action = Action.ACCEPT) -> list[EffectiveRule]:
    return [EffectiveRule(Direction.INGRESS, Tier.VM, "p", name, action) for name in names]


def names(changes: Any) -> list[str]:
    return [rule.name for rule, *_ in changes]


def test_rules_that_come_go_and_change() -> None:
    old, new = rules("stays", "goes", "changes"), rules("stays", "changes", "comes")
    new[1] = replace(new[1], action=Action.DROP, log=True)
    found = compare_rules(old, new)
    assert [(rule.name, place) for rule, place in found.added] == [("comes", 3)]
    assert [(rule.name, place) for rule, place in found.removed] == [("goes", 2)]
    ((before, after),) = found.modified
    assert modified_row(before, after) == {
        "rule": "ingress/vm/p/changes",
        "fields": {
            "action": {"old": "accept", "new": "drop"},
            "log": {"old": False, "new": True},
        },
    }
    assert found.moved == []


def test_where_a_rule_is_written_does_not_matter() -> None:
    old = rules("one")
    new = [replace(old[0], file="b", line=9, comment="moved")]
    found = compare_rules(old, new)
    assert not any((found.added, found.removed, found.modified, found.moved))


def test_the_fewest_rules_move_that_explain_the_order() -> None:
    old = rules(*"abcdefgh")
    found = compare_rules(old, rules(*"abhcdefg"))
    assert [(rule.name, was, now) for rule, was, now in found.moved] == [("h", 8, 3)]
    assert names(compare_rules(old, rules(*"bcdefgha")).moved) == ["a"]
    assert names(compare_rules(rules(*"ab"), rules(*"xba")).moved) in (["a"], ["b"])


@pytest.mark.parametrize("seed", range(20))
def test_carrying_out_the_changes_gives_the_new_list(seed: int) -> None:
    """Take out what goes and moves, put in what comes and moves at its new place."""
    chance = random.Random(seed)
    letters = [f"r{number}" for number in range(12)]
    old = rules(*chance.sample(letters, chance.randrange(12)))
    new = rules(*chance.sample(letters, chance.randrange(12)))
    found = compare_rules(old, new)
    left = set(names(found.removed)) | set(names(found.moved))
    made = [rule.name for rule in old if rule.name not in left]
    coming = [(place, rule.name) for rule, place in found.added]
    coming += [(place, rule.name) for rule, _, place in found.moved]
    for place, name in sorted(coming):
        made.insert(place - 1, name)
    assert made == [rule.name for rule in new]


def test_sets_are_compared_and_cut() -> None:
    nets = tuple(ip_network(f"10.0.{number}.0/24") for number in range(LISTED + 5))
    row = changed_set(nets[:2], nets[1:])
    assert row["removed"] == {"count": 1, "first": ["10.0.0.0/24"]}
    assert row["added"]["count"] == LISTED + 3
    assert len(row["added"]["first"]) == LISTED
    (rule,) = rules("r")
    shown = rule_row(replace(rule, services=(Service(6, (80, 81)),), source_ports=((1, 9),)), 7)
    assert shown["services"] == {"count": 1, "first": ["tcp/80-81"]}
    assert shown["source_ports"]["first"] == ["1-9"]


def test_fifty_thousand_rules_are_quick() -> None:
    old = rules(*(f"r{number}" for number in range(50_000)))
    new = [*old[1:], *rules("new"), old[0]]
    new[25_000] = replace(new[25_000], log=True)
    reverse = list(reversed(old))
    started = time.process_time()
    found = compare_rules(old, new)
    assert len(compare_rules(old, reverse).moved) == 49_999
    assert time.process_time() - started < 3
    assert (names(found.added), names(found.moved)) == (["new"], ["r0"])
    assert names(found.modified) == ["r25001"]


POLICY = """schema: vgw/v1
vms:
  web01:
    VMKEYS
    interfaces:
      - {name: tap0, mac: 'MAC', addresses: [ADDRESS], GUARDS}
groups:
  office: {cidrs: [OFFICE]}
policies:
  - name: base
    tier: vm
    applies_to: {all: true}
    ingress:
RULES
defaults: {ingress: DEFAULT, egress: accept}
"""
RULES = """
      - {name: ops, action: accept, from: [office], services: [tcp/22]}
      - {name: web, action: accept, services: [tcp/80]}
"""


def policy(**parts: str) -> str:
    given = {
        "VMKEYS": "labels: {a: b}",
        "MAC": VM_MAC,
        "ADDRESS": "10.20.0.11",
        "GUARDS": "vlans: []",
        "OFFICE": "192.0.2.0/24",
        "RULES": RULES,
        "DEFAULT": "drop",
    }
    text = POLICY
    for name, part in (given | parts).items():
        text = text.replace(name, part)
    return text


@pytest.fixture
def bench(host: Host, paths: Paths, tap: Callable[[str], int]) -> Bench:
    bench = Bench(host, paths, tap("tap0"))
    bench.attach(policy())
    return bench


def difference(bench: Bench, text: str, limit: int | None = None) -> dict[str, Any]:
    before = bench.host.status()
    (row,) = plan(bench.host, parse_sources([("new.yaml", text)]), limit)["vms"]
    assert bench.host.status() == before
    return dict(row)


def printed(bench: Bench, text: str, limit: int | None = None) -> list[str]:
    import click  # noqa: PLC0415

    @click.command
    def show() -> None:
        print_plan(plan(bench.host, parse_sources([("new.yaml", text)]), limit))

    outcome = CliRunner().invoke(show, catch_exceptions=False)
    return outcome.output.splitlines()


@pytest.mark.bpf
def test_everything_that_differs_is_said(bench: Bench) -> None:
    assert printed(bench, policy()) == ["web01: nothing would change"]
    row = difference(bench, policy())
    assert row["counts"] == {"removed": 0, "added": 0, "modified": 0, "moved": 0}

    office = policy(OFFICE="192.0.2.0/24, 198.51.100.0/24")
    row = difference(bench, office)
    (change,) = row["modified"]
    assert change["fields"]["peers"]["added"]["first"] == ["198.51.100.0/24"]
    (group,) = row["groups"]
    assert (group["group"], group["added"]["first"]) == ("office", ["198.51.100.0/24"])
    assert printed(bench, office) == [
        "web01: 1 rule changed",
        "  ~ group office: +[198.51.100.0/24]",
        "  ~       ingress/vm/base/ops",
        "            peers: +[198.51.100.0/24]",
    ]

    row = difference(
        bench,
        policy(
            VMKEYS="mode: monitor\n    reject_per_second: 7",
            ADDRESS="10.20.0.11, 10.20.0.12",
            GUARDS="guards: {arp: false}",
            DEFAULT="reject",
        ),
    )
    assert row["settings"] == {
        "mode": {"old": "enforce", "new": "monitor"},
        "reject_per_second": {"old": 100, "new": 7},
    }
    assert row["defaults"] == {"ingress": {"old": "drop", "new": "reject"}}
    fields = row["interfaces"]["tap0"]
    assert fields["addresses"]["new"] == ["10.20.0.11", "10.20.0.12"]
    assert fields["guards.arp"] == {"old": True, "new": False}


@pytest.mark.bpf
def test_lines_have_a_limit(bench: Bench) -> None:
    more = "".join(
        f"      - {{name: r{n}, action: drop, services: [tcp/{n}]}}\n" for n in range(1, 9)
    )
    lines = printed(bench, policy(RULES=RULES + more), 3)
    assert lines[0] == "web01: 8 rules added"
    assert lines[1] == "  +     3 ingress/vm/base/r1: drop, services [tcp/1]"
    assert lines[4:] == ["  ... and 5 more; --limit shows more of them"]
    row = difference(bench, policy(RULES=RULES + more), 3)
    assert (len(row["added"]), row["counts"]["added"], row["omitted"]) == (3, 8, 5)


@pytest.mark.bpf
def test_it_is_compared_with_what_is_in_force_not_with_a_file(bench: Bench) -> None:
    other = policy(RULES=RULES.replace("tcp/80", "tcp/443"))
    bench.paths.policy.write_text(other)
    assert difference(bench, other)["counts"]["modified"] == 1
    bench.host.set_mode("web01", Mode.MONITOR)
    bench.apply(other)
    assert difference(bench, other)["changed"] is False


@pytest.mark.bpf
def test_what_is_lost_and_what_is_kept_is_said(bench: Bench) -> None:
    unnamed = parse_sources([("p", "schema: vgw/v1\n")])
    (row,) = plan(bench.host, unnamed)["vms"]
    assert (row["kept"], row["changed"], row["counts"]["removed"]) == (True, False, 0)
    for digest in bench.host.store.digests():
        bench.host.store.remove(digest)
    row = difference(bench, policy(DEFAULT="accept"))
    assert row["counts"] is row["added"] is None
    assert "not known" in printed(bench, policy(DEFAULT="accept"))[0]
