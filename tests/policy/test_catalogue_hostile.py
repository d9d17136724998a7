# SPDX-License-Identifier: Apache-2.0
"""What the catalogue's group N wants of policies: bounds, and nothing that means everything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_network
from itertools import permutations
from pathlib import Path

import pytest

from bench.image_reader import ImageReader
from tests.policy.texts import parse, problems_of, rule, whole
from vgw import abi
from vgw.abi import Action
from vgw.errors import PolicyError, VgwError
from vgw.policy import quotas
from vgw.policy.compile import MAX_RULES, compile_policy
from vgw.policy.model import (
    Direction,
    EffectivePolicy,
    EffectiveRule,
    PolicyDocument,
    Service,
    Tier,
)
from vgw.policy.parse import parse_sources
from vgw.policy.quotas import PolicyTooLargeError
from vgw.policy.resolve import effective_policy, group_networks

MEBIBYTE = 1 << 20
#: Reads policies and prints what each came to, its seconds, and the most memory so far.
_BOUNDED = """
import json, resource, sys, time
from pathlib import Path
from vgw.errors import VgwError
from vgw.controller.inventory import read_policy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    started = time.process_time()
    try:
        read_policy(Path(name))
        answer = "accepted"
    except VgwError as error:
        answer = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([answer, time.process_time() - started, peak * 1024]))
