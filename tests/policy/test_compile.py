# SPDX-License-Identifier: Apache-2.0
"""Compiled policies: an image, interpreted here on its own, says what the rules say.

The interpreter reads the tables by scanning them, not by the binary search of bpf/policy.h, so that
it shares no mistake with it. The loaded programs are held against the evaluator in tests/bpf.
"""

from __future__ import annotations

import array
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from vgw import abi
from vgw.abi import Action, Path
from vgw.errors import ExitCode
from vgw.policy.compile import PolicyTooLargeError, compile_policy
from vgw.policy.evaluate import Opening, _first_match
from vgw.policy.model import (
    ANY_SERVICE,
    ECHO_REQUEST,
    Defaults,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Service,
    Tier,
)

NETWORKS = [ip_network(text) for text in ("10.0.0.0/8", "10.20.0.0/16", "10.20.0.128/25", "::/0")]
NETWORKS += [ip_network(text) for text in ("0.0.0.0/0", "2001:db8::/32", "2001:db8:1::5/128")]
#: Rules of a block, which is what `pass` skips by.
BLOCK = abi.IMAGE_BLOCK_WORDS * 64
SERVICES = [
    ANY_SERVICE,
    Service(6, ports=(80, 80)),
    Service(6, ports=(8000, 8099)),
    Service(17, ports=(53, 53)),
    Service(17),
    Service(47),
    Service(1, icmp_type=8),
    Service(1),
    Service(58, icmp_type=1, icmp_code=4),
]
SOURCE_PORTS: list[tuple[tuple[int, int], ...]] = [(), ((1024, 65535),), ((1, 1), (53, 60))]


def rule(name: str, **changes: object) -> EffectiveRule:
    base = EffectiveRule(Direction.INGRESS, Tier.GROUP, "p", name, Action.ACCEPT)
    return replace(base, **changes)  # type: ignore[arg-type]


def ids(policy: EffectivePolicy) -> dict[str, int]:
    return {r.key: number for number, r in enumerate((*policy.ingress, *policy.egress), 7)}


