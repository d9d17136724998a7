# SPDX-License-Identifier: Apache-2.0
"""Compiled policies: an image, read by a reader of its own, says what the rules say.

bench/image_reader.py shares no mistake with what builds images, brute_force.py none with what
reads rules. The loaded programs are held against the same in tests/bpf/test_lookup.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.image_reader import ImageReader
from tests.policy.brute_force import NO_MATCH, Headers, first_matches, make_headers
from tests.policy.random_policies import World
from vgw import abi
from vgw.abi import Action, Path
from vgw.errors import ExitCode
from vgw.policy import compile as compiler
from vgw.policy.compile import MAX_RULES, PolicyImage, compile_policy
from vgw.policy.evaluate import Opening, _first_match
from vgw.policy.image import NARROW_RULES
from vgw.policy.model import (
    ANYWHERE,
    Defaults,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Service,
    Tier,
)
from vgw.policy.quotas import PolicyTooLargeError

#: Sizes around the bounds of forms and blocks.
SIZES = (1, 2, 10, 63, 64, 65, 66, 200, 511, 512, 513, 900, 1600)


def rule(name: str, **changes: object) -> EffectiveRule:
    base = EffectiveRule(Direction.INGRESS, Tier.GROUP, "p", name, Action.ACCEPT)
    return replace(base, **changes)  # type: ignore[arg-type]


def image_of(rules: tuple[EffectiveRule, ...], **more: object) -> PolicyImage:
    """Compile rules toward the VM, as a new tuple: of an old one the image is remembered."""
    policy = EffectivePolicy("vm", (*rules,), **more)  # type: ignore[arg-type]
    return compile_policy(policy)[Path.TO_VM]


def answers(image: PolicyImage, headers: Headers) -> list[str | None]:
    """Return the names of the rules that an image answers with."""
    reader = ImageReader(image.data)
    found: list[str | None] = []
    for n in range(len(headers)):
        protocol, icmp = int(headers.protocol[n]), int(headers.icmp[n])
        low = icmp if icmp >= 0 else int(headers.dport[n])
        service = protocol << 16 | low
        if icmp < 0 and protocol in (1, 58):
            service |= 1 << 24
        answer = reader.judge(
            headers.version,
            int(headers.remote[n][0]) << 64 | int(headers.remote[n][1]),
            int(headers.local[n][0]) << 64 | int(headers.local[n][1]),
            service,
            protocol << 16 | int(headers.sport[n]),
        )
        found.append(None if answer.is_default else image.rules[answer.rule].name)
    return found


def expected(rules: tuple[EffectiveRule, ...], headers: Headers) -> list[str | None]:
    found = first_matches(rules, headers)
    return [None if n == NO_MATCH else rules[n].name for n in found.tolist()]


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "crowded"])
@pytest.mark.parametrize("size", SIZES)
def test_images_say_what_the_rules_say(size: int, crowded: bool) -> None:
    world = World(size, crowded=crowded)
    rules = world.rules(size)
    image = image_of(rules)
    for version in (4, 6):
        headers = world.headers(rules, version, 300)
        assert answers(image, headers) == expected(rules, headers)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 32), st.integers(0, 140), st.booleans(), st.sampled_from((4, 6)))
def test_any_policy_is_compiled_right(seed: int, size: int, crowded: bool, version: int) -> None:
    world = World(seed, crowded=crowded)
    rules = world.rules(size)
    headers = world.headers(rules, version, 40)
    assert answers(image_of(rules), headers) == expected(rules, headers)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 32), st.randoms(use_true_random=False))
def test_the_order_of_rules_is_kept(seed: int, order: object) -> None:
    """The same rules in another order are another policy; each order is compiled right."""
    world = World(seed, crowded=True)
    rules = list(world.rules(90))
    order.shuffle(rules)  # type: ignore[attr-defined]
    shuffled = tuple(sorted(rules, key=lambda each: list(Tier).index(each.tier)))
    headers = world.headers(shuffled, 4, 60)
    assert answers(image_of(shuffled), headers) == expected(shuffled, headers)


def test_the_plain_way_is_the_evaluators_way() -> None:
    """brute_force.py itself is held against the reference evaluator."""
    world = World(5)
    rules = world.rules(60)
    for version in (4, 6):
        headers = world.headers(rules, version, 400)
        width = 32 if version == 4 else 128
        for n, name in enumerate(expected(rules, headers)):
            icmp = int(headers.icmp[n])
            remote, local = (
                (int(column[n][0]) << 64 | int(column[n][1])).to_bytes(width // 8, "big")
                for column in (headers.remote, headers.local)
            )
            opening = Opening(
                Path.TO_VM,
                ip_address(local),
                ip_address(remote),
                int(headers.protocol[n]),
                int(headers.sport[n]),
                int(headers.dport[n]),
                None if icmp < 0 else (icmp >> 8, icmp & 0xFF),
            )
            match = _first_match(rules, opening)
            assert (None if match is None else match.name) == name


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda rules: rules[1:], id="rule left out"),
        pytest.param(lambda rules: (replace(rules[0], peers=ANYWHERE), *rules[1:]), id="wider"),
        pytest.param(lambda rules: (rules[1], rules[0], *rules[2:]), id="order"),
    ],
)
def test_a_wrong_image_is_noticed(
    wrong: Callable[[tuple[EffectiveRule, ...]], tuple[EffectiveRule, ...]],
) -> None:
    """Negative control: images of other rules do not agree."""
    first = rule("a", peers=(ip_network("10.0.0.0/9"),), action=Action.DROP)
    rules = (first, rule("b", peers=(ip_network("10.0.0.0/8"),)), *World(1).rules(80))
    rules = tuple(replace(each, tier=Tier.GROUP) for each in rules)
    headers = World(2).headers(rules[:2], 4, 200)
    assert answers(image_of(rules), headers) == expected(rules, headers)
    assert answers(image_of(wrong(rules)), headers) != expected(rules, headers)


def test_rules_that_match_nothing_have_no_number() -> None:
    empty = rule("empty", peers=())
    image = image_of((empty, rule("r")))
    assert [each.name for each in image.rules] == ["r"]
    assert answers(image, make_headers(4, [(1, 2, 6, 1, 80, -1)])) == ["r"]


def test_rules_for_others_addresses_are_left_out_where_the_guard_forbids_those() -> None:
    mine = rule("mine", direction=Direction.EGRESS, local=(ip_network("10.20.0.0/24"),))
    other = rule("other", direction=Direction.EGRESS, local=(ip_network("10.20.1.0/24"),))
    closed = replace(other, name="closed", action=Action.DROP)
    egress = (mine, other, closed)
    policy = EffectivePolicy("vm", (replace(other, direction=Direction.INGRESS),), egress)
    sources = (ip_network("10.20.0.11/32"),)
    guarded, free = compile_policy(policy, sources=sources), compile_policy(policy)
    # Flows of an address that the VM had are judged again, so what does not accept stays.
    assert [each.name for each in guarded[Path.FROM_VM].rules] == ["mine", "closed"]
    assert [each.name for each in free[Path.FROM_VM].rules] == ["mine", "other", "closed"]
    # Toward the VM anything may be addressed: no guard speaks of it.
    assert [each.name for each in guarded[Path.TO_VM].rules] == ["other"]


def test_equal_policies_have_equal_images() -> None:
    first, second = image_of(World(3).rules(100)), image_of(World(3).rules(100))
    assert first == second
    renamed = tuple(replace(each, name=f"x{each.name}") for each in World(3).rules(100))
    assert image_of(renamed).data == first.data
    assert image_of(renamed).digest != first.digest
    assert image_of(World(3).rules(100), defaults=Defaults(ingress=Action.ACCEPT)) != first


def test_one_policy_of_many_vms_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = EffectivePolicy("vm1", World(9).rules(70))
    first = compile_policy(policy)
    monkeypatch.setattr(compiler, "_build", None)
    second = compile_policy(dataclasses.replace(policy, vm="vm2"))
    assert second[Path.TO_VM] is first[Path.TO_VM]


def test_large_images_are_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_REMEMBERED_BYTES", 1 << 16)
    for seed in range(4):
        compile_policy(EffectivePolicy("vm", World(seed).rules(300)))
    assert len(compiler._memory) == 2
    assert sum(len(each.image.data) for each in compiler._memory) > 1 << 16


def test_the_defaults_are_in_the_image() -> None:
    defaults = Defaults(ingress=Action.REJECT, log=True)
    word = ImageReader(image_of((), defaults=defaults).data).by_default
    assert word >> 32 == abi.NO_RULE
    assert word >> 8 & 0xFF == abi.RULE_LOG
    assert word & 0xFF == Action.REJECT


def test_catalogue_L15_rules_beyond_the_limit_are_refused() -> None:
    nets = [ip_network((n << 8, 24)) for n in range(MAX_RULES + 1)]
    rules = tuple(rule(f"r{n}", peers=(net,), file="p.yaml", line=n) for n, net in enumerate(nets))
    image = image_of(rules[:-1])
    assert len(image.rules) == MAX_RULES
    message = r"VM vm, ingress: 50001 rules, the limit is 50000: rule 'r50000' .* p.yaml:50000 "
    with pytest.raises(PolicyTooLargeError, match=message) as caught:
        image_of(rules)
    assert caught.value.exit_code == ExitCode.POLICY_INVALID


def test_catalogue_L15_too_much_memory_is_refused_by_the_rule_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "MAX_BYTES", 1 << 20)
    many = tuple(ip_network((n << 9, 24)) for n in range(60_000))
    rules = (*World(1).rules(70), rule("big", tier=Tier.BASELINE, peers=many))
    with pytest.raises(PolicyTooLargeError, match=r"more than 1 MiB; rule 'big' of policy 'p' has"):
        image_of(rules)
    assert image_of(rules[:-1]).rules


def test_catalogue_L15_few_rules_may_not_take_more_memory_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "MAX_BYTES", 1 << 20)
    many = tuple(ip_network((n << 9, 24)) for n in range(60_000))
    with pytest.raises(PolicyTooLargeError, match=r"more than 1 MiB; rule 'big' of policy 'p' has"):
        image_of((rule("small"), rule("big", peers=many)))


def test_no_image_is_larger_than_the_maps_that_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind the searches, such as the rules' words, takes memory too."""
    assert abi.IMAGE_PARTS * ctypes.sizeof(abi.ImagePart) == compiler.MAX_BYTES
    nets = [ip_network((n << 8, 24)) for n in range(2000)]
    rules = tuple(rule(f"r{n}", peers=(net,)) for n, net in enumerate(nets))
    size = len(image_of(rules).data)
    monkeypatch.setattr(compiler, "MAX_BYTES", size)
    assert len(image_of(rules).data) == size
    for less in (1, 64, 4096, 16384):
        monkeypatch.setattr(compiler, "MAX_BYTES", size - less)
        with pytest.raises(PolicyTooLargeError):
            image_of(rules)


def test_long_builds_say_what_they_are_at() -> None:
    said: list[str] = []
    nets = [ip_network((n << 8, 24)) for n in range(6000)]
    rules = tuple(rule(f"r{n}", peers=(net,)) for n, net in enumerate(nets))
    compile_policy(EffectivePolicy("vm", rules), progress=said.append)
    assert said[0] == "VM vm, ingress: building tables of 6000 rules: blocks"
    assert any("remote IPv6" in line for line in said)
    compile_policy(EffectivePolicy("vm", rules[:NARROW_RULES]), progress=said.append)
    assert len(said) == 7


def test_services_stay_apart() -> None:
    """A rule for a port of one protocol says nothing of another, nor of ICMP with that number."""
    rules = (
        rule("tcp", services=(Service(6, (53, 53)),)),
        rule("echo", services=(Service(1, None, 8),)),
    )
    rows = [
        (1, 2, 6, 9, 53, -1),
        (1, 2, 17, 9, 53, -1),
        (1, 2, 1, 0, 0, 8 << 8),
        (1, 2, 1, 0, 0, 53),
    ]
    assert answers(image_of(rules), make_headers(4, rows)) == ["tcp", None, "echo", None]
