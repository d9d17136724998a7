# SPDX-License-Identifier: Apache-2.0
"""Rules that never match: each dimension one off, tiers and `pass`, the order of each VM."""

import re
from pathlib import Path

import pytest

from tests.policy.texts import parse, whole
from vgw.policy.parse import parse_sources
from vgw.policy.report import MAX_PROBLEMS
from vgw.policy.shadow import shadowed_rules

EXAMPLES = Path(__file__).parents[2] / "examples"
MESSAGE = re.compile(r"rule '(\w+)' of .* never matches: '(\w+)' of policy .* covers it")
HEAD = """\
vms:
  web01: {labels: {role: web}, interfaces: [{name: tap1, addresses: [10.20.0.11]}]}
  db01: {labels: {role: db}, interfaces: [{name: tap2, addresses: [10.20.0.21]}]}
groups:
  office: {cidrs: [192.0.2.0/24, "2001:db8:1::/48"]}
  half: {cidrs: [192.0.2.0/25]}
  both-halves: {groups: [half], cidrs: [192.0.2.128/25]}
  spread: {cidrs: [192.0.2.1, 192.0.2.2, "2001:db8:1:2::/64"]}
  nobody: {labels: {role: ghost}}
services:
  web: [tcp/80, tcp/443]
  more: [tcp/443, tcp/80, udp/443]
"""


def policy(name: str, rules: str, tier: str = "vm", to: str = "all: true") -> str:
    return (
        f"  - name: {name}\n    tier: {tier}\n    applies_to: {{{to}}}\n    ingress:\n"
        + "".join(f"      - {{{rule.strip()}}}\n" for rule in rules.strip().splitlines())
    )


