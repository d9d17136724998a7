# SPDX-License-Identifier: Apache-2.0
"""Rules said never to match, in policies made at random or too large to look at."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgw.abi import Action
from vgw.abi import Path as Way
from vgw.policy import evaluate, shadow
from vgw.policy.evaluate import Opening
from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    ECHO_REQUEST,
    ICMP,
    ICMPV6,
    PORT_PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    AppliesTo,
    EffectiveRule,
    Network,
    Policy,
    PolicyDocument,
    Rule,
    Service,
    Tier,
)
from vgw.policy.resolve import effective_policy
from vgw.policy.shadow import shadowed_rules

#: Few values, so that many rules are within others.
NETWORKS = [
    *(
        ip_network(f"10.0.0.{first}/{length}", strict=False)
        for length in (29, 30, 31, 32)
        for first in range(8)
    ),
    *(
        ip_network(f"2001:db8::{first}/{length}", strict=False)
        for length in (126, 127, 128)
        for first in range(4)
    ),
    *ANYWHERE,
]
ICMP_OF_VERSION = {4: ICMP, 6: ICMPV6}

networks = st.sampled_from(NETWORKS)
ports = st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda pair: (pair[0], sum(pair)))
services = st.one_of(
    st.just(ANY_SERVICE),
    st.builds(Service, st.sampled_from([TCP, UDP, SCTP]), ports),
    st.builds(Service, st.sampled_from([TCP, ICMP, ICMPV6, 47])),
    st.builds(
        Service,
        st.sampled_from([ICMP, ICMPV6]),
        icmp_type=st.sampled_from([3, 8, 128]),
        icmp_code=st.sampled_from([None, 0, 1]),
    ),
)
rules = st.builds(
    Rule,
    name=st.just(""),
    action=st.sampled_from(Action),
    peers=st.lists(networks, max_size=3).map(tuple),
    local=st.lists(networks, max_size=2).map(tuple),
    services=st.lists(services, max_size=3).map(tuple),
    source_ports=st.one_of(st.just(()), st.lists(ports, max_size=2).map(tuple)),
)


def document_of(*tiers: Sequence[Rule]) -> PolicyDocument:
    """Return a policy in each tier; the line of a rule is its position in the evaluation."""
    lines = iter(range(1, 1 + sum(map(len, tiers))))
    policies = [
        Policy(
            f"p{number}",
            tier,
            AppliesTo(all=True),
            tuple(replace(rule, name=f"r{(line := next(lines))}", line=line) for rule in written),
        )
        for number, (tier, written) in enumerate(zip(Tier, tiers, strict=False))
    ]
    return PolicyDocument(policies=tuple(policies))


def openings(rule: EffectiveRule, chance: random.Random) -> Iterator[Opening]:
    """Iterate over packets that a rule matches, mostly from the edges of its sets."""
    for peer in rule.peers:
        for local in rule.local:
            if peer.version != local.version:
                continue
            for service in rule.services:
                for protocol, port, icmp in packets(service, peer.version, chance):
                    first, last = chance.choice(rule.source_ports or ((0, 65535),))
                    yield Opening(
                        path=Way.TO_VM,
                        local=local[chance.choice([0, -1])],
                        remote=peer[chance.choice([0, -1])],
                        protocol=protocol,
                        source_port=chance.choice([first, last, chance.randint(first, last)]),
                        destination_port=port,
                        icmp=icmp,
                    )


def packets(
    service: Service, version: int, chance: random.Random
) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
    """Iterate over protocol, port, and type and code of packets of a service."""
    own_icmp = ICMP_OF_VERSION[version]
    code = chance.choice([0, 1, 255]) if service.icmp_code is None else service.icmp_code
    if service.protocol is None:
        for protocol in sorted(PORT_PROTOCOLS):
            yield protocol, chance.choice([0, 1, 2, 3, 65535]), None
        yield own_icmp, 0, (ECHO_REQUEST[own_icmp], code)
    elif service.ports is not None:
        for port in service.ports:
            yield service.protocol, port, None
    elif service.protocol in PORT_PROTOCOLS:
        yield service.protocol, chance.choice([0, 1, 65535]), None
    elif service.protocol != own_icmp:
        if service.icmp_type is None:
            yield service.protocol, 0, None
    else:
        types = [0, 3, 8, 128] if service.icmp_type is None else [service.icmp_type]
        yield service.protocol, 0, (chance.choice(types), code)


def reached(document: PolicyDocument, seed: int) -> list[str]:
    """Return the rules that are said never to match and that a packet reaches all the same."""
    chance = random.Random(seed)
    effective = effective_policy(document, None).ingress
    found = []
    for problem in shadowed_rules(document):
        place = problem.line - 1
        # Were it a `pass`, the evaluator would not return it; what is before it does not change.
        rule = replace(effective[place], action=Action.DROP)
        altered = (*effective[:place], rule, *effective[place + 1 :])
        for opening in openings(rule, chance):
            assert evaluate._matches(rule, opening)
            if evaluate._first_match(altered, opening) is rule:
                found.append(f"{rule} gets {opening}")
    return found


@settings(max_examples=400)
@given(st.lists(st.lists(rules, max_size=6), min_size=1, max_size=3), st.integers(0, 1 << 30))
def test_no_packet_reaches_a_rule_that_is_said_never_to_match(
    tiers: list[list[Rule]], seed: int
) -> None:
    assert reached(document_of(*tiers), seed) == []


EVERYTHING = ((0, 1 << 140),)
A, B = (ip_network("10.0.0.0/31"),), (ip_network("10.0.0.2/31"),)


@pytest.mark.parametrize(
    ("converter", "first", "second"),
    [
        ("_address_set", Rule("", Action.DROP, A), Rule("", Action.DROP, B)),
        ("_address_set", Rule("", Action.DROP, local=A), Rule("", Action.DROP, local=B)),
        (
            "_service_set",
            Rule("", Action.DROP, services=(Service(TCP, (1, 2)),)),
            Rule("", Action.DROP, services=(Service(TCP, (2, 3)),)),
        ),
        (
            "_source_port_set",
            Rule("", Action.DROP, services=(Service(TCP),), source_ports=((1, 2),)),
            Rule("", Action.DROP, services=(Service(TCP),), source_ports=((2, 3),)),
        ),
    ],
)
def test_a_mistake_in_any_dimension_is_seen(
    converter: str, first: Rule, second: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = document_of([first, second])
    assert shadowed_rules(document) == ()
    monkeypatch.setattr(shadow, converter, lambda *_: EVERYTHING)
    assert any(reached(document, seed) for seed in range(8))


def test_a_mistake_about_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    document = document_of(
        [Rule("", Action.PASS), Rule("", Action.DROP)], [Rule("", Action.ACCEPT)]
    )
    assert [problem.line for problem in shadowed_rules(document)] == [2]
    monkeypatch.setattr(shadow, "Action", type("Other", (), {"PASS": None}))
    assert reached(document, 0)


def large(shape: str, count: int) -> list[Rule]:
    chance = random.Random(count)
    whole = ip_network("10.0.0.0/8")
    found = []
    for number in range(count):
        peers: tuple[Network, ...] = (whole,)
        port_range = 80, 80
        if shape == "addresses":
            peers = (IPv4Network((0x0A000000 + number, 32)),)
        elif shape == "prefixes":
            length = chance.randint(9, 32)
            first = 0x0A000000 | chance.getrandbits(24) >> (32 - length) << (32 - length)
            peers = (IPv4Network((first, length)),)
        elif shape == "lists":
            peers = (whole, IPv4Network((0x0B000000 + 2 * number, 32)))
        elif shape == "nested ranges":
            port_range = 32768 - number // 2, 32768 + (number + 1) // 2
        elif shape == "crossing ranges":
            low = chance.randint(1, 60000)
            port_range = low, chance.randint(low, 65535)
        found.append(Rule("", Action.DROP, peers, services=(Service(TCP, port_range),)))
    return found


@pytest.mark.parametrize(
    "shape", ["equal", "addresses", "prefixes", "lists", "nested ranges", "crossing ranges"]
)
def test_fifty_thousand_rules_are_looked_through(shape: str) -> None:
    last = Rule("", Action.ACCEPT, (ip_network("10.0.0.0/30"),), services=(Service(TCP, (80, 80)),))
    written = [*large(shape, 50_000), last]
    found = {problem.line for problem in shadowed_rules(document_of(written))}
    several = shape in {"equal", "prefixes", "crossing ranges"}
    assert len(found) > 1000 if several else len(found) == (shape == "lists")


@pytest.mark.parametrize(("limit", "value"), [("MAX_SHAPES", 8), ("MAX_BOXES", 500)])
def test_a_search_that_ends_early_reports_less(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(7)
    ranges = [(low, chance.randint(low, 99)) for low in chance.choices(range(1, 99), k=300)]
    written = [
        Rule("", Action.DROP, (chance.choice(NETWORKS),), services=(Service(TCP, each),))
        for each in ranges
    ]
    document = document_of(written)
    everything = {problem.line for problem in shadowed_rules(document)}
    monkeypatch.setattr(shadow, limit, value)
    fewer = {problem.line for problem in shadowed_rules(document)}
    assert fewer < everything
    assert reached(document, 1) == []
