# SPDX-License-Identifier: Apache-2.0
"""Ordered rule sets shaped like real ones, the same for the same arguments on every machine.

The shapes are those of ClassBench's filter sets: few services, and addresses that carry the size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

from bench.prefixes import WIDTH, Prefix, pool, roots, to_network
from vgw.abi import Action
from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    ICMP,
    ICMPV6,
    TCP,
    UDP,
    Direction,
    EffectiveRule,
    Network,
    Service,
    Tier,
)

_T = TypeVar("_T")
#: A service and the source ports it is used from; no ports are all ports.
Traffic = tuple[Service, tuple[tuple[int, int], ...]]
#: What a rule matches: source, destination (None: any) and traffic.
Match = tuple[Prefix | None, Prefix | None, Traffic]

SIZES: Final = (10, 100, 1_000, 10_000, 50_000)
POLICY: Final = "bench"
ALL_PORTS: Final = (1, 65535)
HIGH_PORTS: Final = (1024, 65535)
_LOW_PORTS: Final = (1, 1023)

_LENGTHS: Final[Mapping[int, Mapping[int, int]]] = {
    4: {8: 1, 12: 1, 16: 5, 18: 2, 20: 4, 22: 5, 24: 25, 26: 5, 28: 8, 30: 6, 32: 38},
    6: {32: 2, 36: 1, 40: 3, 44: 3, 48: 18, 52: 4, 56: 8, 60: 4, 64: 25, 96: 3, 128: 29},
}
#: Inside one /16 or /48 there are few short prefixes, so a large set consists of long ones.
_SITE_LENGTHS: Final[Mapping[int, Mapping[int, int]]] = {
    4: {18: 1, 20: 2, 22: 3, 24: 10, 26: 8, 28: 12, 30: 14, 32: 50},
    6: {52: 1, 56: 3, 60: 5, 64: 25, 80: 6, 96: 6, 112: 8, 128: 46},
}
#: Standard deviation of the order from narrow to broad; a wildcard address weighs 1.
_DISORDER: Final = 0.3
_POPULAR_PORTS: Final = (80, 443, 22, 25, 53, 110, 143, 123, 161, 389, 445, 3306, 5432, 8080, 3389)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a family of rule sets looks like.

    `sources`, `destinations` and `services` are how many different ones a set of each of SIZES
    has. The shares are between 0 and 1: rules with a wildcard source or destination, services that
    are a range of ports, services from certain source ports, rules that drop.
    """

    sources: Sequence[int]
    destinations: Sequence[int]
    services: Sequence[int]
    any_source: float
    any_destination: float
    port_ranges: float
    source_ports: float
    drops: float


SHAPES: Final[Mapping[str, Shape]] = {
    "acl": Shape(
        sources=(8, 60, 600, 5_000, 40_000),
        destinations=(6, 40, 350, 3_500, 42_000),
        services=(5, 15, 60, 250, 300),
        any_source=0.02,
        any_destination=0.01,
        port_ranges=0.15,
        source_ports=0.03,
        drops=0.2,
    ),
    "fw": Shape(
        sources=(5, 30, 150, 1_500, 20_000),
        destinations=(6, 45, 250, 1_800, 36_000),
        services=(6, 25, 110, 400, 380),
        any_source=0.3,
        any_destination=0.15,
        port_ranges=0.45,
        source_ports=0.15,
        drops=0.3,
    ),
    "ipc": Shape(
        sources=(7, 50, 400, 3_000, 30_000),
        destinations=(7, 50, 400, 5_000, 40_000),
        services=(6, 20, 90, 600, 340),
        any_source=0.1,
        any_destination=0.08,
        port_ranges=0.25,
        source_ports=0.08,
        drops=0.25,
    ),
}


@dataclass(frozen=True, slots=True)
class Counts:
    """How many different values the fields of a rule set have; wildcards count as one."""

    sources: int
    destinations: int
    services: int


def untouched(
    count: int, size: int, shape: str, version: int, touches: Callable[[EffectiveRule], bool]
) -> list[EffectiveRule]:
    """Return `count` rules of a set of about `size`, in their order, none of which `touches`."""
    spare = size + size // 4 + 16
    others = [one for one in generate(spare, shape, version) if not touches(one)]
    rng = random.Random(size)  # noqa: S311 - repeatable
    return [others[index] for index in sorted(rng.sample(range(len(others)), count))]


def is_within(host: Network, network: Network) -> bool:
    """Tell whether a network of one address is inside another network, of any version."""
    return host.version == network.version and host.network_address in network


