# SPDX-License-Identifier: Apache-2.0
"""Pools of address prefixes that nest as those of real rule sets do."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from vgw.policy.model import Network

WIDTH: Final = {4: 32, 6: 128}

#: Share of prefixes that lie inside one drawn before.
_NESTED: Final = 0.5
#: Networks that everything else lies in, besides those all sets share.
_ROOTS: Final = 24
#: First bytes of unicast IPv4 that are neither loopback nor private.
_PUBLIC: Final = [byte for byte in range(11, 224) if byte != 127]
#: Share of IPv4 roots that are 10.0.0.0/8, as inside a company.
_PRIVATE_ROOTS: Final = 8


@dataclass(frozen=True, slots=True)
class Prefix:
    """An address prefix as numbers; the bits of `value` behind `length` are zero."""

    value: int
    length: int


def unicast(rng: random.Random, version: int) -> int:
    """Draw an address that a host could have, from everywhere."""
    if version == 4:
        return rng.choice(_PUBLIC) << 24 | rng.getrandbits(24)
    return 1 << 125 | rng.getrandbits(125)


def to_network(prefix: Prefix, version: int) -> Network:
    """Return a prefix as a network of IP version 4 or 6."""
    pair = prefix.value, prefix.length
    return IPv4Network(pair) if version == 4 else IPv6Network(pair)


def roots(rng: random.Random, version: int, *, one_site: bool) -> list[Prefix]:
    """Return the networks that a pool draws from: one /16 (IPv6: /48) of one site, or many."""
    if version == 4:
        if one_site:
            return [Prefix(10 << 24 | 20 << 16, 16)]
        private = [Prefix(10 << 24, 8)] * _PRIVATE_ROOTS
        return private + [Prefix(byte << 24, 8) for byte in rng.sample(_PUBLIC, _ROOTS)]
    if one_site:
        return [Prefix(0x2001_0DB8_0020 << 80, 48)]
    return [
        Prefix((0x2001_0000 | number) << 96, 32) for number in rng.sample(range(1 << 16), _ROOTS)
    ]


def pool(
    rng: random.Random, version: int, count: int, lengths: Mapping[int, int], bases: list[Prefix]
) -> list[Prefix]:
    """Draw `count` different prefixes inside `bases`.

    `lengths` maps a prefix length to its weight; lengths not beyond a base's stand for the base.
    """
    choices, weights = list(lengths), list(lengths.values())
    found: dict[Prefix, None] = {}
    drawn: list[Prefix] = []
    while len(drawn) < count:
        (length,) = rng.choices(choices, weights)
        parent = rng.choice(bases)
        if drawn and rng.random() < _NESTED:
            near = rng.choice(drawn)
            if near.length < length:
                parent = near
        prefix = _inside(rng, version, parent, max(length, parent.length))
        if prefix not in found:
            found[prefix] = None
            drawn.append(prefix)
    return drawn


def _inside(rng: random.Random, version: int, parent: Prefix, length: int) -> Prefix:
    free = length - parent.length
    return Prefix(parent.value | rng.getrandbits(free) << (WIDTH[version] - length), length)
