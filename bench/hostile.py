# SPDX-License-Identifier: Apache-2.0
"""Rule sets and headers for which a lookup takes long: every block, whole lines, long searches.

vgw/policy/wide.py puts rules into blocks by tier and by the first of their remote addresses. Here
that address is one of the block's own, which nobody sends from; the addresses that headers come
from are beside it, in every block.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Generic, TypeVar

from bench.headers import Header
from bench.prefixes import WIDTH
from bench.rulesets import POLICY
from vgw.abi import Action
from vgw.policy.image import BLOCK_RULES
from vgw.policy.model import (
    SCTP,
    TCP,
    TIERS,
    Direction,
    EffectiveRule,
    Network,
    Service,
    Tier,
)

#: Rules that fill a block in each tier.
FEWEST: Final = 6 * BLOCK_RULES
#: Rules in the last block of a tier: enough for two groups of places.
_SHORT_BLOCK: Final = 64
_FIELDS: Final = 4
#: Before all other addresses: one for each block.
_MARKERS: Final = {4: 1 << 24, 6: 0x2000 << 112}
#: The first of the values that headers have.
_REMOTE: Final = {4: 0x0A140000, 6: 0x20010DB8_00200000_00000000_00010000}
_LOCAL: Final = {4: 0x0A1E0000, 6: 0x20010DB8_00210000_00000000_00010000}
_PORT: Final = 8192
#: How far behind it other values lie, so that searches are long.
_FAR: Final = tuple(range(8 * 256, 48 * 256, 256))
_FAR_ADDRESSES: Final = {
    4: (*_FAR, 1 << 20, 1 << 30),
    # A few in each word but the last, where headers differ.
    6: (*(n << 32 * word for word in (1, 2, 3) for n in range(1, 11)), 1 << 124),
}

_T = TypeVar("_T")
#: Inclusive range of numbers, counted from the first of the values that headers have.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Field(Generic[_T]):
    """What rules may say in a field: half of the headers' values, all, or another value."""

    parts: Sequence[_T]
    every: _T
    others: Sequence[_T]

    def of(self, place: int, *, matches: bool, left_out: bool) -> _T:
        """Return what the rule in a place of a block says."""
        if matches:
            return self.every
        # Parts come in pairs, one of which has any given value, so each group has rules for it.
        choices = self.others if left_out else self.parts
        return choices[place // _FIELDS % len(choices)]


def hostile_rules(
    size: int, version: int, bits: int, *, matching: bool
) -> tuple[EffectiveRule, ...]:
    """Return `size` rules toward a VM for headers that have one of 1 << `bits` values a field.

    Each rule leaves out all these values in one field, the next rule in another, and admits half
    of them in the three others. So all fields of a header have rules in every group of places, and
    no rule matches. With `matching` the last rule of each block matches all headers, though the
    first rules of all blocks of its tier come before it; in all tiers but the last it passes.
    """
    local = _field(bits, _FAR_ADDRESSES[version], _networks(version, _LOCAL[version]))
    remote = _field(bits, _FAR_ADDRESSES[version], _networks(version, _REMOTE[version]))
    services = _field(bits, _FAR, _services)
    sources = _field(bits, _FAR, _source_ports)
    peers: dict[tuple[int, int], tuple[Network, ...]] = {}
    rules: list[EffectiveRule] = []
    for tier, count in zip(TIERS, _tier_sizes(size), strict=True):
        for block, place, is_last in _places(count):
            matches = matching and is_last
            left_out = [place % _FIELDS == field for field in range(_FIELDS)]
            networks = remote.of(place, matches=matches, left_out=left_out[0])
            marked = peers.setdefault(
                (block, id(networks)), (_network(version, _MARKERS[version] + block), *networks)
            )
            rules.append(
                EffectiveRule(
                    direction=Direction.INGRESS,
                    tier=tier,
                    policy=POLICY,
                    name=f"r{len(rules)}",
                    action=_action(tier, matches=matches),
                    peers=marked,
                    local=local.of(place, matches=matches, left_out=left_out[1]),
                    services=services.of(place, matches=matches, left_out=left_out[2]),
                    source_ports=sources.of(place, matches=matches, left_out=left_out[3]),
                )
            )
    return tuple(rules)


def hostile_headers(version: int, bits: int, count: int) -> list[Header]:
    """Return headers for rules of the same arguments, their values drawn at random."""
    rng = random.Random(f"hostile {version} {bits}")  # noqa: S311 - repeatable
    return [
        Header(
            version,
            _REMOTE[version] + rng.getrandbits(bits),
            _LOCAL[version] + rng.getrandbits(bits),
            TCP,
            _PORT + rng.getrandbits(bits),
            _PORT + rng.getrandbits(bits),
        )
        for _ in range(count)
    ]


def _tier_sizes(size: int) -> list[int]:
    """Return how many rules each tier has so that there are as many blocks as possible."""
    early = size // len(TIERS) // BLOCK_RULES * BLOCK_RULES + _SHORT_BLOCK
    return [early] * (len(TIERS) - 1) + [size - early * (len(TIERS) - 1)]


def _places(count: int) -> Iterator[tuple[int, int, bool]]:
    """Iterate over the rules of a tier: the block of each, its place there, whether it is the last.

    The first rules are the first ones of all blocks, and those of each block follow together.
    """
    blocks = -(-count // BLOCK_RULES)
    yield from ((block, 0, False) for block in range(blocks))
    for block in range(blocks):
        rules = min(BLOCK_RULES, count - block * BLOCK_RULES)
        yield from ((block, place, place == rules - 1) for place in range(1, rules))


def _action(tier: Tier, *, matches: bool) -> Action:
    if not matches:
        return Action.DROP
    return Action.ACCEPT if tier is TIERS[-1] else Action.PASS


def _field(bits: int, far: Sequence[int], make: Callable[[Sequence[Span]], _T]) -> _Field[_T]:
    """Return a field of 1 << `bits` values; part 2 * n + b has those whose bit n is b."""
    parts = [
        [(first, first + (1 << bit) - 1) for first in range(value << bit, 1 << bits, 2 << bit)]
        for bit in range(bits)
        for value in (0, 1)
    ]
    others = [make([(offset, offset)]) for offset in far]
    return _Field([make(part) for part in parts], make([(0, (1 << bits) - 1)]), others)


def _network(version: int, value: int, length: int | None = None) -> Network:
    pair = value, WIDTH[version] if length is None else length
    return IPv4Network(pair) if version == 4 else IPv6Network(pair)


def _networks(version: int, base: int) -> Callable[[Sequence[Span]], tuple[Network, ...]]:
    """Return what makes networks of ranges, each of which is one aligned network."""

    def make(spans: Sequence[Span]) -> tuple[Network, ...]:
        return tuple(
            _network(version, base + first, WIDTH[version] - (last - first).bit_length())
            for first, last in spans
        )

    return make


def _services(spans: Sequence[Span]) -> tuple[Service, ...]:
    # A port of another protocol makes the search cover more numbers, so it is longer.
    return (
        *(Service(TCP, (_PORT + first, _PORT + last)) for first, last in spans),
        Service(SCTP, (1, 1)),
    )


def _source_ports(spans: Sequence[Span]) -> tuple[Span, ...]:
    return tuple((_PORT + first, _PORT + last) for first, last in spans)