def generate(
    size: int, shape: str, version: int = 4, *, one_site: bool = False, seed: int = 1
) -> tuple[EffectiveRule, ...]:
    """Return `size` rules toward a VM in their order.

    `shape` is a name in SHAPES, `version` the IP version; with `one_site` all addresses are inside
    one /16 (IPv6: /48). A rule has one source, one destination and one service, so that it is one
    rule in any firewall.
    """
    rng = random.Random(f"{seed} {shape} {version} {one_site} {size}")  # noqa: S311 - repeatable
    form = SHAPES[shape]
    lengths = (_SITE_LENGTHS if one_site else _LENGTHS)[version]
    bases = roots(rng, version, one_site=one_site)
    sources = pool(rng, version, _at(form.sources, size), lengths, bases)
    destinations = pool(rng, version, _at(form.destinations, size), lengths, bases)
    columns = zip(
        _with_wildcards(rng, sources, size, form.any_source),
        _with_wildcards(rng, destinations, size, form.any_destination),
        _column(rng, _traffic_pool(rng, form, version, _at(form.services, size)), size),
        strict=True,
    )
    seen: set[Match] = set()
    rules: list[EffectiveRule] = []
    for match in _in_order(rng, columns, version):
        while match in seen or match[:2] == (None, None):
            # Rules that say the same, or nothing about addresses, would hide those behind them.
            match = rng.choice(sources), rng.choice(destinations), match[2]  # noqa: PLW2901
        seen.add(match)
        source, destination, traffic = match
        action = Action.DROP if rng.random() < form.drops else Action.ACCEPT
        peers, local = _networks(source, version), _networks(destination, version)
        rules.append(rule(f"r{len(rules)}", action, peers, local, traffic))
    return tuple(rules)


def rule(
    name: str,
    action: Action,
    peers: tuple[Network, ...],
    local: tuple[Network, ...],
    traffic: Traffic,
) -> EffectiveRule:
    """Return a rule toward the VM in the one policy of all rule sets."""
    return EffectiveRule(
        direction=Direction.INGRESS,
        tier=Tier.GROUP,
        policy=POLICY,
        name=name,
        action=action,
        peers=peers,
        local=local,
        services=(traffic[0],),
        source_ports=traffic[1],
    )


def counts(rules: Sequence[EffectiveRule]) -> Counts:
    """Count the different values of each field."""
    return Counts(
        sources=len({rule.peers for rule in rules}),
        destinations=len({rule.local for rule in rules}),
        services=len({(rule.services, rule.source_ports) for rule in rules}),
    )


def _at(anchors: Sequence[int], size: int) -> int:
    """Return a count for any size: on a straight line between SIZES in logarithms."""
    points = list(zip(SIZES, anchors, strict=True))
    for (low, first), (high, last) in pairwise(points):
        if size <= high:
            place = math.log(max(size, low) / low) / math.log(high / low)
            return min(size, round(first * math.pow(last / first, place)))
    return anchors[-1]


def _networks(prefix: Prefix | None, version: int) -> tuple[Network, ...]:
    return ANYWHERE if prefix is None else (to_network(prefix, version),)


def _column(rng: random.Random, values: Sequence[_T], size: int) -> list[_T]:
    """Return one field of `size` rules in any order: every value once, the first ones often."""
    weights = [1 / rank for rank in range(1, len(values) + 1)]
    column = [*values[:size], *rng.choices(values, weights, k=max(size - len(values), 0))]
    rng.shuffle(column)
    return column


def _in_order(rng: random.Random, columns: Iterable[Match], version: int) -> list[Match]:
    """Return matches as people order rules: mostly the narrow ones before the broad ones."""

    def breadth(match: Match) -> float:
        *addresses, (service, _) = match
        fixed = sum(prefix.length / WIDTH[version] for prefix in addresses if prefix)
        low, high = service.ports or ALL_PORTS
        return rng.gauss(0, _DISORDER) - fixed - (1 - (high - low) / 65535) / 2

    return sorted(columns, key=breadth)


def _with_wildcards(
    rng: random.Random, values: Sequence[Prefix], size: int, share: float
) -> list[Prefix | None]:
    """Return a column in which a share of the rules, as far as values leave room, has None."""
    wildcards = min(round(size * share), max(size - len(values), 0))
    column = [*_column(rng, values, size - wildcards), *([None] * wildcards)]
    rng.shuffle(column)
    return column


def _traffic_pool(rng: random.Random, form: Shape, version: int, count: int) -> list[Traffic]:
    """Return `count` different services, the common ones first."""
    found: dict[Traffic, None] = dict.fromkeys(
        (service, ())
        for service in (
            Service(TCP, (80, 80)),
            Service(TCP, (443, 443)),
            Service(TCP, ALL_PORTS),
            ANY_SERVICE,
            Service(TCP, HIGH_PORTS),
            Service(UDP, (53, 53)),
            Service(ICMP if version == 4 else ICMPV6),
            Service(UDP, HIGH_PORTS),
        )[:count]
    )
    while len(found) < count:
        protocol = TCP if rng.random() < 0.75 else UDP
        traffic = Service(protocol, _ports(rng, form)), _source_ports(rng, form)
        found.setdefault(traffic)
    return list(found)


def _ports(rng: random.Random, form: Shape) -> tuple[int, int]:
    if rng.random() >= form.port_ranges:
        port = rng.choice(_POPULAR_PORTS) if rng.random() < 0.2 else rng.randint(1, 65535)
        return port, port
    if rng.random() < 0.2:
        return rng.choice((ALL_PORTS, HIGH_PORTS, _LOW_PORTS))
    first = rng.randint(1, 65000)
    return first, min(65535, first + rng.choice((1, 4, 9, 99, 999, 9999)))


def _source_ports(rng: random.Random, form: Shape) -> tuple[tuple[int, int], ...]:
    if rng.random() >= form.source_ports:
        return ()
    low = rng.choice((20, 53, 67, 123, 1812))
    return (rng.choice((HIGH_PORTS, HIGH_PORTS, (low, low))),)
