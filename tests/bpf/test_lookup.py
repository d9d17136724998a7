# SPDX-License-Identifier: Apache-2.0
"""The loaded lookup, alone: every form of image, every block, every boundary, a million pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from bench.policy_probe import PolicyProbe
from tests.bpf import lookup_agreement
from tests.bpf.lookup_agreement import compare, disagreements, queries_of
from tests.policy.brute_force import make_headers
from tests.policy.random_policies import World
from vgw import abi, loader
from vgw.abi import Action, Reason, Verdict
from vgw.policy.compile import PolicyImage, compile_policy
from vgw.policy.model import (
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Service,
    Tier,
)

pytestmark = pytest.mark.bpf

PAIRS = 1_000_000
TCP_80 = (Service(6, (80, 80)),)


@pytest.fixture(scope="module")
def probe(artefact: loader.Artefact) -> Iterator[PolicyProbe]:
    with PolicyProbe(artefact) as made:
        yield made


def rule(number: int, **changes: object) -> EffectiveRule:
    base = EffectiveRule(Direction.INGRESS, Tier.GROUP, "p", f"r{number}", Action.ACCEPT)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_a_million_pairs_agree(probe: PolicyProbe) -> None:
    done = 0
    for count, found in disagreements(probe, seed=1000):
        assert found is None, str(found)
        done += count
        if done >= PAIRS:
            break


@pytest.mark.parametrize("size", [3, 80, 700])
def test_a_wrong_program_is_noticed_and_shrunk(
    probe: PolicyProbe, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: an image in which one rule is too wide disagrees, by that rule."""
    narrow = rule(-1, peers=(ip_network("198.51.100.0/24"),), tier=Tier.ADMIN)
    rules = (narrow, *(replace(each, tier=Tier.VM) for each in World(size).rules(size)))
    headers = make_headers(4, [(int(ip_address("198.51.101.7")), 1, 6, 1000, 80, -1)])
    wide = replace(narrow, peers=(ip_network("198.51.100.0/23"),))
    assert compare(probe, rules, headers) is None

    def compile_wrong(policy: EffectivePolicy) -> dict[abi.Path, PolicyImage]:
        images = compile_policy(replace(policy, ingress=swapped(policy.ingress, narrow, wide)))
        return {
            path: replace(image, rules=swapped(image.rules, wide, narrow))
            for path, image in images.items()
        }

    monkeypatch.setattr(lookup_agreement, "compile_policy", compile_wrong)
    found = lookup_agreement.shrink(probe, rules, headers, 0)
    assert found is not None
    assert [each.name for each in found.rules] == ["r-1"]


def swapped(
    rules: tuple[EffectiveRule, ...], old: EffectiveRule, new: EffectiveRule
) -> tuple[EffectiveRule, ...]:
    return tuple(new if each == old else each for each in rules)


def addresses(rules: int) -> list[tuple[int, int, int, int, int, int]]:
    """Return a header for the remote address of each of so many rules."""
    return [(n << 8, 1, 6, 1000, 80, -1) for n in range(rules)]


@pytest.mark.parametrize("size", [64, 65, 512, 1024, 1025, 3000, 33_000, 50_000])
def test_every_rule_is_found_in_every_block(probe: PolicyProbe, size: int) -> None:
    """One rule for each network, so that each place of each block decides once."""
    rules = tuple(rule(n, peers=(ip_network((n << 8, 24)),), services=TCP_80) for n in range(size))
    headers = make_headers(4, addresses(size))
    image = compile_policy(EffectivePolicy("vm", rules))[abi.Path.TO_VM]
    probe.set_image(abi.Path.TO_VM, image.data)
    answers = probe.ask(queries_of(headers, abi.Path.TO_VM))
    assert answers["rule"].tolist() == list(range(size))
    assert set(answers["reason"].tolist()) == {Reason.RULE}


def test_the_first_of_many_matches_decides(probe: PolicyProbe) -> None:
    """All match, in one field or another: candidates in all blocks, the least number wins."""
    rules = []
    for n in range(6000):
        net = (ip_network((10 << 24, 32 - n % 20)),)
        rules.append(rule(n, peers=net, services=TCP_80) if n % 2 else rule(n, local=net))
    for first in (0, 1, 2999, 5998):
        part = tuple(rules[first:])
        headers = make_headers(4, [(10 << 24, 10 << 24, 6, 5, 80, -1), (10 << 24, 9, 6, 5, 81, -1)])
        assert compare(probe, part, headers) is None


def test_pass_leads_to_the_next_tier_from_any_block(probe: PolicyProbe) -> None:
    world = World(7)
    deep = tuple(
        rule(n, tier=tier, action=Action.PASS if n % 700 == 650 else Action.DROP,
             peers=(ip_network((n % 700 << 8, 24)),))
        for tier, start in zip(Tier, range(0, 2800, 700), strict=True)
        for n in range(start, start + 700)
    )  # fmt: skip
    headers = make_headers(4, addresses(700))
    assert compare(probe, deep, headers) is None
    passing = tuple(replace(each, action=Action.PASS) for each in deep)
    assert compare(probe, passing, world.headers(deep, 4, 2000)) is None


def test_a_policy_that_is_not_there_drops(artefact: loader.Artefact) -> None:
    headers = make_headers(4, addresses(1))
    with PolicyProbe(artefact, size=16) as empty:
        answer = empty.ask(queries_of(headers, abi.Path.TO_VM))[0]
        assert (answer["verdict"], answer["reason"]) == (Verdict.DROP, Reason.NO_POLICY)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: bytes(64) + data[64:], id="format"),
        pytest.param(lambda data: data[:128] + bytes(12) + b"\xff" * 4 + data[144:], id="entries"),
        pytest.param(lambda data: data[:16] + b"\xff\xff\xff\x0f" + data[20:], id="vectors"),
    ],
)
def test_a_damaged_policy_never_accepts(probe: PolicyProbe, damage: object) -> None:
    rules = tuple(rule(n, peers=(ip_network((n << 8, 24)),)) for n in range(600))
    data = compile_policy(EffectivePolicy("vm", rules))[abi.Path.TO_VM].data
    probe.set_image(abi.Path.TO_VM, damage(data))  # type: ignore[operator]
    queries = queries_of(make_headers(4, [(1 << 31, 1, 6, 5, 80, -1)]), abi.Path.TO_VM)
    assert probe.ask(queries)["verdict"][0] == Verdict.DROP