def found(*policies: str) -> list[str]:
    """Return the shadowed rules of policies, each as `rule < the one that covers it`."""
    problems = shadowed_rules(parse(whole(HEAD + "policies:\n" + "".join(policies))))
    return [MESSAGE.sub(r"\1 < \2", problem.message) for problem in problems]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("", ""),
        ("", "from: [office], services: [tcp/80], local: [10.20.0.11]"),
        ("from: [any]", "from: [0.0.0.0/0, '::/0']"),
        ("from: [10.0.0.0/8]", "from: [10.0.0.0/8]"),
        ("from: [10.0.0.0/8]", "from: [10.255.255.255]"),
        ("from: [10.0.0.0/9, 10.128.0.0/9]", "from: [10.0.0.0/8]"),
        ("from: [10.0.0.1, 10.0.0.2/31]", "from: [10.0.0.1, 10.0.0.2]"),
        ("from: [office]", "from: [spread]"),
        ("from: [office]", "from: [both-halves]"),
        ("from: [both-halves]", "from: [192.0.2.0/24]"),
        ("from: ['2001:db8::/32']", "from: ['2001:db8:ffff::/48']"),
        ("from: [0.0.0.0/0]", "from: [any], local: [10.0.0.0/8]"),
        ("local: [10.0.0.0/8]", "from: [office], local: [10.0.0.0/9]"),
        ("local: [10.0.0.0/8]", "from: [10.0.0.0/8], local: [10.0.0.0/9, '2001:db8::/32']"),
        ("services: [tcp/80-90]", "services: [tcp/80, tcp/85-90]"),
        ("services: [tcp/80, tcp/81-90]", "services: [tcp/80-90]"),
        ("services: [more]", "services: [web]"),
        ("services: [proto/6]", "services: [tcp/1-65535]"),
        ("services: [any]", "services: [tcp/1-65535, udp/1, sctp/65535, proto/17]"),
        ("services: [any]", "services: [icmp/echo-request, icmpv6/echo-request/0, icmp/8/7]"),
        (
            "services: [proto/6, proto/17, proto/132, icmp/8, icmpv6/128, tcp/1]",
            "services: [any]",
        ),
        ("services: [icmp/any]", "services: [icmp/3/4, icmp/8]"),
        ("services: [icmp/any]", "services: [proto/1]"),
        ("services: [icmp/3]", "services: [icmp/3/255]"),
        ("services: [icmp/3/any]", "services: [icmp/3]"),
        ("services: [proto/47]", "services: [proto/47]"),
        ("services: [udp/53]", "services: [udp/53], source_ports: [53]"),
        (
            "services: [udp/53], source_ports: [53, 1024-65535]",
            "services: [udp/53], source_ports: [2000-3000]",
        ),
        (
            "services: [udp/53], source_ports: [1-99, 100-200]",
            "services: [udp/53], source_ports: [1-200]",
        ),
        ("log: true, comment: other", ""),
    ],
)
def test_a_rule_within_an_earlier_one(earlier: str, later: str) -> None:
    rules = f"name: a, action: drop, {earlier}\nname: b, action: accept, {later}"
    assert found(policy("p", rules)) == ["b < a"]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("from: [0.0.0.0/0]", ""),
        ("from: ['::/0']", ""),
        ("from: ['::/0']", "from: [0.0.0.0/0]"),
        ("from: [10.0.0.0/8]", "from: [10.0.0.0/7]"),
        ("from: [10.0.0.0/8]", "from: [11.0.0.0]"),
        ("from: [10.0.0.0/8]", "from: [9.255.255.255]"),
        ("from: [10.0.0.0/8]", "from: [10.1.0.0/16, 11.0.0.0]"),
        ("from: [10.0.0.1, 10.0.0.3]", "from: [10.0.0.1, 10.0.0.2]"),
        ("from: [10.0.0.0/8]", "from: [10.1.0.0/16, '2001:db8::1']"),
        ("from: [half]", "from: [spread]"),
        ("from: [half]", "from: [both-halves]"),
        ("from: [nobody]", "from: [nobody]"),
        ("", "from: [nobody]"),
        ("from: [nobody]", ""),
        ("", "from: [10.0.0.0/8], local: ['2001:db8::/32']"),
        ("local: [10.0.0.0/8]", ""),
        ("local: [10.0.0.0/9]", "local: [10.0.0.0/8]"),
        ("local: [10.0.0.0/8]", "local: ['2001:db8::/32']"),
        ("local: [10.0.0.0/8]", "local: [10.0.0.0/9, '2001:db8::/32']"),
        ("services: [tcp/80-90]", "services: [tcp/79-90]"),
        ("services: [tcp/80-90]", "services: [tcp/80-91]"),
        ("services: [tcp/80]", "services: [udp/80]"),
        ("services: [web]", "services: [more]"),
        ("services: [tcp/1-65535]", "services: [proto/6]"),
        ("services: [any]", "services: [icmp/any]"),
        ("services: [any]", "services: [icmp/echo-reply]"),
        ("services: [any]", "services: [proto/1]"),
        ("services: [any]", "services: [icmpv6/8]"),
        ("services: [any]", "services: [proto/47]"),
        ("services: [any]", "services: [tcp/80, proto/47]"),
        ("services: [proto/6, proto/17, proto/132, icmp/8]", "services: [any]"),
        ("services: [proto/6, proto/17, proto/132, icmp/8/0, icmpv6/128]", "services: [any]"),
        ("services: [icmp/3/4]", "services: [icmp/3]"),
        ("services: [icmp/3/4]", "services: [icmp/3/5]"),
        ("services: [icmp/3]", "services: [icmp/4]"),
        ("services: [icmp/3]", "services: [icmpv6/3]"),
        ("services: [icmp/3]", "services: [icmp/any]"),
        ("services: [proto/47]", "services: [proto/48]"),
        ("services: [udp/53], source_ports: [53]", "services: [udp/53]"),
        (
            "services: [udp/53], source_ports: [1024-65535]",
            "services: [udp/53], source_ports: [1023-65535]",
        ),
        ("services: [udp/53], source_ports: [1-65535]", "services: [udp/53]"),
        ("enabled: false", ""),
        ("", "enabled: false"),
    ],
)
def test_a_rule_that_is_not_within_an_earlier_one(earlier: str, later: str) -> None:
    rules = f"name: a, action: drop, {earlier}\nname: b, action: accept, {later}"
    assert found(policy("p", rules)) == []


def test_rules_of_other_directions_and_later_rules_cover_nothing() -> None:
    text = policy("p", "name: a, action: accept, services: [tcp/80]\nname: b, action: drop")
    other = "    egress: [{name: c, action: drop, services: [tcp/80]}]\n"
    assert found(text + other) == []


def test_no_union_of_rules_counts() -> None:
    rules = "name: a, action: drop, from: [10.0.0.0/9]\nname: b, action: drop, from: [10.128.0.0/9]"
    assert found(policy("p", f"{rules}\nname: c, action: drop, from: [10.0.0.0/8]")) == []