"""


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"schema: vgw/v1\n")
        file.truncate(1 << 30)


def written(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 120)
)
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a gigabyte": (sparse, "is larger than 64 MiB"),
    "alias bomb": (written(BOMB), "the anchor '&a' is not allowed"),
    "deep": (written(b"schema: vgw/v1\nvms: " + b"[" * 10_000), "more than 16 levels"),
    "deep mappings": (written(b"{a: " * 10_000), "more than 16 levels"),
    "duplicate keys": (written(b"schema: vgw/v1\n" * 2), "duplicate key 'schema'"),
    "tag": (written(b"vms: !!python/object/apply:os.system [id]"), "the tag"),
    "NUL": (written(b"schema: vgw/v1\nvms: {a\0: {}}"), "character U+0000"),
    "byte order mark": (written(b"\xef\xbb\xbfschema: vgw/v1"), "byte order mark"),
    "invalid UTF-8": (written(b"schema: vgw/v1\n# \xff"), "is not UTF-8 text"),
    "long line": (written(b"schema: " + b"x" * MEBIBYTE), "the schema is"),
    "many problems": (written(b"schema: vgw/v1\n" + b"k: 1\n" * 100_000), "duplicate key 'k'"),
}


def test_catalogue_N1_hostile_files_are_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    paths = []
    for name, (write, _) in FILES.items():
        paths.append(tmp_path / f"{name}.yaml")
        write(paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(FILES)
    for (name, (_, expected)), (answer, seconds, peak) in zip(FILES.items(), answers, strict=True):
        assert expected in answer, name
        assert seconds < 10, name
        assert peak < 300 * MEBIBYTE, name


def port_rule(number: int, first: int = 1, last: int = 65535) -> EffectiveRule:
    services = (Service(6, ports=(first, last)),)
    return EffectiveRule(
        Direction.INGRESS, Tier.VM, "p", f"r{number}", Action.ACCEPT, services=services
    )


def test_catalogue_N2_all_ports_in_65535_rules_is_refused_before_apply() -> None:
    rules = tuple(port_rule(number) for number in range(65_535))
    with pytest.raises(PolicyTooLargeError, match=f"65535 rules, the limit is {MAX_RULES}"):
        compile_policy(EffectivePolicy("vm", rules))


def test_catalogue_N2_a_range_for_each_of_the_most_rules_is_compiled() -> None:
    """Ranges that begin at every port and all end at the last, so that each overlaps all others."""
    rules = tuple(port_rule(n, 1 + n % 65535, 65535) for n in range(MAX_RULES))
    image = compile_policy(EffectivePolicy("vm", rules))[abi.Path.TO_VM]
    assert len(image.rules) == MAX_RULES


def test_catalogue_N2_a_network_in_single_addresses_is_that_network() -> None:
    addresses = ", ".join(f"10.20.{n >> 8}.{n & 255}" for n in range(65536))
    document = parse(whole(f"groups: {{g: {{cidrs: [{addresses}]}}}}"))
    assert group_networks(document, "g") == (ip_network("10.20.0.0/16"),)


def test_catalogue_N2_a_range_within_a_range_is_not_lost() -> None:
    """Whichever comes first in the policy decides, for all orders of nested and crossed ranges."""
    ranges = [(1, 65535), (80, 443), (100, 200), (150, 300)]
    for order in permutations(ranges):
        rules = tuple(port_rule(number, *span) for number, span in enumerate(order))
        image = compile_policy(EffectivePolicy("vm", rules))[abi.Path.TO_VM]
        reader = ImageReader(image.data)
        for port in (1, 79, 80, 99, 100, 149, 150, 200, 201, 300, 301, 443, 444, 65535):
            found = reader.judge(4, 1, 2, 6 << 16 | port, 6 << 16 | 1)
            first = next(n for n, (low, high) in enumerate(order) if low <= port <= high)
            assert found.rule == first, (order, port)


NOTHING = {
    "empty group": "{}",
    "group without networks": "{cidrs: []}",
    "group without VMs": "{vms: []}",
    "group of an empty group": "{groups: [none]}",
    "labels that no VM has": "{labels: {role: nobody}}",
}


@pytest.mark.parametrize("group", NOTHING.values(), ids=NOTHING)
def test_catalogue_N3_what_selects_nothing_matches_nothing(group: str) -> None:
    """It is warned about, and the rule is none: no packet is its."""
    text = rule("from: [g]").replace("groups:\n", f"groups:\n  g: {group}\n  none: {{}}\n")
    document = parse(text)
    assert any("matches nothing" in warning.message for warning in document.warnings)
    (effective,) = effective_policy(document, "web01").ingress
    assert effective.peers == ()
    images = compile_policy(effective_policy(document, "web01"))
    assert images[abi.Path.TO_VM].rules == ()


@pytest.mark.parametrize(
    "text",
    [
        rule("from: ~"),
        rule("from: []"),
        rule("from: [~]"),
        rule("from: [gone]"),
        rule("from: "),
        rule("services: ~"),
        rule("services: []"),
        rule("services: [gone]"),
        rule("local: []"),
        rule("source_ports: []"),
        whole("groups: {g: ~}"),
        whole("groups: {g: {cidrs: ~}}"),
        whole("groups: {g: {vms: [gone]}}"),
        whole("groups: {g: {labels: {}}}"),
        whole("policies: [{name: p, tier: vm}]"),
        whole("policies: [{name: p, tier: vm, applies_to: ~}]"),
        whole("policies: [{name: p, tier: vm, applies_to: {vms: []}}]"),
        whole("policies: [{name: p, tier: vm, applies_to: {labels: ~}}]"),
    ],
)
def test_catalogue_N3_an_empty_or_missing_selector_is_a_mistake(text: str) -> None:
    assert problems_of(text)


TIE = "{name: p, tier: vm, applies_to: {all: true}"


@pytest.mark.parametrize(
    "policies",
    [
        f"[{TIE}, ingress: [{{name: r, action: drop}}, {{name: r, action: accept}}]}}]",
        f"[{TIE}}}, {TIE}}}]",
        "[{name: p, tier: 5, applies_to: {all: true}}]",
    ],
)
def test_catalogue_N4_there_are_no_ties(policies: str) -> None:
    """Rules and policies come in the order of the file; what has one name twice is refused."""
    assert problems_of(whole(f"policies: {policies}"))


def test_catalogue_N4_one_wrong_value_refuses_all_files() -> None:
    right = whole("vms: {a: {interfaces: [{name: tap1}]}}")
    with pytest.raises(PolicyError):
        parse_sources([("1.yaml", right), ("2.yaml", rule("from: [10.0.0.1/8]"))])
    assert parse_sources([("1.yaml", right)]).vms


# --- quotas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("vms:\n{}", "VM"),
        ("groups:\n{}", "group"),
        ("services:\n{}", "service"),
    ],
)
def test_catalogue_N16_definitions_have_a_limit(
    section: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "MAX_DEFINITIONS", 3)
    value = "[tcp/1]" if kind == "service" else "{}"
    names = [f"  n{number}: {value}\n" for number in range(4)]
    assert parse(whole(section.format("".join(names[:3]))))
    (problem,) = problems_of(whole(section.format("".join(names))))
    assert f"4 definitions like this {kind}; the limit is 3" in problem.message
    assert problem.line == 6


def test_catalogue_N16_policies_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAX_DEFINITIONS", 1)
    policies = ", ".join(f"{{name: p{n}, tier: vm, applies_to: {{all: true}}}}" for n in range(2))
    (problem,) = problems_of(whole(f"policies: [{policies}]"))
    assert "2 definitions like this policy; the limit is 1" in problem.message


def test_catalogue_N16_interfaces_and_their_addresses_have_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = whole(
        "vms: {a: {interfaces: [{name: t1, addresses: [10.0.0.1, 10.0.0.2]}, {name: t2, "
        "addresses: [10.0.0.3], allowed_pairs: [{address: 10.0.0.4}]}]}}"
    )
    assert parse(text)
    monkeypatch.setattr(quotas, "MAX_INTERFACES", 1)
    monkeypatch.setattr(quotas, "MAX_INTERFACE_ADDRESSES", 3)
    messages = [problem.message for problem in problems_of(text)]
    assert len(messages) == 2
    assert any("2 interfaces; the limit is 1" in message for message in messages)
    assert any("than 3, which is the limit" in message for message in messages)


def test_catalogue_N16_files_and_their_text_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(f"{number}.yaml", whole("vms: {}")) for number in range(3)]
    assert isinstance(parse_sources(files), PolicyDocument)
    monkeypatch.setattr(quotas, "MAX_FILES", 2)
    with pytest.raises(PolicyError, match=r"2\.yaml.*3 files, the limit is 2"):
        parse_sources(files)
    monkeypatch.setattr(quotas, "MAX_FILES", 3)
    monkeypatch.setattr(quotas, "MAX_ALL_CHARACTERS", 60)
    with pytest.raises(PolicyError, match=r"2\.yaml.*more than 60 characters"):
        parse_sources(files)


def test_catalogue_N16_values_are_counted_over_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgw.policy.yaml_load.MAX_VALUES", 14)
    files = [(f"{number}.yaml", whole("vms: {}")) for number in range(3)]
    assert parse_sources(files[:2])
    with pytest.raises(PolicyError, match=r"3\.yaml|2\.yaml.*more than 14 values"):
        parse_sources(files)


@pytest.mark.parametrize(
    "peers",
    ["[g4]", "[big, 10.9.0.0/16]"],
    ids=["groups of groups", "lists of groups"],
)
def test_catalogue_N16_groups_in_groups_do_not_multiply(
    peers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large group in many others is as large in each: a small text would take all memory."""
    cidrs = ", ".join(f"10.{number}.0.0/24" for number in range(100))
    groups = "".join(f"  g{n}: {{groups: [big]}}\n" for n in range(5))
    text = rule(f"from: {peers}").replace(
        "groups:\n", f"groups:\n  big: {{cidrs: [{cidrs}]}}\n{groups}"
    )
    assert effective_policy(parse(text), "web01").ingress[0].peers
    monkeypatch.setattr(quotas, "MAX_MEMBERS", 150 if "any" in peers else 99)
    with pytest.raises(VgwError, match="come to more than 99 addresses") as raised:
        effective_policy(parse(text), "web01")
    assert raised.value.exit_code == 3


def test_a_document_within_its_limits_is_not_refused_for_what_another_holds() -> None:
    """Members are counted for each document."""
    document = parse(rule("from: [office]"))
    for _ in range(3):
        assert effective_policy(document, "web01").ingress[0].peers