class Interpreter:
    """Reads an image by its documented layout."""

    def __init__(self, image: bytes) -> None:
        self.words = array.array("Q", image)
        assert self.words[0] == 1
        assert len(self.words) % abi.IMAGE_BLOCK_WORDS == 0

    def judge(self, opening: Opening) -> tuple[Action, int]:
        """Return the action and the rule id for a packet, (default action, NO_RULE) without one."""
        first = (1 + 3 * opening.path) * abi.IMAGE_BLOCK_WORDS
        fields = self.words[first : first + 12]
        blocks, rules, default, _ = fields[8:12]
        vectors = (
            self.address_vector(fields[0], fields[1], opening.remote),
            self.address_vector(fields[2], fields[3], opening.local),
            self.value_vector(fields[4], fields[5], service_of(opening)),
            self.value_vector(fields[6], fields[7], source_of(opening)),
        )
        skipped = 0
        for bit in range(blocks * BLOCK):
            word = self.words[rules + bit]
            if bit // BLOCK < skipped or not all(self.bit(vector, bit) for vector in vectors):
                continue
            if word & 0xFF != Action.PASS:
                return Action(word & 0xFF), word >> 32
            skipped = word >> 16 & 0xFFFF
        return Action(default & 0xFF), default >> 32

    def bit(self, vector: int, number: int) -> int:
        return self.words[vector + number // 64] >> number % 64 & 1

    def address_vector(self, first: int, count: int, address: object) -> int:
        value = int.from_bytes(abi.address_bytes(address), "big")  # type: ignore[arg-type]
        pairs = [self.words[first + 2 * i : first + 2 * i + 2] for i in range(count)]
        starts = [high << 64 | low for high, low in pairs]
        assert starts == sorted(set(starts))
        assert starts[0] == 0
        index = max(i for i in range(count) if starts[i] <= value)
        return self.words[first + 2 * count + index]

    def value_vector(self, first: int, count: int, value: int) -> int:
        words = self.words[first : first + count]
        starts = [word >> 32 for word in words]
        assert starts == sorted(set(starts))
        assert starts[0] == 0
        return words[max(i for i in range(count) if starts[i] <= value)] & 0xFFFFFFFF


def service_of(opening: Opening) -> int:
    if opening.icmp is not None:
        return opening.protocol << 16 | opening.icmp[0] << 8 | opening.icmp[1]
    return opening.protocol << 16 | opening.destination_port


def source_of(opening: Opening) -> int:
    return opening.protocol << 16 | opening.source_port


def openings(path: Path) -> Iterator[Opening]:
    """Packets on both sides of each boundary of the networks and services above."""
    v4 = [ip_address(text) for text in ("9.255.255.255", "10.0.0.0", "10.20.0.127", "10.20.0.128")]
    v4 += [ip_address(text) for text in ("10.20.0.255", "10.20.1.0", "11.0.0.0", "192.0.2.1")]
    v6 = [ip_address(text) for text in ("2001:db7:ffff::", "2001:db8::", "2001:db8:1::4")]
    v6 += [ip_address(text) for text in ("2001:db8:1::5", "2001:db8:1::6", "::fffe:0:1", "fe80::1")]
    for remote in v4 + v6:
        local = ip_address("10.20.0.11" if remote.version == 4 else "2001:db8:20::11")
        for protocol, source, port in itertools.product(
            (6, 17, 132), (1, 52, 53, 1023, 1024), (52, 53, 79, 80, 81, 7999, 8000, 8099, 8100)
        ):
            yield Opening(path, local, remote, protocol, source, port)
        echo = 1 if remote.version == 4 else 58
        for kind, code in ((ECHO_REQUEST[echo], 0), (ECHO_REQUEST[echo], 1), (1, 4), (13, 0)):
            yield Opening(path, local, remote, echo, icmp=(kind, code))
        for protocol in (46, 47, 48, 255):
            yield Opening(path, local, remote, protocol)


def expected(policy: EffectivePolicy, numbers: dict[str, int], o: Opening) -> tuple[Action, int]:
    direction = Direction.INGRESS if o.path is Path.TO_VM else Direction.EGRESS
    match = _first_match(policy.rules(direction), o)
    if match is None:
        return policy.defaults.action(direction), abi.NO_RULE
    return match.action, numbers[match.key]


def random_rules(seed: int, direction: Direction, count: int) -> tuple[EffectiveRule, ...]:
    rng = random.Random(seed)
    rules = [
        rule(
            f"r{number}",
            direction=direction,
            tier=rng.choice(list(Tier)),
            action=rng.choice(list(Action)),
            peers=tuple(rng.sample(NETWORKS, rng.randint(0, 3))),
            local=tuple(rng.sample(NETWORKS, rng.randint(2, 5))),
            services=tuple(rng.sample(SERVICES, rng.randint(1, 2))),
            source_ports=rng.choice(SOURCE_PORTS),
        )
        for number in range(count)
    ]
    return tuple(sorted(rules, key=lambda r: list(Tier).index(r.tier)))


@pytest.mark.parametrize("seed", range(4))
def test_images_say_what_the_rules_say(seed: int) -> None:
    """Random rules over all tiers, both directions, judged at every boundary."""
    policy = EffectivePolicy(
        "vm",
        random_rules(seed, Direction.INGRESS, 30),
        random_rules(seed + 100, Direction.EGRESS, 5),
    )
    numbers = ids(policy)
    interpreter = Interpreter(compile_policy(policy, numbers))
    for opening in itertools.chain(openings(Path.TO_VM), openings(Path.FROM_VM)):
        assert interpreter.judge(opening) == expected(policy, numbers, opening), opening


def test_a_wrong_rule_is_noticed() -> None:
    """Negative control: an image compiled of other rules does not agree."""
    policy = EffectivePolicy("vm", random_rules(1, Direction.INGRESS, 30))
    changed = list(policy.ingress)
    changed[0] = replace(changed[0], peers=(), action=Action.DROP)
    numbers = ids(policy)
    image = Interpreter(compile_policy(replace(policy, ingress=tuple(changed[::-1])), numbers))
    assert any(image.judge(o) != expected(policy, numbers, o) for o in openings(Path.TO_VM))


def test_an_empty_group_matches_nothing() -> None:
    policy = EffectivePolicy("vm", (rule("r", peers=()),), defaults=Defaults())
    interpreter = Interpreter(compile_policy(policy, ids(policy)))
    assert {interpreter.judge(o) for o in openings(Path.TO_VM)} == {(Action.DROP, abi.NO_RULE)}


def test_compiling_is_deterministic() -> None:
    policy = EffectivePolicy("vm", random_rules(3, Direction.INGRESS, 50))
    assert compile_policy(policy, ids(policy)) == compile_policy(policy, ids(policy))


def test_tiers_share_no_block() -> None:
    """`pass` skips whole blocks, so a tier that needs a second block moves those behind it."""
    rules = [rule(f"a{n}", tier=Tier.ADMIN, action=Action.PASS, peers=()) for n in range(300)]
    rules[299] = replace(rules[299], peers=(ip_network("10.0.0.0/8"),))
    rules.append(rule("never", tier=Tier.ADMIN, action=Action.DROP))
    rules.append(rule("vm", tier=Tier.VM))
    policy = EffectivePolicy("vm", tuple(rules))
    numbers = ids(policy)
    interpreter = Interpreter(compile_policy(policy, numbers))
    for opening in openings(Path.TO_VM):
        assert interpreter.judge(opening) == expected(policy, numbers, opening)


def test_limits_hold_and_one_more_is_refused() -> None:
    rules = tuple(rule(f"r{n}", peers=()) for n in range(7 * BLOCK))
    policy = EffectivePolicy("web01", rules)
    compile_policy(policy, ids(policy))
    policy = replace(policy, ingress=(*rules, rule("one-more")))
    message = r"VM web01, ingress: 1793 rules need 8 blocks"
    with pytest.raises(PolicyTooLargeError, match=message) as caught:
        compile_policy(policy, ids(policy))
    assert caught.value.exit_code == ExitCode.POLICY_INVALID


def test_too_many_ranges_are_refused() -> None:
    peers = tuple(ip_network(f"10.{n >> 8}.{n & 255}.0/25") for n in range(4096))
    policy = EffectivePolicy("web01", (rule("r", peers=peers),))
    with pytest.raises(
        PolicyTooLargeError, match=r"web01, ingress: .* 8193 ranges of peer .* 8192"
    ):
        compile_policy(policy, ids(policy))
    policy = EffectivePolicy("web01", (rule("r", peers=peers[:-1]),))
    compile_policy(policy, ids(policy))


def test_rule_words_carry_id_log_and_action() -> None:
    rules = (rule("r", log=True, action=Action.REJECT),)
    policy = EffectivePolicy("vm", rules, defaults=Defaults(log=True))
    words = array.array("Q", compile_policy(policy, {rules[0].key: 0xABCDEF}))
    first = abi.IMAGE_BLOCK_WORDS
    word, default = words[words[first + 9]], words[first + 10]
    assert word >> 32 == 0xABCDEF
    assert word >> 8 & 0xFF == abi.RULE_LOG
    assert word & 0xFF == Action.REJECT
    assert default == abi.NO_RULE << 32 | abi.RULE_LOG << 8 | Action.DROP