def test_the_first_of_several_is_named() -> None:
    rules = "name: a, action: drop, services: [tcp/1-9]\nname: b, action: drop, services: [tcp/2-8]"
    found_rules = found(policy("p", f"{rules}\nname: c, action: drop, services: [tcp/3]"))
    assert found_rules == ["b < a", "c < a"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("name: a, action: drop", "name: z, action: drop", ["z < a"]),
        ("name: a, action: accept", "name: z, action: pass", ["z < a"]),
        ("name: a, action: pass", "name: z, action: drop", []),
        (
            "name: a, action: pass, services: [tcp/80]\nname: b, action: drop, services: [tcp/80]",
            "name: z, action: drop, services: [tcp/80]",
            ["b < a"],
        ),
        (
            "name: a, action: pass, services: [tcp/80]\nname: b, action: drop",
            "name: z, action: drop, services: [tcp/22]",
            [],
        ),
        (
            "name: a, action: drop\nname: b, action: pass, from: [10.0.0.0/8]",
            "name: z, action: drop, services: [tcp/22]",
            ["b < a", "z < a"],
        ),
        (
            "name: a, action: pass, from: [nobody]\nname: b, action: drop",
            "name: z, action: drop",
            ["z < b"],
        ),
    ],
)
def test_tiers_and_pass(first: str, second: str, expected: list[str]) -> None:
    assert found(policy("late", second, "baseline"), policy("early", first, "admin")) == [
        *(each for each in expected if each.startswith("z")),
        *(each for each in expected if not each.startswith("z")),
    ]


def test_a_later_tier_covers_its_own_after_a_pass_before() -> None:
    late = "name: y, action: drop\nname: z, action: drop, services: [tcp/80]"
    early = "name: a, action: pass\nname: b, action: drop"
    assert found(policy("early", early, "admin"), policy("late", late, "group")) == [
        "b < a",
        "z < y",
    ]


@pytest.mark.parametrize(
    ("covering_for", "covered_for", "expected"),
    [
        ("all: true", "labels: {role: web}", ["z < a"]),
        ("labels: {role: web}", "vms: [web01]", ["z < a"]),
        ("labels: {role: web}", "all: true", []),
        ("vms: [web01, db01]", "labels: {role: db}", ["z < a"]),
        # A VM that the policy does not name has only the policies for all.
        ("vms: [web01, db01]", "all: true", []),
        ("vms: [web01]", "vms: [web01, db01]", []),
        ("vms: [web01]", "vms: [db01]", []),
        ("all: true", "labels: {role: ghost}", []),
    ],
)
def test_a_rule_is_reported_when_it_is_covered_for_every_vm(
    covering_for: str, covered_for: str, expected: list[str]
) -> None:
    covering = policy("p", "name: a, action: drop", to=covering_for)
    covered = policy("q", "name: z, action: drop, services: [tcp/80]", to=covered_for)
    assert found(covering, covered) == expected


def test_other_rules_may_cover_it_for_other_vms() -> None:
    text = "policies:\n" + "".join(
        (
            policy("p", "name: a, action: drop", to="vms: [web01]"),
            policy("q", "name: b, action: accept", to="vms: [db01]"),
            policy("r", "name: z, action: drop, services: [tcp/80]", to="vms: [web01, db01]"),
        )
    )
    (problem,) = shadowed_rules(parse(whole(HEAD + text)))
    assert (
        "'a' of policy 'p' at policy.yaml:19 covers it; for some VMs another rule does"
        in problem.message
    )


def test_place_and_text_over_several_files() -> None:
    first = whole("""\
policies:
  - name: q
    tier: vm
    applies_to: {all: true}
    egress:
      - name: other
        action: accept
      - name: x
        action: drop
        to: [10.0.0.0/8]
    ingress: [{name: i, action: drop}, {name: j, action: drop}]""")
    second = whole("""\
policies:
  - {name: empty, tier: vm, applies_to: {all: true}}
  - {name: r, tier: vm, applies_to: {all: true}, egress: [{name: y, action: drop}]}""")
    document = parse_sources([("b.yaml", first), ("a.yaml", second)])
    assert document.warnings == ()
    covered = "of policy 'q' at b.yaml"
    lines = [str(problem) for problem in shadowed_rules(document)]
    assert [line.partition(" never matches: ") for line in lines] == [
        (f"{place}: rule '{name}' of policy {policy}", " never matches: ", f"{by} covers it")
        for place, name, policy, by in (
            ("b.yaml:9:9: policies[0].egress[1]", "x", "'q' (egress)", f"'other' {covered}:7"),
            ("b.yaml:12:40: policies[0].ingress[1]", "j", "'q' (ingress)", f"'i' {covered}:12"),
            ("a.yaml:4:59: policies[1].egress[0]", "y", "'r' (egress)", f"'other' {covered}:7"),
        )
    ]


def test_warnings_beyond_the_limit_are_counted() -> None:
    rules = "\n".join(f"name: r{number}, action: drop" for number in range(MAX_PROBLEMS + 6))
    problems = shadowed_rules(parse(whole("policies:\n" + policy("p", rules))))
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1].message == "5 more rule(s) that never match are not listed"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_no_example_has_a_rule_that_never_matches(path: Path) -> None:
    assert shadowed_rules(parse(path.read_text())) == ()
